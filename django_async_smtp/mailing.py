"""
The messages of one call, in the caller's thread: taken, built, signalled, logged.

User code runs here and nowhere else: iterators, lazy strings, signal receivers, log
handlers.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from .delivery import Delivery
from .dispatch import Done, Item, Outcome
from .envelope import Envelope, prepare
from .errors import SMTPError
from .logs import log, masked, quiet
from .signals import post_send, pre_send

if TYPE_CHECKING:
    from django.core.mail import EmailMessage

# Up to so many messages go over one connection, in order.
ONE_CONNECTION: Final = 12
# Bytes and seconds after which no further message is built with the others.
BUNCH_SIZE: Final = 256 * 1024
BUNCH_SECONDS: Final = 0.002


class Mailing:
    """
    What one ``send_messages()`` was given, and what became of it.

    Holds no message after its turn but those that failed.

    :param messages: any iterable; it is read ahead by ``ONE_CONNECTION``, and then only
        as far as messages are built.
    :ivar sent: how many messages went out.
    """

    def __init__(self, backend: Any, messages: Iterable[EmailMessage] | None) -> None:
        self.sent = 0
        self._backend = backend
        self._failures: list[tuple[int, EmailMessage, Exception]] = []
        self._taken = 0
        self._iterator = iter(messages or ())
        # Reading on from a sequence has no effect on anybody else.
        self._is_sequence = isinstance(messages, Sequence)
        self._ahead: deque[EmailMessage] = deque()
        self._returned: list[Item] = []
        self._broken: Exception | None = None
        self._read(1)
        if self._ahead:
            self._read(ONE_CONNECTION)
        # Whether the iterator has no more.
        self._is_read = len(self._ahead) <= ONE_CONNECTION

    @property
    def is_empty(self) -> bool:
        """Whether there was no message at all."""
        return not (self._ahead or self._taken)

    @property
    def has_failures(self) -> bool:
        """Whether a message was not sent, that this knows of."""
        return bool(self._failures)

    def take(self, done: Sequence[Done], count: int) -> list[Item]:
        """
        Finish some messages; return the next, built, up to a count; none at the end.

        Several only where that takes no time to speak of.
        """
        self.finish(done)
        items: list[Item] = []
        size, end = 0, time.monotonic() + BUNCH_SECONDS
        while (message := self._next()) is not None:
            item = self._item(message)
            items.append(item)
            if isinstance(item.envelope, Envelope):
                size += len(item.envelope.content)
            is_enough = len(items) >= count or size >= BUNCH_SIZE
            if is_enough or not self._ahead or time.monotonic() > end:
                break
        return items

    def _item(self, message: EmailMessage) -> Item:
        index, self._taken = self._taken, self._taken + 1
        has_backlog = index == 0 and len(self._ahead) >= ONE_CONNECTION
        is_last = self._is_read and not self._ahead and self._broken is None
        return Item(index, message, self._build(message), has_backlog, is_last)

    def finish(self, done: Sequence[Done]) -> None:
        """Tell everybody what became of some messages."""
        for item, delivery in done:
            self._finish(item, delivery)

    def _finish(self, item: Item, delivery: Delivery) -> None:
        self.sent += delivery.state == "sent"
        error = delivery.error
        if error is not None:
            self._failures.append((item.index, item.message, error))
            if isinstance(error, SMTPError) and self._backend.fail_silently:
                log_failure(error, delivery)
        elif delivery.refused:
            log_refused(delivery)
        self._tell(item.message, delivery)

    def has_news(self, outcome: Outcome) -> bool:
        """Whether ``conclude`` will run user code: log handlers, signal receivers."""
        return (
            bool(outcome.left)
            or outcome.ended_by is not None
            or outcome.broken is not None
            or any(delivery.error or delivery.refused for _, delivery in outcome.untold)
            or post_send.has_listeners(type(self._backend))
        )

    def conclude(self, outcome: Outcome) -> Exception | None:
        """Tell the rest of a call's outcome; return the error that must be raised."""
        self.finish(outcome.untold)
        self._returned.extend(outcome.left)
        failure = self.settle(outcome.ended_by)
        if outcome.broken is not None:
            self.log_failures()
            return outcome.broken
        return failure

    def settle(self, ended_by: SMTPError | None = None) -> Exception | None:
        """
        Return the first error that must be raised, with all of them.

        :param ended_by: what ended the call before its last message.
        """
        if ended_by is not None:
            rest = self._report_rest(ended_by)
            if rest and self._is_swallowed(ended_by):
                message = "%d more messages not sent (fail_silently): %s"
                log(logging.ERROR, message, rest, ended_by, **log_fields(ended_by))
        self._failures.sort(key=lambda failure: failure[0])
        for _, _, error in self._failures:
            if not self._is_swallowed(error):
                self._add_failures(error)
                return error
        # That of the iterator, which the end of the call came before.
        return self._broken

    def not_opened(self, error: SMTPError) -> SMTPError:
        """Report all messages as not sent, and return the error, with them."""
        self._report_rest(error)
        self._add_failures(error)
        return error

    def log_failures(self) -> None:
        """Log what cannot be raised, because something else is."""
        for _, _, error in self._failures:
            if isinstance(error, SMTPError) and not self._is_swallowed(error):
                log_failure(error)

    def _next(self) -> EmailMessage | None:
        if self._ahead:
            return self._ahead.popleft()
        if self._broken is not None:
            raise self._broken
        self._read(ONE_CONNECTION if self._is_sequence else 1)
        return self._ahead.popleft() if self._ahead else None

    def _read(self, count: int) -> None:
        """Take messages from the iterator; what it raises comes after those it gave."""
        try:
            for message in islice(self._iterator, count):
                self._ahead.append(message)
        except Exception as error:
            if not self._ahead:
                raise
            self._broken = error

    def _build(self, message: EmailMessage) -> Envelope | Exception | None:
        try:
            # A log handler may raise, told of what a receiver raised.
            self._signal(pre_send, message, None)
            return prepare(message) if message.recipients() else None
        except Exception as error:
            return error

    def _report_rest(self, error: SMTPError) -> int:
        untaken = [*self._ahead, *(self._iterator if self._is_sequence else ())]
        rest = [(item.index, item.message) for item in self._returned]
        rest += enumerate(untaken, self._taken)
        self._ahead.clear()
        self._returned.clear()
        delivery = Delivery(state="not_sent", server=error.server, error=error)
        for index, message in rest:
            self._failures.append((index, message, error))
            self._tell(message, delivery)
        return len(rest)

    def _tell(self, message: EmailMessage, delivery: Delivery) -> None:
        # Not an attribute of Django's class, but any message will carry it.
        message.delivery = delivery  # type: ignore[attr-defined]
        self._signal(post_send, message, delivery)

    def _signal(
        self, signal: Any, message: EmailMessage, delivery: Delivery | None
    ) -> None:
        sender = type(self._backend)
        # What a receiver raises is logged, which must wait where it would be for ever.
        if signal.has_listeners(sender) and not quiet.get():
            alias = self._backend.alias
            signal.send_robust(sender, message=message, delivery=delivery, alias=alias)

    def _is_swallowed(self, error: Exception) -> bool:
        return isinstance(error, SMTPError) and bool(self._backend.fail_silently)

    def _add_failures(self, error: Any) -> None:
        error.failures = [(message, why) for _, message, why in self._failures]
        error.sent = self.sent
        if len(self._failures) + self.sent > 1:
            error.add_note(
                f"Messages not sent: {len(self._failures)} (see .failures); "
                f"sent: {self.sent}."
            )


def log_failure(error: SMTPError, delivery: Delivery | None = None) -> None:
    """Log what ``fail_silently`` hides from the caller."""
    log(
        logging.ERROR,
        "Mail not sent (fail_silently): %s%s",
        error,
        f" [{error.hint}]" if error.hint else "",
        **log_fields(error),
        delivery=masked_delivery(delivery),
    )


def log_refused(
    delivery: Delivery, level: int = logging.WARNING, **fields: object
) -> None:
    """
    Log the recipients that a message did not reach, while it reached others.

    :param fields: further ones of the log record.
    """
    refused = (f"{a}: {code} {text}" for a, (code, text) in delivery.refused.items())
    log(
        level,
        "%s refused %d of %d recipients of a message that the others got: %s",
        delivery.server,
        len(delivery.refused),
        len(delivery.refused) + len(delivery.accepted),
        "; ".join(refused),
        stage="rcpt",
        server=delivery.server,
        delivery=masked_delivery(delivery),
        **fields,
    )


def log_fields(error: SMTPError) -> dict[str, Any]:
    """Return the fields of a log record about an error."""
    return {
        "stage": error.stage,
        "server": error.server,
        "smtp_code": getattr(error, "smtp_code", None),
        "temporary": error.temporary,
        "maybe_delivered": error.maybe_delivered,
        "hint": error.hint,
    }


def masked_delivery(delivery: Delivery | None) -> Delivery | None:
    """Return a delivery without addresses, and without the error that holds them."""
    if delivery is None:
        return None
    return replace(
        delivery,
        accepted=tuple(map(masked, delivery.accepted)),
        refused={
            masked(address): (code, masked(text))
            for address, (code, text) in delivery.refused.items()
        },
        reply=masked(delivery.reply),
        error=None,
    )
