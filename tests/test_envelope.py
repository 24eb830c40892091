from __future__ import annotations

import email
import email.charset
import random
import re
from collections.abc import Callable
from email.message import Message, MIMEPart
from email.mime.base import MIMEBase
from typing import Any

import django
import pytest
from django.core.mail import EmailMessage, EmailMultiAlternatives
from django.core.mail.backends.smtp import EmailBackend
from django.utils.translation import gettext_lazy as _

from django_async_smtp.envelope import TAKES_POLICY, mailbox, prepare, with_crlf

from .conftest import MakeBackend
from .servers import MailServer, ScriptedServer

FIXED = {
    "Date": "Fri, 21 Nov 1997 09:55:06 -0600",
    "Message-ID": "<1234@local.machine.example>",
}
LINE_BREAKS = ["\n", "\r", "\r\n"]

Build = Callable[[], EmailMessage]


def build(cls: type[EmailMessage] = EmailMessage, **kwargs: Any) -> EmailMessage:
    """Return a message that comes out the same each time."""
    arguments: dict[str, Any] = {
        "subject": "Hello",
        "body": "Body",
        "from_email": "from@example.com",
        "to": ["to@example.com"],
    }
    headers = FIXED | kwargs.pop("headers", {})
    return cls(**(arguments | kwargs), headers=headers)


def parsed(content: bytes) -> Message:
    return email.message_from_bytes(content)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("a@example.com", "a@example.com"),
        ("<a@example.com>", "a@example.com"),
        ("Name <a@example.com>", "a@example.com"),
        ("Näme 🎈 <a@example.com>", "a@example.com"),
        ('"Last, First" <a@example.com>', "a@example.com"),
        ("a@example.com (a comment)", "a@example.com"),
        ("=?utf-8?q?N=C3=A4me?= <a@example.com>", "a@example.com"),
        (_("Name <a@example.com>"), "a@example.com"),
        ("webmaster", "webmaster"),
        ("The Webmaster <webmaster>", "webmaster"),
        ("a@bücher.example", "a@xn--bcher-kva.example"),
        ("Name <a@bücher.example>", "a@xn--bcher-kva.example"),
        ("a@xn--bcher-kva.example", "a@xn--bcher-kva.example"),
        ("a@[127.0.0.1]", "a@[127.0.0.1]"),
        ('"a b"@example.com', '"a b"@example.com'),
        ('"a@b"@example.com', '"a@b"@example.com'),
        ('"a> SIZE=1"@example.com', '"a> SIZE=1"@example.com'),
        (r'"a\"b"@bücher.example', r'"a\"b"@xn--bcher-kva.example'),
        ("jörg@example.com", "jörg@example.com"),
        ("Jörg <jörg@bücher.example>", "jörg@xn--bcher-kva.example"),
    ],
)
def test_the_mailbox_of_an_address(address: object, expected: str) -> None:
    assert mailbox(address) == expected


@pytest.mark.parametrize(
    "address",
    [
        "",
        " ",
        "<>",
        '""',
        '""@example.com',
        "@example.com",
        "a@",
        "a@\u2028",
        "a@[",
        ".@[",
        "a@b@example.com",
        "a b@example.com",
        "a@exam ple.com",
        "a@example.com>",
        "a@example.com SIZE=1",
        "a@example.com, b@example.com",
        "a@example.com; b@example.com",
        "A <a@example.com>, B <b@example.com>",
        "undisclosed-recipients:;",
        "a@" + "ü" * 64 + ".example",
    ],
)
def test_what_is_not_exactly_one_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match=r"Invalid address|idna"):
        mailbox(address)


@pytest.mark.parametrize("character", ["\0", "\t", "\x1b", "\x7f", "\x85", "\u2028"])
@pytest.mark.parametrize("address", ["a{}b@example.com", '"a{}b"@example.com'])
def test_control_characters_are_refused(address: str, character: str) -> None:
    with pytest.raises(ValueError, match="Invalid address"):
        mailbox(address.format(character))


@pytest.mark.parametrize("line_break", LINE_BREAKS)
@pytest.mark.parametrize(
    "address",
    [
        "a@example.com{}",
        "{}a@example.com",
        "a@example.com {}",
        "a{}@example.com",
        "a@exam{}ple.com",
        '"a{} b"@example.com',
        "Name{} <a@example.com>",
        '"Na{} me" <a@example.com>',
        "a@example.com{}RCPT TO:<b@example.com>",
    ],
)
def test_line_breaks_in_addresses_are_refused(address: str, line_break: str) -> None:
    with pytest.raises(ValueError, match="Invalid address"):
        mailbox(address.format(line_break))


@pytest.mark.parametrize("fail_silently", [False, True])
@pytest.mark.parametrize("line_break", LINE_BREAKS)
@pytest.mark.parametrize(
    "field",
    [
        {"subject": "Hello{}Bcc: evil@example.com"},
        {"subject": "{}Hello"},
        {"subject": "Hello{}"},
        {"subject": "Hellö{}"},
        {"from_email": "from@example.com{}"},
        {"to": ["to@example.com{}"]},
        {"cc": ["Name{} <cc@example.com>"]},
        {"bcc": ["bcc@example.com{}"]},
        {"bcc": ["Name{} <bcc@example.com>"]},
        {"reply_to": ["reply@example.com{}X: y"]},
        {"reply_to": ["reply@example.com{}"]},
        {"headers": {"X-Header": "value{}X-Other: y"}},
        {"headers": {"X-Header": "value{}"}},
        {"headers": {"X-Header{}": "value"}},
        {"headers": {"X-Header: value{}X-Other": "y"}},
        {"headers": {"From": "from@example.com{}X-Other: y"}},
        {"headers": {"To": "to@example.com{}X-Other: y"}},
        {"headers": {"To": "to@example.com{}"}},
        {"headers": {"Message-ID": "<1@example.com>{}X-Other: y"}},
        {"headers": {"Message-ID": "<1@example.com>{}"}},
    ],
    ids=str,
)
def test_line_breaks_are_refused_before_anything_is_sent(
    field: dict[str, Any],
    line_break: str,
    fail_silently: bool,
    make_backend: MakeBackend,
) -> None:
    with ScriptedServer() as server:
        backend = make_backend(server, fail_silently=fail_silently)
        with pytest.raises(ValueError):  # noqa: PT011 (Django's and Python's words)
            backend.send_messages([build(**with_break(field, line_break))])
        assert server.commands(b"MAIL") == []
        assert server.received == []


@pytest.mark.parametrize("end", ["=0A", "=0D=0A", "=0ABcc=3A_b", "=0D=0A=0D=0AB"])
def test_an_encoded_line_break_stays_encoded_or_is_refused(end: str) -> None:
    word = f"=?utf-8?q?A{end}?="
    message = build(subject=word, headers={"X-Header": word})
    try:
        found = parsed(prepare(message).content)
    except ValueError:
        return
    assert (
        found.keys() == parsed(prepare(build(headers={"X-Header": ""})).content).keys()
    )
    assert found.get_payload() == "Body\r\n"


def with_break(value: Any, line_break: str) -> Any:
    """Put the line break where the braces are."""
    if isinstance(value, dict):
        return {
            with_break(k, line_break): with_break(v, line_break)
            for k, v in value.items()
        }
    if isinstance(value, list):
        return [with_break(item, line_break) for item in value]
    return value.format(line_break)


@pytest.mark.parametrize("fail_silently", [False, True])
@pytest.mark.parametrize(
    "field",
    [
        {"from_email": "from@example.com, other@example.com"},
        {"to": ["to@example.com, other@example.com"]},
        {"cc": ["garbage @ example.com>"]},
        {"bcc": ["bcc@example.com; other@example.com"]},
        {"bcc": ["b\0cc@example.com"]},
    ],
    ids=str,
)
def test_a_message_with_a_bad_address_is_not_sent(
    field: dict[str, Any], fail_silently: bool, make_backend: MakeBackend
) -> None:
    with ScriptedServer() as server:
        backend = make_backend(server, fail_silently=fail_silently)
        with pytest.raises(ValueError, match="Invalid address"):
            backend.send_messages([build(**field)])
        assert server.commands(b"MAIL") == []


def test_all_kinds_of_recipients_are_in_the_envelope_and_bcc_not_in_the_headers(
    server: MailServer, make_backend: MakeBackend
) -> None:
    message = build(
        from_email=_("Sender <from@example.com>"),
        to=[_("To <to@example.com>")],
        cc=["cc@bücher.example"],
        bcc=["Hidden <hidden@example.com>", "webmaster"],
    )
    assert make_backend(server).send_messages([message]) == 1
    (received,) = server.received
    assert received.sender == "from@example.com"
    assert received.recipients == [
        "to@example.com",
        "cc@xn--bcher-kva.example",
        "hidden@example.com",
        "webmaster",
    ]
    headers = parsed(received.content)
    assert headers["From"] == "Sender <from@example.com>"
    assert headers["To"] == "To <to@example.com>"
    assert headers["Cc"] == "cc@xn--bcher-kva.example"
    assert b"hidden" not in received.content


@pytest.mark.parametrize("name", ["Bcc", "BCC", "bcc"])
def test_a_bcc_header_does_not_go_out(
    name: str, server: MailServer, make_backend: MakeBackend
) -> None:
    backend = make_backend(server)
    message = build(headers={name: "hidden@example.com"})
    if django.VERSION >= (6, 1):
        with pytest.raises(ValueError, match="Bcc is not a valid email header"):
            backend.send_messages([message])
        return
    assert backend.send_messages([message]) == 1
    (received,) = server.received
    assert received.recipients == ["to@example.com"]
    assert b"hidden" not in received.content


def test_a_non_ascii_local_part_goes_out_with_smtputf8(
    make_backend: MakeBackend,
) -> None:
    message = build(
        subject="Grüße",
        from_email=_("Jörg <jörg@bücher.example>"),
        to=["Käthe <käthe@example.com>", "to@example.com"],
        cc=["γιώργος@example.com"],
        reply_to=["antwört@example.com"],
    )
    with MailServer(smtputf8=True) as server:
        assert make_backend(server).send_messages([message]) == 1
    (received,) = server.received
    assert "SMTPUTF8" in received.options.split()
    assert received.sender == "jörg@xn--bcher-kva.example"
    assert received.recipients == [
        "käthe@example.com",
        "to@example.com",
        "γιώργος@example.com",
    ]
    head = received.content.partition(b"\r\n\r\n")[0].decode()
    lines = re.sub(r"\r\n +", " ", head).split("\r\n")
    assert "From: Jörg <jörg@bücher.example>" in lines
    assert "To: Käthe <käthe@example.com>, to@example.com" in lines
    assert "Cc: γιώργος@example.com" in lines
    assert "Reply-To: antwört@example.com" in lines


def test_many_recipients_in_utf8_are_folded() -> None:
    to = ["jörg@example.com", *(f"recipient{i}@example.com" for i in range(100))]
    content = prepare(build(to=to)).content
    assert max(map(len, content.split(b"\r\n"))) < 998
    assert content.count(b"@example.com") == 102


@pytest.mark.parametrize("fail_silently", [False, True])
@pytest.mark.parametrize("address", ["jörg@example.com", "J <jörg@bücher.example>"])
def test_a_non_ascii_local_part_needs_smtputf8(
    address: str,
    fail_silently: bool,
    server: MailServer,
    make_backend: MakeBackend,
    make_django_backend: MakeBackend,
) -> None:
    text = f"Invalid address {address!r}: local-part contains non-ASCII characters)"
    makers = [make_backend]
    if hasattr(EmailBackend, "prep_address"):
        makers.append(make_django_backend)
    for field in ({"from_email": address}, {"to": [address]}, {"bcc": [address]}):
        for make in makers:
            backend = make(server, fail_silently=fail_silently)
            with pytest.raises(ValueError, match=re.escape(text)) as raised:
                backend.send_messages([build(**field)])
            assert str(raised.value) == text
    assert server.received == []


def test_a_session_is_used_again_after_an_address_that_it_cannot_take(
    make_backend: MakeBackend,
) -> None:
    with ScriptedServer() as server:
        backend = make_backend(server)
        with pytest.raises(ValueError, match="jörg"):
            backend.send_messages([build(to=["jörg@example.com"]), build()])
    assert [received.recipients for received in server.received] == [["to@example.com"]]
    assert server.connections == 1


@pytest.mark.parametrize(
    ("body", "body_parameter"), [("ASCII", ""), ("Grüße", " BODY=8BITMIME")]
)
def test_mail_says_the_size_and_whether_the_content_is_8_bit(
    body: str, body_parameter: str, make_backend: MakeBackend
) -> None:
    message = build(body=body)
    size = len(prepare(message).content)
    with ScriptedServer(extensions=("SIZE", "8BITMIME")) as server:
        make_backend(server).send_messages([message])
    expected = f"MAIL FROM:<from@example.com> SIZE={size}{body_parameter}"
    assert server.commands(b"MAIL") == [expected.encode()]
    assert len(server.received[0].content) == size


def test_mail_says_nothing_that_the_server_did_not_offer(
    make_backend: MakeBackend,
) -> None:
    with ScriptedServer(extensions=()) as server:
        make_backend(server).send_messages([build(body="Grüße")])
    assert server.commands(b"MAIL") == [b"MAIL FROM:<from@example.com>"]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", b"\r\n"),
        (b"a", b"a\r\n"),
        (b"a\r\n", b"a\r\n"),
        (b"a\nb", b"a\r\nb\r\n"),
        (b"a\rb\n", b"a\r\nb\r\n"),
        (b"a\r\r\nb", b"a\r\n\r\nb\r\n"),
        (b"a\n\rb", b"a\r\n\r\nb\r\n"),
        (b"a\r", b"a\r\n"),
        (b"a\r\n\r\n", b"a\r\n\r\n"),
        (b"a\n.\nb\r.\rc\r\n.\nd", b"a\r\n.\r\nb\r\n.\r\nc\r\n.\r\nd\r\n"),
    ],
)
def test_every_line_ends_with_crlf(data: bytes, expected: bytes) -> None:
    assert with_crlf(data) == expected


class Raw(EmailMessage):
    """A message whose content is the body, to the byte."""

    def message(self, **kwargs: Any) -> Any:
        raw = self.body.encode()

        class AsIs(Message):
            def as_bytes(self, *args: Any, **kwargs: Any) -> bytes:
                return raw

        return AsIs()


@pytest.mark.parametrize("end", [b"\n.\n", b"\r.\r", b"\r\n.\r", b"\n.\r\n"])
def test_a_lone_cr_or_lf_does_not_end_the_message(
    end: bytes, server: MailServer, make_backend: MakeBackend
) -> None:
    smuggled = b"before" + end + b"MAIL FROM:<evil@example.com>\r\n"
    make_backend(server).send_messages([build(Raw, body=smuggled.decode())])
    (received,) = server.received
    assert received.sender == "from@example.com"
    assert received.content == (b"before\r\n.\r\nMAIL FROM:<evil@example.com>\r\n"), (
        "one message, its line ends mended"
    )


@pytest.mark.parametrize(
    "body",
    [".", "..", ".\r\n", "a\r\n.\r\nb", ".a\r\n..b\r\n...\r\n", "\r\n.\r\n.\r\n"],
)
def test_dots_at_the_start_of_lines_arrive_unchanged(
    body: str, server: MailServer, make_backend: MakeBackend
) -> None:
    make_backend(server).send_messages([build(Raw, body=body)])
    (received,) = server.received
    assert received.content == with_crlf(body.encode())


def test_the_repr_of_an_envelope_shows_no_address_and_no_content() -> None:
    envelope = prepare(build(body="secret", bcc=["hidden@example.com"]))
    assert repr(envelope) == f"<Envelope: 2 recipients, {len(envelope.content)} B>"


class WithHeader(EmailMessage):
    def message(self, **kwargs: Any) -> Any:
        message = super().message(**kwargs)
        message["X-Added"] = "late"
        return message


def alternatives() -> EmailMessage:
    message = build(EmailMultiAlternatives, body="Text 🎈\r\n")
    assert isinstance(message, EmailMultiAlternatives)
    message.attach_alternative("<p>Grüße 🎈</p>", "text/html")
    message.attach_alternative(b"{}", "application/json")
    message.attach("a.txt", "Attached, häppily", "text/plain")
    return message


def html() -> EmailMessage:
    message = build(body="<p>Hällo</p>\n" + "<br>" * 400)
    message.content_subtype = "html"
    return message


def encoded(encoding: Any, body: str = "Grüße") -> Build:
    def make() -> EmailMessage:
        message = build(subject=body, body=body, attachments=[("ü.txt", body, None)])
        message.encoding = encoding
        return message

    return make


def attachments() -> EmailMessage:
    part: Any = MIMEPart() if TAKES_POLICY else MIMEBase("application", "pdf")
    if TAKES_POLICY:
        part.set_content(b"%PDF", "application", "pdf", filename="ä.pdf")
    else:
        part.set_payload("%PDF")
    return build(
        attachments=[
            ("a.txt", "text\nof lines\r\n", "text/plain"),
            ("ä 🎈.txt", b"gr\xc3\xbc\xc3\x9fe", "text/plain"),
            ("latin.txt", b"gr\xfc\xdfe", "text/plain"),
            ("long.csv", "x" * 2000, "text/csv"),
            ("a.bin", bytes(range(256)) * 20, None),
            (None, b"nameless", "application/octet-stream"),
            part,
        ]
    )


def forwarded(content: Callable[[], object]) -> Build:
    return lambda: build(attachments=[("f.eml", content(), "message/rfc822")])


quoted = email.charset.Charset("utf-8")
quoted.body_encoding = email.charset.QP

MESSAGES: dict[str, Build] = {
    "plain": build,
    "empty body": lambda: build(body=""),
    "empty subject": lambda: build(subject=""),
    "no line end": lambda: build(body="one\ntwo"),
    "mixed line ends": lambda: build(body="a\nb\rc\r\nd\n\re\r\r\nf\r"),
    "blank lines at the end": lambda: build(body="a\n\n\r\n\n"),
    "leading dots": lambda: build(body=".\n..\r\n.a\n\n.\n"),
    "leading From": lambda: build(body="From here\nFrom there\n"),
    "long line": lambda: build(body="x" * 2500),
    "long line, not ASCII": lambda: build(body="ü🎈 " * 700),
    "long lines with dots": lambda: build(body="." * 2500 + "\n." + "y" * 1200),
    "non-ASCII": lambda: build(subject="Grüße", body="Grüße 🎈 こんにちは\n"),
    "control characters": lambda: build(body="a\0b\x0bc\x0cd\x1ce\x85f\u2028g"),
    "lazy": lambda: build(subject=_("Hello"), body=_("Body"), to=[_("to@example.com")]),
    "long subject": lambda: build(subject="word " * 60),
    "long word as subject": lambda: build(subject="x" * 900),
    "long subject, not ASCII": lambda: build(subject="wörd 🎈 " * 60),
    "display names": lambda: build(
        from_email="Jörg Ü <from@example.com>",
        to=['"Last, First" <to@example.com>', "Näme 🎈 <other@bücher.example>"],
        cc=["<cc@example.com>", "Cc Ä <cc2@example.com>"],
        bcc=["Hidden <hidden@example.com>"],
        reply_to=["Reply Ö <reply@bücher.example>", "reply2@example.com"],
    ),
    "no domain": lambda: build(from_email="webmaster", to=["Root <root>"]),
    "quoted local parts": lambda: build(
        to=['"a b"@example.com', r'"a\"b"@example.com']
    ),
    "many recipients": lambda: build(
        to=[f"Recipient {i} <to{i}@example.com>" for i in range(200)],
        cc=[f"cc{i}@example.com" for i in range(100)],
        bcc=[f"bcc{i}@example.com" for i in range(100)],
    ),
    "the same recipient twice": lambda: build(cc=["to@example.com"]),
    "headers": lambda: build(
        headers={
            "X-Thing": "väl 🎈",
            "X-Long": "word " * 100,
            "X-Lazy": _("lazy"),
            "List-Unsubscribe": "<https://example.com/" + "u" * 300 + ">",
            "References": " ".join(f"<{i}@example.com>" for i in range(30)),
            "Sender": "Sendär <sender@bücher.example>",
        }
    ),
    "headers in place of addresses": lambda: build(
        cc=["cc@example.com"],
        reply_to=["reply@example.com"],
        headers={
            "From": "Other <other@example.com>",
            "To": "list:;",
            "Cc": "nobody@example.com",
            "Reply-To": "Höther <other@example.com>",
        },
    ),
    "html": html,
    "alternatives": alternatives,
    "alternative without a body": lambda: build(
        EmailMultiAlternatives, body="", alternatives=[("<p>Hi</p>", "text/html")]
    ),
    "iso-8859-1": encoded("iso-8859-1"),
    "iso-2022-jp": encoded("iso-2022-jp", "こんにちは"),
    "attachments": attachments,
    "attachment without a body": lambda: build(
        body="", attachments=[("a.bin", b"\0", "application/octet-stream")]
    ),
    "forwarded message": forwarded(lambda: build(subject="Fwd: Grüße", body="Grüße")),
    "forwarded stdlib message": forwarded(
        lambda: email.message_from_bytes(b"Subject: Fwd\n\n.Body\n")
    ),
    "forwarded text": forwarded(lambda: "Subject: Fwd\r\n\r\n.Body\n"),
    "message() overridden": lambda: build(WithHeader),
}
if not TAKES_POLICY:
    MESSAGES["Charset"] = encoded(quoted)


@pytest.mark.parametrize("make_message", MESSAGES.values(), ids=MESSAGES)
def test_what_arrives_is_what_djangos_backend_sends(
    make_message: Build,
    server: MailServer,
    make_backend: MakeBackend,
    make_django_backend: MakeBackend,
) -> None:
    for make in (make_django_backend, make_backend):
        backend = make(server)
        random.seed(0)  # The boundaries of multiparts.
        assert backend.send_messages([make_message()]) == 1
    theirs, ours = server.received
    assert ours.content == theirs.content
    assert (ours.sender, ours.recipients) == (theirs.sender, theirs.recipients)
