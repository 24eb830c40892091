"""The email backend that queues: what Django calls, sync and async."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from asgiref.sync import sync_to_async
from django.core.mail.backends.base import BaseEmailBackend
from django.db import connections

from .. import options as opts
from ..callers import as_in_a_plain_thread, is_in_running_loop
from . import engine
from .options import QUEUE, queue_options
from .queueing import Queueing

if TYPE_CHECKING:
    from django.core.mail import EmailMessage


class QueuedBackend(BaseEmailBackend):
    """
    Has a worker of the project's task queue (Django Tasks) send the mail.

    Messages are built here, in the caller's thread, so their errors are raised here.

    :ivar queue: the options.
    """

    def __init__(self, *, fail_silently: bool = False, **kwargs: Any) -> None:
        """
        :raises ImproperlyConfigured: an option cannot be used, or there is no library
            of tasks (``InvalidMailer`` where it comes from MAILERS).
        """
        given = {name: kwargs.pop(name, None) for name in QUEUE}
        _refuse_login(kwargs)
        super().__init__(**kwargs)
        self.fail_silently = fail_silently
        self.alias: str | None = getattr(self, "alias", None)
        self.queue = queue_options(given, self.alias)
        engine.library(self.alias)

    async def aopen(self) -> None:
        """Do nothing, as ``open``: there is no connection."""

    async def aclose(self) -> None:
        """Do nothing, as ``close``."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass

    def send_messages(self, email_messages: Iterable[EmailMessage]) -> int:
        """
        Queue the messages, each with its ``Delivery`` as ``message.delivery`` after.

        Within a transaction of the default database they are queued on its commit.
        What fails then is logged, and tells ``message.delivery``.

        :param email_messages: any iterable; it is taken from in the caller's thread.
        :returns: how many were queued.
        :raises NotQueued: the task queue took none or not all, or a message is too
            large; none where ``fail_silently`` is set.
        :raises ValueError: a message could not be built, even with
            ``fail_silently``.
        :raises ImproperlyConfigured: the task queue cannot be used.
        """
        if is_in_running_loop():
            return as_in_a_plain_thread(self._queue_and_disconnect, email_messages)
        return self._queue(email_messages)

    async def asend_messages(self, email_messages: Iterable[EmailMessage]) -> int:
        """
        Do as ``send_messages``, without blocking the event loop.

        Messages are taken and built in the thread that ``sync_to_async`` gives.
        """
        queueing: Queueing = await sync_to_async(self._begin)(email_messages)
        try:
            while (batch := await sync_to_async(queueing.next_batch)()) is not None:
                try:
                    result = await batch.task.aenqueue(batch.payload)
                except Exception as error:
                    queueing.not_queued(batch, error)
                    break
                queueing.queued(batch, result.id)
            failure = await sync_to_async(queueing.conclude)()
        except BaseException:
            if queueing.has_failures:
                await sync_to_async(queueing.log_failures)()
            raise
        if failure is not None:
            raise failure
        return queueing.count

    def _queue_and_disconnect(self, messages: Iterable[EmailMessage]) -> int:
        """Queue in a thread that ends then, with its database connections."""
        try:
            return self._queue(messages)
        finally:
            connections.close_all()

    def _queue(self, messages: Iterable[EmailMessage]) -> int:
        queueing = self._begin(messages)
        try:
            while (batch := queueing.next_batch()) is not None:
                try:
                    result = batch.task.enqueue(batch.payload)
                except Exception as error:
                    queueing.not_queued(batch, error)
                    break
                queueing.queued(batch, result.id)
            failure = queueing.conclude()
        except BaseException:
            queueing.log_failures()
            raise
        if failure is not None:
            raise failure
        return queueing.count

    def _begin(self, messages: Iterable[EmailMessage]) -> Queueing:
        # It is made a task when it is imported, which needs the settings.
        from .worker import send_queued

        task = engine.made_for(send_queued, self.queue, self.alias)
        return Queueing(self, task, messages)


def _refuse_login(kwargs: dict[str, Any]) -> None:
    """
    Refuse a user name and a password; they would not get to the worker.

    :raises ImproperlyConfigured: they are given.
    """
    names = {"username", "password"}
    alias = kwargs.get("alias")
    # What Django 6.1 passes on from send_mail(), and not from OPTIONS.
    passed_on = kwargs.get("_ignore_unknown_kwargs") or ()
    if any(kwargs.get(n) and (alias is None or n in passed_on) for n in names):
        problem = (
            "auth_user and auth_password cannot be given to a queue: no password goes "
            "into a task. Make a mailer with this login, and a queue for it."
        )
        raise opts.setting_error(problem, problem, alias)
    if alias is None:
        for name in names:
            kwargs.pop(name, None)
