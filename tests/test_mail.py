from __future__ import annotations

import email
import inspect
from base64 import b64decode
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import django
import pytest
from asgiref.sync import sync_to_async
from django.core import mail
from django.core.exceptions import ImproperlyConfigured
from django.core.mail import EmailMessage
from django.core.mail.backends.base import BaseEmailBackend
from django.test import SimpleTestCase, TestCase
from django.utils.asyncio import async_unsafe
from django.utils.translation import gettext_lazy as _

from django_async_smtp import (
    amail_admins,
    amail_managers,
    asend_mail,
    asend_mass_mail,
)

from .conftest import OURS, MakeBackend, configure
from .servers import PASSWORD, USERNAME, MailServer, ScriptedServer, free_port
from .settings import USES_MAILERS

LOCMEM = "django.core.mail.backends.locmem.EmailBackend"
DUMMY = "django.core.mail.backends.dummy.EmailBackend"

HELLO: Any = ("Hello", "Body", "from@example.com", ["to@example.com"])
BYE: Any = ("Bye", "Body", None, ["other@example.com", "third@example.com"])

PAIRS: list[tuple[Callable[..., Any], Callable[..., Any]]] = [
    (asend_mail, mail.send_mail),
    (asend_mass_mail, mail.send_mass_mail),
    (amail_admins, mail.mail_admins),
    (amail_managers, mail.mail_managers),
]
STAFF = [(amail_admins, "ADMINS"), (amail_managers, "MANAGERS")]

mailers = pytest.mark.skipif(not USES_MAILERS, reason="MAILERS only")


class NativeBackend(BaseEmailBackend):
    """Somebody else's backend that is async."""

    sent: ClassVar[list[EmailMessage]] = []

    async def asend_messages(self, messages: Iterable[EmailMessage]) -> int:
        self.sent.extend(messages)
        return 7


class BlockingBackend(BaseEmailBackend):
    """Somebody else's backend, which must not run in an event loop, nor count."""

    sent: ClassVar[list[EmailMessage]] = []

    @async_unsafe
    def send_messages(self, messages: Iterable[EmailMessage]) -> Any:
        self.sent.extend(messages)


@pytest.fixture(autouse=True)
def _nothing_sent() -> None:
    NativeBackend.sent.clear()
    BlockingBackend.sent.clear()


def deprecated() -> AbstractContextManager[object]:
    """Expect a warning where Django 6.1 deprecates an argument."""
    if hasattr(mail, "mailers"):
        return pytest.warns((DeprecationWarning, PendingDeprecationWarning))
    return nullcontext()


def facts(message: Any) -> dict[str, Any]:
    """Return what says that two messages are equal."""
    names = ("subject", "body", "from_email", "to", "cc", "bcc", "alternatives")
    found = {name: getattr(message, name, None) for name in names}
    return found | {"class": type(message)}


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_the_signature_is_that_of_djangos_function(
    ours: Callable[..., Any], theirs: Callable[..., Any]
) -> None:
    expected = inspect.signature(theirs).parameters
    found = dict(inspect.signature(ours).parameters)
    if "using" not in expected:
        assert found.pop("using").default is None
    assert list(found) == list(expected)
    for name, parameter in expected.items():
        assert found[name].default == parameter.default
        # Options are keywords, as in Django 6.
        is_option = parameter.default is not parameter.empty
        assert (found[name].kind is parameter.KEYWORD_ONLY) == is_option


@pytest.mark.parametrize("html_message", [None, "<p>Body</p>"])
@pytest.mark.parametrize("fields", [HELLO, BYE, ("", "", None, ["to@example.com"])])
@pytest.mark.asyncio
async def test_asend_mail_sends_what_send_mail_sends(
    fields: Any, html_message: str | None, mailoutbox: list[EmailMessage]
) -> None:
    expected = await sync_to_async(mail.send_mail)(*fields, html_message=html_message)
    assert await asend_mail(*fields, html_message=html_message) == expected == 1
    theirs, ours = mailoutbox
    assert facts(ours) == facts(theirs)


@pytest.mark.parametrize("batch", [[], [HELLO], [HELLO, BYE]])
@pytest.mark.asyncio
async def test_asend_mass_mail_sends_what_send_mass_mail_sends(
    batch: list[Any], mailoutbox: list[EmailMessage]
) -> None:
    expected = await sync_to_async(mail.send_mass_mail)(batch)
    assert await asend_mass_mail(iter(batch)) == expected == len(batch)
    sent = [facts(message) for message in mailoutbox]
    assert sent[: len(batch)] == sent[len(batch) :]


@pytest.mark.parametrize("html_message", [None, "<p>Body</p>"])
@pytest.mark.parametrize(
    ("ours", "theirs", "setting"),
    [
        (amail_admins, mail.mail_admins, "ADMINS"),
        (amail_managers, mail.mail_managers, "MANAGERS"),
    ],
)
@pytest.mark.asyncio
async def test_amail_admins_sends_what_mail_admins_sends(
    ours: Callable[..., Any],
    theirs: Callable[..., Any],
    setting: str,
    html_message: str | None,
    settings: Any,
    mailoutbox: list[EmailMessage],
) -> None:
    settings.EMAIL_SUBJECT_PREFIX = "[Site] "
    settings.SERVER_EMAIL = "server@example.com"
    strings = ["a@example.com", "b@example.com"]
    # What Django itself takes, before 6.0 and since.
    pairs = [("Name", address) for address in strings]
    setattr(settings, setting, pairs if django.VERSION < (6, 0) else strings)
    await sync_to_async(theirs)("Hello", "Body", html_message=html_message)
    await ours("Hello", "Body", html_message=html_message)
    expected, found = mailoutbox
    assert facts(found) == facts(expected)
    assert found.subject == "[Site] Hello"
    assert found.from_email == "server@example.com"
    assert found.to == strings


@pytest.mark.asyncio
async def test_our_backend_sends_it(
    server: MailServer, make_backend: MakeBackend, settings: Any
) -> None:
    settings.ADMINS = settings.MANAGERS = ["staff@example.com"]
    make_backend(server)
    assert await asend_mail(*HELLO, html_message="<p>Body</p>") == 1
    assert await asend_mass_mail([HELLO, BYE]) == 2
    await amail_admins("Broken", "Body")
    await amail_managers("Busy", "Body")
    subjects = [email.message_from_bytes(r.content)["Subject"] for r in server.received]
    prefix = settings.EMAIL_SUBJECT_PREFIX
    assert subjects == [
        "Hello",
        "Hello",
        "Bye",
        f"{prefix}Broken",
        f"{prefix}Busy",
    ]
    message = email.message_from_bytes(server.received[0].content)
    assert message.get_content_type() == "multipart/alternative"
    assert server.received[-1].recipients == ["staff@example.com"]


@pytest.mark.asyncio
async def test_a_backend_that_is_async_is_awaited(settings: Any) -> None:
    configure(settings, f"{__name__}.NativeBackend")
    assert await asend_mail(*HELLO) == 7
    assert await asend_mass_mail([HELLO, BYE]) == 7
    assert [m.subject for m in NativeBackend.sent] == ["Hello", "Hello", "Bye"]


@pytest.mark.asyncio
async def test_any_other_backend_runs_in_a_thread(settings: Any) -> None:
    settings.ADMINS = ["admin@example.com"]
    configure(settings, f"{__name__}.BlockingBackend")
    assert await asend_mail(*HELLO) == 0, "the backend returns None"
    assert await asend_mass_mail([BYE]) == 0
    await amail_admins("Broken", "Body")
    assert len(BlockingBackend.sent) == 3


@pytest.mark.parametrize(("path", "sent"), [(LOCMEM, 2), (DUMMY, 2)])
@pytest.mark.asyncio
async def test_it_returns_what_the_backend_returns(
    path: str, sent: int, settings: Any
) -> None:
    configure(settings, path)
    assert await asend_mass_mail([HELLO, BYE]) == sent


@pytest.mark.asyncio
async def test_without_recipients_nothing_is_sent(make_backend: MakeBackend) -> None:
    make_backend(host="127.0.0.1", port=free_port())  # Nobody is asked.
    assert await asend_mail("Hello", "Body", None, []) == 0
    assert await asend_mail("Hello", "Body", None, [""]) == 0


@pytest.mark.asyncio
async def test_errors_are_raised(make_backend: MakeBackend, settings: Any) -> None:
    settings.ADMINS = ["admin@example.com"]
    make_backend(host="127.0.0.1", port=free_port())
    with pytest.raises(ConnectionRefusedError):
        await asend_mail(*HELLO)
    with pytest.raises(ConnectionRefusedError):
        await asend_mass_mail([HELLO])
    with pytest.raises(ConnectionRefusedError):
        await amail_admins("Broken", "Body")


@pytest.mark.asyncio
async def test_fail_silently_swallows_them(
    make_backend: MakeBackend, settings: Any
) -> None:
    settings.ADMINS = settings.MANAGERS = ["admin@example.com"]
    make_backend(host="127.0.0.1", port=free_port())
    with deprecated():
        assert await asend_mail(*HELLO, fail_silently=True) == 0
    with deprecated():
        assert await asend_mass_mail([HELLO], fail_silently=True) == 0
    with deprecated():
        await amail_admins("Broken", "Body", fail_silently=True)
    with deprecated():
        await amail_managers("Broken", "Body", fail_silently=True)


@pytest.mark.asyncio
async def test_auth_user_and_auth_password_log_in(make_backend: MakeBackend) -> None:
    with ScriptedServer(extensions=("AUTH PLAIN",)) as server:
        make_backend(server, username="nobody", password="wrong")
        with deprecated():
            await asend_mail(*HELLO, auth_user=USERNAME, auth_password=PASSWORD)
        with deprecated():
            await asend_mass_mail([HELLO], auth_user=USERNAME, auth_password=PASSWORD)
    tokens = {command.split()[-1] for command in server.commands(b"AUTH")}
    assert [b64decode(token) for token in tokens] == [
        f"\0{USERNAME}\0{PASSWORD}".encode()
    ]
    assert all(received.login for received in server.received)


@pytest.mark.asyncio
async def test_a_connection_that_is_given_is_used(
    server: MailServer, make_backend: MakeBackend, settings: Any
) -> None:
    settings.ADMINS = settings.MANAGERS = ["admin@example.com"]
    connection = make_backend(server)
    configure(settings, LOCMEM)
    assert await asend_mail(*HELLO, connection=connection) == 1
    assert await asend_mass_mail([HELLO, BYE], connection=connection) == 2
    await amail_admins("Broken", "Body", connection=connection)
    await amail_managers("Broken", "Body", connection=connection)
    assert len(server.received) == 5
    assert mail.outbox == []


@pytest.mark.asyncio
async def test_a_connection_stays_open_between_calls(
    server: MailServer, make_backend: MakeBackend
) -> None:
    async with make_backend(server) as connection:
        await asend_mail(*HELLO, connection=connection)
        await asend_mass_mail([HELLO], connection=connection)
        assert connection.connection is not None
    assert server.connections == 1


@mailers
@pytest.mark.asyncio
async def test_using_names_a_mailer(server: MailServer, settings: Any) -> None:
    settings.ADMINS = settings.MANAGERS = ["admin@example.com"]
    options = {"host": server.host, "port": server.port}
    settings.MAILERS = {
        "default": {"BACKEND": LOCMEM},
        "other": {"BACKEND": OURS, "OPTIONS": options},
    }
    assert await asend_mail(*HELLO, using="other") == 1
    assert await asend_mass_mail([HELLO], using="other") == 1
    await amail_admins("Broken", "Body", using="other")
    await amail_managers("Broken", "Body", using="other")
    assert len(server.received) == 4
    assert await asend_mail(*HELLO, using="default") == 1
    assert [message.subject for message in mail.outbox] == ["Hello"]
    with pytest.raises(mail.MailerDoesNotExist):
        await asend_mail(*HELLO, using="unknown")


@pytest.mark.skipif(hasattr(mail, "mailers"), reason="before Django 6.1")
@pytest.mark.asyncio
async def test_using_needs_mailers(mailoutbox: list[EmailMessage]) -> None:
    with pytest.raises(TypeError, match=r"'using' needs Django 6\.1"):
        await asend_mail(*HELLO, using="default")
    assert mailoutbox == []


@pytest.mark.parametrize("first", ["using", "connection"])
@pytest.mark.parametrize(
    "excluded",
    [{"fail_silently": True}, {"auth_user": "alice"}, {"auth_password": ""}],
    ids=str,
)
@pytest.mark.asyncio
async def test_arguments_that_exclude_each_other_are_an_error(
    first: str,
    excluded: dict[str, Any],
    make_backend: MakeBackend,
    settings: Any,
) -> None:
    settings.ADMINS = settings.MANAGERS = ["admin@example.com"]
    backend = make_backend(host="127.0.0.1", port=free_port())
    given = {"using": "default"} if first == "using" else {"connection": backend}
    options: dict[str, Any] = given | excluded
    match = f"'{first}' excludes"
    with pytest.raises(TypeError, match=match):
        await asend_mail(*HELLO, **options)
    with pytest.raises(TypeError, match=match):
        await asend_mass_mail([HELLO], **options)
    if "fail_silently" in excluded:
        with pytest.raises(TypeError, match=match):
            await amail_admins("Broken", "Body", **options)
        with pytest.raises(TypeError, match=match):
            await amail_managers("Broken", "Body", **options)


@pytest.mark.asyncio
async def test_using_excludes_a_connection(make_backend: MakeBackend) -> None:
    backend = make_backend(host="127.0.0.1", port=free_port())
    with pytest.raises(TypeError, match="'using' excludes"):
        await asend_mail(*HELLO, using="default", connection=backend)


@pytest.mark.parametrize(("function", "setting"), STAFF)
@pytest.mark.parametrize(
    "staff",
    [
        ["a@example.com", "B <b@example.com>"],
        ("a@example.com", "B <b@example.com>"),
        [_("a@example.com"), _("B <b@example.com>")],
        [("A", "a@example.com"), ["B", "B <b@example.com>"]],
        [("A", "a@example.com"), "B <b@example.com>"],
    ],
    ids=str,
)
@pytest.mark.asyncio
async def test_staff_may_be_strings_or_pairs(
    function: Callable[..., Any],
    setting: str,
    staff: Any,
    settings: Any,
    mailoutbox: list[EmailMessage],
) -> None:
    setattr(settings, setting, staff)
    assert await function("Hello", "Body") is None
    (message,) = mailoutbox
    assert message.to == ["a@example.com", "B <b@example.com>"]


@pytest.mark.parametrize(("function", "setting"), STAFF)
@pytest.mark.parametrize("staff", [[], (), None])
@pytest.mark.asyncio
async def test_without_staff_nothing_is_sent(
    function: Callable[..., Any],
    setting: str,
    staff: Any,
    settings: Any,
    mailoutbox: list[EmailMessage],
) -> None:
    setattr(settings, setting, staff)
    assert await function("Hello", "Body") is None
    assert mailoutbox == []


@pytest.mark.parametrize(("function", "setting"), STAFF)
@pytest.mark.parametrize(
    "staff",
    [
        "admin@example.com",
        b"admin@example.com",
        [b"admin@example.com"],
        [None],
        [("A", "a@example.com", "more")],
        [("A", 1)],
        [("a@example.com",)],
        {"admin@example.com"},
        {"A": "a@example.com"},
        1,
    ],
    ids=str,
)
@pytest.mark.asyncio
async def test_staff_that_is_no_list_of_addresses_is_an_error(
    function: Callable[..., Any],
    setting: str,
    staff: Any,
    settings: Any,
    mailoutbox: list[EmailMessage],
) -> None:
    setattr(settings, setting, staff)
    with pytest.raises(ImproperlyConfigured, match=f"The {setting} setting must be"):
        await function("Hello", "Body", connection=BlockingBackend())
    assert mailoutbox == BlockingBackend.sent == []


@pytest.mark.asyncio
async def test_a_configuration_error_is_raised(settings: Any) -> None:
    configure(settings, OURS, host="localhost", use_tls=True, use_ssl=True)
    with pytest.raises(ImproperlyConfigured):
        await asend_mail(*HELLO)
    with pytest.raises(ImproperlyConfigured):
        await asend_mail("Hello", "Body", None, [])


class TestInASimpleTestCase(SimpleTestCase):
    async def test_the_outbox_gets_the_mail(self) -> None:
        assert await asend_mail(*HELLO) == 1
        assert await asend_mass_mail([HELLO, BYE]) == 2
        with self.settings(ADMINS=["admin@example.com"]):
            await amail_admins("Broken", "Body")
        assert len(mail.outbox) == 4

    async def test_it_is_empty_for_the_next_test(self) -> None:
        assert mail.outbox == []


class TestInATestCase(TestCase):
    async def test_the_outbox_gets_the_mail(self) -> None:
        assert await asend_mail(*HELLO) == 1
        assert [message.subject for message in mail.outbox] == ["Hello"]
