from __future__ import annotations

import asyncio
import logging
import time
from base64 import b64encode
from collections.abc import Iterator
from typing import Any

import django
import pytest
from django.core.mail import EmailMessage
from django.utils.log import AdminEmailHandler

from django_async_smtp import SMTPError, hints
from django_async_smtp.logs import log, logger, masked, redacted
from django_async_smtp.options import Options
from django_async_smtp.session import Session

from .conftest import MakeBackend
from .servers import (
    CLOSE,
    PASSWORD,
    USERNAME,
    MailServer,
    Script,
    ScriptedServer,
    free_port,
)
from .settings import USES_MAILERS

NAME = "django_async_smtp"


def message(*to: str, subject: str = "Hello") -> EmailMessage:
    recipients = to or ("to@example.com",)
    return EmailMessage(subject, "Body", "from@example.com", recipients)


def encoded(text: str) -> str:
    return b64encode(text.encode()).decode()


@pytest.fixture(autouse=True)
def _everything_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("joe@example.com", "j***@example.com"),
        ("<joe.doe+tag@example.com>: unknown", "<j***@example.com>: unknown"),
        ("RCPT TO:<joe@example.com>", "RCPT TO:<j***@example.com>"),
        ("a@example.com,bob@example.com", "a***@example.com,b***@example.com"),
        ("Joe <joe@example.com> (joe)", "Joe <j***@example.com> (joe)"),
        ("jörg@bücher.example", "j***@bücher.example"),
        ("joe@localhost.", "j***@localhost."),
        ("joe@[127.0.0.1]", "j***@[127.0.0.1]"),
        ('said "hi" "joe doe"@example.com', 'said "hi" j***@example.com'),
        (r'"joe\"doe"@example.com', "j***@example.com"),
        ("joe@doe@example.com", "j***@doe@example.com"),
        ("127.0.0.1:25 refused it: 550 5.1.1 @ noon", None),
        ("", None),
    ],
)
def test_addresses_are_masked(text: str, expected: str | None) -> None:
    assert masked(text) == (text if expected is None else expected)


@pytest.mark.parametrize(
    "text",
    ["x", "@", "a@", "a@[", '"', r"\"a", '"a', "A=", "a b@", "AAAA", "AAAA ", "%20"],
)
def test_masking_what_a_server_says_takes_no_time(text: str) -> None:
    long = '"a' + text * (32_000 // len(text))
    start = time.process_time()
    masked(long)
    redacted(long, (PASSWORD, USERNAME, "a long secret" * 80))
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize(
    "text",
    [
        f"535 {PASSWORD} is wrong",
        f"535 {USERNAME} may not",
        f"500 AUTH LOGIN {encoded(PASSWORD)}",
        f"500 unknown: '{encoded(USERNAME)}'",
        f"500 AUTH PLAIN {encoded(f'{chr(0)}{USERNAME}{chr(0)}{PASSWORD}')}",
        f"500 {encoded(f'{chr(0)}{USERNAME}{chr(0)}{PASSWORD}').rstrip('=')}",
        f"500 {encoded(f'{USERNAME} 0123456789abcdef')} is no CRAM-MD5",
    ],
)
def test_credentials_are_redacted(text: str) -> None:
    found = redacted(text, (PASSWORD, USERNAME))
    for secret in (PASSWORD, USERNAME, encoded(PASSWORD)[:8], encoded(USERNAME)[:4]):
        assert secret not in found
    assert "***" in found
    assert found.startswith(text[:4])


PLAIN = encoded(f"\0{USERNAME}\0{PASSWORD}")
LONG_NAME = "somebody@example.com"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        *((f"{encoded(PASSWORD)[:end]}...", "***...") for end in range(8, 28)),
        *((f"{encoded(PASSWORD)[start:]}.", "***.") for start in range(19)),
        *((f"=/{'x' * more}{encoded(PASSWORD)}", "=***") for more in range(4)),
        *((f"{PLAIN[:end]}...", "***...") for end in range(8, len(PLAIN))),
        (f"'{encoded(LONG_NAME)[:12]}'", "'***'"),
        ("correct horse bat...", "***..."),
        ("...t horse b", "...***"),
        ("correct, horse battery", "correct,***"),
        ("the password is incorrect", "the password is incorrect"),
        ("incorrect horse", "in***"),
        ("x" + PASSWORD * 2, "x***"),
        ("auth=correct%20horse%20battery&x", "auth=***&x"),
        ("correct%20hor%", "***%"),
        ("%63%6F%72%72%65%63%74%20", "***"),
        ("100%25 correct%20horse", "100%25 ***"),
    ],
)
def test_no_part_of_a_password_stays(said: str, expected: str) -> None:
    assert redacted(f"500 no: {said}", (PASSWORD, LONG_NAME, USERNAME)) == (
        f"500 no: {expected}"
    )


@pytest.mark.parametrize("said", ["schlüssel", "schl%C3%BCssel", "l%C3%BCssel", "ssel"])
def test_a_password_may_be_other_than_ascii(said: str) -> None:
    expected = said if said == "ssel" else "***"
    assert (
        redacted(f"500 {said} %C3 %fcx", ("schlüssel",)) == f"500 {expected} %C3 %fcx"
    )


@pytest.mark.parametrize("said", ["pa%20ss", "a%20s", "xpa%20ssx"])
def test_a_password_may_look_percent_encoded(said: str) -> None:
    text = redacted(said, ("pa%20ss",))
    assert text == {"pa%20ss": "***", "a%20s": "a%20s", "xpa%20ssx": "x***x"}[said]


@pytest.mark.parametrize(
    "text",
    [
        "250 mx.example.com greets somebody",
        "535 the battle of the correct horsemen is not in a secret",
        f"334 {encoded('nobody@home')}",
        "550 batte staff, or the ttery",
    ],
)
def test_what_a_secret_shares_by_chance_stays(text: str) -> None:
    assert redacted(text, ("battery staple", LONG_NAME)) == text


@pytest.mark.parametrize(
    ("secret", "said", "expected"),
    [
        ("abc", "535 abc, not ab", "535 ***, not ab"),
        ("password", "535 password", "535 ***"),
        ("abcde", f"535 {encoded('xabcdex')}", "535 ***"),
        ("abcde", f"535 {encoded('xabcdx')} abcd", f"535 {encoded('xabcdx')} abcd"),
    ],
)
def test_a_short_secret_is_hidden_as_a_whole(
    secret: str, said: str, expected: str
) -> None:
    assert redacted(said, (secret,)) == expected


@pytest.mark.parametrize("secrets", [(), ("",), (PASSWORD, USERNAME)])
@pytest.mark.parametrize(
    "text", ["", "535 5.7.8 Authentication failed", "ask https://help/abcd=", "AAAAA"]
)
def test_anything_else_stays(text: str, secrets: tuple[str, ...]) -> None:
    assert redacted(text, secrets) == text


def ours(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Return what was logged above DEBUG by whomever, but for the test servers."""
    return [
        record
        for record in caplog.records
        if record.levelno > logging.DEBUG and record.name != "mail.log"
    ]


REFUSAL = b"550 5.7.1 <joe@example.com> is not welcome\r\n"


@pytest.mark.parametrize(
    ("script", "stage", "code"),
    [
        ({"greeting": b"554 no\r\n"}, "greeting", 554),
        ({"greeting": CLOSE}, "greeting", None),
        ({"ehlo": b"550 no\r\n", "helo": b"550 no\r\n"}, "ehlo", 550),
        ({"auth": b"535 5.7.8 no\r\n"}, "auth", 535),
        ({"mail": REFUSAL}, "mail", 550),
        ({"rcpt": REFUSAL}, "rcpt", None),
        ({"data": b"451 later\r\n"}, "data", 451),
        ({"body": b"554 spam from joe@example.com\r\n"}, "body", 554),
        ({"body": CLOSE}, "body", None),
    ],
    ids=str,
)
def test_what_fail_silently_swallows_is_logged_once_at_error(
    script: Script,
    stage: str,
    code: int | None,
    make_backend: MakeBackend,
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = {"username": USERNAME, "password": PASSWORD}
    with ScriptedServer(scripts=(script,), extensions=("AUTH PLAIN",)) as server:
        backend = make_backend(server, fail_silently=True, **options)
        assert backend.send_messages([message()]) == 0
        backend.fail_silently = False
        with pytest.raises(SMTPError) as raised:
            backend.send_messages([message()])
    (record,) = ours(caplog)
    assert (record.name, record.levelname) == (NAME, "ERROR")
    fields = vars(record)
    assert fields["stage"] == stage
    assert fields["server"] == f"{server.host}:{server.port}"
    assert fields["smtp_code"] == code
    assert fields["hint"] == raised.value.hint
    assert fields["temporary"] == raised.value.temporary
    assert fields["maybe_delivered"] == raised.value.maybe_delivered
    text = record.getMessage()
    assert text.startswith(
        f"Mail not sent (fail_silently): {masked(str(raised.value))}"
    )
    assert raised.value.hint in text
    assert "joe@" not in text


def test_a_dead_server_is_logged_with_a_hint(
    make_backend: MakeBackend,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hints, "is_in_container", lambda: False)
    port = free_port()
    backend = make_backend(host="127.0.0.1", port=port, fail_silently=True)
    assert backend.send_messages([message(), message()]) == 0
    assert backend.open() is None
    first, second = ours(caplog)
    assert first.getMessage() == second.getMessage()
    assert f"connecting: 127.0.0.1:{port} failed" in first.getMessage()
    assert f"No server listens at 127.0.0.1:{port}." in first.getMessage()


@pytest.mark.asyncio
async def test_the_async_api_logs_the_same(
    make_backend: MakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    backend = make_backend(host="127.0.0.1", port=free_port(), fail_silently=True)
    assert await backend.asend_messages([message()]) == 0
    assert await backend.aopen() is None
    with ScriptedServer(scripts=({"rcpt": REFUSAL},)) as server:
        backend.port = server.port
        assert await backend.asend_messages([message()]) == 0
    assert [vars(record)["stage"] for record in ours(caplog)] == [
        "connect",
        "connect",
        "rcpt",
    ]


def test_each_message_that_failed_is_logged(
    server: MailServer, make_backend: MakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    backend = make_backend(server, fail_silently=True)
    batch = [message("nouser@example.com"), message(), message(subject="reject me")]
    assert backend.send_messages(batch) == 1
    assert [vars(record)["stage"] for record in ours(caplog)] == ["rcpt", "body"]


@pytest.mark.parametrize("fail_silently", [False, True])
def test_recipients_that_were_refused_are_a_warning(
    fail_silently: bool,
    server: MailServer,
    make_backend: MakeBackend,
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = make_backend(server, fail_silently=fail_silently)
    to = ("to@example.com", "nouser@example.com", "greylisted@example.com")
    assert backend.send_messages([message(*to), message()]) == 2
    (record,) = ours(caplog)
    assert (record.name, record.levelname) == (NAME, "WARNING")
    assert vars(record)["stage"] == "rcpt"
    assert vars(record)["server"] == f"{server.host}:{server.port}"
    assert record.getMessage() == (
        f"{server.host}:{server.port} refused 2 of 3 recipients of a message that the "
        "others got: n***@example.com: 550 5.1.1 <n***@example.com>: user unknown; "
        "g***@example.com: 451 4.7.1 greylisted, try again later"
    )


def test_what_is_raised_is_not_logged(
    server: MailServer, make_backend: MakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    backend = make_backend(server)
    for failing in (message("nouser@example.com"), message(subject="reject me")):
        with pytest.raises(SMTPError):
            backend.send_messages([failing])
    with pytest.raises(ValueError, match="Invalid address"):
        backend.send_messages([message("nobody at all")])
    backend.port = free_port()
    with pytest.raises(SMTPError):
        backend.send_messages([message()])
    assert ours(caplog) == []


def test_a_good_message_is_not_logged(
    server: MailServer, make_backend: MakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    make_backend(server).send_messages([message()])
    assert ours(caplog) == []


def test_a_server_cannot_forge_a_record(
    make_backend: MakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    said = b"550-no\r\n550-ERROR \x1b[2J %s %d\r\n550 \xff end\r\n"
    with ScriptedServer(scripts=({"a@example.com": said},)) as server:
        make_backend(server).send_messages([message("a@example.com", "b@example.com")])
    (record,) = ours(caplog)
    assert record.getMessage().isprintable()
    assert "no ERROR  [2J %s %d" in record.getMessage()


def test_nothing_is_made_of_a_record_that_nobody_wants(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.CRITICAL, logger=NAME)
    log(logging.ERROR, "%d", "no number")
    assert caplog.records == []
    assert logger.name == NAME


@pytest.fixture
def mails_errors(settings: Any) -> Iterator[None]:
    """Mail every error that is logged to the admins, through the default backend."""
    admin = "admin@example.com"
    settings.ADMINS = [("Admin", admin)] if django.VERSION < (6, 0) else [admin]
    handler = AdminEmailHandler()
    handler.setLevel(logging.ERROR)
    logging.getLogger().addHandler(handler)
    yield
    logging.getLogger().removeHandler(handler)


DEAD: Script = {"greeting": b"554 5.3.2 down for joe@example.com\r\n"}


def fail_silently(settings: Any) -> None:
    """Do so where AdminEmailHandler leaves it to MAILERS."""
    if USES_MAILERS:
        settings.MAILERS["default"]["OPTIONS"]["fail_silently"] = True


@pytest.mark.usefixtures("mails_errors")
def test_a_handler_that_mails_errors_works(
    server: MailServer, make_backend: MakeBackend
) -> None:
    make_backend(server)
    logging.getLogger("app").error("boom")
    (received,) = server.received
    assert received.recipients == ["admin@example.com"]
    assert b"boom" in received.content


@pytest.mark.usefixtures("mails_errors")
def test_a_record_that_cannot_be_mailed_is_not_mailed_again(
    make_backend: MakeBackend,
    settings: Any,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with ScriptedServer(scripts=(DEAD,)) as server:
        make_backend(server)
        fail_silently(settings)
        logging.getLogger("app").error("boom")
        assert server.connections == 1
    assert [record.name for record in ours(caplog)] == ["app"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Mail not sent (fail_silently): the greeting refused by")
    assert "j***@example.com" in line


@pytest.mark.usefixtures("mails_errors")
def test_mail_that_fails_silently_is_mailed_once(
    make_backend: MakeBackend,
    settings: Any,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with ScriptedServer(scripts=(DEAD,)) as server:
        backend = make_backend(server, fail_silently=True)
        fail_silently(settings)
        assert backend.send_messages([message()]) == 0
        assert server.connections == 2, "the message, and the mail about it"
    assert [record.name for record in ours(caplog)] == [NAME]
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.skipif(not USES_MAILERS, reason="MAILERS only")
@pytest.mark.usefixtures("mails_errors")
def test_a_handler_that_is_not_silent_raises_as_with_djangos_backend(
    make_backend: MakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    with ScriptedServer(scripts=(DEAD,)) as server:
        make_backend(server)
        with pytest.raises(SMTPError):
            logging.getLogger("app").error("boom")
        assert server.connections == 1
    assert NAME not in {record.name for record in ours(caplog)}


@pytest.mark.parametrize(
    "said",
    [
        f"{USERNAME} with {PASSWORD}",
        encoded(PASSWORD),
        encoded(f"\0{USERNAME}\0{PASSWORD}"),
    ],
)
@pytest.mark.parametrize("code", [535, 454, 421, 500])
def test_credentials_that_a_server_quotes_are_not_logged(
    code: int,
    said: str,
    make_backend: MakeBackend,
    caplog: pytest.LogCaptureFixture,
) -> None:
    script: Script = {"auth": f"{code} no: {said}\r\n".encode()}
    options = {"username": USERNAME, "password": PASSWORD}
    with ScriptedServer(scripts=(script,), extensions=("AUTH PLAIN",)) as server:
        backend = make_backend(server, fail_silently=True, **options)
        assert backend.send_messages([message()]) == 0
    (record,) = ours(caplog)
    told = repr([vars(each) for each in caplog.records])
    assert vars(record)["smtp_code"] == code
    for secret in (PASSWORD, encoded(PASSWORD), encoded(f"\0{USERNAME}\0{PASSWORD}")):
        assert secret not in told
    assert USERNAME not in record.getMessage()


@pytest.mark.asyncio
async def test_no_repr_shows_the_password(make_backend: MakeBackend) -> None:
    options: dict[str, Any] = {"username": USERNAME, "password": PASSWORD}
    with ScriptedServer(extensions=("AUTH PLAIN",)) as server:
        backend = make_backend(server, **options)
        session = await Session.open(
            Options(host=server.host, port=server.port, **options)
        )
        try:
            for item in (backend, session, session.options, [vars(session)]):
                assert PASSWORD not in repr(item)
                assert USERNAME not in repr(item)
        finally:
            await session.quit()


@pytest.mark.filterwarnings("ignore:Sending mail synchronously")
@pytest.mark.timeout(20)
@pytest.mark.usefixtures("mails_errors")
def test_an_error_that_is_logged_and_mailed_in_a_coroutine_does_not_hang(
    make_backend: MakeBackend, settings: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    async def view() -> None:
        logging.getLogger("app").error("boom")

    with ScriptedServer(scripts=({"rcpt": b"550 no\r\n"},)) as server:
        make_backend(server)
        fail_silently(settings)
        asyncio.run(view())
        assert len(server.commands(b"MAIL")) == 1
    assert "refused by" in capsys.readouterr().err
