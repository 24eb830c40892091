"""What receivers of the signals get, when, and in which thread."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from django.dispatch import Signal

from django_async_smtp import Backend, errors
from django_async_smtp.delivery import Delivery
from django_async_smtp.signals import post_send, pre_send

from .conftest import MakeBackend, email, emails, subjects
from .servers import MailServer, ScriptedServer, free_port
from .settings import USES_MAILERS

Connect = Callable[..., None]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Connect a receiver until the end of the test."""
    connected: list[tuple[Signal, Any]] = []

    def to(signal: Signal, receiver: Any, **kwargs: Any) -> None:
        signal.connect(receiver, **kwargs)
        connected.append((signal, receiver))

    yield to
    for signal, receiver in connected:
        signal.disconnect(receiver)
        signal.disconnect(receiver, sender=Backend)


def test_both_give_the_message_the_delivery_and_the_alias(
    server: MailServer, make_backend: MakeBackend, connect: Connect
) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def before(**kwargs: Any) -> None:
        calls.append(("pre_send", kwargs))

    def after(**kwargs: Any) -> None:
        calls.append(("post_send", kwargs))

    connect(pre_send, before)
    connect(post_send, after)
    message = email()
    backend = make_backend(server)
    backend.send_messages([message])
    alias = "default" if USES_MAILERS else None
    shared = {"sender": Backend, "message": message, "alias": alias}
    assert calls == [
        ("pre_send", {**shared, "signal": pre_send, "delivery": None}),
        ("post_send", {**shared, "signal": post_send, "delivery": message.delivery}),
    ]
    assert message.delivery.state == "sent"


def test_pre_send_may_change_the_message(
    server: MailServer, make_backend: MakeBackend, connect: Connect
) -> None:
    def mark(message: Any, **kwargs: Any) -> None:
        message.subject = f"[test] {message.subject}"
        message.to = ["other@example.com"]

    connect(pre_send, mark)
    make_backend(server).send_messages([email()])
    assert subjects(server) == ["[test] Hello"]
    assert server.received[0].recipients == ["other@example.com"]


def test_pre_send_may_take_all_recipients_away(
    server: MailServer, make_backend: MakeBackend, connect: Connect
) -> None:
    def empty(message: Any, **kwargs: Any) -> None:
        message.to = []

    connect(pre_send, empty)
    message = email()
    assert make_backend(server).send_messages([message]) == 0
    assert message.delivery.state == "not_sent"
    assert server.received == []


def test_a_receiver_may_ask_for_one_sender(
    server: MailServer, make_backend: MakeBackend, connect: Connect
) -> None:
    seen: list[Any] = []

    def note(message: Any, **kwargs: Any) -> None:
        seen.append(message)

    connect(post_send, note, sender=Backend)
    message = email()
    make_backend(server).send_messages([message])
    assert seen == [message]


class Noting:
    """Receivers, sync and async, that note the threads they run in."""

    def __init__(self) -> None:
        self.threads: dict[str, threading.Thread] = {}

    def sync(self, signal: Signal, **kwargs: Any) -> None:
        self.threads[f"sync {signal is pre_send}"] = threading.current_thread()

    async def coroutine(self, signal: Signal, **kwargs: Any) -> None:
        self.threads[f"async {signal is pre_send}"] = threading.current_thread()


def test_receivers_run_in_the_thread_of_the_caller(
    server: MailServer, make_backend: MakeBackend, connect: Connect
) -> None:
    noting = Noting()
    for signal in (pre_send, post_send):
        connect(signal, noting.sync)
        connect(signal, noting.coroutine)
    backend = make_backend(server)
    with ThreadPoolExecutor(1, thread_name_prefix="caller") as caller:
        assert caller.submit(backend.send_messages, [email()]).result() == 1
    assert len(noting.threads) == 4
    for kind, thread in noting.threads.items():
        if kind.startswith("sync"):
            assert thread.name == "caller_0"
        assert thread.name != "django-async-smtp"


@pytest.mark.asyncio
async def test_receivers_of_a_coroutine_never_run_on_the_smtp_loop(
    server: MailServer, make_backend: MakeBackend, connect: Connect
) -> None:
    noting = Noting()
    for signal in (pre_send, post_send):
        connect(signal, noting.sync)
        connect(signal, noting.coroutine)
    backend = make_backend(server)
    assert await backend.asend_messages([email()]) == 1
    assert len(noting.threads) == 4
    for kind, thread in noting.threads.items():
        if kind.startswith("sync"):
            assert thread is not threading.current_thread()
        assert thread.name != "django-async-smtp"


def test_a_receiver_may_send_mail(
    server: MailServer, make_backend: MakeBackend, connect: Connect
) -> None:
    backend = make_backend(server, max_connections=1)

    def report(message: Any, **kwargs: Any) -> None:
        if message.subject != "report":
            assert backend.send_messages([email("report")]) == 1

    connect(post_send, report)
    assert backend.send_messages(emails(2)) == 2
    assert sorted(subjects(server)) == ["0", "1", "report", "report"]


@pytest.fixture
def outcomes(connect: Connect) -> list[Delivery]:
    """Every delivery that post_send gives."""
    found: list[Delivery] = []

    def note(delivery: Delivery, message: Any, **kwargs: Any) -> None:
        assert message.delivery is delivery
        found.append(delivery)

    connect(post_send, note)
    return found


@pytest.mark.parametrize("fail_silently", [False, True])
def test_post_send_tells_of_what_failed(
    fail_silently: bool,
    server: MailServer,
    make_backend: MakeBackend,
    outcomes: list[Delivery],
) -> None:
    backend = make_backend(server, fail_silently=fail_silently)
    messages = [email("reject me"), email("two\nlines"), email(to=()), email()]
    with pytest.raises((errors.DataRefused, ValueError)):
        backend.send_messages(messages)
    assert [d.state for d in outcomes] == ["refused", "failed", "not_sent", "sent"]
    assert isinstance(outcomes[0].error, errors.DataRefused)
    assert isinstance(outcomes[1].error, ValueError)


@pytest.mark.parametrize("fail_silently", [False, True])
def test_post_send_tells_of_what_was_not_tried(
    fail_silently: bool, make_backend: MakeBackend, outcomes: list[Delivery]
) -> None:
    backend = make_backend(
        host="127.0.0.1", port=free_port(), fail_silently=fail_silently
    )
    try:
        assert backend.send_messages(emails(15)) == 0
    except errors.ConnectionRefused:
        assert not fail_silently
    assert [delivery.state for delivery in outcomes] == ["not_sent"] * 15


@pytest.mark.asyncio
async def test_post_send_tells_a_coroutine_of_what_was_not_tried(
    make_backend: MakeBackend, outcomes: list[Delivery]
) -> None:
    with (
        ScriptedServer(scripts=({"greeting": b"554 no\r\n"},)) as server,
        pytest.raises(errors.GreetingRefused),
    ):
        await make_backend(server).asend_messages(emails(3))
    assert [delivery.state for delivery in outcomes] == ["not_sent"] * 3


@pytest.mark.parametrize("fail_silently", [False, True])
@pytest.mark.parametrize("signal", [pre_send, post_send], ids=["pre", "post"])
@pytest.mark.parametrize("is_async", [False, True])
def test_a_receiver_that_raises_is_logged_and_changes_nothing(
    fail_silently: bool,
    signal: Signal,
    is_async: bool,
    server: MailServer,
    make_backend: MakeBackend,
    connect: Connect,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(**kwargs: Any) -> None:
        raise LookupError("in the receiver")

    async def abroken(**kwargs: Any) -> None:
        raise LookupError("in the receiver")

    connect(signal, abroken if is_async else broken)
    messages = emails(2)
    backend = make_backend(server, fail_silently=fail_silently)
    assert backend.send_messages(messages) == 2
    assert [record.name for record in caplog.records] == ["django.dispatch"] * 2
    assert {record.levelno for record in caplog.records} == {logging.ERROR}
    assert [message.delivery.state for message in messages] == ["sent"] * 2


class BrokenHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise LookupError("in the handler")


def test_a_handler_that_raises_stops_but_the_message_that_it_is_told_of(
    server: MailServer, make_backend: MakeBackend, connect: Connect
) -> None:
    def broken(message: Any, **kwargs: Any) -> None:
        if message.subject == "20":
            raise ValueError("in the receiver")

    connect(pre_send, broken)
    messages = emails(40)
    logger, handler = logging.getLogger("django.dispatch"), BrokenHandler()
    logger.addHandler(handler)
    try:
        with pytest.raises(LookupError):
            make_backend(server).send_messages(messages)
    finally:
        logger.removeHandler(handler)
    expected = ["sent"] * 40
    expected[20] = "failed"
    assert [message.delivery.state for message in messages] == expected
    assert len(server.received) == 39


def test_a_receiver_that_is_interrupted_ends_the_call(
    server: MailServer, make_backend: MakeBackend, connect: Connect
) -> None:
    def interrupted(message: Any, **kwargs: Any) -> None:
        if message.subject == "1":
            raise KeyboardInterrupt

    connect(post_send, interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_backend(server).send_messages(emails(5))
    # The next one may be on its way meanwhile.
    assert subjects(server) in (["0", "1"], ["0", "1", "2"])
