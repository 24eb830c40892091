"""
The problems of the mail settings as system checks: errors for what cannot work,
warnings for what should not be. No network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from django.conf import global_settings, settings
from django.core import checks, mail
from django.core.exceptions import ImproperlyConfigured
from django.core.mail.backends.smtp import EmailBackend as DjangoBackend
from django.core.mail.utils import DNS_NAME
from django.utils.module_loading import import_string

from . import options as opts
from .backend import Backend
from .envelope import mailbox
from .hints import is_this_machine

DEFAULT_ALIAS: Final = "default"

# Which ports are for which kind of TLS (RFC 8314).
IMPLICIT_TLS_PORT: Final = 465
STARTTLS_PORTS: Final = {25, 587, 2525}

# Postfix's default for one client (smtpd_client_connection_count_limit).
MANY_CONNECTIONS: Final = 50
# Seconds after which a server may end an idle session (RFC 5321 section 4.5.3.2.7).
SERVERS_PATIENCE: Final = 300
# Of a client whose idle connections are kept for more than a minute.
MANY_IDLE_CONNECTIONS: Final = 20
# Providers that document how many connections they allow at once.
KNOWN_LIMITS: Final = {"smtp.office365.com": 3, "smtp-mail.outlook.com": 3}


@dataclass(frozen=True)
class Mailer:
    """
    One of the project's mailers, with what its settings come to.

    :ivar alias: the key of MAILERS; "default" with ``EMAIL_*``.
    :ivar path: the backend's dotted path.
    :ivar values: its options as they are set, by name.
    :ivar backend: the backend; None where it cannot be made.
    :ivar route: its servers; None where it is no SMTP backend, or cannot be used.
    :ivar error: why it cannot be made or used.
    """

    alias: str
    path: str
    values: dict[str, Any]
    backend: Any = None
    route: opts.Route | None = None
    error: Exception | None = None

    def __str__(self) -> str:
        return f"MAILERS[{self.alias!r}]" if opts.uses_mailers() else "EMAIL settings"

    def setting(self, name: str) -> str:
        """Return where an option is set."""
        return opts.setting(name, in_mailers=opts.uses_mailers())

    @property
    def servers(self) -> tuple[opts.Options, ...]:
        """The options of its servers; none where it is no SMTP backend."""
        return self.route.servers if self.route is not None else ()


def aliases() -> list[str]:
    """Return the keys of MAILERS; with ``EMAIL_*`` "default" alone."""
    return list(settings.MAILERS) if opts.uses_mailers() else [DEFAULT_ALIAS]


def mailer(alias: str) -> Mailer:
    """Return one of the project's mailers."""
    path, values = _as_set(alias)
    backend = None
    try:
        if not issubclass(import_string(path), Backend | DjangoBackend):
            return Mailer(alias, path, values)
        backend = _backend(alias)
        return Mailer(alias, path, values, backend, route_of(backend))
    except (ImproperlyConfigured, ImportError, OSError, TypeError, ValueError) as error:
        return Mailer(alias, path, values, backend, error=error)


def route_of(backend: Any) -> opts.Route | None:
    """
    Return the servers of a backend, ours or Django's own; None: it is another one.

    :raises ImproperlyConfigured: its settings cannot be used (``OSError``: nor can a
        TLS file).
    """
    if isinstance(backend, Backend):
        return backend.route()
    if not isinstance(backend, DjangoBackend):
        return None
    values = dict.fromkeys(opts.TYPES) | {
        name: getattr(backend, name) for name in opts.DJANGO_SETTINGS
    }
    return opts.route(
        values,
        getattr(backend, "alias", None),
        local_hostname=DNS_NAME.get_fqdn(),
        context_for=lambda values: backend.ssl_context,
    )


def _as_set(alias: str) -> tuple[str, dict[str, Any]]:
    read: Any = settings
    if opts.uses_mailers():
        config = read.MAILERS[alias]
        path = config.get("BACKEND", f"{DjangoBackend.__module__}.EmailBackend")
        return path, dict(config.get("OPTIONS", {}))
    # Behind what warns, on Django 6.1.
    read = settings._wrapped
    names = opts.DJANGO_SETTINGS.items()
    return read.EMAIL_BACKEND, {name: getattr(read, key) for name, key in names}


def _backend(alias: str) -> Any:
    if hasattr(mail, "mailers"):
        return mail.mailers[alias]
    return mail.get_connection()


Concern = Callable[[Mailer], Iterator[checks.CheckMessage]]
Check = Callable[..., list[checks.CheckMessage]]


def _for_every_mailer(concern: Concern) -> Check:
    def check(app_configs: object, **kwargs: Any) -> list[checks.CheckMessage]:
        return [message for alias in aliases() for message in concern(mailer(alias))]

    # Not functools.wraps(): Django looks at the signature.
    check.__name__, check.__doc__ = concern.__name__, concern.__doc__
    return check


def problems(one: Mailer) -> list[checks.CheckMessage]:
    """Return all that the system checks say of one mailer."""
    return [message for concern in CONCERNS for message in concern(one)]


def _error(number: int, mailer: Mailer, problem: str, hint: str) -> checks.Error:
    return checks.Error(
        problem, hint=hint, obj=mailer, id=f"django_async_smtp.E{number:03}"
    )


def _warning(number: int, mailer: Mailer, problem: str, hint: str) -> checks.Warning:
    return checks.Warning(
        problem, hint=hint, obj=mailer, id=f"django_async_smtp.W{number:03}"
    )


def unusable_options(one: Mailer) -> Iterator[checks.CheckMessage]:
    """E001: an option is unknown, or has a value that cannot be used."""
    unusable = isinstance(one.error, ImproperlyConfigured | TypeError | ValueError)
    if unusable and not _has_both_kinds_of_tls(one):
        hint = "Correct this setting; the README lists the options and their values."
        yield _error(1, one, f"Mail cannot be sent: {one.error}", hint)


def both_kinds_of_tls(one: Mailer) -> Iterator[checks.CheckMessage]:
    """E002: use_tls and use_ssl together."""
    if _has_both_kinds_of_tls(one) and (one.error is not None or one.servers):
        use_tls, use_ssl = one.setting("use_tls"), one.setting("use_ssl")
        problem = f"Mail cannot be sent: {use_tls} and {use_ssl} are both set."
        hint = f"Keep {use_ssl} for port 465, {use_tls} for 587 and 25."
        yield _error(2, one, problem, hint)


def unusable_tls_files(one: Mailer) -> Iterator[checks.CheckMessage]:
    """E003: a certificate, key or CA file cannot be read or used."""
    if isinstance(one.error, OSError):
        names = ("ssl_certfile", "ssl_keyfile", "ssl_cafile")
        hint = f"Check {', '.join(map(one.setting, names))}: path, rights and format."
        yield _error(3, one, f"Mail cannot be sent: {one.error}", hint)


def unknown_backend(one: Mailer) -> Iterator[checks.CheckMessage]:
    """E004: the backend cannot be imported."""
    if isinstance(one.error, ImportError):
        problem = f"Mail cannot be sent: {one.error}"
        setting = "BACKEND" if opts.uses_mailers() else "EMAIL_BACKEND"
        hint = f'Set {setting} to "django_async_smtp.Backend".'
        yield _error(4, one, problem, hint)


def senders_are_addresses(one: Mailer) -> Iterator[checks.CheckMessage]:
    """E005: DEFAULT_FROM_EMAIL or SERVER_EMAIL is not one address."""
    for name in ("DEFAULT_FROM_EMAIL", "SERVER_EMAIL") if one.servers else ():
        try:
            mailbox(getattr(settings, name))
        except ValueError as error:
            hint = 'Set it to one address: "me@example.com" or "Me <me@example.com>".'
            yield _error(5, one, f"{name} is not one address: {error}", hint)


def credentials_in_clear(one: Mailer) -> Iterator[checks.CheckMessage]:
    """W001: a login without TLS to a host that is not this machine."""
    for server in one.servers:
        if (
            server.uses_login
            and not (server.use_tls or server.use_ssl)
            and not is_this_machine(server.host)
        ):
            yield _warning(
                1,
                one,
                f"The password goes to {server.server} in clear, and so does the mail.",
                f"Set {one.setting('use_tls')} (port 587) or {one.setting('use_ssl')} "
                "(port 465).",
            )


def half_a_login(one: Mailer) -> Iterator[checks.CheckMessage]:
    """W002: a user name without a password, or the reverse: no login then."""
    for server in one.servers:
        if bool(server.username) != bool(server.password):
            names = one.setting("username"), one.setting("password")
            there, missing = names if server.username else reversed(names)
            problem = f"{there} is set and {missing} is not: {server.server} gets mail "
            hint = f"Set {missing}, or empty {there}."
            yield _warning(2, one, f"{problem}without a login.", hint)


def port_and_kind_of_tls(one: Mailer) -> Iterator[checks.CheckMessage]:
    """W003: the port is that of another kind of TLS."""
    use_tls, use_ssl, port = map(one.setting, ("use_tls", "use_ssl", "port"))
    for server in one.servers:
        if server.port == IMPLICIT_TLS_PORT and not server.use_ssl:
            problem = "Port 465 speaks TLS from the start, which the settings do not."
            hint = f"Set {use_ssl} instead of {use_tls}, or {port} to 587."
            yield _warning(3, one, problem, hint)
        elif server.port in STARTTLS_PORTS and server.use_ssl:
            problem = f"Port {server.port} does not speak TLS from the start, as "
            hint = f"Set {use_tls} instead of {use_ssl}, or {port} to 465."
            yield _warning(3, one, f"{problem}{use_ssl} wants.", hint)


def no_timeout(one: Mailer) -> Iterator[checks.CheckMessage]:
    """W004: Django's own backend without a timeout waits for ever."""
    if isinstance(one.backend, DjangoBackend) and one.backend.timeout is None:
        setting = one.setting("timeout")
        problem = (
            f"{setting} is not set: {one.path} waits for ever for a silent server."
        )
        hint = (
            f"Set {setting} to some seconds, or use django_async_smtp.Backend (60 s)."
        )
        yield _warning(4, one, problem, hint)


def many_connections(one: Mailer) -> Iterator[checks.CheckMessage]:
    """W005: more connections, or idle for longer, than servers let a client have."""
    if isinstance(one.backend, DjangoBackend):
        return
    for server in one.servers:
        problem = _of_connections(server)
        if problem:
            names = one.setting("max_connections"), one.setting("idle_timeout")
            hint = f"Lower {names[0]} or {names[1]}; they count for each process."
            yield _warning(5, one, problem, hint)


def _of_connections(server: opts.Options) -> str:
    count, idle = server.max_connections, server.idle_timeout
    known = KNOWN_LIMITS.get(server.host.lower())
    if known is not None and count > known:
        return f"{server.host} allows {known} connections at once, not {count}."
    if count > MANY_CONNECTIONS:
        return f"{count} connections at once are more than most servers allow a client."
    if idle >= SERVERS_PATIENCE:
        return f"Servers end idle connections before {idle:g} s are over."
    if count > MANY_IDLE_CONNECTIONS and idle > 60:
        return f"{count} connections kept idle for {idle:g} s are too many."
    return ""


def strings_for_booleans(one: Mailer) -> Iterator[checks.CheckMessage]:
    """W006: "False" is true."""
    for name in ("use_tls", "use_ssl"):
        value = one.values.get(name)
        if isinstance(value, str) and value and one.servers:
            problem = f"{one.setting(name)} is a string, and so counts as True"
            if value.lower() in {"false", "0", "no", "off"}:
                problem += f", even {value!r}"
            hint = "Set True or False: of an environment variable, compare the text."
            yield _warning(6, one, f"{problem}.", hint)


def default_sender(one: Mailer) -> Iterator[checks.CheckMessage]:
    """W007: nobody has set DEFAULT_FROM_EMAIL."""
    default = global_settings.DEFAULT_FROM_EMAIL
    if one.servers and default == settings.DEFAULT_FROM_EMAIL:
        problem = (
            f"DEFAULT_FROM_EMAIL is still {default}: servers refuse it as a sender."
        )
        yield _warning(7, one, problem, "Set it to an address of your domain.")


CONCERNS: Final[tuple[Concern, ...]] = (
    unusable_options,
    both_kinds_of_tls,
    unusable_tls_files,
    unknown_backend,
    senders_are_addresses,
    credentials_in_clear,
    half_a_login,
    port_and_kind_of_tls,
    no_timeout,
    many_connections,
    strings_for_booleans,
    default_sender,
)
CHECKS: Final = tuple(_for_every_mailer(concern) for concern in CONCERNS)


def _has_both_kinds_of_tls(one: Mailer) -> bool:
    return bool(one.values.get("use_tls") and one.values.get("use_ssl"))
