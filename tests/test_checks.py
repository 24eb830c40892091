from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from django.core.checks import ERROR, WARNING, CheckMessage, run_checks
from django.core.checks.registry import registry
from django.core.mail.backends.smtp import EmailBackend
from django.core.mail.utils import DNS_NAME
from django.utils.functional import SimpleLazyObject
from django.utils.translation import gettext_lazy

import django_async_smtp
from django_async_smtp import Backend, checks
from django_async_smtp.options import TYPES, setting
from django_async_smtp.tasks import engine

from .conftest import DJANGOS, OURS, QUEUED, configure, configure_queue
from .engines import IMMEDIATE, LIBRARY
from .settings import USES_MAILERS

SECRET = "s3cr3t-p4ss"

ROOT = Path(__file__).parent.parent
PACKAGES = Path(django_async_smtp.__file__).parent.parent

email_settings = pytest.mark.skipif(USES_MAILERS, reason="EMAIL_* only")
mailers = pytest.mark.skipif(not USES_MAILERS, reason="MAILERS only")

# What nothing is to be said of.
FINE: dict[str, Any] = {
    "host": "smtp.example.com",
    "port": 587,
    "use_tls": True,
    "username": "me",
    "password": SECRET,
}
RELAY: dict[str, Any] = {"host": "localhost", "port": 25}
PLAIN: dict[str, Any] = FINE | {"use_tls": False}

NAMES = {name: setting(name, in_mailers=USES_MAILERS) for name in TYPES}
WHERE = "MAILERS['default']" if USES_MAILERS else "EMAIL settings"


class OurSubclass(Backend):
    pass


class DjangosSubclass(EmailBackend):
    pass


class OAuthBackend(EmailBackend):
    def open(self) -> bool:
        return True


class OwnWayBackend(EmailBackend):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.api_key = SECRET


class OwnContextBackend(EmailBackend):
    @property
    def ssl_context(self) -> Any:
        raise AssertionError("evaluated in a check")


class TellingBackend(Backend):
    """Fails as code of others may."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        int(self.password or "nothing")


class FailingBackend(Backend):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        raise KeyError("SMTP_REGION")


def our_factory(*args: Any, **kwargs: Any) -> Backend:
    raise AssertionError("called in a check")


class NotSMTP:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("made in a check")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test that connects, or asks the resolver."""

    def fail(*args: object, **kwargs: object) -> None:
        pytest.fail("A check used the network.")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, fail)
    for name in (
        "create_connection",
        "getaddrinfo",
        "getfqdn",
        "gethostbyaddr",
        "gethostbyname",
        "gethostbyname_ex",
        "getnameinfo",
    ):
        monkeypatch.setattr(socket, name, fail)
    monkeypatch.delattr(DNS_NAME, "_fqdn", raising=False)


def said() -> list[CheckMessage]:
    """Return what our checks say, through Django's registry."""
    return [
        message
        for message in run_checks(tags=["mail"])
        if (message.id or "").startswith("django_async_smtp.")
    ]


def said_of(settings: Any, path: str = OURS, **options: Any) -> list[CheckMessage]:
    """Return what our checks say of a backend with these options."""
    configure(settings, path, **options)
    return said()


def ids(messages: list[CheckMessage]) -> list[str]:
    return [str(message.id).removeprefix("django_async_smtp.") for message in messages]


def texts(messages: list[CheckMessage]) -> str:
    """Return all that the messages show in any way."""
    return "\n".join(f"{message} {message!r}" for message in messages)


def named(text: str) -> str:
    """Return the text with the names of the settings in use."""
    for name, where in NAMES.items():
        text = text.replace(f"{{{name}}}", where)
    return text


def in_fallback(name: str) -> str:
    return f'"{name}" in {NAMES["fallbacks"]}'


CANNOT = "Mail cannot be sent: "
CORRECT = "Correct this setting; the README lists the options and their values."
KEEP = "Keep {use_ssl} for port 465, {use_tls} for 587 and 25."
LOWER = (
    "Lower {max_connections} or {idle_timeout}; each process has connections of its "
    "own."
)
SET_TRUE = 'Set True or False. An environment variable is text: == "True" helps.'

# id, backend, options, message, hint.
BROKEN: list[tuple[str, str, dict[str, Any], str, str]] = [
    (
        "E002",
        OURS,
        FINE | {"use_ssl": True},
        f"{CANNOT}{{use_tls}} and {{use_ssl}} are both set.",
        KEEP,
    ),
    (
        "E002",
        DJANGOS,
        FINE | {"use_ssl": True},
        f"{CANNOT}{{use_tls}} and {{use_ssl}} are both set.",
        KEEP,
    ),
    (
        "E002",
        OURS,
        FINE | {"fallbacks": [{"host": "b", "use_tls": True, "use_ssl": True}]},
        f"{CANNOT}{in_fallback('use_tls')} and {in_fallback('use_ssl')} are both set.",
        f"Keep {in_fallback('use_ssl')} for port 465, {in_fallback('use_tls')} for "
        "587 and 25.",
    ),
    (
        "E003",
        OURS,
        FINE | {"ssl_cafile": "missing.pem"},
        f"{CANNOT}[Errno 2] No such file or directory: 'missing.pem'",
        "Check {ssl_cafile}: path, rights and format (PEM, no passphrase).",
    ),
    (
        "E003",
        DJANGOS,
        FINE | {"timeout": 5, "ssl_certfile": "missing.pem"},
        f"{CANNOT}[Errno 2] No such file or directory: 'missing.pem'",
        "Check {ssl_certfile}: path, rights and format (PEM, no passphrase).",
    ),
    (
        "E003",
        OURS,
        FINE | {"fallbacks": [{"host": "b", "ssl_cafile": Path("missing.pem")}]},
        f"{CANNOT}[Errno 2] No such file or directory: 'missing.pem'",
        f"Check {in_fallback('ssl_cafile')}: path, rights and format (PEM, no "
        "passphrase).",
    ),
    (
        "W001",
        OURS,
        PLAIN,
        "The password goes to smtp.example.com:587 in clear, and so does the mail.",
        "Set {use_tls} (port 587) or {use_ssl} (port 465).",
    ),
    (
        "W001",
        OURS,
        PLAIN | {"host": "localhost", "fallbacks": ["b.example.com"]},
        "The password goes to b.example.com:587 in clear, and so does the mail.",
        f"Set {in_fallback('use_tls')} (port 587) or {in_fallback('use_ssl')} "
        "(port 465).",
    ),
    (
        "W002",
        OURS,
        FINE | {"password": ""},
        "{username} is set and {password} is not: smtp.example.com:587 gets mail "
        "without a login.",
        "Set {password}, or empty {username}.",
    ),
    (
        "W002",
        OURS,
        FINE | {"username": ""},
        "{password} is set and {username} is not: smtp.example.com:587 gets mail "
        "without a login.",
        "Set {username}, or empty {password}.",
    ),
    (
        "W003",
        OURS,
        FINE | {"port": 465},
        "Port 465 of smtp.example.com is for TLS from the start, and {use_ssl} is not "
        "set.",
        "Set {use_ssl} instead of {use_tls}, or {port} to 587.",
    ),
    (
        "W003",
        OURS,
        RELAY | {"port": 465},
        "Port 465 of localhost is for TLS from the start, and {use_ssl} is not set.",
        "Set {use_ssl}, or {port} to 587.",
    ),
    (
        "W003",
        OURS,
        FINE | {"use_tls": False, "use_ssl": True},
        "Port 587 of smtp.example.com is not for TLS from the start, and {use_ssl} is "
        "set.",
        "Set {use_tls} instead of {use_ssl}, or {port} to 465.",
    ),
    (
        "W003",
        OURS,
        FINE | {"use_tls": False, "use_ssl": True, "port": "25"},
        "Port 25 of smtp.example.com is not for TLS from the start, and {use_ssl} is "
        "set.",
        "Set {use_tls} instead of {use_ssl}, or {port} to 465.",
    ),
    (
        "W003",
        OURS,
        FINE | {"fallbacks": [{"host": "b.example.com", "port": 465}]},
        "Port 465 of b.example.com is for TLS from the start, and "
        f"{in_fallback('use_ssl')} is not set.",
        f"Set {in_fallback('use_ssl')} instead of {in_fallback('use_tls')}, or "
        f"{in_fallback('port')} to 587.",
    ),
    (
        "W004",
        DJANGOS,
        FINE,
        f"{{timeout}} is not set: {DJANGOS} waits for ever for a silent server.",
        "Set {timeout} to some seconds, or use django_async_smtp.Backend (60 s).",
    ),
    (
        "W005",
        OURS,
        FINE | {"host": "smtp.office365.com"},
        "smtp.office365.com allows 3 connections at once, not 5.",
        LOWER,
    ),
    (
        "W005",
        OURS,
        FINE | {"max_connections": 51},
        "51 connections at once to smtp.example.com are more than most servers allow "
        "a client.",
        LOWER,
    ),
    (
        "W005",
        OURS,
        FINE | {"idle_timeout": 300},
        "Connections to smtp.example.com are kept idle for 300 s; servers may end "
        "them after 300 s.",
        LOWER,
    ),
    (
        "W005",
        OURS,
        FINE | {"max_connections": 21, "idle_timeout": 61},
        "Up to 21 connections to smtp.example.com are kept idle for 61 s: servers "
        "that count them refuse more.",
        LOWER,
    ),
    (
        "W006",
        DJANGOS,
        FINE | {"timeout": 5, "use_tls": "False"},
        "{use_tls} is a string, and so counts as True, even 'False'.",
        SET_TRUE,
    ),
    (
        "W006",
        DJANGOS,
        FINE | {"timeout": 5, "use_tls": SECRET},
        "{use_tls} is a string, and so counts as True.",
        SET_TRUE,
    ),
]


@pytest.mark.parametrize(("key", "path", "options", "problem", "hint"), BROKEN)
def test_a_problem_is_told_with_what_to_do(
    key: str,
    path: str,
    options: dict[str, Any],
    problem: str,
    hint: str,
    settings: Any,
) -> None:
    [message] = said_of(settings, path, **options)
    assert message.id == f"django_async_smtp.{key}"
    assert (message.msg, message.hint) == (named(problem), named(hint))
    assert (message.level, message.obj) == (ERROR if key[0] == "E" else WARNING, WHERE)


@pytest.mark.parametrize(
    ("path", "options"),
    [
        (OURS, RELAY),
        (OURS, FINE),
        (OURS, FINE | {"use_tls": False, "use_ssl": True, "port": 465}),
        (OURS, FINE | {"port": 25}),
        (OURS, FINE | {"port": "587"}),
        (OURS, FINE | {"port": 2525}),
        (OURS, FINE | {"port": 2525, "use_tls": False, "use_ssl": True}),
        (OURS, FINE | {"use_ssl": False, "timeout": 3}),
        (OURS, FINE | {"username": "", "password": ""}),
        (OURS, {"host": "smtp.example.com", "port": 25}),
        (OURS, PLAIN | {"host": "localhost"}),
        (OURS, PLAIN | {"host": "127.0.0.1"}),
        (OURS, PLAIN | {"host": "::1"}),
        (OURS, PLAIN | {"host": "localhost", "fallbacks": ["127.0.0.2"]}),
        (OURS, FINE | {"max_connections": 50}),
        (OURS, FINE | {"max_connections": 21, "idle_timeout": 60}),
        (OURS, FINE | {"max_connections": 20, "idle_timeout": 299}),
        (OURS, FINE | {"host": "smtp.office365.com", "max_connections": 3}),
        (OURS, FINE | {"fallbacks": ["b.example.com", {"port": 465, "use_ssl": True}]}),
        # Without TLS, nobody reads it.
        (OURS, RELAY | {"ssl_cafile": "missing.pem"}),
        (DJANGOS, FINE | {"timeout": 5}),
        (DJANGOS, FINE | {"timeout": 5, "use_tls": 1, "use_ssl": 0}),
        (DJANGOS, FINE | {"timeout": 5, "password": 12345678}),
        (DJANGOS, FINE | {"timeout": 5, "host": "smtp.office365.com"}),
    ],
)
def test_nothing_is_said_of_settings_that_work(
    path: str, options: dict[str, Any], settings: Any
) -> None:
    assert said_of(settings, path, **options) == []


@email_settings
def test_the_port_that_use_ssl_needs_is_not_djangos_default(settings: Any) -> None:
    assert ids(said_of(settings, host="smtp.example.com", use_ssl=True)) == ["W003"]


@mailers
def test_the_port_follows_the_kind_of_tls_in_mailers(settings: Any) -> None:
    assert said_of(settings, host="smtp.example.com", use_ssl=True) == []
    assert said_of(settings, host="smtp.example.com", use_tls=True) == []


@email_settings
@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"EMAIL_TIMEOUT": "10"}, "EMAIL_TIMEOUT must be a number of seconds above 0"),
        ({"EMAIL_PORT": SECRET}, "EMAIL_PORT must be a port number, not str."),
        ({"EMAIL_HOST_PASSWORD": 1}, "EMAIL_HOST_PASSWORD must be a string, not int."),
        ({"EMAIL_HOST": ""}, "EMAIL_HOST is empty."),
        ({"EMAIL_SSL_KEYFILE": "key.pem"}, "EMAIL_SSL_KEYFILE needs ssl_certfile"),
        ({"ASYNC_SMTP": []}, "ASYNC_SMTP must be a dict, not list."),
        ({"ASYNC_SMTP": {"max_conections": SECRET}}, "Did you mean 'max_connections'?"),
        ({"ASYNC_SMTP": {"password": SECRET}}, "set EMAIL_HOST_PASSWORD."),
        ({"ASYNC_SMTP": {"retries": -1}}, "ASYNC_SMTP['retries'] must be a whole"),
        ({"ASYNC_SMTP": {"fallbacks": [{"hots": SECRET}]}}, "unknown key 'hots'"),
        ({"ASYNC_SMTP": {"fallbacks": "b.example.com"}}, "must be a list of host"),
    ],
)
def test_an_option_that_cannot_be_used_is_an_error(
    changes: dict[str, Any], problem: str, settings: Any
) -> None:
    configure(settings, OURS, **FINE)
    for name, value in changes.items():
        setattr(settings, name, value)
    [message] = said()
    assert (message.id, message.level) == ("django_async_smtp.E001", ERROR)
    assert message.msg.startswith(CANNOT)
    assert problem in message.msg
    assert message.hint == CORRECT
    assert SECRET not in texts([message])


@mailers
@pytest.mark.parametrize("path", [OURS, DJANGOS])
@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "OPTIONS must define 'host'."),
        (FINE | {"hots": SECRET}, "Unknown options 'hots'."),
        (FINE | {"alias": "x"}, "OPTIONS must not define 'alias'."),
        (FINE | {"timeout": "10"}, "The 'timeout' option must be a number of seconds"),
        (FINE | {"port": SECRET}, "The 'port' option must be a port number, not str."),
    ],
)
def test_an_option_of_mailers_that_cannot_be_used_is_an_error(
    path: str, options: dict[str, Any], problem: str, settings: Any
) -> None:
    [message, *others] = said_of(settings, path, **options)
    assert (message.id, message.level) == ("django_async_smtp.E001", ERROR)
    # The mailer is named by Django, before the message.
    assert message.msg.startswith(f"{CANNOT}{problem}")
    assert str(message).count("MAILERS['default']") == 1
    assert (message.hint or "").endswith(CORRECT)
    assert set(ids(others)) <= {"W004"}
    assert SECRET not in texts([message])


@mailers
@pytest.mark.parametrize(
    ("path", "unknown", "meant"),
    [
        (OURS, {"hots": "h"}, "Did you mean 'host'? "),
        (OURS, {"max_connection": 1, "Retry": 1}, "'max_connections' and 'retries'? "),
        (OURS, {"colour": "red"}, ""),
        (DJANGOS, {"use_tsl": True}, "Did you mean 'use_tls'? "),
        # Not one of Django's.
        (DJANGOS, {"max_connection": 1}, ""),
    ],
)
def test_an_unknown_option_of_mailers_is_told_with_the_one_meant(
    path: str, unknown: dict[str, Any], meant: str, settings: Any
) -> None:
    [message, *_] = said_of(settings, path, **FINE, **unknown)
    hint = message.hint or ""
    assert hint.endswith(f"{meant}{CORRECT}")
    assert hint.startswith("Did you mean " if meant else CORRECT)


@mailers
@pytest.mark.parametrize("use_ssl", [False, "True"])
def test_a_string_is_no_boolean_of_our_backend_in_mailers(
    use_ssl: Any, settings: Any
) -> None:
    options = FINE | {"use_tls": "True", "use_ssl": use_ssl}
    [message] = said_of(settings, **options)
    assert ids([message]) == ["E001"]
    assert "The 'use_tls' option must be True or False, not str." in message.msg


@email_settings
@pytest.mark.parametrize(
    ("value", "end"),
    [("True", "."), ("False", ", even 'False'."), ("0", ", even '0'.")],
)
def test_a_string_counts_as_true(value: str, end: str, settings: Any) -> None:
    [message] = said_of(settings, **(FINE | {"use_tls": value}))
    assert message.id == "django_async_smtp.W006"
    assert message.msg == f"EMAIL_USE_TLS is a string, and so counts as True{end}"


@email_settings
def test_an_empty_string_counts_as_false(settings: Any) -> None:
    assert said_of(settings, **(FINE | {"use_ssl": ""})) == []


def test_two_strings_that_say_no_are_both_told(settings: Any) -> None:
    # As environment variables give them.
    options = FINE | {"timeout": 5, "use_tls": "False", "use_ssl": "False"}
    assert ids(said_of(settings, DJANGOS, **options)) == ["E002", "W006", "W006"]


@email_settings
def test_the_settings_are_named_as_django_names_them(settings: Any) -> None:
    [message] = said_of(settings, **PLAIN)
    assert message.hint == "Set EMAIL_USE_TLS (port 587) or EMAIL_USE_SSL (port 465)."
    assert str(message).startswith("EMAIL settings: (django_async_smtp.W001) The ")


@mailers
def test_the_options_are_named_as_mailers_has_them(settings: Any) -> None:
    [message] = said_of(settings, **PLAIN)
    hint = 'Set OPTIONS["use_tls"] (port 587) or OPTIONS["use_ssl"] (port 465).'
    assert message.hint == hint
    assert str(message).startswith("MAILERS['default']: (django_async_smtp.W001) The ")


@pytest.mark.parametrize("path", [OURS, DJANGOS])
def test_tls_files_may_be_paths(
    path: str, tmp_path: Path, ca: Any, cafile: Path, settings: Any
) -> None:
    certificate = tmp_path / "client.pem"
    ca.issue_cert("client.example.com").private_key_and_cert_chain_pem.write_to_path(
        certificate
    )
    options = FINE | {"timeout": 5, "ssl_certfile": certificate}
    if path == OURS:
        options["ssl_cafile"] = cafile
    assert said_of(settings, path, **options) == []


@pytest.mark.parametrize("path", [OURS, DJANGOS])
@pytest.mark.parametrize("content", [b"", b"-----BEGIN CERTIFICATE-----\n"])
def test_a_tls_file_of_another_format_is_an_error(
    content: bytes, path: str, tmp_path: Path, settings: Any
) -> None:
    file = tmp_path / "client.pem"
    file.write_bytes(content)
    options = FINE | {"timeout": 5, "ssl_certfile": str(file)}
    [message] = said_of(settings, path, **options)
    assert ids([message]) == ["E003"]
    assert f"cannot use ssl_certfile='{file}'" in message.msg


def test_a_check_evaluates_no_context_of_a_subclass(settings: Any) -> None:
    path = f"{__name__}.OwnContextBackend"
    options = FINE | {"timeout": 5, "ssl_certfile": "missing.pem"}
    assert said_of(settings, path, **options) == []


@pytest.mark.parametrize(
    "path",
    [
        "django_async_smtp.Backnd",
        "django_async_smtp.nowhere.Backend",
        "nowhere.Backend",
        "Backend",
    ],
)
def test_a_backend_that_cannot_be_imported_is_an_error(
    path: str, settings: Any
) -> None:
    [message] = said_of(settings, path)
    assert (message.id, message.level) == ("django_async_smtp.E004", ERROR)
    assert message.msg.startswith(f"{CANNOT}{path} cannot be imported: ")
    name = "BACKEND" if USES_MAILERS else "EMAIL_BACKEND"
    assert message.hint == (
        f'Correct {name}; it is "django_async_smtp.Backend" for this package.'
    )


def test_a_backend_whose_module_fails_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    (tmp_path / "failing_backend.py").write_text("import os; os.environ['NO_KEY']\n")
    monkeypatch.syspath_prepend(tmp_path)
    [message] = said_of(settings, "failing_backend.Backend")
    assert ids([message]) == ["E004"]
    assert message.msg.endswith("cannot be imported: KeyError: 'NO_KEY'")


def test_a_class_is_no_path(settings: Any) -> None:
    configure(settings, OURS)
    if USES_MAILERS:
        settings.MAILERS = {"default": {"BACKEND": Backend}}
    else:
        settings.EMAIL_BACKEND = Backend
    assert ids(said()) == ["E004"]


@pytest.mark.parametrize("name", ["locmem", "console", "filebased", "dummy"])
def test_other_backends_are_none_of_our_business(
    name: str, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = f"django.core.mail.backends.{name}.EmailBackend"
    # With all that would be told of an SMTP backend; and without EMAIL_FILE_PATH.
    monkeypatch.setattr(path + ".__init__", NotSMTP.__init__)
    settings.DEFAULT_FROM_EMAIL = "webmaster@localhost"
    options = {"host": "", "port": 465, "use_tls": "False", "use_ssl": True}
    assert said_of(settings, path, **options) == []


@pytest.mark.parametrize("name", ["NotSMTP", "our_factory"])
def test_other_backends_are_not_made(name: str, settings: Any) -> None:
    assert said_of(settings, f"{__name__}.{name}") == []


def test_a_subclass_of_ours_is_ours(settings: Any) -> None:
    path = f"{__name__}.OurSubclass"
    assert said_of(settings, path, **FINE) == []
    assert ids(said_of(settings, path, **PLAIN)) == ["W001"]
    assert ids(said_of(settings, path, **FINE, max_connections=60)) == ["W005"]


def test_a_subclass_of_djangos_is_djangos(settings: Any) -> None:
    path = f"{__name__}.DjangosSubclass"
    [message] = said_of(settings, path, **FINE)
    assert ids([message]) == ["W004"]
    assert f"{path} waits for ever" in message.msg


def test_a_subclass_may_log_in_without_a_password(settings: Any) -> None:
    options = FINE | {"timeout": 5, "password": ""}
    assert said_of(settings, f"{__name__}.OAuthBackend", **options) == []
    assert ids(said_of(settings, DJANGOS, **options)) == ["W002"]


def test_a_subclass_may_send_in_its_own_way(settings: Any) -> None:
    settings.DEFAULT_FROM_EMAIL = "webmaster@localhost"
    assert said_of(settings, f"{__name__}.OwnWayBackend", **PLAIN) == []


def test_what_a_subclass_raises_is_told_without_the_password(settings: Any) -> None:
    path = f"{__name__}.TellingBackend"
    [message] = said_of(settings, path, **FINE)
    assert ids([message]) == ["E001"]
    assert message.msg == f"{CANNOT}ValueError"
    [message] = said_of(settings, path, **(FINE | {"username": "", "password": ""}))
    assert message.msg == (
        f"{CANNOT}ValueError: invalid literal for int() with base 10: 'nothing'"
    )


def test_what_a_subclass_raises_ends_no_command(settings: Any) -> None:
    [message] = said_of(settings, f"{__name__}.FailingBackend", **FINE)
    assert ids([message]) == ["E001"]
    assert message.msg == f"{CANNOT}KeyError: 'SMTP_REGION'"


def test_a_default_timeout_of_the_process_is_one(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getdefaulttimeout", lambda: 10.0)
    assert said_of(settings, DJANGOS, **FINE) == []


@pytest.mark.parametrize("path", [OURS, DJANGOS])
@pytest.mark.parametrize("name", ["DEFAULT_FROM_EMAIL", "SERVER_EMAIL"])
@pytest.mark.parametrize(
    "address",
    ["My Site", "me@", "a@example.com, b@example.com", "a@b\r\nBcc: c@d", ("a", "b")],
)
def test_a_sender_is_one_address(
    address: Any, name: str, path: str, settings: Any
) -> None:
    setattr(settings, name, address)
    [message] = said_of(settings, path, **FINE, timeout=5)
    assert (message.id, message.level) == ("django_async_smtp.E005", ERROR)
    assert message.msg.startswith(f"{name} is not one address: ")
    assert str(message.hint).startswith('Set it to one address: "me@example.com"')
    assert message.obj is None


@pytest.mark.parametrize("address", [None, ""])
def test_there_is_a_sender(address: Any, settings: Any) -> None:
    settings.DEFAULT_FROM_EMAIL = settings.SERVER_EMAIL = address
    [message] = said_of(settings, **FINE)
    assert ids([message]) == ["E005"]
    # Django takes it for an empty SERVER_EMAIL.
    assert message.msg == "DEFAULT_FROM_EMAIL is empty."


@pytest.mark.parametrize(
    "address",
    [
        "me@example.com",
        "Me <me@example.com>",
        "webmaster",
        "jörg@exämple.com",
        gettext_lazy("Me <me@example.com>"),
        SimpleLazyObject(lambda: "me@example.com"),
    ],
)
def test_these_are_addresses(address: Any, settings: Any) -> None:
    settings.DEFAULT_FROM_EMAIL = settings.SERVER_EMAIL = address
    assert said_of(settings, **FINE) == []


@pytest.mark.parametrize("path", [OURS, DJANGOS])
def test_djangos_default_sender_is_none_for_servers(path: str, settings: Any) -> None:
    settings.DEFAULT_FROM_EMAIL = "webmaster@localhost"
    [message] = said_of(settings, path, **FINE, timeout=5)
    assert (message.id, message.level) == ("django_async_smtp.W007", WARNING)
    assert message.msg == (
        "DEFAULT_FROM_EMAIL is still webmaster@localhost: most servers refuse this "
        "sender."
    )
    assert message.hint == "Set it to an address of your domain."


def test_lazy_strings_count_as_when_sending(settings: Any) -> None:
    lazy = {"host": SimpleLazyObject(lambda: "smtp.example.com")}
    assert said_of(settings, **(FINE | lazy)) == []
    password = gettext_lazy(SECRET)
    options = FINE | {"timeout": 5, "password": password}
    assert said_of(settings, DJANGOS, **options) == []
    [message] = said_of(settings, **options)
    assert ids([message]) == ["E001"]
    assert SECRET not in texts([message])


@mailers
def test_each_mailer_is_named(settings: Any) -> None:
    settings.MAILERS = {
        "marketing": {"BACKEND": OURS, "OPTIONS": PLAIN},
        "fine": {"BACKEND": OURS, "OPTIONS": FINE},
        "django": {"OPTIONS": FINE},
        "broken": {"BACKEND": "nowhere.Backend"},
        "list": [],
        "options": {"BACKEND": OURS, "OPTIONS": None},
        "console": {"BACKEND": "django.core.mail.backends.console.EmailBackend"},
    }
    found = [(str(message.obj), *ids([message])) for message in said()]
    assert found == [
        ("MAILERS['marketing']", "W001"),
        ("MAILERS['django']", "W004"),
        ("MAILERS['broken']", "E004"),
        ("MAILERS['list']", "E001"),
        ("MAILERS['options']", "E001"),
    ]
    *_, of_list, of_options = said()
    assert of_list.msg == f"{CANNOT}The mailer must be a dict, not list."
    assert of_options.msg == f"{CANNOT}OPTIONS must be a dict, not NoneType."


@mailers
def test_what_all_mailers_share_is_told_once(settings: Any) -> None:
    settings.DEFAULT_FROM_EMAIL = "webmaster@localhost"
    settings.SERVER_EMAIL = "root@"
    settings.MAILERS = {
        alias: {"BACKEND": OURS, "OPTIONS": FINE} for alias in ("default", "b", "c")
    }
    assert ids(said()) == ["E005", "W007"]


@mailers
@pytest.mark.parametrize("value", [{}, [], ["default"]])
def test_no_mailer_is_djangos_to_tell(value: Any, settings: Any) -> None:
    settings.MAILERS = value
    assert checks.aliases() == []
    assert said() == []


@mailers
def test_a_project_may_have_no_default_mailer(settings: Any) -> None:
    settings.MAILERS = {"other": {"BACKEND": OURS, "OPTIONS": FINE}}
    assert said() == []


@pytest.mark.parametrize("path", [OURS, DJANGOS, f"{__name__}.DjangosSubclass"])
def test_the_checks_warn_of_no_deprecation(path: str, settings: Any) -> None:
    configure(settings, path, **FINE, timeout=5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        said()
    assert caught == []


@pytest.mark.parametrize("options", [options for _, _, options, _, _ in BROKEN])
@pytest.mark.parametrize("path", [OURS, DJANGOS, f"{__name__}.OurSubclass"])
def test_no_message_shows_a_secret(
    options: dict[str, Any], path: str, settings: Any
) -> None:
    assert SECRET not in texts(said_of(settings, path, **options))
    [alias] = checks.aliases()
    mailer = checks.mailer(alias, to_send=False)
    assert SECRET not in f"{mailer} {mailer!r}"


def test_the_mailer_for_sending_is_what_sending_uses(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getfqdn", lambda: "this.example.com")
    for path in (OURS, DJANGOS):
        configure(settings, path, **FINE, timeout=5)
        mailer = checks.mailer("default")
        [server] = mailer.servers
        assert server.local_hostname == "this.example.com"
        assert server.ssl_context is not None
        assert server.ssl_context.check_hostname
        assert checks.problems(mailer) == []
    assert checks.route_of(object()) is None


@pytest.mark.parametrize("path", [OURS, DJANGOS])
def test_problems_are_told_of_a_mailer_for_sending(
    path: str, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getfqdn", lambda: "this.example.com")
    options = FINE | {"timeout": 5, "ssl_certfile": "missing.pem"}
    configure(settings, path, **options)
    found = checks.problems(checks.mailer("default"))
    assert ids(found) == ["E003"]
    assert found == said()


def test_the_check_is_registered_for_mail() -> None:
    ours: Any = [
        check for check in registry.get_checks() if check.__module__ == checks.__name__
    ]
    assert ours == [checks.check]
    assert ours[0].tags == ("mail",)


def test_an_id_may_be_silenced(settings: Any) -> None:
    settings.SILENCED_SYSTEM_CHECKS = ["django_async_smtp.W001"]
    [message] = said_of(settings, **PLAIN)
    assert message.is_silenced()


def test_the_ids_are_in_order() -> None:
    keys = list(checks.CONCERNS)
    assert keys == sorted(keys)
    assert all(re.fullmatch(r"[EW]\d{3}", key) for key in keys)
    assert len(set(checks.CONCERNS.values())) == len(keys)
    assert set(keys) >= checks.SHARED


def test_the_readme_has_a_row_for_each_id() -> None:
    readme = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| `([EW]\d{3})` \| (\w+) \| .+ \| .+ \|$", readme, re.M)
    levels = {"E": "error", "W": "warning"}
    assert rows == [(key, levels[key[0]]) for key in checks.CONCERNS]


def run_example(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the example project's manage.py."""
    return subprocess.run(
        [sys.executable, "manage.py", *args],
        cwd=ROOT / "example_project",
        env={
            **{name: os.environ[name] for name in os.environ if "DJANGO" not in name},
            "PYTHONPATH": str(PACKAGES),
            "PYTHONWARNINGS": "error",
            **env,
        },
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


def test_manage_py_check_says_it() -> None:
    done = run_example("check", "--tag", "mail", SMTP_PORT="465", SMTP_USER="me")
    assert done.returncode == 0, done.stderr
    assert "django_async_smtp.W002" in done.stderr
    assert "django_async_smtp.W003" in done.stderr
    assert "2 issues" in done.stderr
    strict = run_example("check", "--fail-level", "WARNING", SMTP_PORT="465")
    assert strict.returncode == 1


def test_manage_py_check_fails_on_an_error() -> None:
    done = run_example("check", "--tag", "mail", SMTP_CA_FILE="missing.pem")
    assert done.returncode == 1
    assert "django_async_smtp.E003" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_example_project_has_no_problems() -> None:
    done = run_example("check", "--fail-level", "WARNING")
    assert done.returncode == 0, done.stderr
    assert "no issues" in done.stdout + done.stderr


def test_a_fresh_project_is_asked_for_its_sender_alone() -> None:
    script = """
from django.conf import settings
settings.configure(INSTALLED_APPS=["django_async_smtp"])
import django
django.setup()
from django.core.checks import run_checks
print([message.id for message in run_checks(tags=["mail"])])
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env={**os.environ, "PYTHONPATH": str(PACKAGES)},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.stdout.strip() == "['django_async_smtp.W007']", done.stderr


# Queues.

QUEUED_TASKS = f"{LIBRARY}.backends.dummy.DummyBackend"


@pytest.fixture
def tasks(settings: Any) -> None:
    """TASKS with a backend that is not immediate."""
    settings.TASKS = {"default": {"BACKEND": QUEUED_TASKS}}


@pytest.mark.usefixtures("tasks")
def test_a_queue_may_be_fine(settings: Any) -> None:
    configure_queue(settings, FINE)
    assert said() == []


@pytest.mark.usefixtures("tasks")
def test_what_the_worker_sends_through_is_checked(settings: Any) -> None:
    configure_queue(settings, PLAIN)
    assert ids(said()) == ["W001"]


@pytest.mark.usefixtures("tasks")
@pytest.mark.parametrize(
    ("options", "problem", "hint"),
    [
        ({"batch_size": 0}, "must be a number of messages, 1 or more", "Correct"),
        ({"batchsize": 5}, "batchsize", "batch_size"),
    ],
)
def test_unusable_options_of_a_queue(
    settings: Any, options: dict[str, Any], problem: str, hint: str
) -> None:
    configure_queue(settings, FINE, **options)
    [message] = [one for one in said() if "E001" in str(one.id)]
    assert problem in message.msg
    assert hint in f"{message.msg} {message.hint}"


@mailers
@pytest.mark.usefixtures("tasks")
@pytest.mark.parametrize("mailer", ["default", "missing", None])
def test_a_mailer_that_is_not_there(settings: Any, mailer: str | None) -> None:
    configure_queue(settings, FINE, mailer=mailer)
    [message] = said()
    assert ids([message]) == ["E001"]
    assert "'mailer' option" in message.msg


@mailers
@pytest.mark.usefixtures("tasks")
@pytest.mark.parametrize("path", [DJANGOS, QUEUED, "django.core.mail.backends.dummy.X"])
def test_a_mailer_that_is_another_backend(settings: Any, path: str) -> None:
    configure_queue(settings, FINE)
    options = {"mailer": "default"} if path == QUEUED else {"host": "localhost"}
    settings.MAILERS["smtp"] = {"BACKEND": path, "OPTIONS": options}
    [message] = [one for one in said() if "E006" in str(one.id)][:1]
    assert message.level == ERROR
    assert "is not a django_async_smtp.Backend" in message.msg


@pytest.mark.usefixtures("tasks")
@pytest.mark.parametrize(
    "options", [{"task_backend": "missing"}, {"queue_name": "missing"}]
)
def test_a_task_queue_that_is_not_there(settings: Any, options: Any) -> None:
    configure_queue(settings, FINE, **options)
    [message] = said()
    assert (ids([message]), message.level) == (["E007"], ERROR)
    assert message.msg.startswith("Mail cannot be queued: ")
    assert "missing" in message.msg


@pytest.mark.parametrize("debug", [False, True])
def test_tasks_that_are_immediate(settings: Any, debug: bool) -> None:
    settings.TASKS = {"default": {"BACKEND": IMMEDIATE}}
    settings.DEBUG = debug
    configure_queue(settings, FINE)
    assert ids(said()) == ([] if debug else ["W008"])


def test_a_django_without_tasks(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "LIBRARIES", ("missing.tasks",))
    configure_queue(settings, FINE)
    [message] = said()
    assert ids([message]) == ["E001"]
    assert "pip install django-tasks" in message.msg


@pytest.mark.parametrize("cache", ["LocMemCache", "redis.RedisCache"])
def test_a_cache_that_cannot_count(settings: Any, cache: str) -> None:
    where = "locmem.LocMemCache" if cache == "LocMemCache" else cache
    path = f"django.core.cache.backends.{where}"
    settings.CACHES = {"default": {"BACKEND": path, "LOCATION": "redis://localhost"}}
    found = said_of(settings, **FINE, rate_limit=5, rate_limit_cache="default")
    assert ids(found) == (["W009"] if cache == "LocMemCache" else [])
