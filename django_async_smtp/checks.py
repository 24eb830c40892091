"""
The problems of the mail settings as system checks: errors for what cannot work,
warnings for what should not be. No network.
"""

from __future__ import annotations

import socket
import ssl
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Final

from django.conf import global_settings, settings
from django.core import checks, mail
from django.core.exceptions import ImproperlyConfigured
from django.core.mail.backends.smtp import EmailBackend as DjangoBackend
from django.core.mail.utils import DNS_NAME
from django.utils.module_loading import import_string

from . import options as opts
from . import tls
from .backend import Backend
from .envelope import mailbox
from .hints import is_this_machine
from .tasks import QueuedBackend, engine
from .tasks.options import GROUP as QUEUE_GROUP
from .tasks.options import QUEUE, QueueOptions
from .tasks.sending import sender

DEFAULT_ALIAS: Final = "default"

# Which ports are for which kind of TLS (RFC 8314). No standard says it of 2525.
IMPLICIT_TLS_PORT: Final = 465
STARTTLS_PORTS: Final = {25, 587}

# Postfix's default for one client (smtpd_client_connection_count_limit).
MANY_CONNECTIONS: Final = 50
# Seconds after which a server may end an idle session (RFC 5321 section 4.5.3.2.7).
SERVERS_PATIENCE: Final = 300
# Of a client whose idle connections are kept for more than a minute.
MANY_IDLE_CONNECTIONS: Final = 20
# Providers that document how many connections they allow at once.
KNOWN_LIMITS: Final = {"smtp.office365.com": 3}

# Django's caches that are of one process, or whose ``incr`` is not atomic.
NOT_COUNTING: Final = {"LocMemCache", "DummyCache", "FileBasedCache", "DatabaseCache"}

FILES: Final = ("ssl_certfile", "ssl_keyfile", "ssl_cafile")
# How text says no.
NO: Final = {"0", "f", "false", "n", "no", "none", "off"}
# What Django's backend takes as it comes.
CONVERTED: Final[dict[str, Callable[[Any], Any]]] = {
    "use_tls": bool,
    "use_ssl": bool,
    "username": str,
    "password": str,
}


@dataclass(frozen=True)
class Mailer:
    """
    One of the project's mailers, with what its settings come to.

    :ivar alias: the key of MAILERS; "default" with ``EMAIL_*``.
    :ivar path: the backend's dotted path.
    :ivar values: its options as they are set, by name.
    :ivar backend_class: ours, Django's SMTP backend, or made from them; else None.
    :ivar backend: None where it is another one, or cannot be made.
    :ivar route: its servers; None where it is another backend, or cannot be used.
    :ivar error: why it cannot be made or used.
    :ivar queue: whether it queues; with ``EMAIL_*``, what is said of servers is of
        those that the worker sends through.
    """

    alias: str
    path: str
    # Passwords, too.
    values: Mapping[str, Any] = field(repr=False)
    backend_class: type[Any] | None = None
    backend: Any = None
    route: opts.Route | None = None
    error: Exception | None = None
    queue: QueueOptions | None = None

    def __str__(self) -> str:
        return f"MAILERS[{self.alias!r}]" if opts.uses_mailers() else "EMAIL settings"

    def setting(self, name: str, *, of_fallback: bool = False) -> str:
        """Return where an option is set."""
        if of_fallback:
            return f'"{name}" in {self.setting("fallbacks")}'
        return opts.setting(name, in_mailers=opts.uses_mailers())

    @property
    def servers(self) -> tuple[opts.Options, ...]:
        """The options of its servers; none where it is another backend."""
        return self.route.servers if self.route is not None else ()

    @property
    def is_ours(self) -> bool:
        """Whether it is this package's backend."""
        return issubclass(self.backend_class or object, Backend)


def aliases() -> list[str]:
    """Return the keys of MAILERS; with ``EMAIL_*`` "default" alone."""
    if not opts.uses_mailers():
        return [DEFAULT_ALIAS]
    # Django says what is wrong with another type.
    return list(settings.MAILERS) if isinstance(settings.MAILERS, Mapping) else []


def mailer(alias: str, *, to_send: bool = True) -> Mailer:
    """
    Return one of the project's mailers.

    :param to_send: make what sending needs and no check does: the name for EHLO, for
        which the resolver is asked, and the TLS context.
    """
    path, backend_class, backend = "", None, None
    values: dict[str, Any] = {}
    queue = None
    try:
        path, values = _as_set(alias)
        backend_class = _smtp_class(path)
        if backend_class is None:
            return Mailer(alias, path, values)
        backend = _backend(alias)
        if isinstance(backend, QueuedBackend):
            queue = backend.queue
            if queue.mailer is not None:
                return Mailer(alias, path, values, queue=queue)
            backend_class, backend = Backend, sender(None)
        if not all(hasattr(backend, name) for name in opts.DJANGO_SETTINGS):
            # A subclass that connects in its own way.
            return Mailer(alias, path, values)
        checked = _checked_route(backend)
        route = route_of(backend) if to_send else checked
        return Mailer(alias, path, values, backend_class, backend, route, queue=queue)
    except Exception as error:
        # A backend may be anyone's code.
        return Mailer(
            alias, path, values, backend_class, backend, error=error, queue=queue
        )


def route_of(backend: Any) -> opts.Route | None:
    """
    Return the servers of a backend, ours or Django's own; None: it is another one.

    :raises ImproperlyConfigured: its settings cannot be used.
    :raises OSError: nor can a TLS file.
    """
    if isinstance(backend, Backend):
        return backend.route()
    if not isinstance(backend, DjangoBackend):
        return None
    return opts.route(
        _values_of(backend),
        getattr(backend, "alias", None),
        own_name=DNS_NAME.get_fqdn,
        context_for=lambda values: backend.ssl_context,
        is_ours=False,
    )


def _checked_route(backend: Any) -> opts.Route:
    """Do as ``route_of`` for a check: no name of this machine, no authorities."""
    own = Backend if isinstance(backend, Backend) else DjangoBackend
    is_own_context = type(backend).ssl_context is own.ssl_context

    def context_for(values: Mapping[str, Any]) -> ssl.SSLContext:
        if is_own_context and any(values[name] for name in FILES):
            return tls.client_context(*(values[name] for name in FILES))
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

    return opts.route(
        _values_of(backend),
        getattr(backend, "alias", None),
        own_name=str,
        context_for=context_for,
    )


def _values_of(backend: Any) -> dict[str, Any]:
    if isinstance(backend, Backend):
        return {name: getattr(backend, name) for name in opts.TYPES}
    found = {name: getattr(backend, name) for name in opts.DJANGO_SETTINGS}
    for name, convert in CONVERTED.items():
        if found[name] is not None:
            found[name] = convert(found[name])
    return dict.fromkeys(opts.TYPES) | found


def _as_set(alias: str) -> tuple[str, dict[str, Any]]:
    """Return the path of a mailer's backend, and its options."""
    if opts.uses_mailers():
        config = settings.MAILERS[alias]
        _check_dict("The mailer", config)
        options = config.get("OPTIONS", {})
        _check_dict("OPTIONS", options)
        path = config.get("BACKEND", f"{DjangoBackend.__module__}.EmailBackend")
        return str(path), dict(options)
    # Behind what warns, on Django 6.1.
    read: Any = settings._wrapped
    values = {name: getattr(read, key) for name, key in opts.DJANGO_SETTINGS.items()}
    extra = getattr(read, "ASYNC_SMTP", {})
    # Another type is the backend's error.
    extra = dict(extra) if isinstance(extra, Mapping) else {}
    return str(read.EMAIL_BACKEND), extra | values


def _check_dict(name: str, value: object) -> None:
    if not isinstance(value, Mapping):
        kind = type(value).__name__
        raise ImproperlyConfigured(f"{name} must be a dict, not {kind}.")


def _smtp_class(path: str) -> type[Any] | None:
    """
    Return the class of an SMTP backend or a queue; None: it is another backend.

    :raises ImportError: it cannot be imported.
    """
    try:
        found = import_string(path)
    except Exception as error:
        problem = f"{path} cannot be imported: {_with_type(error)}"
        raise ImportError(problem) from error
    known = Backend | DjangoBackend | QueuedBackend
    return found if isinstance(found, type) and issubclass(found, known) else None


def _backend(alias: str) -> Any:
    if opts.uses_mailers():
        return mail.mailers[alias]
    with warnings.catch_warnings():
        # Of EMAIL_*, which Django 6.1 has warned of at startup.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        return mail.get_connection()


def _with_type(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


# What is wrong, and what to do.
Problem = tuple[str, str]
Concern = Callable[[Mailer], Iterator[Problem]]


def check(app_configs: object, **kwargs: Any) -> list[checks.CheckMessage]:
    """Return what the checks say of all mailers."""
    found: list[checks.CheckMessage] = []
    for alias in aliases():
        for message in problems(mailer(alias, to_send=False)):
            # Of a setting that all mailers share, once.
            if message not in found:
                found.append(message)
    return found


def problems(one: Mailer) -> list[checks.CheckMessage]:
    """Return what the checks say of one mailer."""
    return [
        (checks.Error if key.startswith("E") else checks.Warning)(
            problem,
            hint=hint,
            # Text: Django shows it, and so would what shows the message.
            obj=None if key in SHARED else str(one),
            id=f"django_async_smtp.{key}",
        )
        for key, concern in CONCERNS.items()
        for problem, hint in concern(one)
    ]


def unusable_options(one: Mailer) -> Iterator[Problem]:
    """An option is unknown, or has a value that cannot be used."""
    is_other = isinstance(one.error, ImportError) or _is_of_files(one)
    if one.error is not None and not is_other and not any(_both_kinds_of_tls(one)):
        yield (
            f"Mail cannot be sent: {_told(one.error, one)}",
            f"{_meant(one)}Correct this setting; the README lists the options and "
            "their values.",
        )


def both_kinds_of_tls(one: Mailer) -> Iterator[Problem]:
    """use_tls and use_ssl together."""
    for use_tls, use_ssl in _both_kinds_of_tls(one):
        hint = f"Keep {use_ssl} for port 465, {use_tls} for 587 and 25."
        yield f"Mail cannot be sent: {use_tls} and {use_ssl} are both set.", hint


def unusable_tls_files(one: Mailer) -> Iterator[Problem]:
    """A certificate, key or CA file cannot be read or used."""
    if _is_of_files(one):
        names = ", ".join(dict.fromkeys(_files(one)))
        hint = f"Check {names}: path, rights and format (PEM, no passphrase)."
        yield f"Mail cannot be sent: {one.error}", hint


def unknown_backend(one: Mailer) -> Iterator[Problem]:
    """The backend cannot be imported."""
    if isinstance(one.error, ImportError):
        setting = "BACKEND" if opts.uses_mailers() else "EMAIL_BACKEND"
        hint = f'Correct {setting}; it is "django_async_smtp.Backend" for this package.'
        yield f"Mail cannot be sent: {one.error}", hint


def senders_are_addresses(one: Mailer) -> Iterator[Problem]:
    """DEFAULT_FROM_EMAIL or SERVER_EMAIL is not one address."""
    hint = 'Set it to one address: "me@example.com" or "Me <me@example.com>".'
    for name in ("DEFAULT_FROM_EMAIL", "SERVER_EMAIL") if one.servers else ():
        address = getattr(settings, name)
        if not address:
            # Django takes DEFAULT_FROM_EMAIL for an empty SERVER_EMAIL.
            if name == "DEFAULT_FROM_EMAIL":
                yield f"{name} is empty.", hint
            continue
        try:
            mailbox(address)
        except ValueError as error:
            yield f"{name} is not one address: {error}.", hint


def unusable_mailer_of_queue(one: Mailer) -> Iterator[Problem]:
    """A queue's mailer is not this package's backend."""
    if one.queue is None or one.queue.mailer is None:
        return
    there = mailer(one.queue.mailer, to_send=False)
    if there.queue is not None or not there.is_ours:
        yield (
            f"Queued mail cannot be sent: {there} is not a django_async_smtp.Backend.",
            'Set OPTIONS["mailer"] to the alias of one; a worker sends through it.',
        )


def unusable_tasks(one: Mailer) -> Iterator[Problem]:
    """TASKS has no such task backend, or that has no such queue or priority."""
    if one.queue is None:
        return
    try:
        engine.check(one.queue)
    except Exception as error:
        names = _of_queue("task_backend", "queue_name", "priority")
        yield f"Mail cannot be queued: {error}", f"Correct TASKS, or {names}."


def credentials_in_clear(one: Mailer) -> Iterator[Problem]:
    """A login without TLS to a host that is not this machine."""
    for server in one.servers:
        uses_tls = server.use_tls or server.use_ssl
        if server.uses_login and not uses_tls and not is_this_machine(server.host):
            use_tls, use_ssl = _settings(one, server, "use_tls", "use_ssl")
            yield (
                f"The password goes to {server.server} in clear, and so does the mail.",
                f"Set {use_tls} (port 587) or {use_ssl} (port 465).",
            )


def half_a_login(one: Mailer) -> Iterator[Problem]:
    """A user name without a password, or the reverse: no login then."""
    if _logs_in_otherwise(one):
        return
    for server in one.servers:
        if bool(server.username) != bool(server.password):
            there, missing = _settings(one, server, "username", "password")
            if server.password:
                there, missing = missing, there
            yield (
                f"{there} is set and {missing} is not: {server.server} gets mail "
                "without a login.",
                f"Set {missing}, or empty {there}.",
            )


def port_and_kind_of_tls(one: Mailer) -> Iterator[Problem]:
    """The port is that of another kind of TLS."""
    for server in one.servers:
        use_tls, use_ssl, port = _settings(one, server, "use_tls", "use_ssl", "port")
        problem = f"Port {server.port} of {server.host}"
        if server.port == IMPLICIT_TLS_PORT and not server.use_ssl:
            use_it = f"{use_ssl} instead of {use_tls}" if server.use_tls else use_ssl
            yield (
                f"{problem} is for TLS from the start, and {use_ssl} is not set.",
                f"Set {use_it}, or {port} to 587.",
            )
        elif server.port in STARTTLS_PORTS and server.use_ssl:
            yield (
                f"{problem} is not for TLS from the start, and {use_ssl} is set.",
                f"Set {use_tls} instead of {use_ssl}, or {port} to 465.",
            )


def no_timeout(one: Mailer) -> Iterator[Problem]:
    """Django's own backend without a timeout waits for ever."""
    if (
        isinstance(one.backend, DjangoBackend)
        and one.backend.timeout is None
        and socket.getdefaulttimeout() is None
        and _is_configured()
    ):
        timeout = one.setting("timeout")
        yield (
            f"{timeout} is not set: {one.path} waits for ever for a silent server.",
            f"Set {timeout} to some seconds, or use django_async_smtp.Backend (60 s).",
        )


def many_connections(one: Mailer) -> Iterator[Problem]:
    """More connections, or idle for longer, than servers let a client have."""
    for server in one.servers if one.is_ours else ():
        problem = _of_connections(server)
        if problem:
            names = _settings(one, server, "max_connections", "idle_timeout")
            hint = f"Lower {' or '.join(names)}; each process has connections of its"
            yield problem, f"{hint} own."


def _of_connections(server: opts.Options) -> str:
    count, idle = server.max_connections, server.idle_timeout
    known = KNOWN_LIMITS.get(server.host.lower().rstrip("."))
    if known is not None and count > known:
        return f"{server.host} allows {known} connections at once, not {count}."
    if count > MANY_CONNECTIONS:
        problem = f"{count} connections at once to {server.host} are more than most"
        return f"{problem} servers allow a client."
    if idle >= SERVERS_PATIENCE:
        problem = f"Connections to {server.host} are kept idle for {idle:g} s; servers"
        return f"{problem} may end them after {SERVERS_PATIENCE} s."
    if count > MANY_IDLE_CONNECTIONS and idle > 60:
        problem = f"Up to {count} connections to {server.host} are kept idle for"
        return f"{problem} {idle:g} s: servers that count them refuse more."
    return ""


def strings_for_booleans(one: Mailer) -> Iterator[Problem]:
    """A string counts as True, and so does "False"."""
    is_smtp = one.backend_class is not None
    for name in ("use_tls", "use_ssl") if is_smtp and not _is_strict(one) else ():
        value = one.values.get(name)
        if isinstance(value, str) and value:
            # Any other text may be a password.
            even = f", even {value!r}" if value.strip().lower() in NO else ""
            yield (
                f"{one.setting(name)} is a string, and so counts as True{even}.",
                'Set True or False. An environment variable is text: == "True" helps.',
            )


def default_sender(one: Mailer) -> Iterator[Problem]:
    """Nobody has set DEFAULT_FROM_EMAIL."""
    default = global_settings.DEFAULT_FROM_EMAIL
    if one.servers and default == settings.DEFAULT_FROM_EMAIL:
        yield (
            f"DEFAULT_FROM_EMAIL is still {default}: most servers refuse this sender.",
            "Set it to an address of your domain.",
        )


def tasks_are_immediate(one: Mailer) -> Iterator[Problem]:
    """The task backend has no worker: mail is sent within the request."""
    if one.queue is None or settings.DEBUG or not engine.is_immediate(one.queue):
        return
    yield (
        f"{engine.place(one.queue)} runs tasks at once, in the request: nothing is "
        "queued, and what fails is not tried again later.",
        "Set its BACKEND to one with workers, or use django_async_smtp.Backend.",
    )


def uncounted_rate(one: Mailer) -> Iterator[Problem]:
    """The cache of rate_limit_cache is of one process, or counts inexactly."""
    for server in one.servers:
        alias = server.rate_limit_cache
        path = settings.CACHES[alias].get("BACKEND", "") if alias is not None else ""
        if path.rpartition(".")[2] in NOT_COUNTING:
            (name,) = _settings(one, server, "rate_limit_cache")
            yield (
                f"{name} is {alias!r}, and {path} cannot count for several processes.",
                "Name a cache on Redis or Memcached.",
            )


CONCERNS: Final[dict[str, Concern]] = {
    "E001": unusable_options,
    "E002": both_kinds_of_tls,
    "E003": unusable_tls_files,
    "E004": unknown_backend,
    "E005": senders_are_addresses,
    "E006": unusable_mailer_of_queue,
    "E007": unusable_tasks,
    "W001": credentials_in_clear,
    "W002": half_a_login,
    "W003": port_and_kind_of_tls,
    "W004": no_timeout,
    "W005": many_connections,
    "W006": strings_for_booleans,
    "W007": default_sender,
    "W008": tasks_are_immediate,
    "W009": uncounted_rate,
}
# Those of settings that all mailers share.
SHARED: Final = {"E005", "W007"}


def _of_queue(*names: str) -> str:
    """Return where options of a queue are set."""
    place = "OPTIONS" if opts.uses_mailers() else QUEUE_GROUP
    return " or ".join(f'{place}["{name}"]' for name in names)


def _told(error: Exception, one: Mailer) -> str:
    """Return what an error says of a mailer."""
    if isinstance(error, ImproperlyConfigured):
        return str(error).removeprefix(f"{one}: ")
    # Of a subclass: nobody knows what it tells.
    told = _with_type(error)
    secret = str(one.values.get("password") or "")
    return type(error).__name__ if secret and secret in told else told


def _meant(one: Mailer) -> str:
    """Return a question about unknown options of MAILERS, which Django just names."""
    if not (opts.uses_mailers() and "Unknown options" in str(one.error)):
        return ""
    known = opts.TYPES if one.is_ours else opts.DJANGO_SETTINGS
    if one.backend_class is not None and issubclass(one.backend_class, QueuedBackend):
        known = QUEUE
    unknown = [str(name).lower() for name in one.values if name not in known]
    meant = [near for name in unknown for near in get_close_matches(name, known, n=1)]
    return f"Did you mean {' and '.join(map(repr, meant))}? " if meant else ""


def _settings(one: Mailer, server: opts.Options, *names: str) -> list[str]:
    """Return where options of a server are set; of a fallback: where they can be."""
    of_fallback = server is not one.servers[0]
    return [one.setting(name, of_fallback=of_fallback) for name in names]


def _sources(one: Mailer) -> Iterator[tuple[Mapping[str, Any], bool]]:
    """Return what is set for the first server, then for fallbacks (True)."""
    yield one.values, False
    fallbacks = one.values.get("fallbacks")
    for fallback in fallbacks if isinstance(fallbacks, list | tuple) else ():
        if isinstance(fallback, Mapping):
            yield fallback, True


def _both_kinds_of_tls(one: Mailer) -> Iterator[list[str]]:
    """Return the names of the settings where both are set."""
    if one.error is None or one.backend_class is None:
        return
    names = ("use_tls", "use_ssl")
    for values, of_fallback in _sources(one):
        found = [values.get(name) for name in names]
        is_strict = _is_strict(one) or of_fallback
        if all(value is True if is_strict else value for value in found):
            yield [one.setting(name, of_fallback=of_fallback) for name in names]


def _files(one: Mailer) -> list[str]:
    """Return where the TLS files are set that are."""
    return [
        one.setting(name, of_fallback=of_fallback)
        for values, of_fallback in _sources(one)
        for name in FILES
        if values.get(name)
    ]


def _is_of_files(one: Mailer) -> bool:
    return isinstance(one.error, OSError) and bool(_files(one))


def _is_strict(one: Mailer) -> bool:
    """Whether only True is true: our backend, in MAILERS."""
    return opts.uses_mailers() and one.is_ours


def _is_configured() -> bool:
    """Whether the project says anything about mail."""
    names = ("EMAIL_BACKEND", *opts.DJANGO_SETTINGS.values())
    return opts.uses_mailers() or any(map(settings.is_overridden, names))


def _logs_in_otherwise(one: Mailer) -> bool:
    """Whether it connects in its own way, as classes for OAuth do."""
    backend = one.backend
    return (
        isinstance(backend, DjangoBackend)
        and type(backend).open is not DjangoBackend.open
    )
