"""The messages of one call on their way into tasks: built, packed, put together."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from django.db import transaction

from ..delivery import Delivery
from ..dispatch import Item, Outcome
from ..envelope import Envelope
from ..errors import NotQueued, SMTPError
from ..logs import is_within_a_log_handler, log, quiet
from ..mailing import Mailing, log_fields
from . import engine
from .payload import MAX_CONTENT, Packed, Payload, packed
from .sending import send_now

if TYPE_CHECKING:
    from django.core.mail import EmailMessage

# Bytes between two messages of a task.
COMMA: Final = 2


@dataclass
class Batch:
    """
    The messages of one task.

    :ivar size: how many bytes the task holds.
    """

    task: Any
    size: int
    payload: dict[str, Any] = field(default_factory=dict)
    items: list[Item] = field(default_factory=list)


class Queueing:
    """
    What one ``send_messages()`` was given, and what became of it.

    Its methods are to be called in the thread for user code, but for those that say
    that something was queued or not.
    """

    def __init__(
        self, backend: Any, task: Any, messages: Iterable[EmailMessage]
    ) -> None:
        self._backend = backend
        self._task = task
        self._queue = backend.queue
        self._mailing = Mailing(backend, messages)
        self._is_quiet = quiet.get() or is_within_a_log_handler()
        # What a task holds beside its messages.
        self._frame = Payload(self._queue, (), quiet=self._is_quiet).size
        # Built, and for the next batch.
        self._held: tuple[Item, Packed] | None = None
        self._left: list[Item] = []
        self._ended_by: NotQueued | None = None
        self._broken: Exception | None = None

    @property
    def count(self) -> int:
        """How many messages were queued, or sent."""
        return self._mailing.sent

    @property
    def has_failures(self) -> bool:
        """Whether a message was not queued, that this knows of."""
        return self._mailing.has_failures

    def log_failures(self) -> None:
        """Log what cannot be raised, because something else is."""
        self._mailing.log_failures()

    def next_batch(self) -> Batch | None:
        """
        Return what is to be enqueued next; None at the end.

        What waits for the commit of a transaction is not returned, but left to that.
        """
        while (batch := self._built()) is not None and self._waits_for_commit():
            transaction.on_commit(partial(self._enqueue_after_commit, batch))
            self.queued(batch, "")
        return batch

    def queued(self, batch: Batch, task_id: str) -> None:
        """Take note that a batch was enqueued; no id: that it will be."""
        self._mailing.sent += len(batch.items)
        _note(batch, task_id)

    def not_queued(self, batch: Batch, error: Exception) -> None:
        """Take note of what the engine raised."""
        self._ended_by = self._as_not_queued(error)
        self._left += batch.items

    def conclude(self) -> Exception | None:
        """Tell what became of the rest; return the error that must be raised."""
        if self._held is not None:
            self._left.append(self._held[0])
        return self._mailing.conclude(
            Outcome((), self._left, self._ended_by, self._broken)
        )

    def _built(self) -> Batch | None:
        """Return the messages of the next task."""
        batch = Batch(self._task, self._frame)
        messages: list[Packed] = []
        while len(messages) < self._queue.batch_size:
            found = self._held or self._take()
            self._held = None
            if found is None:
                break
            item, message = found
            size = batch.size + COMMA * bool(messages) + message.task_size
            if messages and size > self._queue.max_size:
                self._held = found
                break
            batch.size = size
            # Without the bytes, which the task has.
            batch.items.append(replace(item, envelope=None))
            messages.append(message)
        if not messages:
            return None
        payload = Payload(self._queue, messages, quiet=self._is_quiet)
        batch.payload = payload.as_json()
        return batch

    def _take(self) -> tuple[Item, Packed] | None:
        """Return the next message that fits into a task; None at the end."""
        while (item := self._next()) is not None:
            envelope = item.envelope
            if not isinstance(envelope, Envelope):
                self._finish(item, envelope)
                continue
            message = packed(envelope)
            size = self._frame + message.task_size
            if size <= self._queue.max_size and message.size <= MAX_CONTENT:
                return item, message
            self._finish_too_large(item, envelope, size)
        return None

    def _next(self) -> Item | None:
        if self._broken is not None:
            return None
        try:
            return next(iter(self._mailing.take((), 1)), None)
        except Exception as error:
            # Of the project's iterator. What it gave before is queued.
            self._broken = error
            return None

    def _finish(self, item: Item, error: Exception | None) -> None:
        state: Any = "not_sent" if error is None else "failed"
        self._mailing.finish([(item, Delivery(state=state, error=error))])

    def _finish_too_large(self, item: Item, envelope: Envelope, size: int) -> None:
        if self._queue.oversize == "error":
            self._finish(item, self._too_large(size))
        elif self._waits_for_commit():
            transaction.on_commit(partial(self._send_after_commit, item, envelope))
            self._mailing.sent += 1
            item.message.delivery = Delivery(state="queued")  # type: ignore[attr-defined]
        else:
            delivery = send_now(envelope, self._queue.mailer)
            self._mailing.finish([(item, delivery)])

    def _too_large(self, size: int) -> NotQueued:
        place = engine.place(self._queue)
        error = NotQueued(
            f"the message takes {size} bytes of a task in {place}, and max_size is "
            f"{self._queue.max_size}",
            stage="queue",
            server=place,
        )
        error.add_hint('Raise max_size, or set oversize to "direct".')
        return error

    def _waits_for_commit(self) -> bool:
        # What is logged within a transaction must not end with it.
        return (
            self._queue.on_commit
            and not self._is_quiet
            and transaction.get_connection().in_atomic_block
        )

    def _enqueue_after_commit(self, batch: Batch) -> None:
        """Do so; never raise, for the other callbacks would not be called."""
        try:
            _note(batch, batch.task.enqueue(batch.payload).id)
        except Exception as error:
            delivery = Delivery(state="failed", error=self._as_not_queued(error))
            self._fail_after_commit(batch.items, delivery)

    def _send_after_commit(self, item: Item, envelope: Envelope) -> None:
        try:
            delivery = send_now(envelope, self._queue.mailer)
        except Exception as error:
            delivery = Delivery(state="failed", error=error)
        self._fail_after_commit([item], delivery)

    def _fail_after_commit(self, items: list[Item], delivery: Delivery) -> None:
        """Tell what became of messages, and log it: nobody is there to raise to."""
        late = Mailing(self._backend, ())
        late.finish([(item, delivery) for item in items])
        error = delivery.error
        is_logged = self._backend.fail_silently and isinstance(error, SMTPError)
        if error is None or is_logged:
            return
        log(
            logging.ERROR,
            "%d messages lost after the commit of their transaction: %s",
            len(items),
            # Of others, nobody knows what it tells.
            error if isinstance(error, SMTPError) else type(error).__name__,
            **(log_fields(error) if isinstance(error, SMTPError) else {}),
        )

    def _as_not_queued(self, error: Exception) -> NotQueued:
        made = engine.not_queued(self._queue, error)
        made.__cause__ = error
        return made


def _note(batch: Batch, task_id: str) -> None:
    delivery = Delivery(state="queued", task_id=task_id)
    for item in batch.items:
        item.message.delivery = delivery  # type: ignore[attr-defined]
