"""
SMTP servers to send to: aiosmtpd with STARTTLS and AUTH, on free ports.

``nobody@`` is refused, ``slow@`` takes a quarter of a second, and the account
``newsletter`` may not send from another address than its own.
"""

from __future__ import annotations

import asyncio
import datetime
import email
import email.policy
import logging
import socket
import ssl
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.message import EmailMessage
from pathlib import Path
from typing import Any, Final, Self

import trustme
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session

# aiosmtpd warns of its own use of an attribute, and takes a client that does not trust
# the certificate for an error of its own.
logging.getLogger("mail.log").setLevel(logging.CRITICAL)

HOST = "127.0.0.1"
USER = "demo"
PASSWORD = "demo-password"
# May log in, but not send from the project's address.
NEWSLETTER_USER = "newsletter"
ACCOUNTS: Final = (USER, NEWSLETTER_USER)

# Bytes of a message, and messages that are kept.
SIZE_LIMIT: Final = 2 * 2**20
KEPT: Final = 100

SLOW_SECONDS: Final = 0.25


@dataclass(frozen=True)
class Received:
    """
    A message as it arrived.

    :ivar number: 1 for the first.
    """

    number: int
    at: datetime.datetime
    sender: str
    recipients: list[str]
    subject: str
    content: bytes
    tls: str
    login: str

    @property
    def size(self) -> int:
        """How many bytes it has."""
        return len(self.content)

    def parsed(self) -> EmailMessage:
        """Return its headers and parts."""
        return email.message_from_bytes(self.content, policy=email.policy.default)


class Inbox:
    """The last messages that arrived; for any thread."""

    def __init__(self) -> None:
        self._kept: deque[Received] = deque(maxlen=KEPT)
        self._count = 0
        self._lock = threading.Lock()
        self._listeners: set[Callable[[], object]] = set()

    def __iter__(self) -> Iterator[Received]:
        """Yield them, the newest first."""
        return reversed(list(self._kept))

    def add(self, **fields: Any) -> Received:
        """Keep a message, and tell who waits for one."""
        with self._lock:
            self._count += 1
            received = Received(number=self._count, **fields)
            self._kept.append(received)
            listeners = list(self._listeners)
        for listener in listeners:
            listener()
        return received

    def find(self, number: int) -> Received | None:
        """Return a message; None where it is kept no more."""
        return next((kept for kept in self if kept.number == number), None)

    def after(self, number: int) -> list[Received]:
        """Return what came later, the oldest first."""
        return [kept for kept in reversed(list(self)) if kept.number > number]

    @contextmanager
    def telling(self, listener: Callable[[], object]) -> Iterator[None]:
        """Have a function called, in the server's thread, when a message has come."""
        with self._lock:
            self._listeners.add(listener)
        try:
            yield
        finally:
            with self._lock:
                self._listeners.discard(listener)


# What the servers of this process received: the site's pages look here.
INBOX: Final = Inbox()


class Authority:
    """
    Issues the servers' certificates.

    :param folder: where its own certificate is written.
    """

    def __init__(self, folder: Path) -> None:
        self._ca = trustme.CA()
        self.file = folder / "ca.pem"
        self._ca.cert_pem.write_to_path(self.file)

    def context(self, *, is_expired: bool = False) -> ssl.SSLContext:
        """Return a server's context, with a new certificate."""
        days = datetime.timedelta(days=-3 if is_expired else 90)
        ends = datetime.datetime.now(datetime.UTC) + days
        certificate = self._ca.issue_cert(HOST, not_after=ends)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        certificate.configure_cert(context)
        return context


class MailServer:
    """Puts what it receives into an inbox."""

    def __init__(self, context: ssl.SSLContext, inbox: Inbox = INBOX) -> None:
        with socket.create_server((HOST, 0)) as sock:
            self.port: int = sock.getsockname()[1]
        self._inbox = inbox
        self._controller = Controller(
            self,
            hostname=HOST,
            port=self.port,
            tls_context=context,
            require_starttls=True,
            auth_required=True,
            authenticator=_authenticate,
            data_size_limit=SIZE_LIMIT,
        )

    def __enter__(self) -> Self:
        self._controller.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._controller.stop()

    # aiosmtpd calls what follows.

    async def handle_MAIL(  # noqa: N802
        self,
        server: SMTP,
        session: Session,
        envelope: Envelope,
        address: str,
        options: list[str],
    ) -> str:
        """Refuse a sender that does not belong to the account."""
        user = _user(session)
        if user == NEWSLETTER_USER and not address.startswith(f"{user}@"):
            return (
                f"553 5.7.1 <{address}>: Sender address rejected: not owned by {user}"
            )
        envelope.mail_from = address
        envelope.mail_options.extend(options)
        return "250 2.1.0 Ok"

    async def handle_RCPT(  # noqa: N802
        self,
        server: SMTP,
        session: Session,
        envelope: Envelope,
        address: str,
        options: list[str],
    ) -> str:
        """Refuse ``nobody``."""
        if address.startswith("nobody@"):
            return f"550 5.1.1 <{address}>: user unknown"
        envelope.rcpt_tos.append(address)
        return "250 2.1.5 Ok"

    async def handle_DATA(  # noqa: N802
        self, server: SMTP, session: Session, envelope: Envelope
    ) -> str:
        """Keep a message."""
        if any(address.startswith("slow@") for address in envelope.rcpt_tos):
            await asyncio.sleep(SLOW_SECONDS)
        content = envelope.original_content or b""
        headers = email.message_from_bytes(content, policy=email.policy.default)
        received = self._inbox.add(
            at=datetime.datetime.now(datetime.UTC),
            sender=envelope.mail_from or "",
            recipients=list(envelope.rcpt_tos),
            subject=str(headers["Subject"] or ""),
            content=content,
            tls=session.ssl["cipher"][1] if session.ssl else "no",
            login=_user(session) or "no",
        )
        return f"250 2.0.0 Ok: queued as {received.number:04X}"


def _user(session: Session) -> str:
    return session.auth_data.login.decode() if session.auth_data else ""


def _authenticate(
    server: SMTP, session: Session, envelope: Envelope, method: str, data: Any
) -> AuthResult:
    accounts = [LoginPassword(user.encode(), PASSWORD.encode()) for user in ACCOUNTS]
    good = data in accounts
    return AuthResult(success=good, handled=good, auth_data=data)


def main() -> None:
    """Serve until standard input ends; say the port and the CA's file first."""
    with tempfile.TemporaryDirectory() as folder:
        authority = Authority(Path(folder))
        with MailServer(authority.context()) as server:
            print(server.port, authority.file, flush=True)
            sys.stdin.read()


if __name__ == "__main__":
    main()
