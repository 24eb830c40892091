"""An SMTP server to send to: aiosmtpd with STARTTLS and AUTH, on a free port."""

from __future__ import annotations

import email
import email.policy
import logging
import socket
import ssl
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import trustme
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session

# aiosmtpd warns of its own use of an attribute.
logging.getLogger("mail.log").setLevel(logging.ERROR)

HOST = "127.0.0.1"
USER = "demo"
PASSWORD = "demo-password"


@dataclass
class Received:
    """A message as it arrived."""

    sender: str
    recipients: list[str]
    subject: str
    size: int
    tls: str
    login: str


class MailServer:
    """
    Keeps what it receives.

    :param folder: where the certificate authority's certificate is written.
    """

    def __init__(self, folder: Path) -> None:
        ca = trustme.CA()
        self.ca_file = folder / "ca.pem"
        ca.cert_pem.write_to_path(self.ca_file)
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        ca.issue_cert(HOST).configure_cert(context)
        with socket.create_server((HOST, 0)) as sock:
            self.port: int = sock.getsockname()[1]
        self.received: list[Received] = []
        self._controller = Controller(
            self,
            hostname=HOST,
            port=self.port,
            tls_context=context,
            require_starttls=True,
            auth_required=True,
            authenticator=_authenticate,
        )

    def __enter__(self) -> Self:
        self._controller.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._controller.stop()

    async def handle_DATA(  # noqa: N802
        self, server: SMTP, session: Session, envelope: Envelope
    ) -> str:
        """Keep a message; aiosmtpd calls this."""
        content = envelope.original_content or b""
        message = email.message_from_bytes(content, policy=email.policy.default)
        self.received.append(
            Received(
                sender=envelope.mail_from or "",
                recipients=list(envelope.rcpt_tos),
                subject=str(message["Subject"]),
                size=len(content),
                tls=session.ssl["cipher"][1] if session.ssl else "no",
                login=session.auth_data.login.decode() if session.auth_data else "no",
            )
        )
        return f"250 2.0.0 Ok: queued as {len(self.received):04X}"


def _authenticate(
    server: SMTP, session: Session, envelope: Envelope, method: str, data: Any
) -> AuthResult:
    good = data == LoginPassword(USER.encode(), PASSWORD.encode())
    return AuthResult(success=good, handled=good, auth_data=data)


def main() -> None:
    """Serve until standard input ends; say the port and the CA's file first."""
    with tempfile.TemporaryDirectory() as folder, MailServer(Path(folder)) as server:
        print(server.port, server.ca_file, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
