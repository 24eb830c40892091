"""The email backend: what Django calls, sync and async."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Iterable, Iterator
from itertools import chain
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from asgiref.sync import sync_to_async
from django.core.mail.backends.base import BaseEmailBackend
from django.core.mail.utils import DNS_NAME

from . import options as opts
from . import tls
from .delivery import Batch, Delivery, deliver
from .errors import SMTPError
from .logs import log
from .loop import InCaller, smtp_loop

if TYPE_CHECKING:
    from django.core.mail import EmailMessage


class Backend(BaseEmailBackend):
    """
    Sends mail over SMTP like Django's own backend, faster, and from coroutines.

    The arguments are those of ``django.core.mail.backends.smtp.EmailBackend``, and
    ``local_hostname``, ``source_address`` and ``ssl_cafile``; they win over the
    settings. All can be read, and set, as attributes of the same name.

    Connections belong to the process and are shared by all backends with the same
    options: ``open`` makes sure that there is one, and ``close`` leaves it to the
    next sender.

    :ivar connection: the options of the open connection; None while none is open.
    """

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
        self.connection: opts.Options | None = None
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
        self.local_hostname: str | None = values["local_hostname"]
        self.source_address: tuple[str, int] | None = values["source_address"]
        self.ssl_cafile: str | None = values["ssl_cafile"]

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
        options = self._options()
        try:
            smtp_loop().call(_warm, options)
        except SMTPError as error:
            if not self.fail_silently:
                raise
            _log_failure(error)
            return None
        self.connection = options
        return True

    async def aopen(self) -> bool | None:
        """Do as ``open``, without blocking the event loop."""
        if self.connection is not None:
            return False
        options = await sync_to_async(self._options)()
        try:
            await smtp_loop().acall(_warm, options)
        except SMTPError as error:
            if not self.fail_silently:
                raise
            await sync_to_async(_log_failure)(error)
            return None
        self.connection = options
        return True

    def close(self) -> None:
        """Give the connection back. Never fails."""
        self.connection = None

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
        messages = _peeked(email_messages)
        if messages is None:
            return 0
        opened = self.open()
        if opened is None:
            return 0
        try:
            options = self.connection or self._options()
            batch = smtp_loop().call(_deliver, options, messages)
        finally:
            if opened:
                self.close()
        return self._settle(batch)

    async def asend_messages(self, email_messages: Iterable[EmailMessage]) -> int:
        """
        Do as ``send_messages``, without blocking the event loop.

        Messages are taken and built in the thread that ``sync_to_async`` gives. A
        cancelled call cancels what it has not sent yet.
        """
        messages = await sync_to_async(_peeked)(email_messages)
        if messages is None:
            return 0
        opened = await self.aopen()
        if opened is None:
            return 0
        try:
            options = self.connection or await sync_to_async(self._options)()
            batch = await smtp_loop().acall(_deliver, options, messages)
        finally:
            if opened:
                await self.aclose()
        if batch.notable:
            # What it logs may be handled by code that must not block this loop.
            return await sync_to_async(self._settle)(batch)
        return batch.sent

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
            values["port"] = (
                465 if values["use_ssl"] else 587 if values["use_tls"] else 25
            )
        opts.checked(values, self.alias)
        return values

    def _options(self) -> opts.Options:
        """
        Return what the attributes say now. Reads files; in the caller's thread.
        """
        values = opts.checked(
            {name: getattr(self, name) for name in opts.TYPES}, self.alias
        )
        uses_tls = values["use_tls"] or values["use_ssl"]
        return opts.Options(
            host=values["host"],
            port=values["port"],
            username=values["username"] or "",
            password=values["password"] or "",
            use_tls=values["use_tls"],
            use_ssl=values["use_ssl"],
            timeout=values["timeout"] or opts.DEFAULT_TIMEOUT,
            local_hostname=values["local_hostname"] or DNS_NAME.get_fqdn(),
            source_address=values["source_address"],
            ssl_context=self.ssl_context if uses_tls else None,
        )

    def _settle(self, batch: Batch) -> int:
        """Log what would be lost otherwise, and raise what must be raised."""
        to_raise: Exception | None = None
        for _, delivery in batch.notable:
            error = delivery.error
            if error is None:
                _log_refused(delivery)
            elif self.fail_silently and isinstance(error, SMTPError):
                _log_failure(error)
            elif to_raise is None:
                to_raise = error
        if to_raise is not None:
            raise to_raise
        return batch.sent


def _peeked(messages: Iterable[EmailMessage] | None) -> Iterator[EmailMessage] | None:
    """Return an iterator over the messages, or None where there are none."""
    iterator = iter(messages or ())
    for first in iterator:
        return chain([first], iterator)
    return None


async def _warm(in_caller: InCaller, options: opts.Options) -> None:
    pool = smtp_loop().pool(options)
    if not pool.has_session:
        pool.release(await pool.acquire())


async def _deliver(
    in_caller: InCaller, options: opts.Options, messages: Iterator[EmailMessage]
) -> Batch:
    return await deliver(in_caller, smtp_loop().pool(options), messages)


def _log_failure(error: SMTPError) -> None:
    log(
        logging.ERROR,
        "Mail not sent (fail_silently): %s%s",
        error,
        f" [{error.hint}]" if error.hint else "",
        stage=error.stage,
        server=error.server,
        smtp_code=getattr(error, "smtp_code", None),
        temporary=error.temporary,
        maybe_delivered=error.maybe_delivered,
        hint=error.hint,
    )


def _log_refused(delivery: Delivery) -> None:
    log(
        logging.WARNING,
        "%s refused %d of %d recipients of a message that the others got: %s",
        delivery.server,
        len(delivery.refused),
        len(delivery.refused) + len(delivery.accepted),
        "; ".join(
            f"{address}: {code} {text}"
            for address, (code, text) in delivery.refused.items()
        ),
        stage="rcpt",
        server=delivery.server,
    )
