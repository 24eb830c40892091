"""The email backend: what Django calls, sync and async."""

from __future__ import annotations

import ssl
import weakref
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from asgiref.sync import sync_to_async
from django.core.mail.backends.base import BaseEmailBackend
from django.core.mail.utils import DNS_NAME

from . import options as opts
from . import tls
from .callers import CoroutineCaller, InCaller, as_in_a_plain_thread, turn
from .delivery import Courier
from .dispatch import Item, Outcome, deliver
from .errors import SMTPError
from .loop import smtp_loop
from .mailing import Mailing, log_failure

if TYPE_CHECKING:
    from django.core.mail import EmailMessage


_Begun = tuple[opts.Route, list[Item]]


class Backend(BaseEmailBackend):
    """
    Sends mail over SMTP like Django's own backend, faster, and from coroutines.

    The arguments are those of ``django.core.mail.backends.smtp.EmailBackend`` and the
    keys of ``ASYNC_SMTP``; they win over the settings. All can be read, and set, as
    attributes of the same name.

    Connections belong to the process and are shared by all backends with the same
    options: ``open`` makes sure that there is one, and ``close`` leaves it to the
    next sender.

    :ivar connection: where the open connection leads; None while none is open.
    """

    local_hostname: str | None
    source_address: tuple[str, int] | None
    ssl_cafile: str | None
    max_connections: int | None
    max_messages: int | None
    max_age: float | None
    idle_timeout: float | None
    ping_after: float | None
    rate_limit: float | None
    rate_limit_cache: str | None
    pipelining: bool | None
    retries: int | None
    retry_deadline: float | None
    fallbacks: Sequence[str | Mapping[str, Any]] | None

    def __init__(
        self,
        host: str | None = None,
        port: int | str | None = None,
        username: str | None = None,
        password: str | None = None,
        use_tls: bool | None = None,
        fail_silently: bool = False,
        use_ssl: bool | None = None,
        timeout: float | None = None,
        ssl_keyfile: str | None = None,
        ssl_certfile: str | None = None,
        **kwargs: Any,
    ) -> None:
        """
        :raises ImproperlyConfigured: an option cannot be used (``InvalidMailer``
            where it comes from MAILERS).
        """
        given = {
            "host": host or None,
            "port": port or None,
            "username": username,
            "password": password,
            "use_tls": use_tls,
            "use_ssl": use_ssl,
            "timeout": timeout,
            "ssl_keyfile": ssl_keyfile,
            "ssl_certfile": ssl_certfile,
            **{name: kwargs.pop(name, None) for name in opts.EXTRA},
        }
        super().__init__(**kwargs)
        self.fail_silently = fail_silently
        self.connection: opts.Route | None = None
        self._not_opened: SMTPError | None = None
        self._is_finalized = False
        self.alias: str | None = getattr(self, "alias", None)
        values = self._with_defaults(given)
        self.host: str = values["host"]
        self.port: int = values["port"]
        self.username: str | None = values["username"]
        self.password: str | None = values["password"]
        self.use_tls: bool = values["use_tls"]
        self.use_ssl: bool = values["use_ssl"]
        self.timeout: float | None = values["timeout"]
        self.ssl_keyfile: str | None = values["ssl_keyfile"]
        self.ssl_certfile: str | None = values["ssl_certfile"]
        for name in opts.EXTRA:
            setattr(self, name, values[name])

    @property
    def ssl_context(self) -> ssl.SSLContext:
        """
        The context for TLS, which verifies the server's certificate.

        A subclass may override it. Return the same context each time: connections
        with different contexts are not shared.
        """
        return tls.client_context(self.ssl_certfile, self.ssl_keyfile, self.ssl_cafile)

    def open(self) -> bool | None:
        """
        Make sure that a connection is open.

        :returns: True where this call opened it, False where it was open already,
            None where it failed and ``fail_silently`` is set.
        :raises SMTPError: it failed.
        """
        if self.connection is not None:
            return False
        self._not_opened = None
        route = self.route()
        try:
            if not smtp_loop().is_warm(route):
                smtp_loop().call(_warm, route)
        except SMTPError as error:
            if not self.fail_silently:
                raise
            self._not_opened = error
            log_failure(error)
            return None
        self.connection = route
        return True

    async def aopen(self) -> bool | None:
        """Do as ``open``, without blocking the event loop."""
        if self.connection is not None:
            return False
        self._not_opened = None
        route = await sync_to_async(self.route)()
        try:
            if not smtp_loop().is_warm(route):
                await smtp_loop().acall(_warm, route)
        except SMTPError as error:
            if not self.fail_silently:
                raise
            self._not_opened = error
            await sync_to_async(log_failure)(error)
            return None
        self.connection = route
        return True

    def close(self) -> None:
        """Give the connection back. Never fails."""
        route, self.connection = self.connection, None
        if route is None:
            return
        if any(server.idle_timeout == 0 for server in route.servers):
            smtp_loop().close_idle_soon(route)
        if "ssl_context" in vars(self) and not self._is_finalized:
            # A context of this instance alone: nobody else can use its connections.
            weakref.finalize(self, smtp_loop().close_idle_soon, route)
            self._is_finalized = True

    async def aclose(self) -> None:
        """Do as ``close``."""
        self.close()

    async def __aenter__(self) -> Self:
        try:
            await self.aopen()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def send_messages(self, email_messages: Iterable[EmailMessage]) -> int:
        """
        Send the messages, each with its ``Delivery`` as ``message.delivery`` after.

        :param email_messages: any iterable; it is taken from in the caller's thread.
        :returns: how many were sent to at least one recipient.
        :raises SMTPError: the first failure, after all messages were tried; none
            where ``fail_silently`` is set.
        :raises ValueError: a message could not be built, even with
            ``fail_silently``.
        """
        mailing = Mailing(self, email_messages)
        if mailing.is_empty:
            return 0
        try:
            opened = self.open()
        except SMTPError as error:
            raise mailing.not_opened(error) from error.__cause__
        if opened is None:
            return self._opened_silently(mailing)
        try:
            route, taken = as_in_a_plain_thread(self._begin, mailing)
            outcome = smtp_loop().call(_deliver, mailing, route, taken)
            failure = as_in_a_plain_thread(mailing.conclude, outcome)
        except BaseException:
            mailing.log_failures()
            raise
        finally:
            if opened:
                self.close()
        if failure is not None:
            raise failure
        return mailing.sent

    async def asend_messages(self, email_messages: Iterable[EmailMessage]) -> int:
        """
        Do as ``send_messages``, without blocking the event loop.

        Messages are taken and built in the thread that ``sync_to_async`` gives. A
        cancelled call cancels what it has not sent yet.
        """
        async with CoroutineCaller[Outcome]() as caller:
            async with turn():
                mailing, is_started = await sync_to_async(self._start_if_open)(
                    email_messages, caller
                )
            if mailing.is_empty:
                return 0
            try:
                opened = False if is_started else await self.aopen()
            except SMTPError as error:
                await sync_to_async(mailing.not_opened)(error)
                raise
            if opened is None:
                return await sync_to_async(self._opened_silently)(mailing)
            try:
                if not is_started:
                    await sync_to_async(self._start)(mailing, caller)
                outcome = await caller.result()
                if mailing.has_news(outcome):
                    # For user code, which must not block this loop.
                    failure = await sync_to_async(mailing.conclude)(outcome)
                else:
                    failure = mailing.conclude(outcome)
            except BaseException:
                caller.cancel()
                # Cancelled, it must not wait for a thread that may be busy.
                if mailing.has_failures:
                    await sync_to_async(mailing.log_failures)()
                raise
            finally:
                if opened:
                    await self.aclose()
        if failure is not None:
            raise failure
        return mailing.sent

    def _begin(self, mailing: Mailing) -> _Begun:
        """Take and build the first message; in the thread for user code."""
        return self.connection or self.route(), mailing.take((), 1)

    def _start(self, mailing: Mailing, caller: CoroutineCaller[Outcome]) -> None:
        """Have a call's messages sent, the first one built by now."""
        route, taken = self._begin(mailing)
        caller.start(smtp_loop().loop, _deliver, mailing, route, taken)

    def _start_if_open(
        self, messages: Iterable[EmailMessage], caller: CoroutineCaller[Outcome]
    ) -> tuple[Mailing, bool]:
        """Do as ``_start`` where ``aopen`` would have nothing to do; tell if so."""
        mailing = Mailing(self, messages)
        if mailing.is_empty or type(self).aopen is not Backend.aopen:
            return mailing, False
        if not smtp_loop().is_warm(self.connection or self.route()):
            return mailing, False
        self._start(mailing, caller)
        return mailing, True

    def _with_defaults(self, given: dict[str, Any]) -> dict[str, Any]:
        if self.alias is None and not opts.uses_mailers():
            defaults = opts.from_settings()
        else:
            defaults = {"use_tls": False, "use_ssl": False}
        values: dict[str, Any] = {
            name: defaults.get(name) if value is None else value
            for name, value in given.items()
        }
        if values["port"] is None:
            values["port"] = opts.default_port(values)
        opts.checked(values, self.alias)
        return values

    def route(self) -> opts.Route:
        """
        Return the servers that the attributes name now, with their options.

        :raises ImproperlyConfigured: an option cannot be used.
        :raises OSError: nor can a TLS file.
        """
        return opts.route(
            {name: getattr(self, name) for name in opts.TYPES},
            self.alias,
            own_name=DNS_NAME.get_fqdn,
            context_for=self._context_for,
        )

    def _context_for(self, values: Mapping[str, Any]) -> ssl.SSLContext:
        files = [values[name] for name in ("ssl_certfile", "ssl_keyfile", "ssl_cafile")]
        if files == [self.ssl_certfile, self.ssl_keyfile, self.ssl_cafile]:
            return self.ssl_context
        return tls.client_context(*files)

    def _opened_silently(self, mailing: Mailing) -> int:
        """Return how many messages were sent where opening failed silently: 0."""
        if self._not_opened is not None:
            mailing.not_opened(self._not_opened)
        failure = mailing.settle()
        if failure is not None:
            raise failure
        return 0


async def _warm(in_caller: InCaller, route: opts.Route) -> None:
    """Make sure that a session with one of the servers is there."""
    with smtp_loop().pools_for(route) as pools:
        if any(pool.has_session and not pool.is_down for pool in pools):
            return
        await Courier(route, pools).prepare()


async def _deliver(
    in_caller: InCaller, mailing: Mailing, route: opts.Route, taken: list[Item]
) -> Outcome:
    with smtp_loop().pools_for(route) as pools:
        return await deliver(in_caller, mailing, route, pools, taken)
