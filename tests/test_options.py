from __future__ import annotations

import inspect
import math
import os
import ssl
import warnings
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
from django.core import mail
from django.core.exceptions import ImproperlyConfigured
from django.core.mail import EmailMessage
from django.core.mail.backends.smtp import EmailBackend

from django_async_smtp import Backend
from django_async_smtp.options import (
    DEFAULT_TIMEOUT,
    DJANGO_SETTINGS,
    EXTRA,
    TYPES,
    OptionError,
    Options,
)

from .conftest import OURS, MakeBackend, configure, default_backend
from .servers import PASSWORD, USERNAME, MailServer, ScriptedServer, free_port
from .settings import USES_MAILERS

SECRET = "s3cr3t"

email_settings = pytest.mark.skipif(USES_MAILERS, reason="EMAIL_* only")
mailers = pytest.mark.skipif(not USES_MAILERS, reason="MAILERS only")

# A value for each option that is not its default.
VALUES: dict[str, Any] = {
    "host": "smtp.example.com",
    "port": 2525,
    "username": USERNAME,
    "password": PASSWORD,
    "use_tls": True,
    "use_ssl": False,
    "timeout": 7.5,
    "ssl_keyfile": "key.pem",
    "ssl_certfile": "cert.pem",
    "local_hostname": "mail.example.com",
    "source_address": ("127.0.0.1", 0),
    "ssl_cafile": "ca.pem",
    "max_connections": 3,
    "max_messages": 50,
    "max_age": 60.0,
    "idle_timeout": 0,
    "ping_after": 0,
    "rate_limit": 2.5,
    "rate_limit_cache": "default",
    "pipelining": False,
    "retries": 2,
    "retry_deadline": 10,
    "fallbacks": ("two.example.com", {"host": "three.example.com", "port": 2526}),
}

WRONG_TYPES: list[tuple[str, Any]] = [
    ("host", 25),
    ("host", b"smtp.example.com"),
    ("port", SECRET),
    ("port", "25.0"),
    ("port", -1),
    ("port", 65536),
    ("port", 25.0),
    ("port", True),
    ("username", 1),
    ("username", b"alice"),
    ("password", 123456),
    ("timeout", 0),
    ("timeout", -1),
    ("timeout", True),
    ("timeout", "10"),
    ("timeout", math.inf),
    ("timeout", math.nan),
    ("ssl_certfile", True),
    ("ssl_keyfile", b"key.pem"),
]

WRONG_EXTRA: list[tuple[str, Any]] = [
    ("local_hostname", 1),
    ("local_hostname", ""),
    ("local_hostname", "two words"),
    ("local_hostname", "a.example\r\nMAIL"),
    ("local_hostname", "bücher.example"),
    ("source_address", "127.0.0.1"),
    ("source_address", ("127.0.0.1",)),
    ("source_address", ("127.0.0.1", "0")),
    ("source_address", ("127.0.0.1", 65536)),
    ("source_address", (None, 0)),
    ("ssl_cafile", 1),
    ("ssl_cafile", True),
    ("max_connections", 0),
    ("max_connections", True),
    ("max_messages", 1.5),
    ("max_age", 0),
    ("idle_timeout", -1),
    ("ping_after", "5"),
    ("rate_limit", 0),
    ("retries", -1),
    ("retry_deadline", "30"),
    ("fallbacks", "two.example.com"),
    ("fallbacks", [25]),
]

# Where a value may be wrong and yet be of the right type.
NUMBER = {int, float}
TAKES: dict[str, set[type]] = {
    "port": {int},
    "timeout": NUMBER,
    "local_hostname": {str},
    "source_address": {tuple},
    "max_connections": {int},
    "max_messages": {int},
    "max_age": NUMBER,
    "idle_timeout": NUMBER,
    "ping_after": NUMBER,
    "rate_limit": NUMBER,
    "retries": {int},
    "retry_deadline": NUMBER,
    "fallbacks": {list},
}


def tells_the_type(text: str, name: str, value: object) -> bool:
    """Whether an error names the type of a value, and only where that is wrong."""
    if type(value) in TAKES.get(name, ()):
        return ", not " not in text
    return text.endswith(f", not {type(value).__name__}.")


def message() -> EmailMessage:
    return EmailMessage("Hello", "Body", "from@example.com", ["to@example.com"])


def options_of(backend: Backend) -> Options:
    """Return what the backend connects with; a server must listen."""
    backend.open()
    assert backend.connection is not None
    return backend.connection.servers[0]


def configured(settings: Any, **options: Any) -> Any:
    """Return the default backend, ours, with these options in the settings."""
    configure(settings, OURS, **options)
    return default_backend()


def test_the_signature_is_that_of_djangos_backend() -> None:
    ours, theirs = (
        [
            (parameter.name, parameter.kind, parameter.default)
            for parameter in inspect.signature(cls).parameters.values()
        ]
        for cls in (Backend, EmailBackend)
    )
    assert ours == theirs


def test_it_has_the_attributes_of_djangos_backend(
    server: MailServer, make_backend: MakeBackend, make_django_backend: MakeBackend
) -> None:
    options = {"username": "alice", "password": "secret", "timeout": 3}
    theirs = make_django_backend(server, **options)
    ours = make_backend(server, **options)
    names = {name for name in vars(theirs) if not name.startswith("_")}
    assert {name: getattr(ours, name) for name in names} == {
        name: getattr(theirs, name) for name in names
    }


def test_every_option_can_be_read(settings: Any) -> None:
    backend = configured(settings, **VALUES)
    assert {name: getattr(backend, name) for name in TYPES} == VALUES


def test_the_defaults_are_those_of_djangos_backend(settings: Any) -> None:
    backend = configured(settings, host="localhost", port=25)
    for name in ("use_tls", "use_ssl"):
        assert getattr(backend, name) is False
    assert not backend.username
    assert not backend.password
    for name in ("timeout", "ssl_keyfile", "ssl_certfile", *EXTRA):
        assert getattr(backend, name) is None
    assert backend.fail_silently is False
    assert backend.connection is None


def test_without_a_timeout_60_seconds_count(
    server: MailServer, make_backend: MakeBackend
) -> None:
    backend = make_backend(server)
    assert backend.timeout is None
    assert options_of(backend).timeout == DEFAULT_TIMEOUT == 60


def test_a_timeout_that_is_set_counts(
    server: MailServer, make_backend: MakeBackend
) -> None:
    assert options_of(make_backend(server, timeout=7)).timeout == 7


@pytest.mark.parametrize(("name", "value"), WRONG_TYPES, ids=str)
def test_a_value_of_a_wrong_type_is_an_error(
    name: str, value: Any, settings: Any
) -> None:
    options = {"host": "localhost", "port": 25, name: value}
    with pytest.raises(ImproperlyConfigured) as raised:
        configured(settings, **options)
    text = str(raised.value)
    assert (f"MAILERS['default']: The '{name}' option" in text) == USES_MAILERS
    assert (f"{DJANGO_SETTINGS[name]} must be" in text) != USES_MAILERS
    assert tells_the_type(text, name, value)
    assert SECRET not in text


@pytest.mark.parametrize(("name", "value"), WRONG_EXTRA, ids=str)
def test_a_value_that_an_option_of_ours_cannot_have_is_an_error(
    name: str, value: Any, settings: Any
) -> None:
    with pytest.raises(ImproperlyConfigured) as raised:
        configured(settings, host="localhost", port=25, **{name: value})
    text = str(raised.value)
    assert (f"MAILERS['default']: The '{name}' option must" in text) == USES_MAILERS
    assert (f"ASYNC_SMTP['{name}'] must" in text) != USES_MAILERS
    assert tells_the_type(text, name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "2525"),
        ("timeout", 0.5),
        ("username", None),
        ("password", ""),
        ("ssl_certfile", Path("cert.pem")),
        ("ssl_cafile", Path("ca.pem")),
        ("local_hostname", "[127.0.0.1]"),
        ("source_address", ["127.0.0.1", 0]),
    ],
    ids=str,
)
def test_what_else_an_option_may_be(name: str, value: Any, settings: Any) -> None:
    backend = configured(settings, **{"host": "localhost", "port": 25, name: value})
    assert getattr(backend, name) == value


def test_a_port_of_digits_is_a_port(
    server: MailServer, make_backend: MakeBackend
) -> None:
    backend = make_backend(server, port=str(server.port))
    assert backend.send_messages([message()]) == 1


def test_tls_and_ssl_together_are_an_error(settings: Any) -> None:
    expected = (
        "MAILERS['default']: The 'use_ssl' and 'use_tls' OPTIONS are incompatible."
        if USES_MAILERS
        else "EMAIL_USE_TLS/EMAIL_USE_SSL are mutually exclusive"
    )
    with pytest.raises(ImproperlyConfigured) as raised:
        configured(settings, host="localhost", use_tls=True, use_ssl=True)
    assert str(raised.value).startswith(expected)
    assert isinstance(raised.value, ValueError) != USES_MAILERS


@email_settings
def test_both_come_from_the_settings_or_the_arguments(settings: Any) -> None:
    configure(settings, OURS, use_ssl=True)
    with pytest.raises(OptionError, match="EMAIL_USE_TLS/EMAIL_USE_SSL"):
        Backend(use_tls=True)
    assert Backend(use_tls=True, use_ssl=False).use_ssl is False


@email_settings
@pytest.mark.parametrize("value", ["False", "True", 1, "", 0, None])
def test_email_use_tls_may_be_anything_as_in_django(value: Any, settings: Any) -> None:
    configure(settings, OURS, use_tls=value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Django 6.1: not from MAILERS.
        theirs = EmailBackend()
    ours = Backend()
    assert ours.use_tls == theirs.use_tls
    assert bool(ours.use_tls) == bool(value)


@mailers
@pytest.mark.parametrize("name", ["use_tls", "use_ssl"])
@pytest.mark.parametrize("value", ["False", "True", 1])
def test_only_true_is_true_in_mailers(name: str, value: Any, settings: Any) -> None:
    with pytest.raises(mail.InvalidMailer, match=f"'{name}' option must be True or"):
        configured(settings, host="localhost", **{name: value})


@email_settings
@pytest.mark.parametrize("name", DJANGO_SETTINGS)
def test_each_setting_of_djangos_is_read(name: str, settings: Any) -> None:
    settings.EMAIL_SSL_CERTFILE = VALUES["ssl_certfile"]
    setattr(settings, DJANGO_SETTINGS[name], VALUES[name])
    assert getattr(Backend(), name) == VALUES[name]


@email_settings
def test_the_settings_are_read_when_a_backend_is_made(settings: Any) -> None:
    settings.EMAIL_HOST = "one.example.com"
    first = Backend()
    settings.EMAIL_HOST = "two.example.com"
    assert (first.host, Backend().host) == ("one.example.com", "two.example.com")


@email_settings
def test_reading_the_settings_warns_of_nothing(settings: Any) -> None:
    configure(settings, OURS, host="localhost")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Backend()
    assert caught == []


@email_settings
@pytest.mark.parametrize("value", [[], "local_hostname", None, 1])
def test_async_smtp_must_be_a_dict(value: Any, settings: Any) -> None:
    settings.ASYNC_SMTP = value
    name = type(value).__name__
    with pytest.raises(OptionError, match=f"ASYNC_SMTP must be a dict, not {name}"):
        Backend()


@email_settings
@pytest.mark.parametrize(
    ("key", "end"),
    [
        ("local_hostnam", "Did you mean 'local_hostname'?"),
        ("hostname", "Did you mean 'local_hostname'?"),
        ("cafile", "Did you mean 'ssl_cafile'?"),
        ("LOCAL_HOSTNAME", "Did you mean 'local_hostname'?"),
        ("zzz", f"Known: {', '.join(EXTRA)}."),
        (1, f"Known: {', '.join(EXTRA)}."),
    ],
)
def test_an_unknown_key_of_async_smtp_is_an_error(
    key: Any, end: str, settings: Any
) -> None:
    settings.ASYNC_SMTP = {key: SECRET}
    with pytest.raises(ImproperlyConfigured) as raised:
        Backend()
    assert str(raised.value) == f"ASYNC_SMTP[{key!r}] (str) is unknown. {end}"


@email_settings
@pytest.mark.parametrize("key", DJANGO_SETTINGS)
def test_a_key_that_django_has_a_setting_for_is_an_error(
    key: str, settings: Any
) -> None:
    settings.ASYNC_SMTP = {key: SECRET}
    with pytest.raises(ImproperlyConfigured) as raised:
        Backend()
    assert str(raised.value) == f"ASYNC_SMTP[{key!r}]: set {DJANGO_SETTINGS[key]}."


@email_settings
def test_an_empty_host_is_an_error(settings: Any) -> None:
    settings.EMAIL_HOST = ""
    with pytest.raises(OptionError, match="EMAIL_HOST is empty"):
        Backend()


@email_settings
def test_arguments_win_over_settings(settings: Any) -> None:
    settings.ASYNC_SMTP = {"local_hostname": "settings.example.com"}
    settings.EMAIL_HOST_USER = "settings"
    backend = Backend(**VALUES)
    assert {name: getattr(backend, name) for name in TYPES} == VALUES


@email_settings
def test_empty_arguments_count_as_in_django(settings: Any) -> None:
    configure(settings, OURS, **(VALUES | {"use_ssl": False}))
    backend = Backend("", 0, username="", password="", use_tls=False)
    assert (backend.host, backend.port) == (VALUES["host"], VALUES["port"])
    assert (backend.username, backend.password, backend.use_tls) == ("", "", False)


@email_settings
def test_arguments_may_be_positional() -> None:
    backend = Backend("h.example.com", 26, "u", "p", False, True, True, 3, "k", "c")
    assert backend.host == "h.example.com"
    assert backend.port == 26
    assert (backend.username, backend.password) == ("u", "p")
    assert (backend.use_tls, backend.use_ssl) == (False, True)
    assert backend.fail_silently is True
    assert backend.timeout == 3
    assert (backend.ssl_keyfile, backend.ssl_certfile) == ("k", "c")


@mailers
def test_mailers_must_name_the_host(settings: Any) -> None:
    with pytest.raises(mail.InvalidMailer) as raised:
        configured(settings)
    assert str(raised.value) == "MAILERS['default']: OPTIONS must define 'host'."


@mailers
def test_a_backend_made_by_hand_is_not_told_to_set_email_host() -> None:
    with pytest.raises(mail.InvalidMailer, match="OPTIONS must define 'host'"):
        Backend()


@mailers
@pytest.mark.parametrize(
    ("security", "port"), [({}, 25), ({"use_tls": True}, 587), ({"use_ssl": True}, 465)]
)
def test_the_port_follows_the_security(
    security: dict[str, bool], port: int, settings: Any
) -> None:
    assert configured(settings, host="localhost", **security).port == port
    assert configured(settings, host="localhost", port=26, **security).port == 26


@mailers
def test_unknown_options_are_invalid(settings: Any) -> None:
    with pytest.raises(mail.InvalidMailer) as raised:
        configured(settings, host="localhost", hots=SECRET, local=1)
    text = str(raised.value)
    assert text == "MAILERS['default']: Unknown options 'hots', 'local'."


@mailers
def test_an_error_names_the_alias(settings: Any) -> None:
    settings.MAILERS = {"other": {"BACKEND": OURS, "OPTIONS": {"host": ""}}}
    with pytest.raises(mail.InvalidMailer, match=r"MAILERS\['other'\]: OPTIONS must"):
        mail.mailers["other"]


@mailers
def test_async_smtp_is_not_read_for_mailers(
    server: MailServer, make_backend: MakeBackend, settings: Any
) -> None:
    # Nor is EMAIL_*: Django raises AttributeError for it.
    settings.ASYNC_SMTP = {"nonsense": SECRET}
    backend = make_backend(server)
    assert backend.local_hostname is None
    assert backend.send_messages([message()]) == 1


def test_the_local_hostname_is_said_in_ehlo(make_backend: MakeBackend) -> None:
    with ScriptedServer() as server:
        make_backend(server, local_hostname="mail.example.com").open()
        assert server.commands(b"EHLO") == [b"EHLO mail.example.com"]


def test_the_source_address_may_be_a_list(
    server: MailServer, make_backend: MakeBackend
) -> None:
    backend = make_backend(server, source_address=["127.0.0.1", 0])
    assert options_of(backend).source_address == ("127.0.0.1", 0)


def test_attributes_that_change_later_count(make_backend: MakeBackend) -> None:
    with ScriptedServer(extensions=("AUTH PLAIN",)) as server:
        backend = make_backend(host="nowhere.invalid", port=1, timeout=1)
        backend.host, backend.port = server.host, server.port
        backend.username, backend.password = USERNAME, PASSWORD
        backend.timeout = 5
        backend.local_hostname = "mail.example.com"
        options = options_of(backend)
        assert backend.send_messages([message()]) == 1
    assert server.received[0].login
    assert (options.timeout, options.local_hostname) == (5, "mail.example.com")


def test_fail_silently_counts_as_it_is_when_sending(make_backend: MakeBackend) -> None:
    backend = make_backend(host="127.0.0.1", port=free_port())
    backend.fail_silently = True
    assert backend.send_messages([message()]) == 0
    backend.fail_silently = False
    with pytest.raises(ConnectionRefusedError):
        backend.send_messages([message()])


@pytest.mark.parametrize("fail_silently", [False, True])
@pytest.mark.parametrize(
    ("name", "value"),
    [("port", "smtp"), ("timeout", 0), ("host", None), ("source_address", "here")],
)
def test_fail_silently_hides_no_configuration_error(
    name: str,
    value: Any,
    fail_silently: bool,
    server: MailServer,
    make_backend: MakeBackend,
) -> None:
    backend = make_backend(server, fail_silently=fail_silently)
    setattr(backend, name, value)
    with pytest.raises(ImproperlyConfigured):
        backend.send_messages([message()])
    with pytest.raises(ImproperlyConfigured):
        backend.open()
    assert server.received == []


@email_settings
def test_fail_silently_hides_no_error_of_the_settings(settings: Any) -> None:
    settings.EMAIL_TIMEOUT = SECRET
    with pytest.raises(ImproperlyConfigured, match="EMAIL_TIMEOUT must be a number"):
        Backend(fail_silently=True)


def test_connections_are_shared_by_backends_with_equal_options(
    make_backend: MakeBackend,
) -> None:
    with ScriptedServer() as server:
        for _ in range(3):
            make_backend(server).send_messages([message()])
        assert server.connections == 1
        make_backend(server, timeout=3).send_messages([message()])
        assert server.connections == 2


def test_options_are_equal_and_hashable_and_cannot_change() -> None:
    def make(**changes: Any) -> Options:
        context = changes.pop("ssl_context", None)
        return Options(host="h", port=25, ssl_context=context, **changes)

    context = ssl.create_default_context()
    assert make() == make()
    assert hash(make()) == hash(make())
    assert make(ssl_context=context) == make(ssl_context=context)
    different = {
        make(),
        make(username="u"),
        make(password="p"),
        make(timeout=1),
        make(use_tls=True),
        make(use_ssl=True),
        make(local_hostname="l"),
        make(source_address=("", 1)),
        make(ssl_context=context),
    }
    assert len(different) == 9
    with pytest.raises(FrozenInstanceError):
        make().host = "other"  # type: ignore[misc]


def test_the_repr_of_options_shows_no_credentials() -> None:
    options = Options(
        host="smtp.example.com", port=25, username="u53r", password="p4ss"
    )
    assert "smtp.example.com" in repr(options)
    assert "u53r" not in repr(options)
    assert "p4ss" not in repr(options)
    assert options.server == "smtp.example.com:25"


@pytest.mark.parametrize(
    ("username", "password", "uses_login"),
    [("u", "p", True), ("u", "", False), ("", "p", False), ("", "", False)],
)
def test_a_login_needs_both_the_name_and_the_password(
    username: str, password: str, uses_login: bool
) -> None:
    options = Options(host="h", port=25, username=username, password=password)
    assert options.uses_login is uses_login


def test_files_may_be_paths(
    server: MailServer, make_backend: MakeBackend, cafile: Path
) -> None:
    class PathLike:
        def __fspath__(self) -> str:
            return os.fspath(cafile)

    for path in (cafile, PathLike()):
        backend = make_backend(server, ssl_cafile=path)
        assert isinstance(backend.ssl_context, ssl.SSLContext)
