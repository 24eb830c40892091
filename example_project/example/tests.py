"""How a project tests its mail: without a server, and with one."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import django
from django.core import mail
from django.test import SimpleTestCase, TestCase, override_settings
from mailserver import HOST, PASSWORD, USER, Authority, Inbox, MailServer

from .events import Event, event_stream
from .models import SentMail

FORM = {"to": "ada@example.org", "subject": "Hello", "text": "It works."}


class ContactTests(TestCase):
    """Django's test runner puts its locmem backend in the place of every other."""

    def test_the_sync_view_sends(self) -> None:
        self.client.post("/contact/", FORM)
        (message,) = mail.outbox
        self.assertEqual(message.subject, "Hello")
        self.assertEqual(message.to, ["ada@example.org"])

    async def test_the_async_view_sends(self) -> None:
        await self.async_client.post("/contact-async/", FORM)
        self.assertEqual([message.subject for message in mail.outbox], ["Hello"])

    def test_a_line_break_in_the_subject_is_refused(self) -> None:
        response = self.client.post(
            "/contact/", {**FORM, "subject": "Hello\r\nBcc: eve@example.org"}
        )
        self.assertContains(response, "Line breaks")
        self.assertEqual(mail.outbox, [])


class RealBackendTests(TestCase):
    """What locmem cannot show: refusals, deliveries, signals."""

    inbox: Inbox

    @classmethod
    def setUpClass(cls) -> None:
        super().setUpClass()
        folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        authority, cls.inbox = Authority(folder), Inbox()
        server = MailServer(authority.context(), cls.inbox)
        cls.enterClassContext(server)
        cls.enterClassContext(override_settings(**mail_settings(server, authority)))

    def test_a_sent_message_arrives_and_is_recorded(self) -> None:
        self.client.post("/contact/", FORM)
        (received,) = self.inbox
        self.assertEqual(received.subject, "Hello")
        record = SentMail.objects.get()
        self.assertEqual(record.accepted, ["ada@example.org"])
        self.assertIn("queued as", record.reply)

    def test_a_refused_recipient_is_said_to_the_user(self) -> None:
        response = self.client.post("/contact/", {**FORM, "to": "nobody@example.org"})
        self.assertContains(response, "user unknown")
        self.assertEqual(SentMail.objects.get().state, "refused")


class EventTests(SimpleTestCase):
    """A stream of server-sent events, without a server."""

    def test_events_come_in_order_on_any_loop(self) -> None:
        async def events() -> AsyncGenerator[Event, None]:
            yield "first", {"subject": "Hello"}
            yield "last", None

        async def read() -> bytes:
            parts: Any = event_stream(events())
            return b"".join([part async for part in parts])

        expected = b'event: first\ndata: {"subject": "Hello"}\n\n'
        expected += b"event: last\ndata: null\n\n"
        # As a test runner does, and a server does not.
        for _ in range(2):
            self.assertEqual(asyncio.run(read()), expected)


def mail_settings(server: MailServer, authority: Authority) -> dict[str, Any]:
    """Return the settings that lead to a server, for the Django that is installed."""
    backend = "django_async_smtp.Backend"
    if django.VERSION >= (6, 1):
        options = {
            "host": HOST,
            "port": server.port,
            "username": USER,
            "password": PASSWORD,
            "use_tls": True,
            "ssl_cafile": str(authority.file),
        }
        return {"MAILERS": {"default": {"BACKEND": backend, "OPTIONS": options}}}
    return {
        "EMAIL_BACKEND": backend,
        "EMAIL_HOST": HOST,
        "EMAIL_PORT": server.port,
        "EMAIL_HOST_USER": USER,
        "EMAIL_HOST_PASSWORD": PASSWORD,
        "EMAIL_USE_TLS": True,
        "ASYNC_SMTP": {"ssl_cafile": str(authority.file)},
    }
