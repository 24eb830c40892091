from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from django_async_smtp import SMTPError, close_connections, pool_stats
from django_async_smtp.loop import smtp_loop

from .conftest import MakeBackend, emails
from .servers import CLOSE, SILENCE, ScriptedServer, free_port, wait_until


@pytest.fixture(autouse=True)
def _count_from_zero() -> None:
    smtp_loop().counts.clear()


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer() as running:
        yield running


def stats_of(server: ScriptedServer) -> dict[str, Any]:
    return pool_stats()[f"127.0.0.1:{server.port}"]


def test_there_are_none_before_the_first_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("django_async_smtp.loop._current", None)
    assert pool_stats() == {}
    close_connections()
    # Asking starts no thread.
    assert pool_stats() == {}


def test_they_count_connections_and_messages(
    make_backend: MakeBackend, server: ScriptedServer
) -> None:
    backend = make_backend(server, max_connections=1)
    backend.send_messages(emails(3))
    backend.send_messages(emails(2))
    assert stats_of(server) == {
        "in_use": 0,
        "idle": 1,
        "waiting": 0,
        "opened": 1,
        "reused": 4,
        "closed": {},
        "messages": 5,
        "errors": 0,
    }


def test_they_are_plain(make_backend: MakeBackend, server: ScriptedServer) -> None:
    make_backend(server, max_messages=1).send_messages(emails(3))
    stats = pool_stats()
    assert json.loads(json.dumps(stats)) == stats
    assert type(stats_of(server)["closed"]) is dict
    stats_of(server)["closed"].clear()
    assert stats_of(server)["closed"] == {"messages": 3}


def test_they_hold_every_server(make_backend: MakeBackend) -> None:
    with ScriptedServer() as first, ScriptedServer() as second:
        make_backend(first).send_messages(emails(1))
        make_backend(second).send_messages(emails(2))
        assert set(pool_stats()) == {f"127.0.0.1:{s.port}" for s in (first, second)}
        assert stats_of(first)["messages"] == 1
        assert stats_of(second)["messages"] == 2


def test_one_server_is_counted_together_whatever_the_options(
    make_backend: MakeBackend, server: ScriptedServer
) -> None:
    make_backend(server, timeout=5).send_messages(emails(1))
    make_backend(server, timeout=6).send_messages(emails(1))
    stats = stats_of(server)
    assert (stats["opened"], stats["idle"], stats["messages"]) == (2, 2, 2)


def test_they_count_what_failed(make_backend: MakeBackend) -> None:
    with ScriptedServer(scripts=({"rcpt": b"550 no\r\n"},)) as server:
        backend = make_backend(server, max_connections=1)
        with pytest.raises(SMTPError):
            backend.send_messages(emails(2))
        assert stats_of(server)["errors"] == 2
        assert stats_of(server)["messages"] == 0


def test_they_count_a_server_that_cannot_be_reached(make_backend: MakeBackend) -> None:
    backend = make_backend(host="127.0.0.1", port=free_port())
    with pytest.raises(SMTPError):
        backend.send_messages(emails(2))
    (stats,) = pool_stats().values()
    assert stats["errors"] == 1
    assert stats["opened"] == stats["in_use"] == stats["idle"] == 0


@pytest.mark.asyncio
async def test_they_tell_who_sends_and_who_waits(make_backend: MakeBackend) -> None:
    with ScriptedServer(scripts=({"body": SILENCE}, {})) as server:
        backend = make_backend(server, max_connections=1)
        sending = [
            asyncio.create_task(backend.asend_messages([message]))
            for message in emails(3)
        ]
        await asyncio.to_thread(wait_until, pool_stats)
        await asyncio.to_thread(wait_until, lambda: stats_of(server)["waiting"] == 2)
        await asyncio.to_thread(wait_until, lambda: server.commands(b"DATA"))
        assert stats_of(server)["in_use"] == 1
        assert stats_of(server)["idle"] == 0
        for task in sending:
            task.cancel()
        await asyncio.wait(sending)
        await asyncio.to_thread(wait_until, lambda: not stats_of(server)["in_use"])
        # Nobody failed: they did not want to wait.
        assert stats_of(server)["errors"] == 0
        assert stats_of(server)["closed"] == {"unclean": 1}


@pytest.mark.parametrize(
    ("script", "options", "reason"),
    [
        ({}, {"max_messages": 1}, "messages"),
        ({}, {"idle_timeout": 0.05}, "idle"),
        ({"idle": CLOSE}, {}, "ended by server"),
        ({"body": b"421 4.3.2 shutting down\r\n"}, {}, "unclean"),
        ({"body": SILENCE}, {"timeout": 0.1}, "unclean"),
    ],
)
def test_they_tell_why_connections_were_closed(
    make_backend: MakeBackend, script: Any, options: Any, reason: str
) -> None:
    with ScriptedServer(scripts=(script,)) as server:
        backend = make_backend(server, fail_silently=True, **options)
        backend.send_messages(emails(1))
        wait_until(lambda: stats_of(server)["closed"] == {reason: 1})
        assert stats_of(server)["idle"] == 0


def test_idle_connections_can_be_closed(
    make_backend: MakeBackend, server: ScriptedServer
) -> None:
    backend = make_backend(server)
    assert backend.send_messages(emails(20)) == 20
    idle = stats_of(server)["idle"]
    # One that was still connecting at the end of the call was given up.
    assert 1 <= idle <= server.connections
    close_connections()
    assert len(server.commands(b"QUIT")) == idle
    assert stats_of(server)["idle"] == 0
    assert stats_of(server)["closed"] == {"asked": idle}
    close_connections()
    before = server.connections
    assert backend.send_messages(emails(1)) == 1
    assert server.connections == before + 1


def test_connections_are_closed_while_others_send(make_backend: MakeBackend) -> None:
    with ScriptedServer() as server:
        backend = make_backend(server, max_connections=2)

        def messages() -> Iterator[Any]:
            for message in emails(20):
                close_connections()
                yield message

        assert backend.send_messages(messages()) == 20
        assert len(server.received) == 20
