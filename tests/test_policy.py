from __future__ import annotations

import copy
import email
import email.policy
import gc
import pickle
import random
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, timezone
from email.headerregistry import Address, Group, UnstructuredHeader
from email.message import EmailMessage
from typing import Any

import pytest
from django.core import mail
from hypothesis import given, settings
from hypothesis import strategies as st

from django_async_smtp import policy
from django_async_smtp.envelope import (
    TAKES_POLICY,
    kept_mailbox,
    mailbox,
    parsed_mailbox,
)
from django_async_smtp.policy import (
    KEPT_FOLDS,
    KEPT_HEADERS,
    KEPT_LENGTH,
    KEPT_NAMES,
    SMTP,
    SMTPUTF8,
    CachingRegistry,
    plain_mailbox,
)

# Each of ours with the one that it must equal.
PAIRS = [(SMTP, email.policy.SMTP), (SMTPUTF8, email.policy.SMTPUTF8)]

takes_policy = pytest.mark.skipif(
    not TAKES_POLICY, reason="this Django builds messages without a policy"
)


@pytest.fixture(autouse=True)
def _nothing_kept() -> Iterator[None]:
    forget()
    yield
    forget()


def forget() -> None:
    policy._slot.cache_clear()
    kept_mailbox.cache_clear()


def outcome(make: Callable[[], object]) -> object:
    """Return what comes of a call, an error included."""
    random.seed(0)  # The boundaries of multiparts.
    try:
        return make()
    except Exception as error:
        return type(error), str(error)


def with_header(policy: Any, name: str, value: Any) -> EmailMessage:
    message = EmailMessage(policy=policy)
    message[name] = value
    return message


FIELDS = [
    *("addresses", "groups", "datetime", "params", "content_type", "maintype"),
    *("subtype", "content_disposition", "cte", "version", "max_count"),
]


def seen(policy: Any, name: str, value: Any) -> object:
    """Return all that can be seen of a header in a message."""

    def look() -> object:
        message = with_header(policy, name, value)
        header = message[name]
        return (
            str(header),
            header.name,
            [(type(defect), str(defect)) for defect in header.defects],
            [repr(getattr(header, field, None)) for field in FIELDS],
            outcome(message.as_bytes),
            outcome(message.as_string),
        )

    return outcome(look)


NAMES = [
    *("Subject", "subject", "Date", "Message-ID", "From", "To", "Cc", "Reply-To"),
    *("Sender", "Resent-To", "Resent-Date", "References", "X-Thing", "x" * 80),
    *("MIME-Version", "Content-Type", "Content-Disposition", "Content-ID"),
    *("Content-Transfer-Encoding", "List-Unsubscribe", "X-Näme", "X Space", "X\nY", ""),
]

ATOMS = st.text("abcXYZ019!#$%&'*+/=?^_`{|}~-", min_size=1, max_size=12)
DOT_ATOMS = st.lists(ATOMS, min_size=1, max_size=3).map(".".join)
ADDR_SPECS = st.tuples(DOT_ATOMS, DOT_ATOMS).map("@".join)
PLAIN_NAMES = st.lists(ATOMS, min_size=1, max_size=3).map(" ".join)
PLAIN_MAILBOXES = ADDR_SPECS | st.tuples(PLAIN_NAMES, ADDR_SPECS).map(
    lambda parts: f"{parts[0]} <{parts[1]}>"
)
MAILBOXES = PLAIN_MAILBOXES | st.sampled_from(
    [
        *("Jörg <j@example.com>", "Jörg Müller Ü <jörg@bücher.example>", "<a@b>"),
        *('"Last, First" <a@b.c>', r'"q\"q"@example.com', "J. Q. Public <j@b.c>"),
        *("a@[127.0.0.1]", "a@b (comment)", "(c) a@b", "webmaster", "a@", "@b", ""),
        *("=?utf-8?q?J=C3=B6rg?= <a@b.c>", "=?x?q?y?=@b.c", "a <=?utf-8?q?a?=@b>"),
        *("list:;", "list: a@b, c@d;", "A  B <a@b>", " a@b", "a@b ", "a@b\t", "A<a@b>"),
        *("n" * 70 + " <a@b>", "l" * 90 + "@b.c", "a@" + "d" * 76, "<a@b", "a..b@c"),
    ]
)
ADDRESS_LISTS = st.lists(MAILBOXES, max_size=12).map(", ".join) | st.lists(
    PLAIN_MAILBOXES, max_size=30
).map(", ".join)
ASCII = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=100)
WORDS = st.text("ab .,@<>\"()=?ü🎈'_:;/", max_size=120)
ODD = st.sampled_from(
    [
        *("a\nb", "a\r\nBcc: b", "a\r", "\n", "a\n", "a\x0bb", "a\x85b", "a\u2028b"),
        *("a\0b", "\t", " ", "  a  b ", "\x7f", "\udcff raw", "raw \udce9\udc80"),
        *("=?utf-8?q?a?=", "=?utf-8?q?a?= =?utf-8?b?w7w=?=", "a=?utf-8?q?b?=c", "=?"),
        *("=?utf-8?q?a=0Ab?=", "=?nope?q?a?=", "=?utf-8?b?!?=", "x" * 76, "x" * 77),
        *("x" * 78, "x" * 69, "x" * 70, "y" * 300, "word " * 15, "word " * 40),
        *("<1.2@example.com>", "<a@" + "h" * 60 + ">", "<a@" + "h" * 90 + ">", "<a>"),
        *("<a@b", "<a@[::1]>", "<a@b> x", "<a b@c>", " <a@b>", "<" + "a@b" * 30 + ">"),
        *("Fri, 21 Nov 1997 09:55:06 -0600", "yesterday", "2001-01-01", ""),
        *(
            'text/plain; charset="utf-8"',
            "multipart/mixed",
            "text",
            "a/b; c",
            "a/b;c=d",
        ),
        *('multipart/mixed; boundary="' + "=" * 15 + "0123456789" * 2 + '=="',),
        *('attachment; filename="ä.pdf"', 'attachment; filename="' + "f" * 90 + '"'),
        *("inline", "1.0", "1.0 x", "7bit", "base64 (c)", "(" * 5 + "a" + ")" * 5),
    ]
)
TEXTS = ASCII | WORDS | ODD | ADDRESS_LISTS | st.text(max_size=40)
OFFSETS = st.integers(-720, 720).map(lambda m: timezone(timedelta(minutes=m)))
DATES = st.datetimes(timezones=st.none() | st.just(UTC) | OFFSETS)
ADDRESSES = st.sampled_from(
    [
        Address("A", "a", "b.c"),
        Address("Jörg", "j", "b.c"),
        [Address("", "a b", "c"), Address("x, y", "l", "d" * 80)],
        Group("g", [Address("", "a", "b")]),
        [],
    ]
)
# Too narrow a limit has the stdlib run for ever.
LIMITS = st.sampled_from([None, 0, 40, 60, 77, 78, 79, 998])


@settings(max_examples=500, deadline=None)
@given(
    name=st.sampled_from(NAMES), value=TEXTS, limit=LIMITS, pair=st.sampled_from(PAIRS)
)
def test_a_header_is_that_of_the_stdlib(
    name: str, value: str, limit: int | None, pair: tuple[Any, Any]
) -> None:
    ours, theirs = pair
    expected = seen(theirs, name, value)
    assert seen(ours, name, value) == expected
    assert seen(ours, name, value) == expected, "a header that was kept"
    narrow = {"max_line_length": limit}
    expected = seen(theirs.clone(**narrow), name, value)
    assert seen(ours.clone(**narrow), name, value) == expected


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(["To", "From", "Resent-Cc", "Date", "Orig-Date", "Subject"]),
    value=DATES | ADDRESSES | st.none() | st.integers(),
    pair=st.sampled_from(PAIRS),
)
def test_a_header_of_an_object_is_that_of_the_stdlib(
    name: str, value: object, pair: tuple[Any, Any]
) -> None:
    ours, theirs = pair
    assert seen(ours, name, value) == seen(theirs, name, value)


@settings(max_examples=200, deadline=None)
@given(
    subtype=st.text("abxyz", min_size=1, max_size=40),
    boundary=st.text("0123=", min_size=1, max_size=70),
    name=st.sampled_from(["Content-Type", "content-type"]),
    limit=LIMITS,
    pair=st.sampled_from(PAIRS),
)
def test_a_boundary_is_folded_as_the_stdlib_does(
    subtype: str, boundary: str, name: str, limit: int, pair: tuple[Any, Any]
) -> None:
    ours, theirs = (one.clone(max_line_length=limit) for one in pair)
    value = f'multipart/{subtype}; boundary="{boundary}"'
    assert seen(ours, name, value) == seen(theirs, name, value)


@settings(max_examples=200, deadline=None)
@given(addresses=st.lists(PLAIN_MAILBOXES, min_size=1, max_size=60))
def test_a_list_of_plain_addresses_is_folded_as_the_stdlib_does(
    addresses: list[str],
) -> None:
    value = ", ".join(addresses)
    expected = with_header(email.policy.SMTP, "To", value).as_bytes()
    assert with_header(SMTP, "To", value).as_bytes() == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Subject", "word " * 9 + "end"),
        ("Subject", "x" * 60),
        ("X" * 50, "a b"),
        ("X" * 50, "x" * 60),
        ("Message-ID", "<a@" + "h" * 50 + ">"),
        ("To", "a@" + "d" * 50),
        ("To", "a@b, Name <a@b>, " * 4 + "b@" + "d" * 50),
        ("To", "b@" + "d" * 50 + ", a@b" * 15),
        ("X" * 50, "a@b, " * 20 + "a@b"),
        ("Content-Type", 'multipart/alternative; boundary="===0123==="'),
        ("Content-Type", f'multipart/{"x" * 50}; boundary="=0="'),
        ("Content-Type", f'multipart/x; boundary="{"=" * 50}"'),
    ],
)
def test_a_plain_value_is_folded_alike_at_every_limit(name: str, value: str) -> None:
    for limit in range(25, 90):
        ours, theirs = (
            with_header(one.clone(max_line_length=limit), name, value).as_bytes()
            for one in PAIRS[0]
        )
        assert ours == theirs, limit


FIXED = {"Date": "Fri, 21 Nov 1997 09:55:06 -0600", "Message-ID": "<1@example.com>"}
PARTS = st.lists(
    st.sampled_from(
        [
            ("a.txt", "text\nof lines\r\n", "text/plain"),
            ("ä 🎈.txt", "grüße " * 30, "text/plain"),
            ("f" * 90 + ".csv", "x" * 2000, "text/csv"),
            ("a.bin", bytes(range(256)), None),
            (None, b"nameless", "application/octet-stream"),
            ('"odd";\\.pdf', b"%PDF", "application/pdf"),
            ("f.eml", "Subject: Fwd =?utf-8?q?a?=\r\nTo: a@b\r\n\r\n.Body\n", None),
            ("g.eml", mail.EmailMessage("Fwd ü", "Grüße", headers=FIXED), None),
        ]
    ),
    max_size=3,
)
ALTERNATIVES = st.lists(
    st.sampled_from(
        [("<p>Grüße 🎈</p>", "text/html"), ("<br>" * 400, "text/html"), (b"{}", "a/b")]
    ),
    max_size=2,
)


@st.composite
def fields(draw: Any) -> dict[str, Any]:
    """The arguments of a Django message, most of them of the usual kind."""
    names = ["X-Thing", "Sender", "Date", "Message-ID", "From", "To", "Reply-To"]
    return {
        "subject": draw(TEXTS),
        "body": draw(TEXTS | st.just("long " * 300)),
        "from_email": draw(MAILBOXES),
        "to": draw(st.lists(MAILBOXES, max_size=5)),
        "cc": draw(st.lists(MAILBOXES, max_size=2)),
        "reply_to": draw(st.lists(MAILBOXES, max_size=2)),
        "headers": FIXED | draw(st.dictionaries(st.sampled_from(names), TEXTS)),
        "alternatives": draw(ALTERNATIVES),
        "attachments": draw(PARTS),
    }


@takes_policy
@settings(max_examples=150, deadline=None)
@given(arguments=fields(), pair=st.sampled_from(PAIRS))
def test_a_message_is_that_of_the_stdlib(
    arguments: dict[str, Any], pair: tuple[Any, Any]
) -> None:
    def built(policy: Any) -> object:
        message: Any = mail.EmailMultiAlternatives(**arguments)
        return outcome(lambda: message.message(policy=policy).as_bytes())

    ours, theirs = pair
    expected = built(theirs)
    assert built(ours) == expected
    assert built(ours) == expected, "of headers that were kept"


def calls(make: Callable[[], object]) -> int:
    """Return how many Python functions a call calls."""
    counted = 0

    def count(frame: object, event: str, arg: object) -> None:
        nonlocal counted
        counted += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        make()
    finally:
        sys.setprofile(before)
    return counted


def stdlib_message(policy: Any, number: int = 1) -> bytes:
    """Build a small message, some of it as in each, the rest its own."""
    message = EmailMessage(policy=policy)
    message.set_content(f"Hello {number}\n")
    message["Subject"] = f"Your order {number}"
    message["From"] = "Jörg's Shop <shop@example.com>"
    message["To"] = f"Customer <customer{number}@example.com>"
    message["Date"] = datetime(1997, 11, 21, 9, 55, number % 60, tzinfo=UTC)
    message["Message-ID"] = f"<{number}.1234567890@mail.example.com>"
    message["X-Mailer"] = "Grüße"
    return message.as_bytes()


def test_a_small_message_takes_a_fourth_of_the_calls() -> None:
    stdlib_message(SMTP, 1)
    ours = calls(lambda: stdlib_message(SMTP, 2))
    assert ours * 4 < calls(lambda: stdlib_message(email.policy.SMTP, 2))


@pytest.mark.parametrize(
    ("name", "value", "plain"),
    [
        ("Subject", "Your order 1234 (50% off) - now!", True),
        ("Subject", "Grüße", False),
        ("Subject", "=?utf-8?q?a?=", False),
        ("Subject", "x" * 78, False),
        ("To", "a.b+c@mail.example.com", True),
        ("To", "A B <a@b>, c@d", True),
        ("To", "<a@b>", False),
        ("To", "a@b,c@d", False),
        ("To", '"a" <a@b>', False),
        ("To", "a@b, ", False),
        ("Message-ID", "<1.2.3@mail.example.com>", True),
        ("Message-ID", "<1.2.3>", False),
        ("Date", datetime(1997, 11, 21, tzinfo=UTC), True),
        ("X-Thing", "a: b", True),
        ("Content-Type", "text/plain", False),
        ("Content-Type", 'multipart/mixed; boundary="==0123=="', True),
        ("Content-Type", 'multipart/mixed; boundary="==?0123=="', False),
    ],
)
def test_what_is_plain(name: str, value: object, plain: bool) -> None:
    assert (SMTP.header_factory(name, value).plain is not None) is plain


class Counting(UnstructuredHeader):
    """A header that says when it is parsed and folded."""

    parsed = 0
    folded = 0

    @classmethod
    def parse(cls, value: str, kwds: dict[str, Any]) -> None:
        Counting.parsed += 1
        super().parse(value, kwds)

    def fold(self, *, policy: Any) -> str:
        Counting.folded += 1
        folded: str = super().fold(policy=policy)  # type: ignore[misc]
        return folded


@pytest.fixture
def counting() -> Any:
    """A policy with its own registry, whose X-Counting counts."""
    registry = CachingRegistry()
    registry.map_to_type("X-Counting", Counting)
    Counting.parsed = Counting.folded = 0
    return SMTP.clone(header_factory=registry)


def test_what_repeats_is_parsed_and_folded_once(counting: Any) -> None:
    for _ in range(5):
        with_header(counting, "X-Counting", "Grüße").as_bytes()
    assert (Counting.parsed, Counting.folded) == (1, 1)
    with_header(counting, "X-counting", "Grüße").as_bytes()
    assert (Counting.parsed, Counting.folded) == (2, 2), "the name is another"


def test_each_form_of_a_policy_folds_for_itself(counting: Any) -> None:
    for _ in range(2):
        for form in ({}, {"utf8": True}, {"linesep": "\n"}, {"max_line_length": 30}):
            theirs = email.policy.SMTP.clone(**form)
            expected = with_header(theirs, "X-Counting", "Grüße " * 9).as_bytes()
            ours = counting.clone(**form)
            message = with_header(ours, "X-Counting", "Grüße " * 9)
            assert message.as_bytes() == expected


def test_a_class_that_is_mapped_later_is_used(counting: Any) -> None:
    before = with_header(counting, "X-Later", "a@bü.example").as_bytes()
    counting.header_factory.map_to_type("X-Later", Counting)
    message = with_header(counting, "X-Later", "a@bü.example")
    assert isinstance(message["X-Later"], Counting)
    assert message.as_bytes() == before


def test_a_message_does_not_see_what_another_does_to_a_header() -> None:
    first, second = (with_header(SMTP, "From", "Jörg <j@b.c>") for _ in range(2))
    third = with_header(SMTP, "From", "Jörg <j@b.c>")
    assert first["From"] is not second["From"] is not third["From"]
    second["From"].mine = "mine"
    second["From"].folds = {}
    fourth = with_header(SMTP, "From", "Jörg <j@b.c>")
    assert not hasattr(third["From"], "mine")
    assert not hasattr(fourth["From"], "mine")


def test_a_parameter_that_is_set_stays_in_its_message() -> None:
    messages = [with_header(SMTP, "Content-Type", "text/plain") for _ in range(3)]
    messages[1].set_param("charset", "utf-8", replace=True)
    assert [message["Content-Type"] for message in messages] == [
        "text/plain",
        'text/plain; charset="utf-8"',
        "text/plain",
    ]
    with pytest.raises(TypeError):
        messages[0]["Content-Type"].params["a"] = "b"


@pytest.mark.parametrize("value", ["text/plain; a", 'x"'])
def test_a_defective_header_is_not_shared(value: str) -> None:
    first, second = (SMTP.header_factory("Content-Type", value) for _ in range(2))
    assert first.defects
    assert not set(map(id, first.defects)) & set(map(id, second.defects))


def test_an_error_is_not_kept() -> None:
    errors = []
    for _ in range(2):
        with pytest.raises(ValueError, match="linefeed") as raised:
            with_header(SMTP, "Subject", "a\nb")
        errors.append(raised.value)
    assert errors[0] is not errors[1]


def test_a_str_subclass_is_not_kept() -> None:
    """It may hold more than its text, as a header of a parsed message does."""
    header = email.policy.SMTP.header_factory("X-Other", "Grüße <a@b>")
    for name in ("X-Thing", "To"):
        assert seen(SMTP, name, header) == seen(email.policy.SMTP, name, header)
    assert policy._slot.cache_info().currsize == 0
    assert mailbox(header) == "a@b"
    assert kept_mailbox.cache_info().currsize == 0


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_a_message_can_be_copied(duplicate: Callable[[Any], Any]) -> None:
    for value in ("Jörg <j@b.c>", "a@b", "Jörg <j@b.c>"):
        message = with_header(SMTP, "From", value)
        message.set_content("Grüße\n")
        twin = duplicate(message)
        assert twin.as_bytes() == message.as_bytes()
        assert twin["From"].addresses == message["From"].addresses


def test_a_message_can_be_built_in_7_bits() -> None:
    def build(policy: Any) -> bytes:
        message = EmailMessage(policy=policy)
        message.set_content("Grüße 🎈\n")
        message["Subject"] = "Grüße"
        return message.as_bytes(policy=policy.clone(cte_type="7bit"))

    assert build(SMTP) == build(SMTP) == build(email.policy.SMTP)
    assert build(SMTP).isascii()


def test_a_parsed_message_is_refolded_as_the_stdlib_does() -> None:
    source = (
        b"Subject: "
        + b"word " * 30
        + b"\r\nTo: a@b,\r\n c@d\r\nX-Raw: \xff\r\n\r\nBody"
    )
    ours, theirs = (
        email.message_from_bytes(source, policy=p) for p in (SMTP, email.policy.SMTP)
    )
    assert ours.as_bytes() == theirs.as_bytes()
    assert [str(v) for v in ours.values()] == [str(v) for v in theirs.values()]


# Values whose parse trees are large, by their length.
BULKY: list[tuple[str, Callable[[int], str]]] = [
    ("Subject", lambda n: f"ö{n:05}" + " ö" * 93),
    ("To", lambda n: f"a{n:05}@b," + "a@b," * 45 + "a@b"),
    ("To", lambda n: "ä b c d e f g h " * 10 + f" <a{n}@b>"),
    ("Cc", lambda n: "(a)" * 50 + f"<a{n}@b>"),
    ("Content-Type", lambda n: "a/b" + "".join(f"; {n}x{i}=b" for i in range(16))),
]


def fill(kept: int) -> None:
    """Have so many bulky headers kept, in each form of a policy."""
    for number in range(kept):
        name, value = BULKY[number % len(BULKY)]
        for ours, _ in PAIRS:
            with_header(ours, name, value(number)).as_bytes()


def test_kept_headers_are_bounded_in_bytes() -> None:
    number = 20
    fill(number)  # What is made but once, such as classes.
    forget()
    gc.collect()
    tracemalloc.start()
    try:
        fill(number)
        gc.collect()
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert policy._slot.cache_info().currsize == number
    assert kept / number * KEPT_HEADERS < 4_000_000


def test_kept_headers_are_bounded_in_number() -> None:
    for number in range(KEPT_HEADERS + 10):
        with_header(SMTP, "X-Thing", f"ü {number}")
    assert policy._slot.cache_info().currsize == KEPT_HEADERS


@pytest.mark.parametrize("excess", [0, 1])
def test_a_long_header_is_not_kept(excess: int, counting: Any) -> None:
    value = "ü" * (KEPT_LENGTH + excess - len("X-Counting"))
    for _ in range(3):
        with_header(counting, "X-Counting", value).as_bytes()
    assert Counting.parsed == (3 if excess else 1)


def test_the_classes_of_headers_are_bounded() -> None:
    registry = CachingRegistry()
    made = {registry[f"X-{number}"] for number in range(3 * KEPT_NAMES)}
    assert len(made) == 1
    assert len(registry._by_name) <= KEPT_NAMES
    registry["x" * (KEPT_LENGTH + 1)]
    assert max(map(len, registry._by_name)) <= KEPT_LENGTH


def test_the_folds_of_a_header_are_bounded() -> None:
    header = SMTP.header_factory("Subject", "Grüße " * 9)
    for limit in range(40, 60):
        SMTP.clone(max_line_length=limit).fold_binary("Subject", header)
    assert 0 < len(header.folds) <= KEPT_FOLDS


def test_threads_get_the_same_bytes_as_one_alone() -> None:
    # So many values that they are kept and dropped all the time.
    expected = [stdlib_message(email.policy.SMTP, n) for n in range(150)]
    wrong: list[int] = []

    def build(seed: int) -> None:
        numbers = list(range(150))
        random.Random(seed).shuffle(numbers)
        for n in numbers:
            if stdlib_message(SMTP, n) != expected[n]:
                wrong.append(n)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=build, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
    assert policy._slot.cache_info().currsize <= KEPT_HEADERS


@settings(max_examples=500, deadline=None)
@given(address=MAILBOXES | ADDR_SPECS | WORDS | ODD)
def test_a_plain_mailbox_is_what_the_parser_finds(address: str) -> None:
    shortcut = outcome(lambda: mailbox(address))
    assert shortcut == outcome(lambda: parsed_mailbox(address))
    assert shortcut == outcome(lambda: mailbox(address)), "a mailbox that was kept"


@given(address=PLAIN_MAILBOXES.filter(lambda text: "=?" not in text))
def test_a_plain_mailbox_is_known_for_one(address: str) -> None:
    plain = plain_mailbox(address)
    assert plain is not None
    assert address in ("@".join(plain[1:]), f"{plain[0]} <{plain[1]}@{plain[2]}>")


def test_mailboxes_that_are_kept_are_bounded() -> None:
    for number in range(KEPT_HEADERS + 10):
        assert mailbox(f"ü <a{number}@b>") == f"a{number}@b"
    assert kept_mailbox.cache_info().currsize == KEPT_HEADERS
    kept_mailbox.cache_clear()
    mailbox("ü" * KEPT_LENGTH + " <a@b>")
    mailbox("a@b")
    assert kept_mailbox.cache_info().currsize == 0


def test_an_address_that_is_refused_is_not_kept() -> None:
    errors = []
    for _ in range(2):
        with pytest.raises(ValueError, match="Invalid address") as raised:
            mailbox("a@b@c")
        errors.append(raised.value)
    assert errors[0] is not errors[1]
    assert str(errors[0]) == str(errors[1])
    assert kept_mailbox.cache_info().currsize == 0
