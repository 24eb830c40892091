from __future__ import annotations

import copy
import errno
import pickle
import smtplib
import socket
import ssl
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import aiosmtplib
import pytest

from django_async_smtp import errors
from django_async_smtp.errors import Stage, translate

SERVER: Final = "smtp.example.com:587"


@dataclass(frozen=True, kw_only=True)
class Example:
    """
    An error, the stage where it occurs, and what ``translate`` makes of it.

    :ivar also: the classes of ``smtplib`` and the system whose handlers catch it.
    """

    error: aiosmtplib.SMTPException | OSError
    stage: Stage
    becomes: type[errors.SMTPError]
    also: tuple[type[Exception], ...]
    message: str
    temporary: bool = False
    attributes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{type(self.error).__name__} at {self.stage}"


def caused(
    error: aiosmtplib.SMTPException, cause: Exception
) -> aiosmtplib.SMTPException:
    error.__cause__ = cause
    return error


def certificate_error() -> ssl.SSLCertVerificationError:
    error = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.reason, error.library = "CERTIFICATE_VERIFY_FAILED", "SSL"
    error.verify_code, error.verify_message = 10, "certificate has expired"
    return error


# One for each class of aiosmtplib's errors.
FROM_AIOSMTPLIB: Final = [
    Example(
        error=aiosmtplib.SMTPException("Something odd"),
        stage="ehlo",
        becomes=errors.SMTPError,
        also=(smtplib.SMTPException,),
        message="EHLO: smtp.example.com:587 failed: Something odd",
    ),
    Example(
        error=aiosmtplib.SMTPServerDisconnected("Connection lost"),
        stage="mail",
        becomes=errors.Disconnected,
        also=(smtplib.SMTPServerDisconnected,),
        message="MAIL FROM: smtp.example.com:587 closed the connection",
        temporary=True,
    ),
    Example(
        error=aiosmtplib.SMTPConnectError("No route"),
        stage="connect",
        becomes=errors.ConnectError,
        also=(OSError,),
        message="connecting: smtp.example.com:587 failed: No route",
        temporary=True,
    ),
    Example(
        error=aiosmtplib.SMTPConnectTimeoutError("Timed out"),
        stage="connect",
        becomes=errors.ConnectTimeout,
        also=(TimeoutError,),
        message="connecting: no answer from smtp.example.com:587 within the timeout",
        temporary=True,
    ),
    Example(
        error=aiosmtplib.SMTPConnectResponseError(554, "5.7.1 go away"),
        stage="greeting",
        becomes=errors.GreetingRefused,
        also=(smtplib.SMTPConnectError,),
        message="the greeting refused by smtp.example.com:587: 554 5.7.1 go away",
        attributes={"smtp_code": 554, "smtp_error": b"5.7.1 go away"},
    ),
    Example(
        error=aiosmtplib.SMTPTimeoutError("Timed out"),
        stage="data",
        becomes=errors.ReplyTimeout,
        also=(smtplib.SMTPServerDisconnected, TimeoutError),
        message="DATA: no answer from smtp.example.com:587 within the timeout",
        temporary=True,
    ),
    Example(
        error=aiosmtplib.SMTPReadTimeoutError("Timed out"),
        stage="rcpt",
        becomes=errors.ReplyTimeout,
        also=(smtplib.SMTPServerDisconnected, TimeoutError),
        message="RCPT TO: no answer from smtp.example.com:587 within the timeout",
        temporary=True,
    ),
    Example(
        error=aiosmtplib.SMTPNotSupported("STARTTLS is not offered"),
        stage="tls",
        becomes=errors.NotSupported,
        also=(smtplib.SMTPNotSupportedError,),
        message="smtp.example.com:587: STARTTLS is not offered",
    ),
    Example(
        error=aiosmtplib.SMTPResponseException(454, "4.7.0 no TLS now"),
        stage="tls",
        becomes=errors.ResponseError,
        also=(smtplib.SMTPResponseException,),
        message="TLS refused by smtp.example.com:587: 454 4.7.0 no TLS now",
        temporary=True,
        attributes={"smtp_code": 454, "smtp_error": b"4.7.0 no TLS now"},
    ),
    Example(
        error=aiosmtplib.SMTPHeloError(550, "who?"),
        stage="ehlo",
        becomes=errors.HeloRefused,
        also=(smtplib.SMTPHeloError,),
        message="EHLO refused by smtp.example.com:587: 550 who?",
        attributes={"smtp_code": 550, "smtp_error": b"who?"},
    ),
    Example(
        error=aiosmtplib.SMTPAuthenticationError(535, "5.7.8 bad credentials"),
        stage="auth",
        becomes=errors.AuthenticationRefused,
        also=(smtplib.SMTPAuthenticationError,),
        message="AUTH refused by smtp.example.com:587: 535 5.7.8 bad credentials",
        attributes={"smtp_code": 535, "smtp_error": b"5.7.8 bad credentials"},
    ),
    Example(
        error=aiosmtplib.SMTPSenderRefused(553, "not yours", "me@example.com"),
        stage="mail",
        becomes=errors.SenderRefused,
        also=(smtplib.SMTPSenderRefused,),
        message="MAIL FROM refused by smtp.example.com:587: 553 not yours",
        attributes={
            "smtp_code": 553,
            "smtp_error": b"not yours",
            "sender": "me@example.com",
        },
    ),
    Example(
        error=aiosmtplib.SMTPRecipientRefused(550, "unknown", "you@example.com"),
        stage="rcpt",
        becomes=errors.RecipientsRefused,
        also=(smtplib.SMTPRecipientsRefused,),
        message="RCPT TO: the recipient refused by smtp.example.com:587: 550 unknown",
        attributes={"recipients": {"you@example.com": (550, b"unknown")}},
    ),
    Example(
        error=aiosmtplib.SMTPRecipientsRefused(
            [
                aiosmtplib.SMTPRecipientRefused(550, "unknown", "one@example.com"),
                aiosmtplib.SMTPRecipientRefused(451, "later", "two@example.com"),
            ]
        ),
        stage="rcpt",
        becomes=errors.RecipientsRefused,
        also=(smtplib.SMTPRecipientsRefused,),
        message=(
            "RCPT TO: all 2 recipients refused by smtp.example.com:587: 550 unknown"
        ),
        temporary=True,
        attributes={
            "recipients": {
                "one@example.com": (550, b"unknown"),
                "two@example.com": (451, b"later"),
            }
        },
    ),
    Example(
        error=aiosmtplib.SMTPDataError(554, "5.7.1 spam\nof the worst kind"),
        stage="body",
        becomes=errors.DataRefused,
        also=(smtplib.SMTPDataError,),
        message=(
            "the message refused by smtp.example.com:587: "
            "554 5.7.1 spam of the worst kind"
        ),
        attributes={
            "smtp_code": 554,
            "smtp_error": b"5.7.1 spam\nof the worst kind",
        },
    ),
]

# Replies that have no class of their own, or need another one at their stage.
FROM_REPLIES: Final = [
    Example(
        error=aiosmtplib.SMTPResponseException(421, "busy"),
        stage="greeting",
        becomes=errors.GreetingRefused,
        also=(smtplib.SMTPConnectError,),
        message="the greeting refused by smtp.example.com:587: 421 busy",
        temporary=True,
        attributes={"smtp_code": 421, "smtp_error": b"busy"},
    ),
    Example(
        error=aiosmtplib.SMTPHeloError(421, "busy"),
        stage="ehlo",
        becomes=errors.HeloClosed,
        also=(smtplib.SMTPHeloError, smtplib.SMTPServerDisconnected),
        message="EHLO refused by smtp.example.com:587: 421 busy",
        temporary=True,
        attributes={"smtp_code": 421, "smtp_error": b"busy"},
    ),
    Example(
        error=aiosmtplib.SMTPAuthenticationError(421, "busy"),
        stage="auth",
        becomes=errors.AuthenticationClosed,
        also=(smtplib.SMTPAuthenticationError, smtplib.SMTPServerDisconnected),
        message="AUTH refused by smtp.example.com:587: 421 busy",
        temporary=True,
        attributes={"smtp_code": 421, "smtp_error": b"busy"},
    ),
    Example(
        error=aiosmtplib.SMTPResponseException(
            -1, "Malformed SMTP response line: HTTP/1.1 400 Bad Request\r\n"
        ),
        stage="greeting",
        becomes=errors.GreetingRefused,
        also=(smtplib.SMTPConnectError,),
        message=(
            "the greeting refused by smtp.example.com:587: "
            "no SMTP reply: 'HTTP/1.1 400 Bad Request'"
        ),
        attributes={"smtp_code": -1, "smtp_error": b"/1.1 400 Bad Request"},
    ),
    Example(
        error=aiosmtplib.SMTPResponseException(
            -1, "Malformed SMTP response line: \r\n"
        ),
        stage="ehlo",
        becomes=errors.HeloClosed,
        also=(smtplib.SMTPHeloError, smtplib.SMTPServerDisconnected),
        message="EHLO refused by smtp.example.com:587: no SMTP reply: ''",
        attributes={"smtp_code": -1, "smtp_error": b""},
    ),
    Example(
        error=aiosmtplib.SMTPResponseException(-1, "Response too long"),
        stage="auth",
        becomes=errors.AuthenticationRefused,
        also=(smtplib.SMTPAuthenticationError,),
        message="AUTH refused by smtp.example.com:587: 500 Line too long.",
        attributes={"smtp_code": 500, "smtp_error": b"Line too long."},
    ),
    Example(
        error=aiosmtplib.SMTPDataError(550, "refus\udce9"),
        stage="data",
        becomes=errors.DataRefused,
        also=(smtplib.SMTPDataError,),
        message="DATA refused by smtp.example.com:587: 550 refus\ufffd",
        attributes={"smtp_code": 550, "smtp_error": b"refus\xe9"},
    ),
]

CONNECT: Final = "connecting: smtp.example.com:587"
CLOSED: Final = "smtp.example.com:587 closed the connection"
SILENT: Final = "no answer from smtp.example.com:587 within the timeout"

# As sockets and ssl raise them, and as aiosmtplib passes them on.
FROM_OS: Final = [
    Example(
        error=caused(
            aiosmtplib.SMTPConnectError("no"),
            ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
        ),
        stage="connect",
        becomes=errors.ConnectionRefused,
        also=(ConnectionRefusedError,),
        message=f"{CONNECT} failed: Connection refused",
        temporary=True,
        attributes={"errno": errno.ECONNREFUSED, "strerror": "Connection refused"},
    ),
    Example(
        error=ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        stage="connect",
        becomes=errors.ConnectionReset,
        also=(ConnectionResetError, smtplib.SMTPServerDisconnected),
        message=f"connecting: {CLOSED}",
        temporary=True,
        attributes={"errno": errno.ECONNRESET},
    ),
    Example(
        error=PermissionError(errno.EACCES, "Permission denied"),
        stage="connect",
        becomes=errors.ConnectionForbidden,
        also=(PermissionError,),
        message=f"{CONNECT} failed: Permission denied",
        attributes={"errno": errno.EACCES},
    ),
    Example(
        error=OSError(errno.EHOSTUNREACH, "No route to host"),
        stage="connect",
        becomes=errors.ConnectError,
        also=(OSError,),
        message=f"{CONNECT} failed: No route to host",
        temporary=True,
        attributes={"errno": errno.EHOSTUNREACH},
    ),
    Example(
        error=TimeoutError(errno.ETIMEDOUT, "Connection timed out"),
        stage="connect",
        becomes=errors.ConnectTimeout,
        also=(TimeoutError,),
        message=f"connecting: {SILENT}",
        temporary=True,
        attributes={"errno": errno.ETIMEDOUT},
    ),
    Example(
        error=socket.gaierror(socket.EAI_AGAIN, "Temporary failure"),
        stage="connect",
        becomes=errors.UnknownHost,
        also=(socket.gaierror,),
        message=f"{CONNECT} failed: Temporary failure",
        temporary=True,
        attributes={"errno": socket.EAI_AGAIN},
    ),
    Example(
        error=socket.gaierror(socket.EAI_NONAME, "Name or service not known"),
        stage="connect",
        becomes=errors.UnknownHost,
        also=(socket.gaierror,),
        message=f"{CONNECT} failed: Name or service not known",
        attributes={"errno": socket.EAI_NONAME},
    ),
    Example(
        error=caused(
            aiosmtplib.SMTPConnectError("no"),
            caused(
                aiosmtplib.SMTPServerDisconnected("lost"),
                ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
            ),
        ),
        stage="greeting",
        becomes=errors.ConnectionReset,
        also=(ConnectionResetError, smtplib.SMTPServerDisconnected),
        message=f"the greeting: {CLOSED}",
        temporary=True,
    ),
    Example(
        error=caused(
            aiosmtplib.SMTPConnectError("no"),
            aiosmtplib.SMTPServerDisconnected("Unexpected EOF"),
        ),
        stage="greeting",
        becomes=errors.Disconnected,
        also=(smtplib.SMTPServerDisconnected,),
        message=f"the greeting: {CLOSED}",
        temporary=True,
    ),
    Example(
        error=caused(
            aiosmtplib.SMTPConnectTimeoutError("no"),
            caused(aiosmtplib.SMTPReadTimeoutError("no"), TimeoutError()),
        ),
        stage="greeting",
        becomes=errors.ReplyTimeout,
        also=(smtplib.SMTPServerDisconnected, TimeoutError),
        message=f"the greeting: {SILENT}",
        temporary=True,
    ),
    Example(
        error=caused(aiosmtplib.SMTPConnectError("no"), certificate_error()),
        stage="tls",
        becomes=errors.CertificateError,
        also=(ssl.SSLCertVerificationError, ValueError),
        message=(
            "TLS: the certificate of smtp.example.com:587 is not valid: "
            "certificate has expired"
        ),
        attributes={
            "verify_code": 10,
            "verify_message": "certificate has expired",
            "reason": "CERTIFICATE_VERIFY_FAILED",
            "library": "SSL",
        },
    ),
    Example(
        error=ssl.SSLError(ssl.SSL_ERROR_SSL, "wrong version number"),
        stage="tls",
        becomes=errors.TLSError,
        also=(ssl.SSLError,),
        message="TLS: smtp.example.com:587 failed: wrong version number",
        attributes={"errno": ssl.SSL_ERROR_SSL},
    ),
    *(
        Example(
            error=error,
            stage="tls",
            becomes=errors.TLSDisconnected,
            also=(
                *(ssl.SSLEOFError, ssl.SSLZeroReturnError),
                *(ConnectionResetError, smtplib.SMTPServerDisconnected),
            ),
            message=f"TLS: {CLOSED}",
            temporary=True,
        )
        for error in (
            ssl.SSLEOFError(ssl.SSL_ERROR_EOF, "EOF"),
            ssl.SSLZeroReturnError(ssl.SSL_ERROR_ZERO_RETURN, "closed"),
            ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
            aiosmtplib.SMTPServerDisconnected("Connection lost"),
        )
    ),
    *(
        Example(
            error=error,
            stage="tls",
            becomes=errors.TLSTimeout,
            also=(ssl.SSLError, TimeoutError, smtplib.SMTPServerDisconnected),
            message=f"TLS: {SILENT}",
            temporary=True,
        )
        for error in (
            TimeoutError("The handshake operation timed out"),
            # asyncio's word for a handshake that took too long.
            ConnectionAbortedError("SSL handshake is taking longer than 60 seconds"),
            aiosmtplib.SMTPTimeoutError("Timed out"),
            aiosmtplib.SMTPConnectTimeoutError("Timed out"),
        )
    ),
    *(
        Example(
            error=error,
            stage="mail",
            becomes=errors.Disconnected,
            also=(smtplib.SMTPServerDisconnected,),
            message=f"MAIL FROM: {CLOSED}",
            temporary=True,
        )
        for error in (
            ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
            BrokenPipeError(errno.EPIPE, "Broken pipe"),
            caused(
                aiosmtplib.SMTPServerDisconnected("lost"), ConnectionResetError("EOF")
            ),
        )
    ),
    Example(
        error=caused(aiosmtplib.SMTPReadTimeoutError("no"), TimeoutError()),
        stage="mail",
        becomes=errors.ReplyTimeout,
        also=(smtplib.SMTPServerDisconnected, TimeoutError),
        message=f"MAIL FROM: {SILENT}",
        temporary=True,
    ),
    Example(
        error=caused(
            aiosmtplib.SMTPServerDisconnected("lost"),
            ssl.SSLError(ssl.SSL_ERROR_SSL, "bad record mac"),
        ),
        stage="mail",
        becomes=errors.TLSDisconnected,
        also=(ssl.SSLError, smtplib.SMTPServerDisconnected),
        message=f"MAIL FROM: {CLOSED}",
        temporary=True,
    ),
]

EXAMPLES: Final = [*FROM_AIOSMTPLIB, *FROM_REPLIES, *FROM_OS]
ALL_CLASSES: Final = [
    made
    for made in vars(errors).values()
    if isinstance(made, type) and issubclass(made, errors.SMTPError)
]


def pickled(error: errors.SMTPError) -> errors.SMTPError:
    """Return an error as a task queue's worker hands it on."""
    twin: errors.SMTPError = pickle.loads(pickle.dumps(error))
    return twin


for_each_example = pytest.mark.parametrize("example", EXAMPLES, ids=str)
for_each_class = pytest.mark.parametrize("cls", ALL_CLASSES)


def test_no_class_of_aiosmtplib_goes_unmapped() -> None:
    names = aiosmtplib.errors.__all__
    known = {getattr(aiosmtplib.errors, name) for name in names}
    assert set(errors.FROM_AIOSMTPLIB) == known
    assert {type(example.error) for example in FROM_AIOSMTPLIB} == known


@for_each_class
def test_every_class_is_an_smtp_exception(cls: type[errors.SMTPError]) -> None:
    assert issubclass(cls, smtplib.SMTPException)


@for_each_example
def test_it_becomes_what_smtplib_would_have_raised(example: Example) -> None:
    error = translate(example.error, example.stage, SERVER)
    assert type(error) is example.becomes
    assert isinstance(error, smtplib.SMTPException)
    for cls in example.also:
        assert isinstance(error, cls)


@for_each_example
def test_it_has_smtplibs_attributes_in_smtplibs_types(example: Example) -> None:
    error = translate(example.error, example.stage, SERVER)
    found = {name: getattr(error, name) for name in example.attributes}
    assert found == example.attributes
    if isinstance(error, ssl.SSLError):
        assert error.reason == example.attributes.get("reason", "")


@for_each_example
def test_its_args_are_those_of_smtplibs_error(example: Example) -> None:
    error = translate(example.error, example.stage, SERVER)
    match error:
        case smtplib.SMTPSenderRefused():
            assert error.args == (error.smtp_code, error.smtp_error, error.sender)
        case smtplib.SMTPResponseException():
            assert error.args == (error.smtp_code, error.smtp_error)
        case smtplib.SMTPRecipientsRefused():
            assert error.args == (error.recipients,)
        case OSError(errno=int()):
            assert error.args == (error.errno, error.strerror)


@for_each_example
def test_it_says_where_and_whether_to_try_again(example: Example) -> None:
    error = translate(example.error, example.stage, SERVER)
    assert error.stage == example.stage
    assert error.server == SERVER
    assert error.temporary is example.temporary
    assert error.maybe_delivered is False


@for_each_example
def test_its_message_is_for_people(example: Example) -> None:
    error = translate(example.error, example.stage, SERVER)
    assert str(error) == error.message == example.message


@for_each_example
def test_its_hint_is_shown_with_a_traceback(example: Example) -> None:
    error = translate(example.error, example.stage, SERVER)
    assert error.hint == ""
    error.add_hint("Try 2525.")
    assert error.hint == "Try 2525."
    lines = "".join(traceback.format_exception_only(error)).splitlines()
    assert lines[0].endswith(example.message)
    assert lines[1:] == ["Try 2525."]


@pytest.mark.parametrize(
    "error",
    [
        aiosmtplib.SMTPServerDisconnected("Connection lost"),
        aiosmtplib.SMTPReadTimeoutError("Timed out"),
        aiosmtplib.SMTPDataError(-1, "garbage"),
        aiosmtplib.SMTPDataError(451, "later"),
    ],
    ids=repr,
)
def test_what_may_have_been_delivered_is_not_worth_another_try(
    error: aiosmtplib.SMTPException,
) -> None:
    made = translate(error, "body", SERVER, maybe_delivered=True)
    assert made.maybe_delivered is True
    assert made.temporary is False


@pytest.mark.parametrize("copied", [pickled, copy.copy, copy.deepcopy])
@for_each_example
def test_a_copy_is_the_same(
    example: Example, copied: Callable[[errors.SMTPError], errors.SMTPError]
) -> None:
    error = translate(example.error, example.stage, SERVER)
    twin = copied(error)
    assert type(twin) is type(error)
    assert str(twin) == example.message
    assert vars(twin) == vars(error)
    assert (twin.args, twin.errno, twin.strerror) == (
        error.args,
        error.errno,
        error.strerror,
    )
