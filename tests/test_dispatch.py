"""Messages over workers: built ahead, begun with the one before, told once."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.dispatch import Signal
from django.utils.asyncio import async_unsafe

from django_async_smtp import delivery
from django_async_smtp.loop import smtp_loop
from django_async_smtp.signals import post_send, pre_send

from .conftest import MakeBackend, email, emails, states, subjects
from .servers import (
    CLOSE,
    DEFAULT,
    SILENCE,
    Pause,
    Script,
    ScriptedServer,
    Turns,
    wait_until,
)

EXTENSIONS = ("SIZE 10000000", "8BITMIME", "PIPELINING")
# Slow enough that the next message is built when this one's turn comes.
SLOW: Script = {"mail": [Pause(0.05), DEFAULT]}

with_and_without_pipelining = pytest.mark.parametrize("pipelining", [True, False])


def pipelining_server(*scripts: Script) -> ScriptedServer:
    return ScriptedServer(scripts or ({},), extensions=EXTENSIONS)


@contextmanager
def connected(signal: Signal, receiver: Callable[..., Any]) -> Iterator[None]:
    signal.connect(receiver)
    try:
        yield
    finally:
        signal.disconnect(receiver)


# The next message begins with the end of the one before.


@with_and_without_pipelining
def test_a_message_begun_on_a_connection_that_ends_goes_out_on_another(
    make_backend: MakeBackend, pipelining: bool
) -> None:
    # The second connection was never idle, and so never known to have worked.
    refusing: Script = {**SLOW, "body": [b"554 spam\r\n", CLOSE]}
    with pipelining_server(SLOW, refusing, SLOW) as server:
        backend = make_backend(
            server,
            max_connections=1,
            max_messages=2,
            fail_silently=True,
            pipelining=pipelining,
        )
        messages = emails(5)
        assert backend.send_messages(messages) == 4
    assert states(messages) == ["sent", "sent", "refused", "sent", "sent"]


@pytest.mark.parametrize(
    "reply",
    [
        b"".join(b"250-%s\r\n" % (b"x" * 500) for _ in range(80)) + b"250 ok\r\n",
        b"250 ok\r\n250 again\r\n",
    ],
    ids=["too long", "one too many"],
)
@with_and_without_pipelining
def test_a_reply_out_of_step_does_not_answer_the_next_message(
    make_backend: MakeBackend, reply: bytes, pipelining: bool
) -> None:
    script = {**SLOW, "body": Turns(reply)}
    with pipelining_server(script, {}) as server:
        backend = make_backend(
            server, max_connections=1, fail_silently=True, pipelining=pipelining
        )
        messages = emails(3)
        backend.send_messages(messages)
        assert states(messages)[1:] == ["sent", "sent"]
        assert subjects(server) == ["0", "1", "2"]


def test_a_retry_comes_before_the_message_that_was_begun(
    make_backend: MakeBackend, retry_at_once: None
) -> None:
    script = {**SLOW, "body": Turns(DEFAULT, b"451 later\r\n")}
    with pipelining_server(script, {}) as server:
        backend = make_backend(server, max_connections=1, retries=3)
        messages = emails(6)
        assert backend.send_messages(messages) == 6
        # What was put off was received twice, and accepted once.
        assert subjects(server) == ["0", "1", "1", "2", "3", "4", "5"]


def test_no_connection_is_held_through_the_pause_before_a_retry(
    make_backend: MakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "FIRST_PAUSE", 3)
    script = {**SLOW, "body": Turns(b"451 later\r\n")}
    with pipelining_server(script, {}) as server:
        backend = make_backend(server, max_connections=1, retries=1)
        sending = threading.Thread(target=backend.send_messages, args=(emails(3),))
        sending.start()
        try:
            wait_until(lambda: len(server.received) == 1)
            start = time.monotonic()
            assert backend.send_messages([email("other")]) == 1
            assert time.monotonic() - start < 1
        finally:
            sending.join()


# What is told, and when.


@pytest.mark.parametrize("signal", [pre_send, post_send], ids=["pre", "post"])
@pytest.mark.asyncio
async def test_a_sync_send_in_a_coroutine_signals_async_receivers(
    make_backend: MakeBackend, signal: Signal
) -> None:
    told = []

    async def receiver(message: Any, **kwargs: Any) -> None:
        told.append(message.subject)

    with pipelining_server() as server, connected(signal, receiver):
        backend = make_backend(server)
        with pytest.warns(RuntimeWarning, match="blocks this event loop"):
            assert backend.send_messages(emails(3)) == 3
    assert told == ["0", "1", "2"]


@pytest.mark.asyncio
async def test_a_sync_send_in_a_coroutine_lets_receivers_ask_the_database(
    make_backend: MakeBackend,
) -> None:
    told: list[str] = []
    query: Callable[[str], None] = async_unsafe(told.append)

    def receiver(message: Any, **kwargs: Any) -> None:
        query(message.subject)

    with pipelining_server() as server, connected(post_send, receiver):
        backend = make_backend(server)
        with pytest.warns(RuntimeWarning, match="blocks this event loop"):
            assert backend.send_messages(emails(3)) == 3
    assert told == ["0", "1", "2"]


def test_a_message_built_ahead_is_told_though_its_source_breaks(
    make_backend: MakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    messages = emails(2)

    def broken() -> Iterator[Any]:
        yield from messages
        raise LookupError("in the iterator")

    ending: Script = {"mail": [Pause(0.1), b"421 bye\r\n", CLOSE]}
    away: Script = {"greeting": b"554 go away\r\n"}
    with pipelining_server(ending, away) as server:
        backend = make_backend(server, max_connections=1, fail_silently=True)
        with pytest.raises(LookupError):
            backend.send_messages(broken())
    assert [bool(message.delivery.error) for message in messages] == [True, True]
    assert "421 bye" in caplog.text or "554 go away" in caplog.text


def test_failures_are_logged_where_a_receiver_ends_the_call(
    make_backend: MakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    def receiver(**kwargs: Any) -> None:
        raise SystemExit(3)

    with (
        pipelining_server({"body": b"554 no\r\n"}) as server,
        connected(post_send, receiver),
    ):
        messages = emails(2)
        with pytest.raises(SystemExit):
            make_backend(server, max_connections=1).send_messages(messages)
    assert "554 no" in caplog.text
    assert states(messages) == ["refused", "refused"]


@pytest.mark.asyncio
async def test_a_message_that_was_sent_says_so_though_the_call_is_cancelled(
    make_backend: MakeBackend,
) -> None:
    with (
        pipelining_server({"body": [Pause(0.3), DEFAULT]}) as server,
        connected(post_send, lambda **kwargs: None),
    ):
        backend = make_backend(server)
        message = email()
        sending = asyncio.create_task(backend.asend_messages([message]))
        await asyncio.to_thread(wait_until, lambda: server.commands(b"DATA"))
        # So that it cannot be told at once.
        busy = asyncio.create_task(sync_to_async(time.sleep)(0.8))
        await asyncio.sleep(0.5)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        await busy
        assert len(server.received) == 1
    assert message.delivery.state == "sent"


@pytest.mark.asyncio
async def test_a_message_says_so_whose_answer_a_cancelled_call_did_not_await(
    make_backend: MakeBackend,
) -> None:
    with ScriptedServer(scripts=({"body": SILENCE},)) as server:
        message = email()
        asend = make_backend(server).asend_messages
        sending = asyncio.create_task(asend([message]))
        await asyncio.to_thread(wait_until, lambda: server.received)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        # The work ends a moment after the call.
        await asyncio.to_thread(wait_until, lambda: hasattr(message, "delivery"))
    assert message.delivery.state == "unknown"
    assert message.delivery.error.maybe_delivered


class SlowHandler(logging.Handler):
    """Takes as long for a record as a server for some messages."""

    def emit(self, record: logging.LogRecord) -> None:
        time.sleep(0.6)


@pytest.mark.asyncio
async def test_nothing_is_sent_while_a_cancelled_call_logs_its_failures(
    make_backend: MakeBackend,
) -> None:
    script: Script = {"body": Turns(b"554 no\r\n"), "mail": [Pause(0.1), DEFAULT]}
    logger, handler = logging.getLogger("django_async_smtp"), SlowHandler()
    logger.addHandler(handler)
    try:
        with pipelining_server(script) as server:
            backend = make_backend(server, max_connections=1)
            sending = asyncio.create_task(backend.asend_messages(emails(10)))
            await asyncio.to_thread(wait_until, lambda: len(server.received) == 3)
            sending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sending
            # The third, and one that was on its way.
            assert len(server.received) <= 4
    finally:
        logger.removeHandler(handler)


# Interrupts.


def test_no_message_is_built_after_an_interrupt(make_backend: MakeBackend) -> None:
    built = []

    def receiver(message: Any, **kwargs: Any) -> None:
        built.append(message.subject)
        if message.subject == "1":
            raise KeyboardInterrupt

    with (
        pipelining_server({"mail": [Pause(0.3), DEFAULT]}) as server,
        connected(pre_send, receiver),
        pytest.raises(KeyboardInterrupt),
    ):
        make_backend(server, max_connections=1).send_messages(emails(5))
    assert built == ["0", "1"]


@pytest.mark.parametrize("is_first", [True, False])
def test_an_interrupt_while_the_loop_is_woken_harms_no_later_mail(
    make_backend: MakeBackend, monkeypatch: pytest.MonkeyPatch, is_first: bool
) -> None:
    with pipelining_server() as server:
        backend = make_backend(server)
        backend.send_messages(emails(1))
        loop = smtp_loop().loop
        wake = loop.call_soon_threadsafe

        def interrupted(*args: Any, **kwargs: Any) -> None:
            if not is_first:
                wake(*args, **kwargs)
            raise KeyboardInterrupt

        sends: list[Callable[[], object]] = [
            lambda: backend.send_messages(emails(1)),
            lambda: asyncio.run(backend.asend_messages(emails(1))),
        ]
        for send in sends:
            with monkeypatch.context() as patch:
                patch.setattr(loop, "call_soon_threadsafe", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    send()
            later = threading.Thread(
                target=backend.send_messages, args=([email("later")],), daemon=True
            )
            later.start()
            later.join(5)
            assert not later.is_alive()

        async def pools(_: object) -> list[int]:
            return [pool.users for pool in smtp_loop().pools.values()]

        wait_until(lambda: smtp_loop().call(pools) == [0])


# Nothing is kept.


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("is_async", [False, True])
def test_no_message_is_kept_after_the_call(
    make_backend: MakeBackend, count: int, is_async: bool
) -> None:
    def send(messages: list[Any]) -> None:
        if is_async:
            asyncio.run(backend.asend_messages(messages))
        else:
            backend.send_messages(messages)

    with pipelining_server() as server:
        backend = make_backend(server)
        send(emails(1))
        messages = emails(count)
        kept = [weakref.ref(message) for message in messages]
        gc.collect()
        gc.disable()
        try:
            send(messages)
            messages.clear()
            # The loop's own frames end a moment later.
            wait_until(lambda: not any(one() for one in kept), 2)
        finally:
            gc.enable()


def test_no_message_is_kept_after_its_turn(make_backend: MakeBackend) -> None:
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def messages() -> Iterator[Any]:
        for n in range(40):
            message = email(f"{n}")
            alive[:] = [i for i, one in enumerate(made) if one() is not None]
            made.append(weakref.ref(message))
            yield message
            del message

    with pipelining_server() as server:
        backend = make_backend(server, max_connections=1)
        assert backend.send_messages(messages()) == 40
    # The one in flight, two that are built, and what is on its way between threads.
    assert len(alive) < 10
    assert min(alive) > 20
