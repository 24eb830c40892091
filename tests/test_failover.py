"""Servers in reserve: which failures move a message to the next one."""

from __future__ import annotations

from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured

from django_async_smtp import errors
from django_async_smtp.loop import smtp_loop
from django_async_smtp.pool import DOWN_TIME

from .conftest import MakeBackend, email, emails, states, subjects
from .servers import (
    CLOSE,
    DEFAULT,
    SILENCE,
    MailServer,
    Script,
    ScriptedServer,
    Turns,
    free_port,
)


def at(server: ScriptedServer | MailServer) -> dict[str, Any]:
    return {"host": server.host, "port": server.port}


def name(server: ScriptedServer | MailServer) -> str:
    return f"{server.host}:{server.port}"


def test_a_refused_connection_goes_to_the_next_server(
    server: MailServer, make_backend: MakeBackend
) -> None:
    message = email()
    backend = make_backend(host="127.0.0.1", port=free_port(), fallbacks=[at(server)])
    assert backend.send_messages([message]) == 1
    assert subjects(server) == ["Hello"]
    assert message.delivery.server == name(server)
    assert message.delivery.attempts == 1


def test_a_fallback_may_be_a_host_name_alone(
    server: MailServer, make_backend: MakeBackend
) -> None:
    backend = make_backend(
        host="no.such.host.invalid", port=server.port, fallbacks=["127.0.0.1"]
    )
    message = email()
    assert backend.send_messages([message]) == 1
    assert message.delivery.server == name(server)


@pytest.mark.parametrize(
    "script",
    [
        {"greeting": SILENCE},
        {"greeting": CLOSE},
        {"greeting": b"421 busy\r\n"},
        {"greeting": b"451 later\r\n"},
        {"ehlo": b"421 busy\r\n"},
        {"ehlo": CLOSE},
    ],
    ids=repr,
)
def test_a_server_that_cannot_serve_now_leads_to_the_next(
    script: Script, server: MailServer, make_backend: MakeBackend
) -> None:
    with ScriptedServer(scripts=(script,)) as first:
        backend = make_backend(first, timeout=0.3, fallbacks=[at(server)])
        assert backend.send_messages(emails(3)) == 3
        assert first.connections == 1
    assert subjects(server) == ["0", "1", "2"]


@pytest.mark.asyncio
async def test_coroutines_fail_over_as_well(
    server: MailServer, make_backend: MakeBackend
) -> None:
    backend = make_backend(host="127.0.0.1", port=free_port(), fallbacks=[at(server)])
    message = email()
    assert await backend.asend_messages([message]) == 1
    assert message.delivery.server == name(server)


@pytest.mark.parametrize("stage", ["mail", "rcpt", "data", "body"])
def test_a_refused_message_stays_refused(
    stage: str, server: MailServer, make_backend: MakeBackend
) -> None:
    message = email()
    with ScriptedServer(scripts=({stage: b"550 no\r\n"},)) as first:
        backend = make_backend(first, fallbacks=[at(server)])
        with pytest.raises(errors.SMTPError):
            backend.send_messages([message])
    assert server.received == []
    assert message.delivery.state == "refused"
    assert message.delivery.server == name(first)


def test_a_refused_login_stays_refused(
    server: MailServer, make_backend: MakeBackend
) -> None:
    script: Script = {"auth": b"535 5.7.8 no\r\n"}
    with ScriptedServer(scripts=(script,), extensions=("AUTH PLAIN",)) as first:
        backend = make_backend(
            first, username="alice", password="secret", fallbacks=[at(server)]
        )
        with pytest.raises(errors.AuthenticationRefused):
            backend.send_messages(emails(3))
        assert first.connections == 1
    assert server.received == []


@pytest.mark.parametrize("stage", ["mail", "data", "body"])
def test_a_message_whose_answer_is_lost_goes_to_no_other_server(
    stage: str, server: MailServer, make_backend: MakeBackend
) -> None:
    with ScriptedServer(scripts=({stage: CLOSE},)) as first:
        backend = make_backend(first, fallbacks=[at(server)])
        with pytest.raises(errors.Disconnected):
            backend.send_messages([email()])
    assert server.received == []


def test_a_server_that_goes_down_within_a_batch_is_replaced(
    server: MailServer, make_backend: MakeBackend
) -> None:
    died: Script = {"mail": Turns(DEFAULT, CLOSE)}
    messages = emails(3)
    with ScriptedServer(scripts=(died, {"greeting": b"421 bye\r\n"})) as first:
        backend = make_backend(first, fallbacks=[at(server)])
        assert backend.send_messages(messages) == 3
    assert subjects(first) == ["0"]
    assert subjects(server) == ["1", "2"]
    assert [m.delivery.server for m in messages] == [
        name(first),
        name(server),
        name(server),
    ]


def test_a_connection_at_its_end_is_replaced_by_one_to_another_server(
    server: MailServer, make_backend: MakeBackend
) -> None:
    with ScriptedServer(scripts=({}, {"greeting": b"421 bye\r\n"})) as first:
        backend = make_backend(first, max_messages=1, fallbacks=[at(server)])
        assert backend.send_messages(emails(2)) == 2
    assert subjects(first) == ["0"]
    assert subjects(server) == ["1"]


def test_a_server_that_failed_is_left_alone(
    server: MailServer, make_backend: MakeBackend
) -> None:
    with ScriptedServer(scripts=({"greeting": b"421 busy\r\n"}, {})) as first:
        for _ in range(3):
            backend = make_backend(first, idle_timeout=0, fallbacks=[at(server)])
            assert backend.send_messages([email()]) == 1
        assert first.connections == 1
    assert len(server.received) == 3


def test_a_server_that_failed_is_tried_again_after_a_minute(
    server: MailServer, make_backend: MakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = smtp_loop().loop
    now = loop.time
    with ScriptedServer(scripts=({"greeting": b"421 busy\r\n"}, {})) as first:
        backend = make_backend(first, idle_timeout=0, fallbacks=[at(server)])
        for minute in (0, DOWN_TIME - 1, DOWN_TIME + 1):
            with monkeypatch.context() as patch:
                patch.setattr(loop, "time", lambda ahead=minute: now() + ahead)
                assert backend.send_messages([email(f"{minute:g}")]) == 1
        assert subjects(first) == ["61"]
    assert subjects(server) == ["0", "59"]


def test_servers_that_all_failed_are_tried_all_the_same(
    make_backend: MakeBackend,
) -> None:
    busy: Script = {"greeting": b"421 busy\r\n"}
    with (
        ScriptedServer(scripts=(busy, {})) as first,
        ScriptedServer(scripts=(busy, {})) as second,
    ):
        backend = make_backend(first, fallbacks=[at(second)])
        with pytest.raises(errors.GreetingRefused):
            backend.send_messages([email()])
        assert backend.send_messages([email()]) == 1
        assert subjects(first) == ["Hello"]


def test_an_error_names_each_server_that_was_tried(make_backend: MakeBackend) -> None:
    ports = [free_port(), free_port()]
    messages = emails(3)
    with ScriptedServer(scripts=({"greeting": b"421 busy\r\n"},)) as last:
        fallbacks = [{"port": ports[1]}, at(last)]
        backend = make_backend(host="127.0.0.1", port=ports[0], fallbacks=fallbacks)
        with pytest.raises(errors.SMTPError) as caught:
            backend.send_messages(messages)
        assert last.connections == 1
    for port in (*ports, last.port):
        assert f"127.0.0.1:{port}" in str(caught.value)
    assert states(messages) == ["not_sent"] * 3


def test_the_first_server_is_used_while_it_works(
    server: MailServer, make_backend: MakeBackend
) -> None:
    with ScriptedServer() as spare:
        backend = make_backend(server, fallbacks=[at(spare)])
        assert backend.send_messages(emails(40)) == 40
        assert spare.connections == 0


@pytest.mark.usefixtures("retry_at_once")
def test_a_retry_may_go_to_another_server(
    server: MailServer, make_backend: MakeBackend
) -> None:
    message = email()
    scripts: tuple[Script, ...] = ({"data": CLOSE}, {"greeting": b"421 bye\r\n"})
    with ScriptedServer(scripts=scripts) as first:
        backend = make_backend(first, retries=1, fallbacks=[at(server)])
        assert backend.send_messages([message]) == 1
        assert first.received == []
    assert subjects(server) == ["Hello"]
    assert message.delivery.server == name(server)
    assert message.delivery.attempts == 2


class TestOptions:
    def test_a_fallback_has_options_of_its_own(
        self, server_tls: Any, cafile: Any, make_backend: MakeBackend
    ) -> None:
        own = {"use_ssl": True, "ssl_cafile": str(cafile), "username": "bob"}
        with ScriptedServer(
            tls=server_tls, implicit=True, extensions=("AUTH PLAIN",)
        ) as spare:
            backend = make_backend(
                host="127.0.0.1",
                port=free_port(),
                username="alice",
                password="secret",
                fallbacks=[{"port": spare.port, **own}],
            )
            assert backend.send_messages([email()]) == 1
        (received,) = spare.received
        assert received.tls
        assert received.login

    def test_it_takes_the_rest_from_the_first_server(
        self, make_backend: MakeBackend
    ) -> None:
        backend = make_backend(
            host="first.example",
            port=2525,
            username="alice",
            password="secret",
            timeout=7,
            fallbacks=(
                "second.example",
                {"host": "third.example", "port": 26, "username": "bob"},
                {"host": "fourth.example", "use_ssl": True},
            ),
        )
        servers = backend.route().servers
        assert [(s.server, s.username, s.use_ssl) for s in servers] == [
            ("first.example:2525", "alice", False),
            ("second.example:2525", "alice", False),
            ("third.example:26", "bob", False),
            ("fourth.example:465", "alice", True),
        ]
        assert {s.timeout for s in servers} == {7}

    @pytest.mark.parametrize(
        "fallback",
        [{"hots": "x"}, {"retries": 2}, {"fallbacks": ()}, {"port": "no"}, {"host": 1}],
        ids=repr,
    )
    def test_what_it_cannot_use_is_a_configuration_error(
        self, fallback: Any, make_backend: MakeBackend
    ) -> None:
        with pytest.raises(ImproperlyConfigured):
            make_backend(host="127.0.0.1", fallbacks=[fallback]).send_messages(
                [email()]
            )

    @pytest.mark.parametrize("fallbacks", ["host", {"host": "x"}, [1]], ids=repr)
    def test_a_value_of_another_type_is_a_configuration_error(
        self, fallbacks: Any, make_backend: MakeBackend
    ) -> None:
        with pytest.raises(ImproperlyConfigured):
            make_backend(host="127.0.0.1", fallbacks=fallbacks)


@pytest.mark.parametrize(
    ("fallback", "said"),
    [
        ({"host": "b", "use_tls": "False"}, "has 'use_tls', which must be True or"),
        ({"hots": "b"}, "Did you mean 'host'?"),
    ],
)
def test_a_fallback_that_cannot_be_used_is_named(
    make_backend: MakeBackend, fallback: dict[str, str], said: str
) -> None:
    backend = make_backend(host="127.0.0.1", port=free_port(), fallbacks=[fallback])
    with pytest.raises(ImproperlyConfigured) as caught:
        backend.open()
    assert "fallbacks" in str(caught.value)
    assert said in str(caught.value)


def test_a_rate_limit_slows_a_batch_and_does_not_end_it(
    make_backend: MakeBackend,
) -> None:
    with ScriptedServer() as server:
        backend = make_backend(server, rate_limit=6, timeout=1)
        assert backend.send_messages(emails(14)) == 14
