"""
What sending can raise, and the table that makes it from aiosmtplib's errors.

Every class here is also what Django's own SMTP backend raises in the same
situation, so ``except`` clauses that name ``smtplib`` classes or socket errors
keep working, and every one is an ``smtplib.SMTPException``.

Configuration errors are deliberately not here: ``fail_silently`` hides what a
mail server did, never a setting that is wrong.
"""

from __future__ import annotations

import smtplib
import socket
import ssl
from typing import Any, Final, Literal

import aiosmtplib

Stage = Literal[
    "queue",
    "connect",
    "greeting",
    "ehlo",
    "tls",
    "auth",
    "mail",
    "rcpt",
    "data",
    "body",
]

# What the client was doing at each stage, as the subject of a sentence.
ACTION: Final[dict[Stage, str]] = {
    "queue": "queueing",
    "connect": "connecting",
    "greeting": "the greeting",
    "ehlo": "EHLO",
    "tls": "TLS",
    "auth": "AUTH",
    "mail": "MAIL FROM",
    "rcpt": "RCPT TO",
    "data": "DATA",
    "body": "the message",
}


class SMTPError(smtplib.SMTPException):
    """
    Sending mail failed; the base class of all that this package raises for it.

    :ivar stage: where it failed, one of ``connect``, ``greeting``, ``ehlo``,
        ``tls``, ``auth``, ``mail``, ``rcpt``, ``data`` and ``body``; ``queue``: it
        did not come to the task queue.
    :ivar server: the server, as ``"host:port"``; of the queue, ``TASKS["alias"]``.
    :ivar temporary: whether trying again later is worth it. False where
        ``maybe_delivered`` is true.
    :ivar maybe_delivered: true only where the message went out whole and the
        server's answer to it was lost. Sending it again may deliver it twice.
    :ivar hint: what to do about it; may be empty.
    :ivar failures: where it ended ``send_messages()``, all messages that were not
        sent, each with its error.
    :ivar sent: how many messages that call had sent.
    """

    def __init__(
        self,
        message: str,
        *smtplib_args: object,
        stage: Stage,
        server: str,
        temporary: bool = False,
        maybe_delivered: bool = False,
    ) -> None:
        # ``args`` are smtplib's: code that unpacks them finds what it expects.
        self.args = smtplib_args or (message,)
        self.message = message
        self.stage: Stage = stage
        self.server = server
        self.temporary = temporary and not maybe_delivered
        self.maybe_delivered = maybe_delivered
        self.hint = ""
        self.failures: list[tuple[Any, Exception]] = []
        self.sent = 0

    def add_hint(self, hint: str) -> None:
        """Say what to do about it, also below a traceback."""
        self.hint = hint
        self.add_note(hint)

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        # Task queues pickle exceptions; BaseException would call __init__
        # with ``args`` alone.
        state = {**vars(self), "failures": []}
        return _restore, (type(self), self.args, self.errno, self.strerror), state


def _restore(
    cls: type[SMTPError], args: tuple[object, ...], number: int, strerror: str
) -> SMTPError:
    error = cls.__new__(cls)
    error.args, error.errno, error.strerror = args, number, strerror
    return error


class NotQueued(SMTPError):
    """The task queue did not take the message, or it is too large for a task."""


class ConnectError(SMTPError):
    """No connection: the host or the network cannot be reached."""


class ConnectionRefused(ConnectError, ConnectionRefusedError):
    """The host answered that nothing listens on this port."""


class ConnectionForbidden(ConnectError, PermissionError):
    """This machine does not let the process connect."""


class UnknownHost(ConnectError, socket.gaierror):
    """The host name does not resolve to an address."""


class ConnectTimeout(ConnectError, TimeoutError):
    """Nothing answered within the timeout."""


class PoolTimeout(ConnectTimeout):
    """All connections to the server stayed in use for the whole timeout."""


class RateLimited(PoolTimeout):
    """The rate limit would have let the message go only after the timeout."""


class Disconnected(SMTPError, smtplib.SMTPServerDisconnected):
    """The server closed the connection, or the connection broke."""


class ConnectionReset(Disconnected, ConnectionResetError):
    """The server reset the connection before its greeting."""


class ReplyTimeout(Disconnected, TimeoutError):
    """The server was silent, or took no more data, for the whole timeout."""


class TLSError(SMTPError, ssl.SSLError):
    """The TLS handshake failed."""

    # Code that handles ssl's errors expects them; empty where OpenSSL said nothing.
    library = ""
    reason = ""


class CertificateError(TLSError, ssl.SSLCertVerificationError):
    """The server's certificate is not valid for this host, now, or at all."""


class TLSDisconnected(
    TLSError,
    ssl.SSLEOFError,
    ssl.SSLZeroReturnError,
    Disconnected,
    ConnectionResetError,
):
    """The connection ended within the TLS handshake."""


class TLSTimeout(TLSError, ReplyTimeout):
    """The TLS handshake was not finished within the timeout."""


class NotSupported(SMTPError, smtplib.SMTPNotSupportedError):
    """The server does not offer what the settings require."""


class ResponseError(SMTPError, smtplib.SMTPResponseException):
    """
    The server answered with a reply code that means no.

    :ivar smtp_code: the reply code (RFC 5321 section 4.2); -1 where the answer
        was no SMTP reply.
    :ivar smtp_error: the reply's text, as bytes.
    """

    def __init__(
        self, message: str, code: int, text: bytes, *more: object, **details: Any
    ) -> None:
        super().__init__(
            message, code, text, *more, temporary=400 <= code < 500, **details
        )
        self.smtp_code = code
        self.smtp_error = text


class GreetingRefused(ResponseError, smtplib.SMTPConnectError):
    """The server does not want this connection, or is no SMTP server."""


class HeloRefused(ResponseError, smtplib.SMTPHeloError):
    """The server refused EHLO and HELO."""


class AuthenticationRefused(ResponseError, smtplib.SMTPAuthenticationError):
    """The server refused the login."""


class HeloClosed(HeloRefused, Disconnected):
    """The server ended the session (421) in answer to EHLO."""


class AuthenticationClosed(AuthenticationRefused, Disconnected):
    """The server ended the session (421) in answer to a login."""


class SenderRefused(ResponseError, smtplib.SMTPSenderRefused):
    """
    The server refused the envelope's sender.

    :ivar sender: the address.
    """

    def __init__(
        self, message: str, code: int, text: bytes, sender: str, **details: Any
    ) -> None:
        super().__init__(message, code, text, sender, **details)
        self.sender = sender


class DataRefused(ResponseError, smtplib.SMTPDataError):
    """The server refused the message itself."""


class RecipientsRefused(SMTPError, smtplib.SMTPRecipientsRefused):
    """
    The server refused all recipients, so nothing was sent.

    :ivar recipients: ``{address: (reply code, text as bytes)}``.
    """

    def __init__(
        self, message: str, recipients: dict[str, tuple[int, bytes]], **details: Any
    ) -> None:
        super().__init__(
            message,
            recipients,
            temporary=any(400 <= code < 500 for code, _ in recipients.values()),
            **details,
        )
        self.recipients = recipients


# aiosmtplib's class -> ours. Connection errors are told apart further by the
# operating system's error behind them, replies without a class of their own by
# the stage.
FROM_AIOSMTPLIB: Final[dict[type[aiosmtplib.SMTPException], type[SMTPError]]] = {
    aiosmtplib.SMTPException: SMTPError,
    aiosmtplib.SMTPServerDisconnected: Disconnected,
    aiosmtplib.SMTPConnectError: ConnectError,
    aiosmtplib.SMTPConnectTimeoutError: ConnectTimeout,
    aiosmtplib.SMTPConnectResponseError: GreetingRefused,
    aiosmtplib.SMTPTimeoutError: ReplyTimeout,
    aiosmtplib.SMTPReadTimeoutError: ReplyTimeout,
    aiosmtplib.SMTPNotSupported: NotSupported,
    aiosmtplib.SMTPResponseException: ResponseError,
    aiosmtplib.SMTPHeloError: HeloRefused,
    aiosmtplib.SMTPAuthenticationError: AuthenticationRefused,
    aiosmtplib.SMTPSenderRefused: SenderRefused,
    aiosmtplib.SMTPRecipientRefused: RecipientsRefused,
    aiosmtplib.SMTPRecipientsRefused: RecipientsRefused,
    aiosmtplib.SMTPDataError: DataRefused,
}

REPLY_AT_STAGE: Final[dict[Stage, type[ResponseError]]] = {
    "greeting": GreetingRefused,
    "ehlo": HeloRefused,
    "auth": AuthenticationRefused,
    "data": DataRefused,
    "body": DataRefused,
}

# 421 ends the session, and so does an empty line in answer to EHLO for smtplib; where
# it goes on to a second command all the same, its users catch a disconnect.
CLOSED_BY_REPLY: Final[dict[type[SMTPError], type[SMTPError]]] = {
    HeloRefused: HeloClosed,
    AuthenticationRefused: AuthenticationClosed,
}

_Rows = list[tuple[type[OSError], type[SMTPError]]]

# The operating system's error -> ours; the first match counts.
FROM_OS: Final[dict[Stage, _Rows]] = {
    "connect": [
        (socket.gaierror, UnknownHost),
        (TimeoutError, ConnectTimeout),
        (ConnectionRefusedError, ConnectionRefused),
        (ConnectionResetError, ConnectionReset),
        (PermissionError, ConnectionForbidden),
    ],
    "greeting": [(ConnectionResetError, ConnectionReset)],
    # In a TLS handshake asyncio reports an EOF as a reset connection, and a timeout
    # as an aborted one.
    "tls": [
        (ssl.SSLCertVerificationError, CertificateError),
        (ssl.SSLEOFError, TLSDisconnected),
        (ssl.SSLZeroReturnError, TLSDisconnected),
        (ssl.SSLError, TLSError),
        (TimeoutError, TLSTimeout),
        (ConnectionAbortedError, TLSTimeout),
        (ConnectionError, TLSDisconnected),
    ],
}

# After the handshake TLS fails as a connection does; TLS 1.3 refuses a client then.
FROM_OS_AT_ANY_STAGE: Final[_Rows] = [(ssl.SSLError, TLSDisconnected)]

# In the handshake, where no error of the system is behind it.
IN_TLS: Final[dict[type[SMTPError], type[SMTPError]]] = {
    Disconnected: TLSDisconnected,
    ConnectTimeout: TLSTimeout,
    ReplyTimeout: TLSTimeout,
}

# aiosmtplib's words; its code is -1, for the latter 500 before 5.1.2.
MALFORMED = "Malformed SMTP response line: "
TOO_LONG = "Response too long"


def translate(
    error: aiosmtplib.SMTPException | OSError,
    stage: Stage,
    server: str,
    *,
    maybe_delivered: bool = False,
) -> SMTPError:
    """
    Make this package's error of one that aiosmtplib, ``ssl`` or a socket raised.

    The caller raises what this returns ``from`` the error it passed.
    """
    details: dict[str, Any] = {"stage": stage, "server": server}
    if isinstance(error, aiosmtplib.SMTPRecipientsRefused):
        return recipients_refused(
            {e.recipient: (e.code, _as_bytes(e.message)) for e in error.recipients},
            **details,
        )
    if isinstance(error, aiosmtplib.SMTPRecipientRefused):
        return recipients_refused(
            {error.recipient: (error.code, _as_bytes(error.message))}, **details
        )
    if isinstance(error, aiosmtplib.SMTPResponseException):
        return _from_reply(error, details, maybe_delivered)
    if isinstance(error, aiosmtplib.SMTPNotSupported):
        return NotSupported(f"{server}: {error.message}", **details)
    inner, os_error = _origin(error)
    cls = _class_of(inner, os_error, stage)
    reason = os_error or error
    made = cls(
        f"{ACTION[stage]}: {_what_happened(cls, reason, server)}",
        **details,
        temporary=_is_temporary(cls, reason),
        maybe_delivered=maybe_delivered,
    )
    if os_error is not None:
        made.args = os_error.args
        made.errno, made.strerror = os_error.errno, os_error.strerror
        for name in ("reason", "library", "verify_code", "verify_message"):
            if hasattr(os_error, name):
                setattr(made, name, getattr(os_error, name))
    return made


def recipients_refused(
    recipients: dict[str, tuple[int, bytes]], *, stage: Stage, server: str
) -> RecipientsRefused:
    """Say that none of the recipients was accepted, in the words of the first no."""
    code, text = next(iter(recipients.values()))
    count = len(recipients)
    which = "the recipient" if count == 1 else f"all {count} recipients"
    return RecipientsRefused(
        f"RCPT TO: {which} refused by {server}: {_reply(code, text)}",
        recipients,
        stage=stage,
        server=server,
    )


def _from_reply(
    error: aiosmtplib.SMTPResponseException,
    details: dict[str, Any],
    maybe_delivered: bool,
) -> SMTPError:
    stage: Stage = details["stage"]
    cls = FROM_AIOSMTPLIB[type(error)]
    if cls is ResponseError:
        cls = REPLY_AT_STAGE.get(stage, ResponseError)
    code, text = error.code, error.message
    line = text.removeprefix(MALFORMED).strip(" \t\r\n")
    if code == -1 and text.startswith(MALFORMED):
        # As smtplib has it: the line without the place of the reply code.
        text = line[4:].strip(" \t\r\n")
    elif text == TOO_LONG:
        code, text = 500, "Line too long."
    if code == 421 or (stage == "ehlo" and code == -1 and not text):
        cls = CLOSED_BY_REPLY.get(cls, cls)
    more = (error.sender,) if isinstance(error, aiosmtplib.SMTPSenderRefused) else ()
    raw = _as_bytes(text)
    words = _reply(code, raw if code != -1 else _as_bytes(line))
    message = f"{ACTION[stage]} refused by {details['server']}: {words}"
    return cls(message, code, raw, *more, **details, maybe_delivered=maybe_delivered)


def _reply(code: int, text: bytes) -> str:
    words = text.decode("utf-8", "replace").replace("\n", " ")
    return f"{code} {words}" if code != -1 else f"no SMTP reply: {words!r}"


def _as_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _origin(
    error: BaseException,
) -> tuple[aiosmtplib.SMTPException | None, OSError | None]:
    """Return aiosmtplib's innermost error, and the system's error that caused it."""
    inner = None
    cause: BaseException | None = error
    while isinstance(cause, aiosmtplib.SMTPException):
        inner, cause = cause, cause.__cause__
    return inner, cause if isinstance(cause, OSError) else None


def _class_of(
    inner: aiosmtplib.SMTPException | None, os_error: OSError | None, stage: Stage
) -> type[SMTPError]:
    for kind, cls in [*FROM_OS.get(stage, []), *FROM_OS_AT_ANY_STAGE]:
        if isinstance(os_error, kind):
            return cls
    if inner is None:
        return ConnectError if stage == "connect" else Disconnected
    cls = FROM_AIOSMTPLIB[type(inner)]
    return IN_TLS.get(cls, cls) if stage == "tls" else cls


def _what_happened(cls: type[SMTPError], reason: Exception, server: str) -> str:
    if issubclass(cls, TimeoutError):
        return f"no answer from {server} within the timeout"
    if issubclass(cls, Disconnected):
        why = getattr(reason, "reason", None)  # OpenSSL's word.
        return f"{server} closed the connection{f': {why}' if why else ''}"
    if isinstance(reason, ssl.SSLCertVerificationError):
        return f"the certificate of {server} is not valid: {reason.verify_message}"
    if isinstance(reason, OSError) and reason.strerror:
        return f"{server} failed: {reason.strerror}"
    return f"{server} failed: {reason}"


def _is_temporary(cls: type[SMTPError], reason: Exception) -> bool:
    if issubclass(cls, UnknownHost):
        return isinstance(reason, OSError) and reason.errno == socket.EAI_AGAIN
    if issubclass(cls, ConnectionForbidden):
        return False
    if issubclass(cls, TLSError):
        return issubclass(cls, TLSDisconnected | TLSTimeout)
    return issubclass(cls, ConnectError | Disconnected)
