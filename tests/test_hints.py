"""Every row of the table of hints, provoked on a server."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import warnings
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from django_async_smtp import SMTPError, hints
from django_async_smtp.envelope import Envelope
from django_async_smtp.hints import HINTS, Hint, hint_for
from django_async_smtp.logs import masked
from django_async_smtp.options import TYPES, Options
from django_async_smtp.pool import Counts, Pool
from django_async_smtp.session import Session

from .conftest import MakeBackend, email, options_for
from .servers import (
    CLOSE,
    DEFAULT,
    PASSWORD,
    SILENCE,
    USERNAME,
    Script,
    ScriptedServer,
    Step,
    address_without_answer,
    free_port,
)
from .settings import USES_MAILERS

LOGIN = {"username": USERNAME, "password": PASSWORD}
HELLO = Envelope("from@example.com", ("to@example.com",), b"Subject: Hi\r\n\r\nHi\r\n")
# Seconds, where nothing comes.
SHORT = 0.15

Failure = tuple[SMTPError, Options]


@dataclass(frozen=True)
class Tools:
    """What provoking needs besides a server."""

    monkeypatch: pytest.MonkeyPatch
    ca: trustme.CA
    client_tls: ssl.SSLContext
    server_tls: ssl.SSLContext
    tmp_path: Path

    def address(self, host: str, port: int, address: tuple[str, int]) -> Any:
        """Have a host's port, whatever its number, lead to an address here."""
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address)]
        # Only root can listen on port 465.
        self.monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **more: found)
        return {"host": host, "port": port}

    def served(self, *pems: bytes) -> ssl.SSLContext:
        """Return the context of a server with a key and its certificates."""
        path = self.tmp_path / "server.pem"
        path.write_bytes(b"".join(pems))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        return context


@pytest.fixture
def tools(
    monkeypatch: pytest.MonkeyPatch,
    ca: trustme.CA,
    client_tls: ssl.SSLContext,
    server_tls: ssl.SSLContext,
    tmp_path: Path,
) -> Tools:
    # A fact of the machine, on which no example may depend.
    monkeypatch.setattr(hints, "is_in_container", lambda: False)
    return Tools(monkeypatch, ca, client_tls, server_tls, tmp_path)


@dataclass(frozen=True)
class Example:
    """
    A failure, and the row that is about it.

    :ivar row: the row's id; for the second of two rows with one id, "id 2".
    """

    row: str
    name: str
    provoke: Callable[[Tools], Awaitable[Failure]]


def numbered(table: tuple[Hint, ...]) -> dict[str, Hint]:
    seen: Counter[str] = Counter()
    rows = {}
    for hint in table:
        seen[hint.id] += 1
        number = seen[hint.id]
        rows[hint.id if number == 1 else f"{hint.id} {number}"] = hint
    return rows


ROWS = numbered(HINTS)


async def failure(options: Options) -> Failure:
    """Return the error that opening a session, or sending, ends with."""
    try:
        session = await Session.open(options)
    except SMTPError as error:
        return error, options
    try:
        await session.send(HELLO)
    except SMTPError as error:
        return error, options
    finally:
        session.abort()
    raise AssertionError("it was sent")


# Replies.


def reply(row: str, stage: str, *lines: str, **options: Any) -> Example:
    """Return an example of a reply, of one or more lines, at a stage of a session."""
    steps: Step = "".join(f"{line}\r\n" for line in lines).encode()
    script: Script = {stage: steps}
    if stage == "ehlo":
        script["helo"] = steps
    if stage == "auth":
        options |= LOGIN

    async def provoke(tools: Tools) -> Failure:
        return await scripted(tools, script, **options)

    return Example(row, lines[0][:50], provoke)


def step(row: str, stage: str, *steps: Step, name: str, **options: Any) -> Example:
    """Return an example of what is no reply."""

    async def provoke(tools: Tools) -> Failure:
        return await scripted(tools, {stage: steps}, timeout=SHORT, **options)

    return Example(row, name, provoke)


async def scripted(
    tools: Tools,
    script: Script,
    *,
    host: str = "",
    port: int = 0,
    extensions: tuple[str, ...] | None = None,
    tls: ssl.SSLContext | None = None,
    speaks_tls: bool = True,
    **options: Any,
) -> Failure:
    """
    Run a session against a server with a script.

    :param host: the name of the server for the client; ``port``: its port.
    :param tls: the server's context, where it is not the usual one.
    :param speaks_tls: whether the server does what the client's options say.
    """
    implicit = speaks_tls and "use_ssl" in options
    if extensions is None:
        extensions = ("AUTH PLAIN",) if "username" in options else ()
    if "use_ssl" in options or "use_tls" in options:
        options = {"ssl_context": tools.client_tls, **options}
        tls = (tls or tools.server_tls) if speaks_tls else None
    with ScriptedServer(
        scripts=(script,), extensions=extensions, tls=tls, implicit=implicit
    ) as server:
        if host or port:
            here = (server.host, server.port)
            options |= tools.address(host or server.host, port or server.port, here)
        return await failure(options_for(server, **options))


REPLIES = [
    # What listens there.
    reply("http-server", "greeting", "HTTP/1.1 400 Bad Request", "Server: nginx"),
    reply("http-server", "greeting", "<html><title>400</title></html>"),
    reply("ssh-server", "greeting", "SSH-2.0-OpenSSH_9.6p1 Ubuntu-3ubuntu13"),
    reply("imap-server", "greeting", "* OK [CAPABILITY IMAP4rev1] Dovecot ready."),
    reply("pop3-server", "greeting", "+OK Dovecot ready."),
    reply("no-smtp-server", "greeting", "-ERR unknown command"),
    reply("no-smtp-server", "greeting", "200 news.example.com InterNetNews ready"),
    reply("no-smtp-server 2", "ehlo", "500 EHLO not understood"),
    reply("no-smtp-server 2", "ehlo", "530 Please login with USER and PASS."),
    reply("no-smtp-reply", "mail", "what did you say?"),
    reply("no-smtp-reply", "auth", "what did you say?"),
    # Sizes and limits.
    reply("message-too-large", "mail", "552 5.3.4 Message size exceeds fixed limit"),
    reply(
        "message-too-large",
        "mail",
        "552-5.3.4 Your message exceeded Google's message size limits. To view our",
        "552-5.3.4 message size guidelines, go to",
        "552 5.3.4  https://support.google.com/mail/?p=MaxSizeError a1 - gsmtp",
    ),
    reply(
        "message-too-large",
        "body",
        "552 5.3.4 Error: message file too big",
    ),
    reply(
        "message-too-large",
        "body",
        "550 5.3.4 ROUTING.SizeLimit; message size exceeds fixed maximum size",
    ),
    reply("message-too-large 2", "mail", "552 Message size exceeds maximum permitted"),
    reply(
        "mailbox-full",
        "rcpt",
        "452-4.2.2 The email account that you tried to reach is over quota. Please",
        "452 4.2.2 direct the recipient to https://support.google.com/mail - gsmtp",
    ),
    reply("mailbox-full", "rcpt", "552 5.2.2 <to@example.com> Quota exceeded"),
    reply("mailbox-full", "rcpt", "552 mailbox is full"),
    reply(
        "mailbox-busy",
        "rcpt",
        "450-4.2.1 The user you are trying to contact is receiving mail too quickly.",
        "450 4.2.1 Please resend your message at a later time. - gsmtp",
    ),
    reply(
        "too-many-connections",
        "greeting",
        "421 4.7.0 mail.example.com Error: too many connections from 192.0.2.1",
    ),
    reply("too-many-connections", "greeting", "421 4.7.0 too many connections"),
    reply(
        "too-many-connections",
        "greeting",
        "421 Too many concurrent SMTP connections; please try again later.",
    ),
    reply("too-many-connections", "mail", "421 4.3.2 Too many open connections."),
    reply(
        "too-many-connections",
        "greeting",
        "421 4.3.2 The maximum number of concurrent connections has exceeded a limit, "
        "closing transmission channel",
    ),
    reply(
        "too-many-connections",
        "auth",
        "421 4.7.0 Maximum number of connections from user+IP exceeded "
        "(mail_max_userip_connections=10)",
    ),
    reply(
        "too-many-connections",
        "auth",
        "432 4.3.2 Concurrent connections limit exceeded. "
        "Visit https://aka.ms/concurrent_sending",
    ),
    reply(
        "too-many-connections",
        "body",
        "432 4.3.2 STOREDRV.ClientSubmit; sender thread limit exceeded "
        "[Hostname=AM0.example.com]",
        **LOGIN,
    ),
    reply("too-many-connections 2", "mail", "432 4.3.2 Please slow down here"),
    reply(
        "sending-quota",
        "body",
        "454 Throttling failure: Daily message quota exceeded.",
        **LOGIN,
    ),
    reply(
        "sending-quota",
        "auth",
        "451 Authentication failed: Maximum credits exceeded",
    ),
    reply(
        "sending-quota",
        "body",
        "550-5.4.5 Daily user sending limit exceeded. For more information on Gmail",
        "550 5.4.5 sending limits go to https://support.google.com/a - gsmtp",
        **LOGIN,
    ),
    reply(
        "sending-quota",
        "rcpt",
        "450-Requested mail action not taken: mailbox unavailable",
        "450 Mail send limit exceeded.",
        **LOGIN,
    ),
    reply(
        "sending-quota",
        "body",
        "550 Domain example.com has exceeded the max emails per hour (50/50 (100%)) "
        "allowed. Message discarded.",
    ),
    reply(
        "login-rate",
        "auth",
        "454 4.7.0 Too many login attempts, please try again later. a1 - gsmtp",
    ),
    reply("login-rate", "auth", "450 4.7.1 Error: too many AUTH commands"),
    reply(
        "sending-rate",
        "body",
        "454 Throttling failure: Maximum sending rate exceeded.",
        **LOGIN,
    ),
    reply("sending-rate", "mail", "450 4.7.1 Error: too much mail from 192.0.2.1"),
    reply(
        "sending-rate",
        "body",
        "421-4.7.28 Our system has detected an unusual rate of unsolicited mail",
        "421 4.7.28 originating from your IP address. - gsmtp",
    ),
    reply(
        "sending-rate",
        "body",
        "550 5.7.0 Requested action not taken: too many emails per second",
        **LOGIN,
    ),
    reply("sending-rate", "rcpt", '451 4.7.1 Ratelimit "to_ip" exceeded'),
    reply(
        "idle-connection",
        "body",
        "451 4.4.2 Timeout waiting for data from client.",
        **LOGIN,
    ),
    reply("idle-connection", "mail", "421 4.4.2 x Error: timeout exceeded"),
    reply(
        "idle-connection", "mail", "421 x: SMTP command timeout - closing connection"
    ),
    reply("server-storage", "mail", "452 4.3.1 Insufficient system storage"),
    reply("server-storage", "mail", "452 4.3.1 Insufficient system resources"),
    # Who this side is.
    reply(
        "ehlo-name",
        "rcpt",
        "504 5.5.2 <localhost>: Helo command rejected: need fully-qualified hostname",
        local_hostname="localhost",
    ),
    reply(
        "ehlo-name",
        "rcpt",
        "550 Access denied - Invalid HELO name (See RFC2821 4.1.1.1)",
    ),
    reply(
        "ehlo-name",
        "ehlo",
        "421 4.7.0 Try again later, closing connection. (EHLO) a1 - gsmtp",
    ),
    reply("ehlo-name", "ehlo", "501 Syntactically invalid EHLO argument(s)"),
    reply("ehlo-name 2", "ehlo", "501 5.5.4 Invalid domain name"),
    reply(
        "not-authenticated-domain",
        "body",
        "550-5.7.26 Unauthenticated email from example.com is not accepted due to",
        "550 5.7.26 domain's DMARC policy. - gsmtp",
    ),
    reply(
        "not-authenticated-domain",
        "rcpt",
        "550 5.7.1 <to@example.com>: Recipient address rejected: Please see "
        "http://www.openspf.net/Why?id=from%40example.com",
    ),
    reply(
        "reverse-dns",
        "rcpt",
        "450 4.7.25 Client host rejected: cannot find your hostname, [192.0.2.1]",
    ),
    reply(
        "reverse-dns",
        "greeting",
        "554-gmx.net (mxgmx117) Nemesis ESMTP Service not available",
        "554-No SMTP service",
        "554 Bad DNS PTR resource record.",
    ),
    reply(
        "reverse-dns",
        "body",
        "550-5.7.25 The IP address sending this message does not have a PTR record",
        "550 5.7.25 setup. - gsmtp",
    ),
    # TLS and the login first.
    reply("auth-needs-tls 2", "mail", "530 5.7.0 Must issue a STARTTLS command first"),
    reply(
        "auth-needs-tls 2",
        "auth",
        "538 5.7.11 Encryption required for requested authentication mechanism",
    ),
    reply("auth-needs-tls 2", "mail", "451 5.7.3 STARTTLS is required to send mail"),
    reply("auth-needs-tls 2", "auth", "523 5.7.10 Encryption Needed"),
    reply(
        "login-first",
        "mail",
        "530-5.7.0 Authentication Required. For more information, go to",
        "530 5.7.0  https://support.google.com/mail/?p=WantAuthError a1 - gsmtp",
    ),
    reply("login-first", "mail", "530 5.7.0 Authentication Required"),
    reply(
        "login-first",
        "mail",
        "530 5.7.57 Client not authenticated to send mail.",
        # Django logs in only with both.
        username=USERNAME,
    ),
    reply(
        "login-first 2",
        "rcpt",
        "554 5.7.1 <client.example[192.0.2.1]>: Client host rejected: Access denied",
    ),
    reply(
        "login-first 2",
        "rcpt",
        "554 5.7.1 <to@example.com>: Recipient address rejected: Access denied",
    ),
    reply(
        "login-first 2",
        "rcpt",
        "553 5.7.1 <from@example.com>: Sender address rejected: not logged in",
    ),
    reply("login-first 2", "mail", "503 5.5.4 Error: send AUTH command first"),
    reply("login-first 2", "mail", "550 Unauthenticated senders not allowed"),
    reply(
        "login-first 2",
        "rcpt",
        "550-Please turn on SMTP Authentication in your mail client.",
        "550-(client.example) [192.0.2.1] is not permitted to relay through this",
        "550 server without authentication.",
    ),
    # Who is kept out.
    reply(
        "address-blocked",
        "rcpt",
        "554 5.7.1 Service unavailable; Client host [192.0.2.1] blocked using "
        "zen.spamhaus.org",
    ),
    reply(
        "address-blocked",
        "mail",
        "550 5.7.1 Unfortunately, messages from [192.0.2.1] weren't sent. Please "
        "contact your Internet service provider since part of their network is on "
        "our block list (S3150).",
    ),
    reply("address-blocked", "greeting", "554 Your IP is not welcome"),
    reply(
        "greylisting",
        "rcpt",
        "450 4.2.0 <to@example.com>: Recipient address rejected: Greylisted, see "
        "http://postgrey.schweikert.ch/help/example.com.html",
    ),
    reply("greylisting", "rcpt", "450 4.2.0 Greylisted"),
    reply(
        "greylisting",
        "rcpt",
        "451 4.7.1 Greylisting in action, please come back later",
    ),
    reply("greylisting", "body", "451 4.7.1 Try again later"),
    reply(
        "greylisting",
        "rcpt",
        "450 4.7.1 <to@example.com>: Recipient address rejected: Try again, see "
        "http://postgrey.schweikert.ch",
    ),
    reply("address-blocked", "auth", "525 5.7.1 Unauthorized IP address"),
    reply(
        "account-blocked",
        "mail",
        "550 5.1.8 Access denied, bad outbound sender AS(42003)",
        **LOGIN,
    ),
    reply("account-blocked", "auth", "525 5.7.13 Account disabled"),
    reply(
        "account-blocked",
        "body",
        "554 Message rejected: Sending paused for this account",
        **LOGIN,
    ),
    # The login.
    reply(
        "no-auth-method-in-common 2",
        "auth",
        "504 5.7.4 Unrecognized authentication type",
    ),
    reply(
        "microsoft-basic-auth-off",
        "auth",
        "550 5.7.30 Basic authentication is not supported for Client Submission",
    ),
    reply(
        "microsoft-basic-auth-off",
        "auth",
        "535 5.7.139 Authentication unsuccessful, basic authentication is disabled.",
    ),
    reply(
        "microsoft-basic-auth-off 2",
        "auth",
        "535 5.7.139 Authentication unsuccessful, SmtpClientAuthentication is disabled "
        "for the Tenant. Visit https://aka.ms/smtp_auth_disabled",
    ),
    reply(
        "microsoft-basic-auth-off 2",
        "auth",
        "535 5.7.139 Authentication unsuccessful, user is locked by your "
        "organization's security defaults policy.",
    ),
    reply(
        "gmail-app-password",
        "auth",
        "534-5.7.9 Application-specific password required. For more information, go to",
        "534 5.7.9  https://support.google.com/mail/?p=InvalidSecondFactor a1 - gsmtp",
    ),
    reply(
        "gmail-app-password",
        "auth",
        "535-5.7.8 Username and Password not accepted. For more information, go to",
        "535 5.7.8  https://support.google.com/mail/?p=BadCredentials a1 - gsmtp",
    ),
    reply("ses-credentials", "auth", "535 Authentication Credentials Invalid"),
    reply(
        "sendgrid-api-key",
        "auth",
        "535 Authentication failed: Bad username / password",
    ),
    reply(
        "sendgrid-api-key",
        "auth",
        "535 Authentication failed: The provided authorization grant is invalid, "
        "expired, or revoked",
    ),
    reply(
        "login-temporary-failure",
        "auth",
        "454 4.7.0 Temporary authentication failure: Connection lost to "
        "authentication server",
    ),
    reply(
        "credentials-refused",
        "auth",
        "535 5.7.8 Error: authentication failed: UGFzc3dvcmQ6",
    ),
    reply("credentials-refused", "auth", "535 5.7.3 Authentication unsuccessful"),
    reply(
        "credentials-refused",
        "auth",
        "535 5.7.139 Authentication unsuccessful, the user credentials were incorrect.",
    ),
    reply("credentials-refused", "auth", "535 Authentication credentials invalid"),
    # The sender.
    reply(
        "from-is-not-the-mailbox",
        "body",
        "550 5.7.60 SMTP; Client does not have permissions to send as this sender",
        **LOGIN,
    ),
    reply(
        "from-is-not-the-mailbox",
        "body",
        "554 5.2.252 SendAsDenied; alice@example.com not allowed to send as "
        "from@example.com; STOREDRV.Submission.Exception:SendAsDeniedException",
        **LOGIN,
    ),
    reply(
        "ses-not-verified",
        "body",
        "554 Message rejected: Email address is not verified. The following "
        "identities failed the check in region EU-WEST-1: from@example.com",
        **LOGIN,
    ),
    reply(
        "sender-identity-not-verified",
        "body",
        "550 The from address does not match a verified Sender Identity. Mail cannot "
        "be sent until this error is resolved.",
        **LOGIN,
    ),
    reply(
        "sender-is-not-yours",
        "rcpt",
        "553 5.7.1 <from@example.com>: Sender address rejected: not owned by user "
        "alice",
        **LOGIN,
    ),
    reply(
        "sender-is-not-yours",
        "mail",
        "550-Requested action not taken: mailbox unavailable",
        "550 Sender address is not allowed.",
        **LOGIN,
    ),
    reply(
        "sender-is-not-yours",
        "body",
        "553 Relaying disallowed as from@example.com",
        **LOGIN,
    ),
    reply(
        "sender-is-not-yours",
        "mail",
        "501 mail from address must be same as authorization user",
        **LOGIN,
    ),
    reply(
        "sender-domain",
        "mail",
        "450 4.1.8 <from@example.com>: Sender address rejected: Domain not found",
    ),
    reply(
        "sender-domain",
        "mail",
        "553 5.1.8 <from@example.com>... Domain of sender address from@example.com "
        "does not exist",
    ),
    reply(
        "sender-domain",
        "rcpt",
        "504 5.5.2 <webmaster@localhost>: Sender address rejected: need "
        "fully-qualified address",
    ),
    reply("sender-syntax", "mail", "501 5.1.7 Bad sender address syntax"),
    reply("sender-syntax", "mail", "501 5.1.7 Invalid address [AM0.example.com]"),
    reply("sender-syntax", "mail", "555 5.5.2 Syntax error, goodbye. a1 - gsmtp"),
    reply("sender-syntax", "mail", "501 5.1.7 Bad sender address syntax", **LOGIN),
    reply(
        "sender-refused",
        "rcpt",
        "550 5.1.0 <from@example.com>: Sender address rejected: User unknown in "
        "virtual mailbox table",
    ),
    reply("sender-refused", "rcpt", "550 Sender verify failed"),
    reply("sender-refused 2", "mail", "550 5.7.1 Our policy", **LOGIN),
    # The recipient.
    reply(
        "relaying-denied",
        "rcpt",
        "550 5.7.54 SMTP; Unable to relay recipient in non-accepted domain",
        **LOGIN,
    ),
    reply(
        "relaying-denied 2", "rcpt", "554 5.7.1 <to@example.com>: Relay access denied"
    ),
    reply(
        "relaying-denied 2",
        "rcpt",
        "454 4.7.1 <to@example.com>: Relay access denied",
    ),
    reply("relaying-denied 2", "rcpt", "550 5.7.1 Relaying denied"),
    reply("relaying-denied 2", "rcpt", "550 5.7.1 Unable to relay"),
    reply("relaying-denied 2", "rcpt", "550 relay not permitted"),
    reply(
        "relaying-denied 2",
        "rcpt",
        "553 sorry, that domain isn't in my list of allowed rcpthosts (#5.7.1)",
    ),
    reply(
        "relaying-denied 2",
        "mail",
        "550-5.7.1 Invalid credentials for relay [192.0.2.1]. The IP address you've",
        "550 5.7.1 registered in your Workspace SMTP Relay service doesn't match",
    ),
    reply("unknown-recipient", "rcpt", "550 5.1.1 user unknown"),
    reply(
        "unknown-recipient",
        "rcpt",
        "550 5.1.1 <relay@example.com>: Recipient address rejected: User unknown in "
        "local recipient table",
    ),
    reply(
        "unknown-recipient",
        "rcpt",
        "550-5.1.1 The email account that you tried to reach does not exist. Please",
        "550 5.1.1 try double-checking the recipient's address - gsmtp",
    ),
    reply(
        "unknown-recipient",
        "rcpt",
        "550 5.4.1 Recipient address rejected: Access denied. [AM0.example.com]",
    ),
    reply("unknown-recipient", "rcpt", "550 Unrouteable address"),
    reply("unknown-recipient", "rcpt", "550 No such user here"),
    reply(
        "recipient-domain",
        "rcpt",
        "450 4.1.2 <to@example.com>: Recipient address rejected: Domain not found",
    ),
    reply("too-many-recipients", "rcpt", "452 4.5.3 Error: too many recipients"),
    # What the server thinks of it.
    reply("content-refused", "body", "554 5.7.1 Spam message rejected"),
    reply(
        "content-refused",
        "body",
        "552-5.7.0 This message was blocked because its content presents a potential",
        "552 5.7.0 security issue. - gsmtp",
    ),
    # The server.
    reply("server-busy", "mail", "421 4.3.2 System is shutting down"),
    reply("server-busy", "mail", "421 too many messages in this connection"),
    reply("server-busy", "mail", "421 4.7.0 x Error: too many errors"),
    reply("temporary-failure", "body", "451 4.3.0 Error: queue file write error"),
    reply("temporary-failure", "rcpt", "451 4.3.0 Temporary lookup failure"),
    reply(
        "temporary-failure",
        "body",
        "451 4.7.1 Service unavailable - try again later",
    ),
    reply(
        "temporary-failure",
        "mail",
        "451 cannot generate an id, ask corporate support",
    ),
    reply("temporary-failure", "greeting", "450 4.3.0 not now"),
    reply("server-refuses-client", "greeting", "554 5.3.2 No SMTP service here"),
]

# What is no reply.

STEPS = [
    step("no-smtp-server 3", "greeting", b"x" * 100_000 + b"\r\n", name="a long line"),
    step("maybe-delivered", "body", CLOSE, name="closed after the message"),
    step("maybe-delivered", "body", SILENCE, name="silent after the message"),
    step("maybe-delivered", "body", b"what?\r\n", name="garbage after the message"),
    step(
        "starttls-not-offered",
        "ehlo",
        DEFAULT,
        name="on this machine",
        use_tls=True,
        speaks_tls=False,
    ),
    step(
        "starttls-not-offered 2",
        "ehlo",
        DEFAULT,
        name="elsewhere",
        host="mail.example",
        use_tls=True,
        speaks_tls=False,
    ),
    step(
        "starttls-refused",
        "starttls",
        b"454 4.7.0 TLS not available due to local problem\r\n",
        name="454",
        use_tls=True,
    ),
    step(
        "too-many-connections",
        "starttls",
        b"421 4.7.0 Error: too many new TLS sessions from 192.0.2.1\r\n",
        name="at STARTTLS",
        use_tls=True,
    ),
    step(
        "wrong-version-number",
        "ehlo",
        DEFAULT,
        name="TLS to a server without",
        use_ssl=True,
        speaks_tls=False,
    ),
    step(
        "tls-timeout",
        "greeting",
        SILENCE,
        name="silent",
        use_ssl=True,
        speaks_tls=False,
    ),
    step("tls-timeout 2", "tls", SILENCE, name="after STARTTLS", use_tls=True),
    step("tls-failed", "tls", CLOSE, name="closed", use_ssl=True),
    step("tls-failed", "tls", CLOSE, name="closed after STARTTLS", use_tls=True),
    step("tls-version", "tls", b"\x15\x03\x01\0\2\2\x46", name="alert", use_ssl=True),
    step("tls-version 2", "tls", b"\x15\x03\x03\0\2\2\x28", name="alert", use_ssl=True),
    step(
        "client-certificate", "tls", b"\x15\x03\x03\0\2\2\x2a", name="bad", use_ssl=True
    ),
    step(
        "client-certificate", "tls", b"\x15\x03\x03\0\2\2\x30", name="CA", use_ssl=True
    ),
    step(
        "tls-port",
        "greeting",
        SILENCE,
        name="silent on 465",
        host="mail.example",
        port=465,
    ),
    step("greeting-timeout", "greeting", SILENCE, name="silent"),
    step("connection-closed", "greeting", CLOSE, name="no greeting"),
    step("connection-closed 2", "mail", CLOSE, name="at MAIL"),
    step(
        "connection-closed 2",
        "greeting",
        CLOSE,
        name="no greeting in TLS",
        use_ssl=True,
    ),
    step("reply-timeout", "mail", SILENCE, name="at MAIL"),
    step("reply-timeout", "greeting", SILENCE, name="in TLS", use_ssl=True),
    step("auth-needs-tls", "ehlo", DEFAULT, name="not offered", extensions=(), **LOGIN),
    step(
        "auth-not-offered",
        "ehlo",
        DEFAULT,
        name="with TLS",
        extensions=(),
        use_tls=True,
        **LOGIN,
    ),
    step(
        "no-auth-method-in-common",
        "ehlo",
        DEFAULT,
        name="XOAUTH2",
        extensions=("AUTH XOAUTH2 NTLM",),
        **LOGIN,
    ),
]


# Certificates.


def trusting(*authorities: trustme.CA) -> ssl.SSLContext:
    """Return a client's context that trusts these authorities alone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    for authority in authorities:
        authority.configure_trust(context)
    return context


async def with_certificate(
    tools: Tools,
    certificate: trustme.LeafCert,
    *more: bytes,
    client: ssl.SSLContext | None = None,
) -> Failure:
    """Fail on a server's certificate, sent without its issuers' but for ``more``."""
    leaf = certificate.cert_chain_pems[0].bytes()
    tls = tools.served(certificate.private_key_pem.bytes(), leaf, *more)
    return await scripted(
        tools, {}, tls=tls, use_ssl=True, ssl_context=client or tools.client_tls
    )


async def expired(tools: Tools) -> Failure:
    past = datetime.now(UTC) - timedelta(days=1)
    return await with_certificate(
        tools, tools.ca.issue_cert("127.0.0.1", not_after=past)
    )


async def not_yet_valid(tools: Tools) -> Failure:
    later = datetime.now(UTC) + timedelta(days=1)
    return await with_certificate(
        tools, tools.ca.issue_cert("127.0.0.1", not_before=later)
    )


async def other_host_name(tools: Tools) -> Failure:
    tls = tools.served(*pems(tools.ca.issue_cert("mail.example.com")))
    return await scripted(tools, {}, tls=tls, host="smtp.example.com", use_ssl=True)


async def other_address(tools: Tools) -> Failure:
    return await with_certificate(tools, tools.ca.issue_cert("mail.example.com"))


async def private_ca(tools: Tools) -> Failure:
    issuer = tools.ca.cert_pem.bytes()
    certificate = tools.ca.issue_cert("127.0.0.1")
    return await with_certificate(tools, certificate, issuer, client=trusting())


async def self_signed(tools: Tools) -> Failure:
    tls = tools.served(tools.ca.private_key_pem.bytes(), tools.ca.cert_pem.bytes())
    return await scripted(tools, {}, tls=tls, use_ssl=True, ssl_context=trusting())


async def unknown_issuer(tools: Tools) -> Failure:
    certificate = tools.ca.issue_cert("127.0.0.1")
    return await with_certificate(tools, certificate, client=trusting())


async def no_intermediate(tools: Tools) -> Failure:
    between = tools.ca.create_child_ca()
    return await with_certificate(tools, between.issue_cert("127.0.0.1"))


async def against_rfc_5280(tools: Tools) -> Failure:
    issuer, key = tools.ca.cert_pem, ec.generate_private_key(ec.SECP256R1())
    issuing = serialization.load_pem_private_key(tools.ca.private_key_pem.bytes(), None)
    assert isinstance(issuing, ec.EllipticCurvePrivateKey)
    # As authorities made by hand issue it: it does not say with which key.
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name.from_rfc4514_string("CN=mail"))
        .issuer_name(x509.load_pem_x509_certificate(issuer.bytes()).subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.now(UTC) - timedelta(days=1))
        .not_valid_after(datetime.now(UTC) + timedelta(days=1))
        .sign(issuing, hashes.SHA256())
    )
    tls = tools.served(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
        certificate.public_bytes(serialization.Encoding.PEM),
    )
    client = trusting(tools.ca)
    # The default from Python 3.13 on.
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    return await scripted(tools, {}, tls=tls, use_ssl=True, ssl_context=client)


async def no_revocation_list(tools: Tools) -> Failure:
    client = trusting(tools.ca)
    client.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    certificate = tools.ca.issue_cert("127.0.0.1")
    return await with_certificate(tools, certificate, client=client)


def pems(certificate: trustme.LeafCert) -> tuple[bytes, bytes]:
    """Return a certificate's key and the certificate."""
    key, leaf = certificate.private_key_pem, certificate.cert_chain_pems[0]
    return key.bytes(), leaf.bytes()


def wanting_certificates(tools: Tools) -> ssl.SSLContext:
    context = tools.served(*pems(tools.ca.issue_cert("127.0.0.1")))
    tools.ca.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


async def no_client_certificate(tools: Tools) -> Failure:
    return await scripted(tools, {}, tls=wanting_certificates(tools), use_ssl=True)


async def no_client_certificate_in_tls_1_2(tools: Tools) -> Failure:
    tls = wanting_certificates(tools)
    tls.maximum_version = ssl.TLSVersion.TLSv1_2
    return await scripted(tools, {}, tls=tls, use_ssl=True)


async def old_tls(tools: Tools) -> Failure:
    tls = tools.served(*pems(tools.ca.issue_cert("127.0.0.1")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        tls.minimum_version = ssl.TLSVersion.TLSv1
        tls.maximum_version = ssl.TLSVersion.TLSv1_1
    tls.set_ciphers("ALL:@SECLEVEL=0")
    return await scripted(tools, {}, tls=tls, use_tls=True)


TLS = [
    Example("certificate-expired", "expired", expired),
    Example("certificate-not-yet-valid", "not yet valid", not_yet_valid),
    Example("certificate-host-name", "other name", other_host_name),
    Example("certificate-host-name", "IP address", other_address),
    Example("certificate-private-ca", "issuer sent along", private_ca),
    Example("certificate-self-signed", "self-signed", self_signed),
    Example("certificate-unknown-issuer", "issuer not sent", unknown_issuer),
    Example("certificate-unknown-issuer", "no intermediate", no_intermediate),
    Example("certificate-against-rfc-5280", "old CA", against_rfc_5280),
    Example("certificate-invalid", "no revocation list", no_revocation_list),
    Example("client-certificate", "none, TLS 1.3", no_client_certificate),
    Example("tls-version", "TLS 1.1", old_tls),
    Example("tls-version 2", "none, TLS 1.2", no_client_certificate_in_tls_1_2),
]


# No connection.


def connecting(row: str, name: str, **options: Any) -> Example:
    """Return an example of what no server has to do with."""

    async def provoke(tools: Tools) -> Failure:
        defaults = {"host": "127.0.0.1", "port": free_port(), "timeout": 5.0}
        return await failure(Options(**{**defaults, **options}))

    return Example(row, name, provoke)


async def localhost_in_container(tools: Tools) -> Failure:
    tools.monkeypatch.setattr(hints, "is_in_container", lambda: True)
    return await failure(Options(host="localhost", port=free_port()))


async def elsewhere_in_container(tools: Tools) -> Failure:
    tools.monkeypatch.setattr(hints, "is_in_container", lambda: True)
    there = tools.address("mail.example", 587, ("127.0.0.1", free_port()))
    return await failure(Options(**there))


async def forbidden(tools: Tools) -> Failure:
    async def connect(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    # Only root can have the kernel forbid it.
    loop = asyncio.get_running_loop()
    tools.monkeypatch.setattr(loop, "sock_connect", connect)
    return await failure(Options(host="127.0.0.1", port=25))


async def no_resolver(tools: Tools) -> Failure:
    def getaddrinfo(*args: object, **more: object) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    # Nothing that a test may touch makes a resolver fail.
    tools.monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return await failure(Options(host="mail.example", port=25))


def no_answer(row: str, port: int) -> Example:
    async def provoke(tools: Tools) -> Failure:
        with address_without_answer() as silent:
            there = tools.address("mail.example", port, silent)
            return await failure(Options(**there, timeout=SHORT))

    return Example(row, f"port {port}", provoke)


async def turn_too_late(tools: Tools) -> Failure:
    options = Options(host="127.0.0.1", port=25, rate_limit=0.5, timeout=1)
    pool = Pool(options, Counts())
    await pool.turn()
    with pytest.raises(SMTPError) as caught:
        await pool.turn()
    return caught.value, options


async def all_in_use(tools: Tools) -> Failure:
    with ScriptedServer() as server:
        options = options_for(server, max_connections=1, timeout=SHORT)
        pool = Pool(options, Counts())
        session = await pool.acquire()
        with pytest.raises(SMTPError) as caught:
            await pool.acquire()
        pool.release(session)
        pool.stop_keeping()
        await pool.closed()
    return caught.value, options


# Too long for DNS, so that no resolver is asked.
NO_NAME = ".".join(["x" * 63] * 4) + ".invalid"

CONNECT = [
    Example("localhost-in-container", "localhost", localhost_in_container),
    Example("connection-refused", "elsewhere in a container", elsewhere_in_container),
    connecting("connection-refused", "refused"),
    connecting("connection-refused", "localhost", host="localhost"),
    Example("connection-forbidden", "patched", forbidden),
    connecting("source-address", "foreign", source_address=("192.0.2.1", 0)),
    connecting("source-address", "other family", source_address=("::1", 0)),
    Example("resolver-failure", "patched", no_resolver),
    connecting("unknown-host", "no name", host=NO_NAME),
    Example("rate-limit", "turn too late", turn_too_late),
    Example("connections-in-use", "all in use", all_in_use),
    *(no_answer("port-blocked", port) for port in (25, 465, 587)),
    no_answer("connect-timeout", 2525),
    connecting("unreachable", "broadcast", host="255.255.255.255"),
    connecting("connect-failed", "link-local without a link", host="fe80::1"),
]

EXAMPLES = [*CONNECT, *TLS, *STEPS, *REPLIES]


@pytest.mark.parametrize(
    "example", [pytest.param(e, id=f"{e.row}: {e.name}") for e in EXAMPLES]
)
@pytest.mark.asyncio
async def test_a_failure_has_the_hint_that_is_about_it(
    example: Example, tools: Tools
) -> None:
    error, options = await example.provoke(tools)
    found = hint_for(error, options)
    assert found is not None, error
    # The row, not just the id: an earlier row may hide a later one.
    assert (found.id, found) == (ROWS[example.row].id, ROWS[example.row]), error
    assert error.hint == found.explain(options)
    assert error.__notes__ == [error.hint]


def test_every_row_is_provoked() -> None:
    assert {example.row for example in EXAMPLES} == set(ROWS)


# What says nothing about the cause.

NO_HINT = [
    ("rcpt", "550 5.7.1 our policy"),
    ("rcpt", "550 5.7.1 <to@relay.example>: Recipient address rejected: our policy"),
    ("rcpt", "550 5.7.1 <to@example.com>: Recipient address rejected: Access denied"),
    ("rcpt", "503 5.5.1 Error: send HELO/EHLO first"),
    ("mail", "555 5.5.4 Unsupported option: SIZE=300"),
    ("mail", "503 5.5.1 Error: nested MAIL command"),
    ("data", "554 5.5.1 Error: no valid recipients"),
    ("body", "554 5.6.0 rejected"),
    ("body", "554 Transaction failed"),
    ("body", "554 5.3.0 the corporate generator said no"),
]


@pytest.mark.parametrize(("stage", "words"), NO_HINT)
@pytest.mark.asyncio
async def test_a_refusal_without_a_known_cause_has_no_hint(
    stage: str, words: str, tools: Tools
) -> None:
    error, _ = await reply("", stage, words).provoke(tools)
    assert error.hint == ""


@pytest.mark.asyncio
async def test_the_names_of_hosts_and_addresses_say_nothing(tools: Tools) -> None:
    """Neither the server's, nor those that it quotes."""
    error, options = await reply(
        "",
        "rcpt",
        "550 5.7.1 <not-relay@spamhaus.example>: no",
        host="relay.google.example",
    ).provoke(tools)
    assert options.host in str(error)
    assert error.hint == ""


@pytest.mark.asyncio
async def test_a_hint_looks_at_the_beginning_of_a_long_reply(tools: Tools) -> None:
    # In all its lines together, lest a pattern takes its time.
    lines = ["550-connection limit " + "no " * 300, *["550-no " + "no " * 100] * 20]
    example = reply("", "body", *lines, "550 DMARC")
    error, options = await example.provoke(tools)
    assert len(hints.words(error)) <= 1000
    assert hint_for(error, options) is ROWS["too-many-connections"]


# The table.


@pytest.mark.parametrize("hint", HINTS, ids=list(ROWS))
def test_an_id_is_kebab_case(hint: Hint) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", hint.id)


def test_rows_with_one_id_are_about_different_failures() -> None:
    conditions = [
        replace(hint, id="", cause="", advice="", when=None) for hint in HINTS
    ]
    for hint, condition in zip(HINTS, conditions, strict=True):
        twins = [h for h, c in zip(HINTS, conditions, strict=True) if c == condition]
        # Where the rest is equal, the last one alone may be without a condition.
        assert all(twin.when is not None for twin in twins[:-1]), hint.id


@pytest.mark.parametrize("in_mailers", [True, False], ids=["MAILERS", "EMAIL_*"])
@pytest.mark.parametrize("hint", HINTS, ids=list(ROWS))
def test_a_hint_is_in_the_names_of_the_settings_in_use(
    hint: Hint, in_mailers: bool
) -> None:
    options = Options(
        host="mail.example",
        port=587,
        username=USERNAME,
        password=PASSWORD,
        in_mailers=in_mailers,
    )
    text = hint.explain(options)
    assert hint.cause.endswith(".")
    assert hint.advice.endswith(".")
    assert not set("{}") & set(text)
    assert USERNAME not in text
    assert PASSWORD not in text
    # Read in a log record, and by someone under stress.
    assert len(text) < 300
    assert text == masked(text)
    foreign = r"\bEMAIL_|ASYNC_SMTP" if in_mailers else r"OPTIONS"
    assert re.search(foreign, text) is None
    for name in re.findall(r"{(\w+)}", hint.cause + hint.advice):
        assert name == "server" or name in TYPES
        if name != "server":
            assert options.setting(name) in text


@pytest.mark.parametrize(
    ("row", "words", "words_in_mailers"),
    [
        (
            "tls-port",
            "Set EMAIL_USE_SSL, and not EMAIL_USE_TLS; or EMAIL_PORT to 587.",
            'Set OPTIONS["use_ssl"], and not OPTIONS["use_tls"]; or OPTIONS["port"] to '
            "587.",
        ),
        (
            "certificate-private-ca",
            'Set ASYNC_SMTP["ssl_cafile"] to that authority\'s certificate, in PEM.',
            'Set OPTIONS["ssl_cafile"] to that authority\'s certificate, in PEM.',
        ),
    ],
)
def test_a_hint_names_settings_as_a_project_writes_them(
    row: str, words: str, words_in_mailers: str
) -> None:
    options = Options(host="mail.example", port=465)
    assert ROWS[row].explain(options).endswith(words)
    assert (
        ROWS[row].explain(replace(options, in_mailers=True)).endswith(words_in_mailers)
    )


# Where a project meets it.

REFUSED_LOGIN: Script = {"auth": b"535 5.7.8 Error: authentication failed\r\n"}
WANTED = 'OPTIONS["username"]' if USES_MAILERS else "EMAIL_HOST_USER"


@pytest.mark.parametrize("fail_silently", [False, True], ids=["raised", "logged"])
def test_a_project_is_told(
    fail_silently: bool, make_backend: MakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    with ScriptedServer(scripts=(REFUSED_LOGIN,), extensions=("AUTH PLAIN",)) as server:
        backend = make_backend(server, fail_silently=fail_silently, **LOGIN)
        if fail_silently:
            assert backend.send_messages([email()]) == 0
            (record,) = caplog.records
            hint = vars(record)["hint"]
            assert record.getMessage().endswith(f" [{hint}]")
        else:
            with pytest.raises(SMTPError) as raised:
                backend.send_messages([email()])
            hint = raised.value.hint
    assert hint.startswith(f"The server refused {WANTED} and ")
