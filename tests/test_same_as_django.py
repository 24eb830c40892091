"""What our backend makes of a failing server, held against Django's own backend."""

from __future__ import annotations

import datetime
import gc
import logging
import smtplib
import ssl
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from traceback import TracebackException
from typing import Any, Final, Protocol

import pytest
import trustme
from django.core.mail import EmailMessage

from django_async_smtp import errors

from .conftest import end_connections
from .servers import (
    CLOSE,
    PASSWORD,
    READ,
    RESET,
    SILENCE,
    USERNAME,
    Action,
    Received,
    Script,
    ScriptedServer,
    Step,
)

# What smtplib leaves open where the server resets the connection in a handshake.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <ssl.SSLSocket")


@pytest.fixture(scope="module", autouse=True)
def _garbage_collected() -> Iterator[None]:
    """Free these sockets here, where it is known why they are open."""
    yield
    gc.collect()


SENDER: Final = "from@example.com"
ONE: Final = "one@example.com"
TWO: Final = "two@example.com"

PLAIN_TOKEN: Final = b64encode(f"\0{USERNAME}\0{PASSWORD}".encode())
LOGIN_TOKEN: Final = b64encode(PASSWORD.encode())
SECRETS: Final = (PASSWORD.encode(), PLAIN_TOKEN, LOGIN_TOKEN)

# What code that handles smtplib's errors reads of them.
ATTRIBUTES: Final = (
    *("smtp_code", "smtp_error", "recipients", "sender"),
    *("verify_code", "verify_message"),
)

# Seconds: for a server that stays silent, and for all others.
SHORT: Final = 0.4
LONG: Final = 20.0

Steps = Step | tuple[Step, ...]
Faults = dict[str, Steps]

BROKEN: Final[Faults] = {
    "close": CLOSE,
    "reset": RESET,
    "silence": SILENCE,
    "garbage": b"HTTP/1.1 400 Bad Request\r\n",
}
MANGLED: Final[Faults] = {
    "empty line": b"\r\n",
    "long line": b"250 " + b"x" * 9000 + b"\r\n",
}
REFUSED: Final[Faults] = {
    "451": b"451 4.3.0 later\r\n",
    "554": b"554-5.7.1 refus\xe9\r\n554 5.7.1 pour toujours\r\n",
    "421": b"421 4.7.0 busy\r\n",
    "421, close": (b"421 4.7.0 busy\r\n", CLOSE),
}
FAULTS: Final[Faults] = BROKEN | MANGLED | REFUSED
BAD_LOGIN: Final[Faults] = {
    "close": CLOSE,
    "garbage": b"HTTP/1.1 400 Bad Request\r\n",
    "421, close": (b"421 4.7.0 busy\r\n", CLOSE),
    "535": b"535 5.7.8 bad credentials\r\n",
}
NO: Final = b"550 5.7.1 no\r\n"
UNKNOWN: Final = b"502 5.5.1 unknown command\r\n"


@dataclass(frozen=True, kw_only=True)
class Case:
    """
    How a server fails, and the settings that meet it.

    :ivar stages: one of these our error must give as its stage.
    :ivar lost: whether the message went out whole and the answer to it was lost.
    :ivar tls: the server's: "starttls", "implicit" or none.
    """

    script: Script = field(default_factory=dict)
    stages: tuple[str, ...] = ()
    lost: bool = False
    tls: str = ""
    certificate: str = "good"
    extensions: tuple[str, ...] = ("SIZE 10000000", "AUTH PLAIN LOGIN")
    options: dict[str, Any] = field(default_factory=dict)
    to: tuple[str, ...] = (ONE,)

    @property
    def is_silent(self) -> bool:
        """Whether a client waits for its timeout."""
        return any(SILENCE in _tuple(steps) for steps in self.script.values())


STARTTLS: Final[dict[str, Any]] = {"tls": "starttls", "options": {"use_tls": True}}
IMPLICIT: Final[dict[str, Any]] = {"tls": "implicit", "options": {"use_ssl": True}}
NO_LOGIN: Final[dict[str, Any]] = {"options": {"username": "", "password": ""}}


def at(stage: str, faults: Faults, note: str = "", **details: Any) -> dict[str, Case]:
    """Return a case for each fault at a stage of a server's script."""
    stages = ["ehlo", "helo"] if stage == "ehlo" else [stage]
    return {
        f"{stage}{note}: {fault}": Case(
            script=dict.fromkeys(stages, steps),
            lost=stage == "body" and fault in BROKEN | MANGLED,
            **{"stages": ("tls" if stage == "starttls" else stage,), **details},
        )
        for fault, steps in faults.items()
    }


def then(reply: bytes, faults: Faults) -> Faults:
    """Return the faults that follow at once on a reply."""
    return {
        f"{reply[:3].decode()}, {f}": (reply, *_tuple(s)) for f, s in faults.items()
    }


def at_the_second_line_of(method: str, faults: Faults) -> dict[str, Case]:
    """Return a case for each fault at the end of a login with a challenge."""
    late: Faults = {
        fault: (b"334 " + b64encode(b"?") + b"\r\n", READ, *_tuple(steps))
        for fault, steps in faults.items()
    }
    return at("auth", late, f" {method}", extensions=(f"AUTH {method}",))


def _tuple(steps: Step | Iterable[Step]) -> tuple[Step, ...]:
    return (steps,) if isinstance(steps, bytes | Action) else tuple(steps)


FAILURES: Final[dict[str, Case]] = {
    "refused port": Case(options={"port": 1}, stages=("connect",)),
    "unknown host": Case(options={"host": "no-such-host.invalid"}, stages=("connect",)),
    **at("greeting", FAULTS),
    # It may come while the client is still connecting.
    **at("greeting", {"reset": RESET}, stages=("connect", "greeting")),
    **at("greeting", REFUSED, " over TLS", **IMPLICIT),
    **at("ehlo", FAULTS),
    **at("ehlo", FAULTS, " without login", **NO_LOGIN),
    **at("starttls", FAULTS, **STARTTLS),
    **at("starttls", then(b"220 go\r\n", {"close": CLOSE, "reset": RESET}), **STARTTLS),
    **at("tls", BROKEN, " after STARTTLS", **STARTTLS),
    **at("tls", BROKEN, " from the start", **IMPLICIT),
    **{
        f"{certificate} certificate, {tls['tls']}": Case(
            certificate=certificate, stages=("tls",), **tls
        )
        for certificate in ("unknown issuer's", "other host's", "expired")
        for tls in (STARTTLS, IMPLICIT)
    },
    "client's certificate missing, starttls": Case(
        certificate="client's", stages=("tls", "ehlo"), **STARTTLS
    ),
    "client's certificate missing, implicit": Case(
        certificate="client's", stages=("tls", "greeting"), **IMPLICIT
    ),
    "TLS to a plaintext port": Case(options={"use_ssl": True}, stages=("tls",)),
    "plaintext to a TLS port": Case(
        tls="implicit", options={"timeout": SHORT}, stages=("greeting",)
    ),
    "STARTTLS not offered": Case(options={"use_tls": True}, stages=("tls",)),
    "AUTH not offered": Case(extensions=(), stages=("auth",)),
    "EHLO refused, so no AUTH": Case(script={"ehlo": UNKNOWN}, stages=("auth",)),
    "no AUTH method in common": Case(
        extensions=("AUTH NTLM GSSAPI",), stages=("auth",)
    ),
    **at("auth", FAULTS | BAD_LOGIN),
    **at_the_second_line_of("LOGIN", BAD_LOGIN),
    **at_the_second_line_of("CRAM-MD5", BAD_LOGIN),
    **at("mail", FAULTS),
    **at("mail", BROKEN, " over TLS", **IMPLICIT),
    **at("rcpt", FAULTS),
    **at("data", FAULTS),
    **at("body", FAULTS),
    **at("mail", {"success of another kind": b"252 ok\r\n"}),
    **at("rcpt", {"success of another kind": b"252 ok\r\n"}),
    **at("data", {"success of another kind": b"250 ok\r\n"}),
    **at("body", {"success of another kind": b"252 ok\r\n"}),
    "both recipients refused": Case(
        script={ONE: REFUSED["451"], TWO: NO}, to=(ONE, TWO), stages=("rcpt",)
    ),
    "421 at the second recipient": Case(
        script={TWO: REFUSED["421"]}, to=(ONE, TWO), stages=("rcpt",)
    ),
    "sender refused, and RSET, too": Case(
        script={"mail": NO, "rset": UNKNOWN}, stages=("mail",)
    ),
    "recipient refused, RSET: close": Case(
        script={"rcpt": NO, "rset": CLOSE}, stages=("rcpt",)
    ),
    "message refused, RSET: silence": Case(
        script={"body": NO, "rset": SILENCE}, stages=("body",)
    ),
}

# Nothing is wrong, or the server has the message already.
SUCCESSES: Final[dict[str, Case]] = {
    "login": Case(),
    "STARTTLS": Case(**STARTTLS),
    "TLS": Case(**IMPLICIT),
    "one recipient refused": Case(script={TWO: NO}, to=(ONE, TWO)),
    "EHLO: refused, HELO: fine": Case(script={"ehlo": UNKNOWN}, **NO_LOGIN),
    "EHLO: garbage, HELO: fine": Case(script={"ehlo": BROKEN["garbage"]}, **NO_LOGIN),
    **at("idle", {"close": CLOSE, "reset": RESET, "421": REFUSED["421"]}),
    **at("quit", BROKEN | REFUSED | {"empty line": b"\r\n"}),
}

# Replies that quote what the client said, or what the server expected.
QUOTES: Final[dict[str, Case]] = {
    **at(
        "auth",
        {
            "the command": b"535 5.7.8 no: AUTH PLAIN " + PLAIN_TOKEN + b"\r\n",
            "an unknown command": b"500 <AUTH PLAIN " + PLAIN_TOKEN + b">\r\n",
            "a last command": b"421 AUTH PLAIN " + PLAIN_TOKEN + b"\r\n",
            "nothing else": b"AUTH PLAIN " + PLAIN_TOKEN + b"\r\n",
            "the password": f"535 5.7.8 {PASSWORD} is wrong\r\n".encode(),
        },
        " quotes",
    ),
    **at_the_second_line_of(
        "LOGIN", {"quoted": b"535 what is " + LOGIN_TOKEN + b"?\r\n"}
    ),
}


@dataclass
class Outcome:
    """What a backend returned or raised, and what else there is to see of it."""

    sent: int | None
    error: Exception | None
    received: list[Received]
    lines: list[bytes]
    records: list[logging.LogRecord] = field(default_factory=list)

    @property
    def logged(self) -> list[logging.LogRecord]:
        """The package's records above DEBUG."""
        return [
            record
            for record in self.records
            if record.levelno > logging.DEBUG
            # In dev mode, asyncio warns of a machine that is slow.
            and record.name != "asyncio"
        ]


class Run(Protocol):
    """Sends a message with Django's backend, then with ours."""

    def __call__(
        self, case: Case, *, fail_silently: bool = False
    ) -> tuple[Outcome, Outcome]:
        """Return the outcomes in this order."""


@pytest.fixture(scope="session")
def certificates(
    ca: trustme.CA, server_tls: ssl.SSLContext
) -> dict[str, ssl.SSLContext]:
    """Contexts for servers, good and bad."""
    now = datetime.datetime.now(datetime.UTC)
    yesterday, before = (now - datetime.timedelta(days=days) for days in (1, 2))
    issued = {
        "client's": ca.issue_cert("127.0.0.1"),
        "unknown issuer's": trustme.CA().issue_cert("127.0.0.1"),
        "other host's": ca.issue_cert("mail.example.com"),
        "expired": ca.issue_cert("127.0.0.1", not_before=before, not_after=yesterday),
    }
    contexts = {"good": server_tls}
    for name, certificate in issued.items():
        contexts[name] = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        certificate.configure_cert(contexts[name])
    contexts["client's"].verify_mode = ssl.CERT_REQUIRED
    return contexts


@pytest.fixture
def run(
    make_backend: Callable[..., Any],
    make_django_backend: Callable[..., Any],
    certificates: dict[str, ssl.SSLContext],
    cafile: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> Run:
    """Let both backends meet a server of their own."""
    monkeypatch.setenv("SSL_CERT_FILE", str(cafile))
    caplog.set_level(logging.DEBUG)

    def send(make: Callable[..., Any], case: Case, fail_silently: bool) -> Outcome:
        caplog.clear()
        options: dict[str, Any] = {
            "username": USERNAME,
            "password": PASSWORD,
            "timeout": SHORT if case.is_silent else LONG,
            **case.options,
        }
        with ScriptedServer(
            (case.script,),
            tls=certificates[case.certificate] if case.tls else None,
            implicit=case.tls == "implicit",
            extensions=case.extensions,
        ) as server:
            backend = make(server, fail_silently=fail_silently, **options)
            outcome = Outcome(None, None, server.received, server.lines)
            try:
                outcome.sent = backend.send_messages(
                    [EmailMessage("Hello", "Body", SENDER, case.to)]
                )
            except OSError as error:
                outcome.error = error
            backend.close()
            end_connections()
        outcome.records = list(caplog.records)
        return outcome

    def run(case: Case, *, fail_silently: bool = False) -> tuple[Outcome, Outcome]:
        theirs = send(make_django_backend, case, fail_silently)
        if theirs.error is not None:
            theirs.error.with_traceback(None)  # It would keep sockets open.
        return theirs, send(make_backend, case, fail_silently)

    return run


def shown(error: BaseException | None) -> str:
    """Return all that a report could show of an error, local variables included."""
    if error is None:
        return ""
    report = TracebackException.from_exception(error, capture_locals=True)
    parts = [str(error), repr(vars(error)), *report.format_exception_only()]
    parts += [str(frame.locals) for frame in report.stack if frame.filename != __file__]
    return "".join(parts) + shown(error.__cause__) + shown(error.__context__)


def shown_in_log(records: list[logging.LogRecord]) -> str:
    """Return all that a log handler could show of records."""
    return "".join(f"{r.getMessage()} {vars(r)}" for r in records)


def secrets_in(text: str) -> list[bytes]:
    """Return the forms of the password that a text holds."""
    return [secret for secret in SECRETS if secret in text.encode()]


def assert_same_failure(ours: Exception | None, theirs: Exception | None) -> None:
    """Code that handles their error must handle ours, to the same effect."""
    assert theirs is not None
    assert isinstance(ours, errors.SMTPError)
    assert isinstance(ours, smtplib.SMTPException)
    assert isinstance(ours, type(theirs))
    for name in ATTRIBUTES:
        if hasattr(theirs, name):
            assert getattr(ours, name) == expected(getattr(theirs, name))


def expected(value: Any) -> Any:
    """Return what our error has for a value of smtplib's."""
    if value == "Line too long.":
        return value.encode()  # The only str that smtplib has for a reply.
    if isinstance(value, bytes):
        for secret in SECRETS:
            value = value.replace(secret, b"***")
    return value


@pytest.mark.parametrize("case", FAILURES.values(), ids=FAILURES)
def test_what_catches_djangos_error_catches_ours(case: Case, run: Run) -> None:
    theirs, ours = run(case)
    assert_same_failure(ours.error, theirs.error)
    assert isinstance(ours.error, errors.SMTPError)
    assert ours.error.stage in case.stages
    assert ours.error.maybe_delivered is case.lost
    assert len(ours.received) == len(theirs.received) <= 1
    assert not secrets_in(shown(ours.error) + shown_in_log(ours.records))
    assert not ours.logged


@pytest.mark.parametrize("case", FAILURES.values(), ids=FAILURES)
def test_what_django_swallows_is_logged_once(case: Case, run: Run) -> None:
    theirs, ours = run(case, fail_silently=True)
    assert ours.error is theirs.error is None
    assert ours.sent == theirs.sent == 0
    assert len(ours.received) == len(theirs.received) <= 1
    (record,) = ours.logged
    assert record.name == "django_async_smtp"
    assert record.levelno == logging.ERROR
    assert vars(record)["stage"] in case.stages
    assert not secrets_in(shown_in_log(ours.records))
    assert ONE not in shown_in_log(ours.records)


@pytest.mark.parametrize("fail_silently", [False, True])
@pytest.mark.parametrize("case", SUCCESSES.values(), ids=SUCCESSES)
def test_it_sends_where_django_sends(case: Case, fail_silently: bool, run: Run) -> None:
    theirs, ours = run(case, fail_silently=fail_silently)
    assert ours.error is theirs.error is None
    assert ours.sent == theirs.sent == 1
    assert len(ours.received) == len(theirs.received) == 1
    assert b"QUIT" in ours.lines or "idle" in case.script
    assert [record.levelname for record in ours.logged] == (
        ["WARNING"] if TWO in case.script else []
    )


@pytest.mark.parametrize("case", QUOTES.values(), ids=QUOTES)
def test_a_password_that_the_server_quotes_is_hidden(case: Case, run: Run) -> None:
    theirs, ours = run(case)
    assert secrets_in(str(theirs.error))
    assert_same_failure(ours.error, theirs.error)
    assert not secrets_in(shown(ours.error) + shown_in_log(ours.records))
    _, silenced = run(case, fail_silently=True)
    assert len(silenced.logged) == 1
    assert not secrets_in(shown_in_log(silenced.records))


def test_a_password_in_a_report_would_be_found() -> None:
    with pytest.raises(ssl.SSLError) as caught:
        ssl.create_default_context(cadata=PASSWORD)
    assert secrets_in(shown(caught.value)) == [PASSWORD.encode()]
