"""Every setting of a connection: read, checked and explained once."""

from __future__ import annotations

import difflib
import math
import os
import ssl
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Final

from django.conf import settings
from django.core import mail
from django.core.exceptions import ImproperlyConfigured

if TYPE_CHECKING:
    from .fleet import FleetLimit

DEFAULT_TIMEOUT: Final = 60.0

# Option -> the setting that Django has for it.
DJANGO_SETTINGS: Final = {
    "host": "EMAIL_HOST",
    "port": "EMAIL_PORT",
    "username": "EMAIL_HOST_USER",
    "password": "EMAIL_HOST_PASSWORD",
    "use_tls": "EMAIL_USE_TLS",
    "use_ssl": "EMAIL_USE_SSL",
    "timeout": "EMAIL_TIMEOUT",
    "ssl_keyfile": "EMAIL_SSL_KEYFILE",
    "ssl_certfile": "EMAIL_SSL_CERTFILE",
}


class OptionError(ImproperlyConfigured, ValueError):
    """
    An ``EMAIL_*`` setting or a key of ``ASYNC_SMTP`` cannot be used.

    A ``ValueError`` too: Django's backend raises one for ``EMAIL_USE_TLS`` together
    with ``EMAIL_USE_SSL``.
    """


@dataclass(frozen=True, kw_only=True)
class Options:
    """
    The settings of a connection to one server.

    Hashable: connections are shared by all that have equal options. The repr holds
    no credentials.

    :ivar timeout: seconds without progress, on connecting and on each reply.
    :ivar local_hostname: the name said in EHLO; None: this machine's own.
    :ivar source_address: the local ``(host, port)`` to connect from.
    :ivar ssl_context: used for TLS, and needed where TLS is on.
    :ivar max_connections: how many this process holds at most.
    :ivar max_messages: how many messages go over one connection.
    :ivar max_age: seconds until a connection is replaced.
    :ivar idle_timeout: seconds until an idle connection is closed; 0: at the end of
        every call.
    :ivar ping_after: seconds idle after which a NOOP comes before use.
    :ivar rate_limit: messages a second; None for no limit.
    :ivar rate_limit_cache: the alias of the Django cache that counts for all processes
        together; None: each process has the rate for itself.
    :ivar pipelining: whether to send commands together where the server offers it.
    :ivar fleet: what counts there.
    :ivar in_mailers: whether the options come from MAILERS.
    :ivar is_fallback: whether they are one of ``fallbacks``.
    :ivar is_ours: whether they are of this package's backend, not of Django's.
    """

    host: str
    port: int
    username: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    use_tls: bool = False
    use_ssl: bool = False
    timeout: float = DEFAULT_TIMEOUT
    local_hostname: str | None = None
    source_address: tuple[str, int] | None = None
    ssl_context: ssl.SSLContext | None = field(default=None, repr=False)
    max_connections: int = 5
    max_messages: int = 100
    max_age: float = 300.0
    idle_timeout: float = 20.0
    ping_after: float = 5.0
    rate_limit: float | None = None
    rate_limit_cache: str | None = None
    pipelining: bool = True
    fleet: FleetLimit | None = field(default=None, compare=False, repr=False)
    in_mailers: bool = field(default=False, compare=False, repr=False)
    is_fallback: bool = field(default=False, compare=False, repr=False)
    is_ours: bool = field(default=True, compare=False, repr=False)

    @property
    def server(self) -> str:
        """``host:port``, as errors and logs name the server."""
        return f"{self.host}:{self.port}"

    @property
    def uses_login(self) -> bool:
        """As in Django, a login needs both the user name and the password."""
        return bool(self.username and self.password)

    def setting(self, name: str) -> str:
        """Return where the project sets an option, such as ``EMAIL_HOST``."""
        if self.is_fallback:
            return f'"{name}" in {setting("fallbacks", in_mailers=self.in_mailers)}'
        if not self.is_ours and name not in DJANGO_SETTINGS:
            return f"{name} (with django_async_smtp.Backend)"
        return setting(name, in_mailers=self.in_mailers)


@dataclass(frozen=True, kw_only=True)
class Route:
    """
    The servers that a message may take, and how often it is tried.

    :ivar servers: in the order of preference; at least one.
    :ivar retries: how often a temporary failure is tried again.
    :ivar retry_deadline: seconds after the first attempt that the last may begin.
    """

    servers: tuple[Options, ...]
    retries: int = 0
    retry_deadline: float = 30.0


def setting(name: str, *, in_mailers: bool) -> str:
    """Return where a project sets an option."""
    if in_mailers:
        return f'OPTIONS["{name}"]'
    return DJANGO_SETTINGS.get(name, f'ASYNC_SMTP["{name}"]')


def uses_mailers() -> bool:
    """Whether the project's mail settings are MAILERS (Django 6.1 and later)."""
    return hasattr(mail, "mailers") and hasattr(settings, "MAILERS")


def from_settings() -> dict[str, Any]:
    """
    Return the options that ``EMAIL_*`` and ``ASYNC_SMTP`` give.

    :raises OptionError: ``ASYNC_SMTP`` has an unknown key or a value of a wrong type.
    """
    extra = from_dict("ASYNC_SMTP", EXTRA)
    # Django 6.1 warns about these settings where ``settings`` itself is asked. It has
    # said so at startup, about those that the project sets.
    read: Any = settings._wrapped
    django = {name: getattr(read, key) for name, key in DJANGO_SETTINGS.items()}
    return django | dict.fromkeys(EXTRA) | extra


def from_dict(group: str, known: Mapping[str, Check]) -> dict[str, Any]:
    """
    Return what a setting that is a dict of options holds.

    :raises OptionError: it is no dict, has an unknown key or a value of a wrong type.
    """
    found = getattr(settings, group, {})
    if not isinstance(found, Mapping):
        raise OptionError(f"{group} must be a dict, not {_type_name(found)}.")
    for key, value in found.items():
        if key in DJANGO_SETTINGS:
            raise OptionError(f"{group}[{key!r}]: set {DJANGO_SETTINGS[key]}.")
        if key not in known:
            problem = f"({_type_name(value)}) is unknown.{_closest(key, known)}"
            raise OptionError(f"{group}[{key!r}] {problem}")
        check_type(key, value, None, known, group)
    return dict(found)


def checked(values: Mapping[str, Any], alias: str | None) -> dict[str, Any]:
    """
    Return the values as ``Options`` wants them, but for the TLS files.

    :param values: a value, or None for the default, of each key of ``TYPES``.
    :param alias: the MAILERS alias that they come from, or None for ``EMAIL_*``.
    :raises OptionError: a value has the wrong type, or excludes another one;
        ``InvalidMailer`` where there is an alias.
    """
    found = dict(values)
    if isinstance(found["port"], str) and found["port"].isdecimal():
        found["port"] = int(found["port"])
    if alias is None:
        # Django's own backend takes whatever is true for True.
        for name in ("use_tls", "use_ssl"):
            found[name] = bool(found[name])
    for name, value in found.items():
        check_type(name, value, alias)
    if not found["host"]:
        raise setting_error(
            "OPTIONS must define 'host'.", "EMAIL_HOST is empty.", alias
        )
    if found["use_tls"] and found["use_ssl"]:
        raise setting_error(
            "The 'use_ssl' and 'use_tls' OPTIONS are incompatible. "
            "Set at most one of them to True.",
            "EMAIL_USE_TLS/EMAIL_USE_SSL are mutually exclusive, so only set one of "
            "those settings to True.",
            alias,
        )
    if found["ssl_keyfile"] and not found["ssl_certfile"]:
        raise unusable(alias, "ssl_keyfile", "needs ssl_certfile beside it.")
    if found["rate_limit_cache"] is not None:
        if found["rate_limit"] is None:
            raise unusable(alias, "rate_limit_cache", "needs rate_limit beside it.")
        if found["rate_limit_cache"] not in settings.CACHES:
            raise unusable(alias, "rate_limit_cache", "must be an alias of CACHES.")
    if found["source_address"] is not None:
        found["source_address"] = tuple(found["source_address"])
    for name in ("ssl_keyfile", "ssl_certfile", "ssl_cafile"):
        if found[name] is not None:
            found[name] = os.fspath(found[name])
    return found


def route(
    values: Mapping[str, Any],
    alias: str | None,
    *,
    own_name: Callable[[], str],
    context_for: Callable[[Mapping[str, Any]], ssl.SSLContext],
    is_ours: bool = True,
) -> Route:
    """
    Return the route that the values describe, checked.

    :param values: a value, or None for the default, of each key of ``TYPES``.
    :param alias: the MAILERS alias that they come from, or None for ``EMAIL_*``.
    :param own_name: returns this machine's name, for EHLO where the values have none;
        that may ask the resolver.
    :param context_for: returns the SSL context for the values of one server.
    :param is_ours: whether they are of this package's backend.
    :raises ImproperlyConfigured: see ``checked``.
    """
    first = checked(values, alias)
    servers = [first]
    for fallback in first["fallbacks"] or ():
        override = {"host": fallback} if isinstance(fallback, str) else dict(fallback)
        servers.append(checked(first | _checked_fallback(override, alias), alias))
    return Route(
        servers=tuple(
            _one_server(
                server
                | {
                    "in_mailers": alias is not None or uses_mailers(),
                    "is_fallback": server is not first,
                    "is_ours": is_ours,
                },
                own_name,
                context_for,
            )
            for server in servers
        ),
        **{name: first[name] for name in ("retries", "retry_deadline") if first[name]},
    )


def _checked_fallback(override: dict[str, Any], alias: str | None) -> dict[str, Any]:
    """Return what a fallback has instead of the first server's options."""
    for name, value in override.items():
        if name not in TYPES or name in ROUTE:
            near = _closest(name, [known for known in TYPES if known not in ROUTE])
            problem = f"has the unknown key {name!r} ({_type_name(value)}).{near}"
            raise unusable(alias, "fallbacks", problem)
        expected, fits = TYPES[name]
        if value is not None and not fits(value):
            wrong = _wrong_type(value, fits)
            problem = f"has {name!r}, which must be {expected}{wrong}."
            raise unusable(alias, "fallbacks", problem)
    found = {name: value for name, value in override.items() if value is not None}
    if found.get("use_tls") or found.get("use_ssl"):
        # One kind of TLS replaces the other.
        found = {"use_tls": False, "use_ssl": False} | found
    if "port" not in found and "use_tls" in found and "use_ssl" in found:
        found["port"] = default_port(found)
    return found


def default_port(values: Mapping[str, Any]) -> int:
    """Return the registered port for the kind of security (RFC 8314)."""
    return 465 if values["use_ssl"] else 587 if values["use_tls"] else 25


def _one_server(
    values: Mapping[str, Any],
    own_name: Callable[[], str],
    context_for: Callable[[Mapping[str, Any]], ssl.SSLContext],
) -> Options:
    uses_tls = values["use_tls"] or values["use_ssl"]
    known = {
        option.name: values[option.name]
        for option in fields(Options)
        if values.get(option.name) is not None
    }
    if "local_hostname" not in known:
        known["local_hostname"] = own_name()
    return Options(
        **known,
        ssl_context=context_for(values) if uses_tls else None,
        fleet=_fleet_limit(known),
    )


def _fleet_limit(known: Mapping[str, Any]) -> FleetLimit | None:
    if "rate_limit_cache" not in known:
        return None
    # Few use it, and Django's caches take long to import.
    from .fleet import FleetLimit

    server = f"{known['host']}:{known['port']}"
    return FleetLimit(known["rate_limit_cache"], server, known["rate_limit"])


def setting_error(in_mailers: str, in_settings: str, alias: str | None) -> Exception:
    """Return an error in the words of MAILERS, or in those of other settings."""
    if alias is None and not uses_mailers():
        return OptionError(in_settings)
    error: Exception = mail.InvalidMailer(in_mailers, alias=alias)
    return error


def check_type(
    name: str,
    value: object,
    alias: str | None,
    known: Mapping[str, Check] | None = None,
    group: str = "ASYNC_SMTP",
) -> None:
    """
    Check the type of an option's value.

    :param known: the options with their types; ``TYPES`` where not given.
    :param group: the setting that holds what Django has no setting for.
    :raises OptionError: it is another one; ``InvalidMailer`` where there is an alias.
    """
    expected, fits = (known or TYPES)[name]
    if value is not None and not fits(value):
        problem = f"must be {expected}{_wrong_type(value, fits)}."
        raise unusable(alias, name, problem, group)


def _wrong_type(value: object, fits: Callable[[Any], bool]) -> str:
    """Return ``, not str``, or nothing where another value of the type would do."""
    of_its_type = (one for one in _EXAMPLES if type(one) is type(value))
    return "" if any(map(fits, of_its_type)) else f", not {_type_name(value)}"


def unusable(
    alias: str | None, name: str, problem: str, group: str = "ASYNC_SMTP"
) -> Exception:
    """Return the error for an option that cannot be used."""
    setting = DJANGO_SETTINGS.get(name, f"{group}[{name!r}]")
    return setting_error(
        f"The {name!r} option {problem}", f"{setting} {problem}", alias
    )


def _type_name(value: object) -> str:
    # Never the value: what stands at the wrong place may be a password.
    kind = type(value)
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return f"{module}{kind.__qualname__}"


def _closest(key: object, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(key).lower(), known, n=1)
    return f" Did you mean {near[0]!r}?" if near else f" Known: {', '.join(known)}."


def is_text(value: object) -> bool:
    """Whether it is a string."""
    return isinstance(value, str)


def is_bool(value: object) -> bool:
    """Whether it is True or False."""
    return isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_seconds(value: Any) -> bool:
    return _is_number(value) and 0 < value < math.inf


def is_count(value: Any) -> bool:
    """Whether it is a whole number, 1 or more."""
    return isinstance(value, int) and _is_number(value) and value >= 1


def _is_count_or_0(value: Any) -> bool:
    return value == 0 or is_count(value)


def _is_seconds_or_0(value: Any) -> bool:
    return _is_number(value) and 0 <= value < math.inf


def _is_port(value: Any) -> bool:
    return isinstance(value, int) and _is_number(value) and 0 < value < 65536


def _is_path(value: object) -> bool:
    return isinstance(value, str | os.PathLike)


def _is_host_name(value: object) -> bool:
    return isinstance(value, str) and value.isascii() and _is_one_word(value)


def _is_one_word(value: str) -> bool:
    return value.isprintable() and len(value.split()) == 1 and value.strip() == value


def _is_source_address(value: Any) -> bool:
    return (
        isinstance(value, tuple | list)
        and len(value) == 2
        and isinstance(value[0], str)
        and (value[1] == 0 or _is_port(value[1]))
    )


def _are_fallbacks(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(fallback, str | Mapping) for fallback in value
    )


Check = tuple[str, Callable[[Any], bool]]

# Values by which an option shows which types it takes.
_EXAMPLES: Final = (1, 1.0, "a", ("a", 1), ["a", 1], ("a",), ["a"])

# What Django has no setting for: the keys of ASYNC_SMTP.
EXTRA: Final[dict[str, Check]] = {
    "local_hostname": ("a host name in ASCII", _is_host_name),
    "source_address": ("a tuple (host, port)", _is_source_address),
    "ssl_cafile": ("a path", _is_path),
    "max_connections": ("a number of connections, 1 or more", is_count),
    "max_messages": ("a number of messages, 1 or more", is_count),
    "max_age": ("a number of seconds above 0", _is_seconds),
    "idle_timeout": ("a number of seconds, 0 or more", _is_seconds_or_0),
    "ping_after": ("a number of seconds, 0 or more", _is_seconds_or_0),
    "rate_limit": ("a number of messages a second above 0", _is_seconds),
    "rate_limit_cache": ("a string", is_text),
    "pipelining": ("True or False", is_bool),
    "retries": ("a whole number, 0 or more", _is_count_or_0),
    "retry_deadline": ("a number of seconds above 0", _is_seconds),
    "fallbacks": ("a list of host names and dicts of options", _are_fallbacks),
}

# Options of a route, not of a server.
ROUTE: Final = {"retries", "retry_deadline", "fallbacks"}

TYPES: Final[dict[str, Check]] = {
    "host": ("a string", is_text),
    "port": ("a port number", _is_port),
    "username": ("a string", is_text),
    "password": ("a string", is_text),
    "use_tls": ("True or False", is_bool),
    "use_ssl": ("True or False", is_bool),
    "timeout": ("a number of seconds above 0", _is_seconds),
    "ssl_keyfile": ("a path", _is_path),
    "ssl_certfile": ("a path", _is_path),
    **EXTRA,
}
