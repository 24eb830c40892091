"""The messages of one call: taken, counted, reported, logged."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, Self

import pytest
from asgiref.sync import sync_to_async
from django.core.mail import EmailMessage

from django_async_smtp import Backend, errors, mailing
from django_async_smtp.loop import smtp_loop
from django_async_smtp.mailing import (
    BUNCH_SECONDS,
    BUNCH_SIZE,
    ONE_CONNECTION,
    Mailing,
)
from django_async_smtp.signals import post_send, pre_send

from .conftest import MakeBackend, email, emails, states, subjects
from .servers import (
    CLOSE,
    DEFAULT,
    SILENCE,
    MailServer,
    Pause,
    Script,
    ScriptedServer,
    Turns,
    free_port,
    wait_until,
)

MIXED = ["first", "reject me", "second", "third", "fourth"]


def mixed() -> list[Any]:
    """Return good messages, and bad ones at 1, 3, and 5."""
    return [
        email("first"),
        email("reject me"),
        email("second"),
        email(to=["nouser@example.com"]),
        email("third"),
        email(to=["greylisted@example.com", "nouser@example.com"]),
        email("fourth", to=["nouser@example.com", "to@example.com"]),
    ]


class TestFailures:
    def test_a_refused_message_does_not_stop_the_others(
        self, server: MailServer, make_backend: MakeBackend
    ) -> None:
        messages = mixed()
        with pytest.raises(errors.DataRefused) as caught:
            make_backend(server).send_messages(messages)
        assert subjects(server) == MIXED
        assert server.connections == 1
        assert states(messages) == [
            "sent",
            "refused",
            "sent",
            "refused",
            "sent",
            "refused",
            "sent",
        ]
        error = caught.value
        assert error is messages[1].delivery.error
        assert error.failures == [(m, m.delivery.error) for m in messages[1:6:2]]
        assert error.sent == 4
        assert [type(why) for _, why in error.failures] == [
            errors.DataRefused,
            errors.RecipientsRefused,
            errors.RecipientsRefused,
        ]
        assert "Messages not sent: 3 (see .failures); sent: 4." in error.__notes__

    @pytest.mark.asyncio
    async def test_nor_does_it_in_a_coroutine(
        self, server: MailServer, make_backend: MakeBackend
    ) -> None:
        messages = mixed()
        with pytest.raises(errors.DataRefused) as caught:
            await make_backend(server).asend_messages(messages)
        assert subjects(server) == MIXED
        assert [message for message, _ in caught.value.failures] == messages[1:6:2]
        assert caught.value.sent == 4

    def test_the_first_error_is_that_of_the_first_message(
        self, make_backend: MakeBackend
    ) -> None:
        # The second connection is told its refusal long before the first one.
        script: Script = {"to@example.com": SILENCE}
        bad: Script = {"rcpt": b"550 no\r\n"}
        messages = emails(30)
        with ScriptedServer(scripts=(script, bad)) as server:
            backend = make_backend(server, max_connections=2, timeout=0.5)
            with pytest.raises(errors.ReplyTimeout) as caught:
                backend.send_messages(messages)
        assert [message for message, _ in caught.value.failures] == messages
        assert caught.value is messages[0].delivery.error

    def test_one_message_has_no_note_of_others(
        self, server: MailServer, make_backend: MakeBackend
    ) -> None:
        with pytest.raises(errors.DataRefused) as caught:
            make_backend(server).send_messages([email("reject me")])
        assert not getattr(caught.value, "__notes__", [])
        assert len(caught.value.failures) == 1
        assert caught.value.sent == 0

    def test_a_message_that_cannot_be_built_does_not_stop_the_others(
        self, server: MailServer, make_backend: MakeBackend
    ) -> None:
        messages = [
            email("first"),
            email("two\nlines"),
            email("reject me"),
            email(to=["a b"]),
            email("last"),
        ]
        with pytest.raises(ValueError, match="line") as caught:
            make_backend(server).send_messages(messages)
        error: Any = caught.value
        assert subjects(server) == ["first", "reject me", "last"]
        assert states(messages) == ["sent", "failed", "refused", "failed", "sent"]
        assert messages[1].delivery.attempts == 0
        assert [message for message, _ in error.failures] == messages[1:4]
        assert error.sent == 2
        assert "Messages not sent: 3 (see .failures); sent: 2." in error.__notes__

    def test_fail_silently_raises_what_cannot_be_built(
        self,
        server: MailServer,
        make_backend: MakeBackend,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        messages = [email("reject me"), email("two\nlines"), email("last")]
        backend = make_backend(server, fail_silently=True)
        with pytest.raises(ValueError, match="line") as caught:
            backend.send_messages(messages)
        error: Any = caught.value
        assert [message for message, _ in error.failures] == messages[:2]
        assert error.sent == 1
        (record,) = caplog.records
        assert record.levelno == logging.ERROR

    def test_fail_silently_counts_what_was_sent(
        self, server: MailServer, make_backend: MakeBackend
    ) -> None:
        messages = mixed()
        backend = make_backend(server, fail_silently=True)
        assert backend.send_messages(messages) == 4
        assert states(messages).count("refused") == 3

    def test_fail_silently_reports_those_that_were_not_tried(
        self, make_backend: MakeBackend, caplog: pytest.LogCaptureFixture
    ) -> None:
        messages = emails(30)
        dying: Script = {"mail": Turns(DEFAULT, CLOSE)}
        with ScriptedServer(scripts=(dying, {"greeting": b"554 no\r\n"})) as server:
            backend = make_backend(server, fail_silently=True, max_connections=1)
            assert backend.send_messages(messages) == 1
        assert states(messages) == ["sent", "failed"] + ["not_sent"] * 28
        lost, rest = caplog.records
        assert "Mail not sent" in lost.getMessage()
        assert rest.getMessage().startswith("28 more messages not sent")

    @pytest.mark.asyncio
    async def test_coroutines_report_those_that_were_not_tried(
        self, make_backend: MakeBackend
    ) -> None:
        messages = emails(30)
        backend = make_backend(host="127.0.0.1", port=free_port())
        with pytest.raises(errors.ConnectionRefused) as caught:
            await backend.asend_messages(messages)
        assert states(messages) == ["not_sent"] * 30
        assert len(caught.value.failures) == 30
        silent = make_backend(host="127.0.0.1", port=free_port(), fail_silently=True)
        assert await silent.asend_messages(emails(3)) == 0


class TestLog:
    def test_recipients_refused_among_others_are_a_warning(
        self,
        server: MailServer,
        make_backend: MakeBackend,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        message = email(to=["to@example.com", "nouser@example.com"])
        assert make_backend(server).send_messages([message]) == 1
        assert list(message.delivery.refused) == ["nouser@example.com"]
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert "refused 1 of 2 recipients" in record.getMessage()
        assert "n***@example.com" in record.getMessage()
        assert "nouser@example.com" not in repr(vars(record))

    def test_a_record_holds_the_delivery_with_masked_addresses(
        self, make_backend: MakeBackend, caplog: pytest.LogCaptureFixture
    ) -> None:
        script: Script = {
            "bob@example.com": b"550 <bob@example.com>: unknown\r\n",
            "body": b"250 kept for alice@example.com\r\n",
        }
        message = email(to=["alice@example.com", "bob@example.com"])
        with ScriptedServer(scripts=(script,)) as server:
            make_backend(server).send_messages([message])
        (record,) = caplog.records
        logged = vars(record)["delivery"]
        assert logged == dataclasses.replace(
            message.delivery,
            accepted=("a***@example.com",),
            refused={"b***@example.com": (550, "<b***@example.com>: unknown")},
            reply="kept for a***@example.com",
        )

    def test_a_silent_failure_holds_the_delivery_without_its_error(
        self,
        server: MailServer,
        make_backend: MakeBackend,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        message = email(to=["nouser@example.com"])
        backend = make_backend(server, fail_silently=True)
        assert backend.send_messages([message]) == 0
        (record,) = caplog.records
        logged = vars(record)["delivery"]
        assert (logged.state, logged.error) == ("refused", None)
        assert list(logged.refused) == ["n***@example.com"]

    def test_what_is_raised_is_not_logged(
        self,
        server: MailServer,
        make_backend: MakeBackend,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        with pytest.raises(errors.SMTPError):
            make_backend(server).send_messages([email("reject me")])
        assert not caplog.records


class TestGenerators:
    def test_it_is_taken_from_a_dozen_ahead(self, make_backend: MakeBackend) -> None:
        taken: list[int] = []

        def messages() -> Iterator[EmailMessage]:
            for n in range(100):
                taken.append(n)
                yield email(f"{n}")

        scripts: tuple[Script, ...] = ({"body": SILENCE}, {})
        with (
            ScriptedServer(scripts=scripts) as server,
            ThreadPoolExecutor(1) as thread,
        ):
            backend = make_backend(server, max_connections=1)
            sending = thread.submit(backend.send_messages, messages())
            wait_until(lambda: server.received)
            assert len(taken) == 13
            server.close_all()
            with pytest.raises(errors.Disconnected) as caught:
                sending.result(10)
        assert len(taken) == 100
        assert caught.value.sent == 99
        assert subjects(server) == [f"{n}" for n in range(100)]

    def test_several_connections_take_no_more(self, make_backend: MakeBackend) -> None:
        taken: list[int] = []

        def messages() -> Iterator[EmailMessage]:
            for n in range(100):
                taken.append(n)
                yield email(f"{n}")

        silent: Script = {"body": SILENCE}
        scripts: tuple[Script, ...] = (*[silent] * 5, {})
        with (
            ScriptedServer(scripts=scripts) as server,
            ThreadPoolExecutor(1) as thread,
        ):
            backend = make_backend(server, max_connections=5)
            sending = thread.submit(backend.send_messages, messages())
            wait_until(lambda: len(server.received) == 5)
            # For each connection, the one in flight and up to two that are built.
            time.sleep(0.2)
            assert 13 <= len(taken) <= 15
            server.close_all()
            with pytest.raises(errors.Disconnected) as caught:
                sending.result(20)
        assert caught.value.sent == 95

    def test_what_it_gave_goes_out_while_it_takes_its_time(
        self, server: MailServer, make_backend: MakeBackend
    ) -> None:
        def messages() -> Iterator[EmailMessage]:
            yield from emails(20)
            wait_until(lambda: len(server.received) == 20)
            yield email()

        assert make_backend(server).send_messages(messages()) == 21

    def test_it_runs_in_the_thread_of_the_caller(
        self, server: MailServer, make_backend: MakeBackend
    ) -> None:
        threads: set[threading.Thread] = set()

        def messages() -> Iterator[EmailMessage]:
            for n in range(30):
                threads.add(threading.current_thread())
                yield email(f"{n}")

        assert make_backend(server).send_messages(messages()) == 30
        assert threads == {threading.current_thread()}

    @pytest.mark.asyncio
    async def test_it_runs_off_the_loop_of_a_coroutine(
        self, server: MailServer, make_backend: MakeBackend
    ) -> None:
        threads: set[str] = set()

        def messages() -> Iterator[EmailMessage]:
            for n in range(30):
                threads.add(threading.current_thread().name)
                with pytest.raises(RuntimeError):
                    asyncio.get_running_loop()
                yield email(f"{n}")

        assert await make_backend(server).asend_messages(messages()) == 30
        assert len(threads) == 1
        assert threads.isdisjoint({"MainThread", "django-async-smtp"})

    @pytest.mark.parametrize("number", [2, 13, 20])
    def test_its_error_comes_after_the_messages_before_it(
        self, number: int, server: MailServer, make_backend: MakeBackend
    ) -> None:
        messages = emails(number)

        def broken() -> Iterator[EmailMessage]:
            yield from messages
            raise LookupError("no more")

        with pytest.raises(LookupError, match="no more"):
            make_backend(server).send_messages(broken())
        assert sorted(subjects(server), key=int) == [f"{n}" for n in range(number)]
        assert states(messages) == ["sent"] * number

    def test_an_error_before_the_first_message_is_raised_at_once(
        self, make_backend: MakeBackend
    ) -> None:
        def broken() -> Iterator[EmailMessage]:
            raise LookupError("none")
            yield

        with ScriptedServer() as server:
            with pytest.raises(LookupError):
                make_backend(server).send_messages(broken())
            assert server.connections == 0

    def test_refusals_before_its_error_are_logged(
        self,
        server: MailServer,
        make_backend: MakeBackend,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        def broken() -> Iterator[EmailMessage]:
            yield email("reject me")
            raise LookupError

        with pytest.raises(LookupError):
            make_backend(server).send_messages(broken())
        (record,) = caplog.records
        assert "rejected" in record.getMessage()

    @pytest.mark.parametrize("number", [5, 20])
    def test_an_interrupt_in_it_ends_the_call(
        self, number: int, server: MailServer, make_backend: MakeBackend
    ) -> None:
        def interrupted() -> Iterator[EmailMessage]:
            yield from emails(number)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            make_backend(server).send_messages(interrupted())
        # Nothing hangs, and nothing is left behind.
        assert make_backend(server).send_messages([email("next")]) == 1
        assert subjects(server)[-1] == "next"

    @pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
    def test_an_interrupt_does_not_wait_for_the_other_connections(
        self, kind: type[BaseException], make_backend: MakeBackend
    ) -> None:
        def interrupted() -> Iterator[EmailMessage]:
            yield from emails(14)
            wait_until(lambda: any(r.connection == 0 for r in server.received))
            raise kind

        # The helper gets there, while the first connection waits for an answer.
        with ScriptedServer(scripts=({"body": SILENCE}, {})) as server:
            backend = make_backend(server, max_connections=2, timeout=20)
            with ThreadPoolExecutor(1) as thread:
                sending = thread.submit(backend.send_messages, interrupted())
                assert isinstance(sending.exception(5), kind)
            wait_until(lambda: server.open_connections <= 1)

    @pytest.mark.asyncio
    async def test_an_interrupt_in_it_reaches_a_coroutine(
        self, server: MailServer, make_backend: MakeBackend
    ) -> None:
        class Stop(BaseException):
            pass

        def interrupted() -> Iterator[EmailMessage]:
            yield from emails(20)
            raise Stop

        with pytest.raises(Stop):
            await make_backend(server).asend_messages(interrupted())
        assert await make_backend(server).asend_messages([email("next")]) == 1

    def test_what_it_sends_itself_arrives(
        self, server: MailServer, make_backend: MakeBackend
    ) -> None:
        backend = make_backend(server, max_connections=1)

        def nested() -> Iterator[EmailMessage]:
            for n in range(15):
                if n == 14:
                    assert backend.send_messages([email("inner")]) == 1
                yield email(f"{n}")

        assert backend.send_messages(nested()) == 15
        assert "inner" in subjects(server)


class Sink:
    """A server that takes every message, and keeps none."""

    def __init__(self) -> None:
        self.host = "127.0.0.1"
        self.messages = 0
        self._lock = threading.Lock()
        self._listener = socket.create_server((self.host, 0))
        self.port: int = self._listener.getsockname()[1]

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock, suppress(OSError):
            sock.sendall(b"220 sink\r\n")
            while line := sock.recv(65536):
                if line.upper().startswith(b"DATA"):
                    sock.sendall(b"354 go\r\n")
                    end = b""
                    while not end.endswith(b"\r\n.\r\n"):
                        data = sock.recv(2**20)
                        if not data:
                            return
                        end = end[-5:] + data[-5:]
                    with self._lock:
                        self.messages += 1
                sock.sendall(b"250 ok\r\n")


MANY_LARGE = """
import resource
import sys
from pathlib import Path

import django
from django.conf import settings
from django.core.mail import EmailMessage

settings.configure(USE_TZ=True)
django.setup()

from django_async_smtp import Backend

BODY = ("x" * 900 + "\\n") * 1164
peaks = []


class Large(EmailMessage):
    def message(self, **kwargs):
        built = EmailMessage("Hello", "", self.from_email, self.to).message(**kwargs)
        built.set_payload(BODY + self.subject)
        return built


def memory():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def messages():
    for n in range(int(sys.argv[2])):
        peaks.append(memory())
        yield Large(f"{n}", "", "from@example.com", ["to@example.com"])


backend = Backend(host="127.0.0.1", port=int(sys.argv[1]))
backend.send_messages([Large("", "", "a@b.c", ["d@e.f"])] * 12)
start = memory()
assert backend.send_messages(messages()) == int(sys.argv[2])
print((max(*peaks, memory()) - start) // 2**20)
"""


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="the memory is read from /proc"
)
def test_a_thousand_large_messages_take_little_memory() -> None:
    with Sink() as sink:
        client = subprocess.run(
            [sys.executable, "-c", MANY_LARGE, str(sink.port), "1000"],
            capture_output=True,
            text=True,
            timeout=50,
        )
        assert client.returncode == 0, client.stderr
        assert sink.messages == 1012
    assert int(client.stdout) < 50  # MB, of 1000


def test_a_generator_lets_go_of_what_was_sent(
    server: MailServer, make_backend: MakeBackend
) -> None:
    held: list[int] = []
    alive = 0

    class Counted(EmailMessage):
        def __init__(self, *args: Any) -> None:
            nonlocal alive
            alive += 1
            super().__init__(*args)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def messages() -> Iterator[EmailMessage]:
        for n in range(200):
            held.append(alive)
            yield Counted(f"{n}", "", "from@example.com", ["to@example.com"])

    assert make_backend(server).send_messages(messages()) == 200
    assert max(held) < 30


def test_messages_go_to_a_subclass_as_its_own(
    server: MailServer, make_backend: MakeBackend
) -> None:
    senders: list[type] = []

    def note(sender: type, **kwargs: Any) -> None:
        senders.append(sender)

    class Own(Backend):
        pass

    make_backend(server)
    post_send.connect(note)
    try:
        own = Own(host=server.host, port=server.port)
        assert own.send_messages([email()]) == 1
    finally:
        post_send.disconnect(note)
    assert senders == [Own]


# Several are built in one hand-over.


@pytest.fixture
def enough_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no slow machine build fewer at a time."""
    monkeypatch.setattr(mailing, "BUNCH_SECONDS", 60)


@pytest.mark.usefixtures("enough_time")
def test_as_many_are_built_at_a_time_as_are_asked_for(
    make_backend: MakeBackend,
) -> None:
    taking = Mailing(make_backend(host="localhost"), emails(30))
    taken = [len(taking.take((), count)) for count in (1, 5, 5)]
    assert taken == [1, 5, 5]
    assert [item.index for item in taking.take((), 1)] == [11]


@pytest.mark.usefixtures("enough_time")
def test_all_are_built_in_order_and_the_last_is_known(
    make_backend: MakeBackend,
) -> None:
    taking = Mailing(make_backend(host="localhost"), emails(10))
    items = list(chain.from_iterable(taking.take((), 3) for _ in range(4)))
    assert [item.message.subject for item in items] == [f"{n}" for n in range(10)]
    assert [item.is_last for item in items] == [False] * 9 + [True]
    assert taking.take((), 3) == []


@pytest.mark.usefixtures("enough_time")
def test_few_large_messages_are_built_at_a_time(make_backend: MakeBackend) -> None:
    messages = emails(10)
    for message in messages:
        message.body = "x" * 80 + "\n"
        message.body *= BUNCH_SIZE // 81 // 2 + 1
    taking = Mailing(make_backend(host="localhost"), messages)
    assert len(taking.take((), 10)) == 2


def test_messages_that_take_long_are_built_one_at_a_time(
    make_backend: MakeBackend,
) -> None:
    def slow(**kwargs: Any) -> None:
        time.sleep(2 * BUNCH_SECONDS)

    pre_send.connect(slow)
    try:
        taking = Mailing(make_backend(host="localhost"), emails(10))
        assert len(taking.take((), 10)) == 1
    finally:
        pre_send.disconnect(slow)


@pytest.mark.usefixtures("enough_time")
def test_an_iterator_is_not_asked_for_more_than_one_at_a_time(
    make_backend: MakeBackend,
) -> None:
    given: list[Any] = []

    def messages() -> Iterator[Any]:
        for message in emails(40):
            given.append(message)
            yield message

    taking = Mailing(make_backend(host="localhost"), messages())
    assert len(given) == 1 + ONE_CONNECTION
    assert len(taking.take((), 100)) == len(given)
    assert len(taking.take((), 100)) == 1
    assert len(given) == 2 + ONE_CONNECTION


# What is told after an awaited call.


@pytest.mark.asyncio
async def test_a_call_with_nothing_to_tell_does_not_wait_for_a_thread(
    make_backend: MakeBackend,
) -> None:
    proceed = threading.Event()
    with ScriptedServer(({"body": [Pause(0.2), DEFAULT]},)) as server:
        backend = make_backend(server)
        await backend.aopen()
        message = email()
        sending = asyncio.create_task(backend.asend_messages([message]))
        await asyncio.to_thread(wait_until, lambda: server.received)
        waiting = asyncio.create_task(sync_to_async(proceed.wait)(10))
        try:
            async with asyncio.timeout(5):
                assert await sending == 1
        finally:
            proceed.set()
            await waiting
    assert message.delivery.state == "sent"


@pytest.mark.parametrize(
    "script",
    [
        {"body": b"554 no\r\n"},
        {"rcpt": Turns(DEFAULT, b"550 no\r\n")},
        {"mail": [b"421 bye\r\n", CLOSE]},
    ],
    ids=["refused", "a recipient refused", "ended"],
)
@pytest.mark.parametrize("is_warm", [False, True])
@pytest.mark.asyncio
async def test_log_handlers_never_run_on_the_loop_of_a_coroutine(
    make_backend: MakeBackend, script: Script, is_warm: bool
) -> None:
    threads: set[threading.Thread] = set()

    class Noting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            threads.add(threading.current_thread())

    logger, handler = logging.getLogger("django_async_smtp"), Noting()
    logger.addHandler(handler)
    try:
        with ScriptedServer((script, {"greeting": b"554 no\r\n"})) as server:
            backend = make_backend(server, fail_silently=True)
            if is_warm:
                await backend.aopen()
            await backend.asend_messages([email(to=("a@example.com", "b@example.com"))])
    finally:
        logger.removeHandler(handler)
    assert threads
    assert threads.isdisjoint({threading.current_thread(), smtp_loop().thread})
