"""Keeps what became of every message: a receiver of ``post_send``."""

from __future__ import annotations

import datetime
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

from django.core.mail import EmailMessage

from django_async_smtp import Delivery, post_send

from .models import SentMail

_recorded: ContextVar[list[SentMail] | None] = ContextVar("recorded", default=None)


@dataclass(frozen=True)
class LastError:
    """What a message met that was not sent."""

    at: datetime.datetime
    server: str
    text: str
    hint: str


# For the page "Pool": of this process, as pool_stats() is.
LAST_ERRORS: Final[deque[LastError]] = deque(maxlen=5)


def connect() -> None:
    """Have the receiver called."""
    post_send.connect(record, dispatch_uid="example.record")


def record(
    message: EmailMessage, delivery: Delivery, alias: str | None, **kwargs: Any
) -> None:
    """
    Write a row. It runs in the thread of the caller, within its transaction.

    What it raises is logged, and changes nothing.
    """
    row = SentMail.of(message, delivery, alias)
    if delivery.error is not None:
        now = datetime.datetime.now(datetime.UTC)
        error = LastError(now, row.server, row.error, row.hint)
        LAST_ERRORS.appendleft(error)
    row.save()
    rows = _recorded.get()
    if rows is not None:
        rows.append(row)


@contextmanager
def recorded() -> Iterator[list[SentMail]]:
    """Collect the rows of what the block sends; in a sync or an async view."""
    rows: list[SentMail] = []
    token = _recorded.set(rows)
    try:
        yield rows
    finally:
        _recorded.reset(token)
