"""What a worker does with a task: sends, tells, queues again."""

from __future__ import annotations

import base64
import logging
import signal
import threading
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.utils import timezone

from django_async_smtp.delivery import Delivery
from django_async_smtp.errors import NotQueued
from django_async_smtp.signals import post_send
from django_async_smtp.tasks import sending
from django_async_smtp.tasks.payload import PayloadError
from django_async_smtp.tasks.worker import BACKOFF, JITTER

from .conftest import configure_queue, default_backend, email, emails, subjects
from .engines import (
    IMMEDIATE,
    Down,
    Keeping,
    NotDeferring,
    nothing_enqueued,
    payloads,
    tasks_of,
    work,
)
from .servers import (
    CLOSE,
    SILENCE,
    MailServer,
    ScriptedServer,
    Turns,
    free_port,
    wait_until,
)
from .settings import USES_MAILERS

Queue = Callable[..., Any]
Told = list[tuple[Any, Delivery]]

mailers = pytest.mark.skipif(not USES_MAILERS, reason="MAILERS only")

GREYLISTED = "greylisted@example.com"


@pytest.fixture(autouse=True)
def _keeping(settings: Any) -> Iterator[None]:
    """Keep what is enqueued."""
    settings.TASKS = tasks_of(Keeping)
    with nothing_enqueued():
        yield


@pytest.fixture
def queue(settings: Any) -> Queue:
    """Queue messages for a server, and return what the task holds."""

    def queue(
        server: Any, messages: list[Any], smtp: dict[str, Any] | None = None, **of: Any
    ) -> Any:
        where = {"host": server.host, "port": server.port, "timeout": 5.0}
        configure_queue(settings, where | (smtp or {}), **of)
        default_backend().send_messages(messages)
        return payloads()[-1]

    return queue


@pytest.fixture
def told() -> Iterator[Told]:
    """What post_send told."""
    calls: Told = []

    def receiver(message: Any, delivery: Delivery, **kwargs: Any) -> None:
        calls.append((message, delivery))

    post_send.connect(receiver)
    yield calls
    post_send.disconnect(receiver)


def records(caplog: pytest.LogCaptureFixture, level: int) -> list[logging.LogRecord]:
    return [
        record
        for record in caplog.records
        if record.name == "django_async_smtp" and record.levelno == level
    ]


def said(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [record.getMessage() for record in records(caplog, level)]


def recipients(payload: Any) -> list[list[str]]:
    return [message["recipients"] for message in payload["messages"]]


def test_all_messages_are_tried(server: MailServer, queue: Queue, told: Told) -> None:
    messages = emails(4)
    messages[1].to = ["nouser@example.com"]
    payload = queue(server, messages)
    assert work(payload) == {"sent": 3, "failed": 1, "again": 0}
    assert subjects(server) == ["0", "2", "3"]
    assert [d.state for _, d in told] == ["sent", "refused", "sent", "sent"]
    assert [m.subject for m, _ in told] == ["0", "1", "2", "3"]


def test_a_batch_goes_over_one_connection(server: MailServer, queue: Queue) -> None:
    work(queue(server, emails(10)))
    assert server.connections == 1


def test_a_large_batch_goes_over_several(server: MailServer, queue: Queue) -> None:
    payload = queue(server, emails(60), batch_size=60)
    assert work(payload)["sent"] == 60
    assert sorted(subjects(server), key=int) == [str(n) for n in range(60)]


def test_a_permanent_failure_is_logged_and_told_once(
    server: MailServer, queue: Queue, told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    message = email("reject me")
    work(queue(server, [message]))
    [record] = records(caplog, logging.ERROR)
    assert "attempt 1 of 5" in record.getMessage()
    assert "554 5.6.0 rejected" in record.getMessage()
    found = vars(record)
    assert (found["stage"], found["temporary"]) == ("body", False)
    assert found["message_id"].startswith("<")
    [(_, delivery)] = told
    assert (delivery.state, delivery.attempts) == ("refused", 1)
    assert len(payloads()) == 1


def test_only_what_failed_for_now_is_queued_again(
    server: MailServer, queue: Queue, told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    mixed = ["a@example.com", GREYLISTED, "nouser@example.com"]
    messages = [email("1"), email("2", mixed), email("3", [GREYLISTED])]
    first = queue(server, messages)
    before = timezone.now()
    assert work(first) == {"sent": 1, "failed": 0, "again": 2}
    [_, again] = payloads()
    assert recipients(again) == [[GREYLISTED], [GREYLISTED]]
    assert (again["attempt"], again["queue"]) == (2, first["queue"])
    # The same bytes: the same Message-ID.
    same = [message["content"] for message in first["messages"][1:]]
    assert [message["content"] for message in again["messages"]] == same
    run_after = Keeping.enqueued[1].task.run_after
    pause = (run_after - before).total_seconds()
    assert BACKOFF[0] <= pause <= BACKOFF[0] * (1 + JITTER) + 1
    assert [message.subject for message, _ in told] == ["1"]
    [text] = said(caplog, logging.WARNING)
    assert text.startswith("2 of 3 queued messages to be sent again in ")
    assert "g***@example.com: 451" in text
    assert "user unknown" not in text
    assert not said(caplog, logging.ERROR)


def test_the_outcome_tells_all_attempts(
    server: MailServer, queue: Queue, told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    mixed = ["a@example.com", GREYLISTED, "nouser@example.com"]
    work(queue(server, [email("1", mixed)]))
    again = payloads()[-1]
    again["messages"][0]["recipients"] = ["now-fine@example.com"]
    work(again)
    [(message, delivery)] = told
    assert message.delivery is delivery
    assert delivery.state == "sent"
    assert delivery.accepted == ("a@example.com", "now-fine@example.com")
    assert list(delivery.refused) == ["nouser@example.com"]
    assert delivery.attempts == 2
    assert delivery.error is None
    assert delivery.reply.count("queued as") == 2
    # As direct sending has it.
    [text] = said(caplog, logging.WARNING)[1:]
    assert "refused 1 of 3 recipients" in text


def test_it_is_given_up_after_max_attempts(
    server: MailServer, queue: Queue, told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    work(queue(server, [email("1", ["a@example.com", GREYLISTED])]))
    for _ in range(4):
        assert told == []
        work(payloads()[-1])
    assert [payload["attempt"] for payload in payloads()] == [1, 2, 3, 4, 5]
    starts = [result.task.run_after for result in Keeping.enqueued[1:]]
    pauses = [later - earlier for earlier, later in pairwise(starts)]
    assert all(later > timedelta(minutes=1) for later in pauses)
    assert sum(BACKOFF) == 3600
    [(_, delivery)] = told
    assert (delivery.state, list(delivery.refused)) == ("sent", [GREYLISTED])
    assert delivery.attempts == 5
    [text] = said(caplog, logging.ERROR)
    assert "refused 1 of 2 recipients" in text
    assert GREYLISTED not in text
    assert len(server.received) == 1


def test_a_message_that_nobody_took_is_given_up(
    server: MailServer, queue: Queue, told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    work(queue(server, [email("1", [GREYLISTED])], max_attempts=2))
    work(payloads()[-1])
    assert len(payloads()) == 2
    [(_, delivery)] = told
    assert (delivery.state, delivery.attempts) == ("refused", 2)
    [text] = said(caplog, logging.ERROR)
    assert "attempt 2 of 2" in text


def test_a_server_that_is_down_is_tried_again_with_all(
    queue: Queue, told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    class Nowhere:
        host, port = "127.0.0.1", free_port()

    assert work(queue(Nowhere, emails(3)))["again"] == 3
    assert len(payloads()[-1]["messages"]) == 3
    assert told == []
    [text] = said(caplog, logging.WARNING)
    assert "Connection refused" in text


def test_a_login_that_fails_is_tried_again(queue: Queue) -> None:
    """It says nothing of the message: somebody may correct the password."""
    script: Any = {"auth": b"535 5.7.8 wrong\r\n"}
    with ScriptedServer((script,), extensions=("AUTH PLAIN",)) as server:
        login = {"username": "a", "password": "b"}
        assert work(queue(server, emails(2), login))["again"] == 2


def test_what_may_have_been_delivered_is_not_sent_again(
    queue: Queue, told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    with ScriptedServer(({"body": CLOSE}, {})) as server:
        assert work(queue(server, [email()])) == {"sent": 0, "failed": 1, "again": 0}
    [(_, delivery)] = told
    assert delivery.state == "unknown"
    [text] = said(caplog, logging.ERROR)
    assert "may have been delivered, and is not sent again" in text


def test_what_may_have_been_delivered_is_sent_again_where_asked_for(
    queue: Queue,
) -> None:
    with ScriptedServer(({"body": CLOSE}, {})) as server:
        assert work(queue(server, [email()], resend_unknown=True))["again"] == 1


@pytest.mark.parametrize("resend_unknown", [False, True])
def test_so_it_is_for_single_recipients(queue: Queue, resend_unknown: bool) -> None:
    """The answer for the recipients of a further transaction was lost."""
    too_many: Any = {
        "b@example.com": Turns(b"452 4.5.3 too many\r\n"),
        "body": Turns(b"250 2.0.0 Ok\r\n", CLOSE),
    }
    with ScriptedServer((too_many, {})) as server:
        message = email("1", ["a@example.com", "b@example.com"])
        payload = queue(server, [message], resend_unknown=resend_unknown)
        assert work(payload)["again"] == resend_unknown
    if resend_unknown:
        assert recipients(payloads()[-1]) == [["b@example.com"]]


def test_an_engine_that_cannot_wait_is_asked_at_once(
    server: MailServer, queue: Queue, settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    settings.TASKS = tasks_of(NotDeferring)
    work(queue(server, [email("1", [GREYLISTED])]))
    assert Keeping.enqueued[1].task.run_after is None
    assert "at once" in said(caplog, logging.WARNING)[0]


def test_an_immediate_engine_ends(
    server: MailServer, queue: Queue, settings: Any, told: Told
) -> None:
    settings.TASKS = tasks_of(IMMEDIATE)
    configure_queue(settings, {"host": server.host, "port": server.port})
    default_backend().send_messages([email("1", [GREYLISTED])])
    [(_, delivery)] = told
    assert delivery.attempts == 5


def test_what_cannot_be_queued_again_fails_the_task(
    server: MailServer,
    queue: Queue,
    settings: Any,
    told: Told,
    caplog: pytest.LogCaptureFixture,
) -> None:
    payload = queue(server, [email("1"), email("2", [GREYLISTED])])
    settings.TASKS = tasks_of(Down)
    with pytest.raises(NotQueued, match="ConnectionError") as why:
        work(payload)
    # What engines keep of it.
    assert "s3cr3t" not in "".join(traceback.format_exception(why.value))
    [text] = said(caplog, logging.ERROR)
    assert text.startswith("1 messages that failed are lost")
    assert "s3cr3t" not in caplog.text
    # Of the others, everybody is told.
    assert [message.subject for message, _ in told] == ["1"]


def test_settings_that_cannot_be_used_lose_nothing(
    server: MailServer, queue: Queue, settings: Any
) -> None:
    payload = queue(server, emails(2))
    configure_queue(settings, {"host": server.host, "port": "many"})
    with pytest.raises(ImproperlyConfigured):
        work(payload)
    assert len(payloads()[-1]["messages"]) == 2
    assert payloads()[-1]["attempt"] == 2


def test_settings_that_stay_unusable_are_told(
    server: MailServer, queue: Queue, settings: Any, told: Told
) -> None:
    payload = queue(server, [email()], max_attempts=1)
    configure_queue(settings, {"host": server.host, "port": "many"})
    with pytest.raises(ImproperlyConfigured):
        work(payload)
    [(_, delivery)] = told
    assert delivery.state == "failed"
    assert isinstance(delivery.error, ImproperlyConfigured)


class TimeLimit(Exception):
    """As engines raise it within a task, from a signal handler."""


@contextmanager
def broken_off(
    reason: type[BaseException],
    server: ScriptedServer,
    verb: bytes,
    count: int,
    messages: int = 0,
) -> Iterator[None]:
    """Have a signal handler raise, as workers' do, once so many commands came."""

    def end(*args: object) -> None:
        raise reason

    def interrupt() -> None:
        wait_until(lambda: len(server.commands(verb)) == count)
        wait_until(lambda: len(server.received) >= messages)
        signal.pthread_kill(main, signal.SIGUSR1)

    main = threading.get_ident()
    previous = signal.signal(signal.SIGUSR1, end)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(reason):
            yield
    finally:
        thread.join()
        signal.signal(signal.SIGUSR1, previous)


@pytest.mark.parametrize("reason", [SystemExit, KeyboardInterrupt, TimeLimit])
def test_a_task_that_is_broken_off_is_queued_again(
    queue: Queue, told: Told, reason: type[BaseException]
) -> None:
    script: Any = {"mail": Turns(b"250 ok\r\n", SILENCE)}
    with ScriptedServer((script,), extensions=("8BITMIME",)) as server:
        payload = queue(server, emails(3))
        with broken_off(reason, server, b"MAIL", 2):
            work(payload)
    assert [message.subject for message, _ in told] == ["0"]
    assert len(payloads()[-1]["messages"]) == 2


@pytest.mark.parametrize("resend_unknown", [False, True])
def test_a_message_whose_answer_is_broken_off_may_have_been_delivered(
    queue: Queue, told: Told, resend_unknown: bool, caplog: pytest.LogCaptureFixture
) -> None:
    script: Any = {"body": Turns(b"250 2.0.0 Ok\r\n", SILENCE)}
    with ScriptedServer((script,), extensions=("8BITMIME",)) as server:
        payload = queue(server, emails(3), resend_unknown=resend_unknown)
        with broken_off(TimeLimit, server, b"DATA", 2, messages=2):
            work(payload)
    again = len(payloads()[-1]["messages"])
    if resend_unknown:
        assert ([d.state for _, d in told], again) == (["sent"], 2)
        return
    assert ([d.state for _, d in told], again) == (["sent", "unknown"], 1)
    [text] = said(caplog, logging.ERROR)
    assert "may have been delivered, and is not sent again" in text


@pytest.mark.parametrize(
    ("stage", "left"), [("mail", ["b@example.com", "c@example.com"]), ("body", [])]
)
def test_of_a_message_that_is_broken_off_only_the_rest_is_sent_again(
    queue: Queue, told: Told, stage: str, left: list[str]
) -> None:
    """The second transaction of a message hangs, with two of its recipients."""
    too_many: Any = {
        "b@example.com": Turns(b"452 4.5.3 too many\r\n"),
        "c@example.com": Turns(b"452 4.5.3 too many\r\n"),
        stage: Turns(b"250 2.0.0 Ok\r\n", SILENCE),
    }
    to = ["a@example.com", "b@example.com", "c@example.com"]
    with ScriptedServer((too_many,), extensions=("8BITMIME",)) as server:
        payload = queue(server, [email("1", to)])
        verb, messages = (b"MAIL", 1) if stage == "mail" else (b"DATA", 2)
        with broken_off(TimeLimit, server, verb, 2, messages=messages):
            work(payload)
    if left:
        assert recipients(payloads()[-1]) == [left]
        assert payloads()[-1]["messages"][0]["earlier"]["accepted"] == to[:1]
        return
    [(_, delivery)] = told
    assert delivery.accepted == ("a@example.com",)
    assert list(delivery.refused) == to[1:]
    assert len(payloads()) == 1


def test_what_a_task_did_not_come_to_has_lost_no_attempt(queue: Queue) -> None:
    """But for the first of them: a message that stops each worker must end."""
    one_each: Any = {"mail": Turns(b"250 ok\r\n", SILENCE)}
    silent: Any = {"mail": SILENCE}
    scripts: Any = (one_each, silent, {})
    with ScriptedServer(scripts, extensions=("8BITMIME",)) as server:
        queue(server, emails(4), max_attempts=2)
        for number, count in enumerate((2, 3), 1):
            with broken_off(TimeLimit, server, b"MAIL", count):
                work(payloads()[-1])
            server.close_all()
            assert payloads()[-1]["attempt"] == number
        assert len(payloads()[-1]["messages"]) == 3
        assert work(payloads()[-1]) == {"sent": 3, "failed": 0, "again": 0}


def test_a_task_that_takes_too_long_leaves_the_rest(
    server: MailServer,
    queue: Queue,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(sending, "TASK_SECONDS", 0)
    queue(server, emails(10), max_attempts=1)
    while len(server.received) < 10:
        received = len(server.received)
        work(payloads()[-1])
        assert len(server.received) > received
    assert sorted(subjects(server), key=int) == [str(n) for n in range(10)]
    assert len(payloads()) > 2
    assert {payload["attempt"] for payload in payloads()} == {1}
    assert said(caplog, logging.WARNING)[0].endswith("the task took too long")
    assert not said(caplog, logging.ERROR)


def test_the_rate_limit_costs_no_attempt(server: MailServer, queue: Queue) -> None:
    smtp = {"rate_limit": 0.1, "timeout": 0.5}
    payload = queue(server, emails(3), smtp, max_attempts=1)
    assert work(payload) == {"sent": 1, "failed": 0, "again": 2}
    assert payloads()[-1]["attempt"] == 1


def test_the_rate_limit_costs_an_attempt_where_nothing_can_wait(
    server: MailServer, queue: Queue, settings: Any
) -> None:
    settings.TASKS = tasks_of(NotDeferring)
    smtp = {"rate_limit": 0.1, "timeout": 0.5}
    payload = queue(server, emails(3), smtp, max_attempts=2)
    assert work(payload) == {"sent": 1, "failed": 0, "again": 2}
    assert work(payloads()[-1]) == {"sent": 0, "failed": 2, "again": 0}


def test_mail_of_a_log_handler_is_not_logged(
    server: MailServer,
    queue: Queue,
    told: Told,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The handler would mail that, and so on without end."""
    payload = queue(server, [email("reject me")])
    payload["quiet"] = True
    work(payload)
    assert said(caplog, logging.ERROR) == []
    assert told == []
    assert "Queued mail not sent" in capsys.readouterr().err


def test_nor_is_anything_raised_of_it(
    server: MailServer,
    queue: Queue,
    settings: Any,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Engines log what a task raises, which the handler would mail, and so on."""
    payload = queue(server, [email("1", [GREYLISTED])])
    payload["quiet"] = True
    assert work({**payload, "version": 0}) == {}
    assert "The task is of version 0" in capsys.readouterr().err
    settings.TASKS = tasks_of(Down)
    assert work(payload) == {}
    assert "not queued again" in capsys.readouterr().err
    settings.TASKS = tasks_of(Keeping)
    configure_queue(settings, {"host": server.host, "port": "many"})
    assert work(payload) == {}
    assert payloads()[-1]["attempt"] == 2
    assert said(caplog, logging.ERROR) == []


# Tasks that cannot be read.


def damage(payload: Any, **message: Any) -> None:
    payload["messages"][0].update(message)


def compressed(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content)).decode()


DAMAGES: dict[str, Callable[[Any], Any]] = {
    "version": lambda p: p.update(version=2),
    "no version": lambda p: p.pop("version"),
    "no messages": lambda p: p.pop("messages"),
    "no queue": lambda p: p.update(queue=None),
    "queue": lambda p: p["queue"].update(task_backend=1),
    "attempt": lambda p: p.update(attempt="1"),
    "quiet": lambda p: p.update(quiet=1),
    "a key": lambda p: damage(p, more=1),
    "address": lambda p: damage(p, recipients=["a@example.com>\r\nRSET"]),
    "sender": lambda p: damage(p, sender=1),
    "base64": lambda p: damage(p, content="!!!"),
    "zlib": lambda p: damage(p, content="AAAA"),
    "not text": lambda p: damage(p, content=5),
    "cut": lambda p: damage(p, content=p["messages"][0]["content"][:40]),
    "longer": lambda p: damage(p, size=p["messages"][0]["size"] - 1),
    "shorter": lambda p: damage(p, size=p["messages"][0]["size"] + 1),
    "size": lambda p: damage(p, size=2**40),
    "smtputf8": lambda p: damage(p, smtputf8_error=1),
    "size's type": lambda p: damage(p, size="1"),
    "lines": lambda p: damage(p, content=compressed(b"a\n.\nb\r\n"), size=7),
    "recipients": lambda p: damage(p, recipients="a@example.com"),
    "no recipients": lambda p: damage(p, recipients=[]),
    "attempts": lambda p: damage(p, earlier={"state": "sent", "attempts": "1"}),
    "reply": lambda p: damage(p, earlier={"state": "sent", "reply": 1}),
    "earlier": lambda p: damage(p, earlier={"state": "sent", "refused": []}),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_task_that_cannot_be_read_fails(
    server: MailServer, queue: Queue, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    payload = queue(server, [email()])
    DAMAGES[kind](payload)
    with pytest.raises(PayloadError):
        work(payload)
    [text] = said(caplog, logging.ERROR)
    assert text.startswith("Queued mail not sent: The task is ")
    assert len(payloads()) == 1
    assert server.received == []


def test_a_task_that_is_no_dict_fails() -> None:
    with pytest.raises(PayloadError, match="version unknown"):
        work("mail")


def test_a_bomb_does_not_go_off(
    server: MailServer, queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    payload = queue(server, [email()])
    damage(payload, content=compressed(b"\r\n" * 10**7), size=1000)
    peak: list[int] = []
    real = zlib.decompressobj

    class Watched:
        def __init__(self) -> None:
            self._real = real()

        def decompress(self, data: bytes, limit: int) -> bytes:
            found = self._real.decompress(data, limit)
            peak.append(len(found))
            return found

        @property
        def eof(self) -> bool:
            return self._real.eof

    monkeypatch.setattr(zlib, "decompressobj", Watched)
    with pytest.raises(PayloadError, match="not its size"):
        work(payload)
    assert peak == [1001]


def test_options_of_a_later_release_are_left_out(
    server: MailServer, queue: Queue
) -> None:
    payload = queue(server, [email()])
    payload["queue"]["new"] = 1
    assert work(payload)["sent"] == 1


def test_what_becomes_of_the_rest_is_told(queue: Queue, told: Told) -> None:
    """The server takes one recipient, and then breaks off."""
    scripts: Any = ({GREYLISTED: b"451 4.7.1 later\r\n"}, {"body": CLOSE}, {})
    with ScriptedServer(scripts) as server:
        work(queue(server, [email("1", ["a@example.com", GREYLISTED])]))
        server.close_all()
        assert work(payloads()[-1]) == {"sent": 1, "failed": 0, "again": 0}
    [(_, delivery)] = told
    assert delivery.state == "sent"
    assert delivery.accepted == ("a@example.com",)
    [(code, text)] = delivery.refused.values()
    assert code == 0
    assert text.endswith("(it may have been delivered)")


@mailers
def test_a_task_of_the_time_before_mailers_is_an_error(
    server: MailServer, queue: Queue
) -> None:
    payload = queue(server, [email()])
    payload["queue"]["mailer"] = None
    with pytest.raises(ImproperlyConfigured, match="queued with EMAIL_"):
        work(payload)


@mailers
def test_another_backend_cannot_send(settings: Any, server: MailServer) -> None:
    configure_queue(settings, {"host": server.host, "port": server.port})
    with pytest.raises(ImproperlyConfigured, match=r"must be a django_async_smtp"):
        sending.sender("default")
