"""The backend as Django calls it, and its async twin."""

from __future__ import annotations

import asyncio
import smtplib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from django.core.mail import EmailMessage, send_mail, send_mass_mail

from django_async_smtp import Backend, SMTPError

from .conftest import MakeBackend
from .servers import CLOSE, MailServer, ScriptedServer, free_port, wait_until


def email(subject: str = "Hello", **kwargs: Any) -> EmailMessage:
    to = kwargs.pop("to", ["to@example.com"])
    return EmailMessage(subject, "Body", "from@example.com", to, **kwargs)


def subjects(server: MailServer) -> list[str]:
    return [
        line.removeprefix(b"Subject: ").decode()
        for received in server.received
        for line in received.content.split(b"\r\n")
        if line.startswith(b"Subject: ")
    ]


def test_send_mail_goes_through_the_backend(
    server: MailServer, make_backend: MakeBackend
) -> None:
    make_backend(server)
    assert send_mail("Hello", "Body", "from@example.com", ["to@example.com"]) == 1
    (received,) = server.received
    assert received.sender == "from@example.com"
    assert received.recipients == ["to@example.com"]
    assert b"Subject: Hello" in received.content


def test_send_mass_mail_goes_through_the_backend(
    server: MailServer, make_backend: MakeBackend
) -> None:
    make_backend(server)
    mails = [(f"{n}", "Body", None, ["to@example.com"]) for n in range(12)]
    assert send_mass_mail(mails) == 12
    assert subjects(server) == [f"{n}" for n in range(12)]


class TestOpenAndClose:
    def test_open_says_whether_it_opened(
        self, server: MailServer, make_backend: MakeBackend
    ) -> None:
        backend = make_backend(server)
        assert backend.connection is None
        assert backend.open() is True
        assert backend.connection is not None
        assert backend.open() is False
        backend.close()
        assert backend.connection is None
        assert backend.open() is True

    def test_open_raises_what_failed(self, make_backend: MakeBackend) -> None:
        backend = make_backend(host="127.0.0.1", port=free_port())
        with pytest.raises(ConnectionRefusedError) as caught:
            backend.open()
        assert isinstance(caught.value, smtplib.SMTPException)
        assert backend.connection is None

    def test_open_returns_none_where_a_failure_passed_silently(
        self, make_backend: MakeBackend
    ) -> None:
        backend = make_backend(host="127.0.0.1", port=free_port(), fail_silently=True)
        assert backend.open() is None
        assert backend.connection is None

    def test_close_is_fine_when_nothing_is_open(
        self, server: MailServer, make_backend: MakeBackend
    ) -> None:
        make_backend(server).close()

    def test_close_is_fine_when_the_server_is_gone(
        self, make_backend: MakeBackend
    ) -> None:
        with ScriptedServer() as server:
            backend = make_backend(server)
            backend.open()
        backend.close()
        assert backend.connection is None

    def test_with_opens_and_closes_and_yields_the_backend(
        self, server: MailServer, make_backend: MakeBackend
    ) -> None:
        backend = make_backend(server)
        with backend as entered:
            assert entered is backend
            assert backend.connection is not None
            backend.send_messages([email()])
            assert backend.connection is not None
        assert backend.connection is None

    def test_open_and_close_of_a_subclass_are_called(
        self, server: MailServer, make_backend: MakeBackend
    ) -> None:
        calls = []

        class Noting(Backend):
            def open(self) -> bool | None:
                calls.append("open")
                return super().open()

            def close(self) -> None:
                calls.append("close")
                super().close()

        make_backend(server)
        backend = Noting(host=server.host, port=server.port)
        assert backend.send_messages([email()]) == 1
        assert calls == ["open", "close"]
        with backend:
            assert calls[2:] == ["open"]
            backend.send_messages([email()])
            assert calls[2:] == ["open", "open"]
        assert calls[2:] == ["open", "open", "close"]

    def test_a_connection_that_failed_to_open_can_be_opened_later(
        self, make_backend: MakeBackend
    ) -> None:
        with ScriptedServer(({"greeting": CLOSE}, {})) as server:
            backend = make_backend(server)
            with pytest.raises(SMTPError):
                backend.open()
            assert backend.open() is True


class TestSendMessages:
    @pytest.mark.parametrize("nothing", [[], (), None, iter(())])
    def test_no_messages_are_sent_without_opening(
        self, make_backend: MakeBackend, nothing: Any
    ) -> None:
        with ScriptedServer() as server:
            assert make_backend(server).send_messages(nothing) == 0
            assert server.connections == 0

    def test_a_message_without_recipients_counts_0(
        self, server: MailServer, make_backend: MakeBackend
    ) -> None:
        backend = make_backend(server)
        assert backend.send_messages([email(to=[]), email(), email(to=[])]) == 1
        assert len(server.received) == 1

    def test_one_shot_iterators_work(
        self, server: MailServer, make_backend: MakeBackend
    ) -> None:
        def messages() -> Iterator[EmailMessage]:
            for n in range(3):
                yield email(f"{n}")

        assert make_backend(server).send_messages(messages()) == 3
        assert subjects(server) == ["0", "1", "2"]

    def test_a_dozen_messages_go_in_order_on_one_connection(
        self, server: MailServer, make_backend: MakeBackend
    ) -> None:
        messages = [email(f"{n}") for n in range(12)]
        assert make_backend(server).send_messages(messages) == 12
        assert subjects(server) == [f"{n}" for n in range(12)]
        assert server.connections == 1

    def test_backends_of_the_same_settings_share_a_connection(
        self, server: MailServer, make_backend: MakeBackend
    ) -> None:
        for _ in range(3):
            assert make_backend(server).send_messages([email()]) == 1
        assert server.connections == 1

    def test_fail_silently_is_obeyed_where_it_is_set_later(
        self, make_backend: MakeBackend
    ) -> None:
        backend = make_backend(host="127.0.0.1", port=free_port())
        backend.fail_silently = True
        assert backend.send_messages([email()]) == 0
        backend.fail_silently = False
        with pytest.raises(ConnectionRefusedError):
            backend.send_messages([email()])

    def test_what_cannot_be_sent_is_not_counted_silently(
        self, server: MailServer, make_backend: MakeBackend
    ) -> None:
        backend = make_backend(server, fail_silently=True)
        bad = email(to=["nouser@example.com"])
        assert backend.send_messages([email("1"), bad, email("2")]) == 2
        assert subjects(server) == ["1", "2"]

    def test_a_refused_message_is_raised_after_the_others_were_sent(
        self, server: MailServer, make_backend: MakeBackend
    ) -> None:
        bad = email(to=["nouser@example.com"])
        with pytest.raises(smtplib.SMTPRecipientsRefused) as caught:
            make_backend(server).send_messages([email("1"), bad, email("2")])
        assert caught.value.recipients["nouser@example.com"][0] == 550
        assert subjects(server) == ["1", "2"]

    def test_one_instance_in_20_threads_sends_each_message_once(
        self, server: MailServer, make_backend: MakeBackend
    ) -> None:
        backend = make_backend(server)
        together = threading.Barrier(20)

        def send(number: int) -> int:
            together.wait()
            return backend.send_messages([email(f"{number}")])

        with ThreadPoolExecutor(20) as threads:
            assert sum(threads.map(send, range(20))) == 20
        assert sorted(map(int, subjects(server))) == list(range(20))
        assert backend.connection is None

    def test_settings_changed_on_the_instance_count_from_the_next_open(
        self, server: MailServer, make_backend: MakeBackend
    ) -> None:
        backend = make_backend(host="127.0.0.1", port=free_port())
        backend.port = server.port
        assert backend.send_messages([email()]) == 1


@pytest.mark.asyncio
class TestFromACoroutine:
    async def test_messages_are_sent(
        self, server: MailServer, make_backend: MakeBackend
    ) -> None:
        backend = make_backend(server)
        messages = [email(f"{n}") for n in range(12)]
        assert await backend.asend_messages(iter(messages)) == 12
        assert subjects(server) == [f"{n}" for n in range(12)]
        assert backend.connection is None

    async def test_open_says_whether_it_opened(
        self, server: MailServer, make_backend: MakeBackend
    ) -> None:
        backend = make_backend(server)
        assert await backend.aopen() is True
        assert await backend.aopen() is False
        await backend.aclose()
        assert backend.connection is None

    async def test_async_with_opens_and_closes(
        self, server: MailServer, make_backend: MakeBackend
    ) -> None:
        async with make_backend(server) as backend:
            assert backend.connection is not None
            assert await backend.asend_messages([email()]) == 1
        assert backend.connection is None

    async def test_async_with_raises_what_failed(
        self, make_backend: MakeBackend
    ) -> None:
        with pytest.raises(ConnectionRefusedError):
            async with make_backend(host="127.0.0.1", port=free_port()):
                pass

    async def test_nothing_is_sent_without_opening(
        self, make_backend: MakeBackend
    ) -> None:
        with ScriptedServer() as server:
            assert await make_backend(server).asend_messages([]) == 0
            assert server.connections == 0

    async def test_failures_pass_silently_where_asked(
        self, make_backend: MakeBackend, server: MailServer
    ) -> None:
        refused = make_backend(host="127.0.0.1", port=free_port(), fail_silently=True)
        assert await refused.aopen() is None
        assert await refused.asend_messages([email()]) == 0
        backend = make_backend(server, fail_silently=True)
        bad = email(to=["nouser@example.com"])
        assert await backend.asend_messages([bad, email()]) == 1

    async def test_failures_are_raised(
        self, make_backend: MakeBackend, server: MailServer
    ) -> None:
        with pytest.raises(ConnectionRefusedError):
            await make_backend(host="127.0.0.1", port=free_port()).asend_messages(
                [email()]
            )
        bad = email(to=["nouser@example.com"])
        with pytest.raises(smtplib.SMTPRecipientsRefused):
            await make_backend(server).asend_messages([bad])

    async def test_one_instance_in_20_tasks_sends_each_message_once(
        self, server: MailServer, make_backend: MakeBackend
    ) -> None:
        backend = make_backend(server)
        counts = await asyncio.gather(
            *(backend.asend_messages([email(f"{n}")]) for n in range(20))
        )
        assert sum(counts) == 20
        assert sorted(map(int, subjects(server))) == list(range(20))


def test_an_idle_connection_that_the_server_closed_is_not_used(
    make_backend: MakeBackend,
) -> None:
    with ScriptedServer() as server:
        backend = make_backend(server)
        assert backend.send_messages([email("1")]) == 1
        server.close_all()
        wait_until(lambda: server.open_connections == 0)
        assert backend.send_messages([email("2")]) == 1
        assert len(server.received) == 2
        assert server.connections == 2


def test_a_quit_that_fails_is_no_error(make_backend: MakeBackend) -> None:
    with ScriptedServer(({"quit": CLOSE},)) as server:
        assert make_backend(server).send_messages([email()]) == 1
