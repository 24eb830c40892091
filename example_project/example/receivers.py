"""Keeps what became of every message: a receiver of ``post_send``."""

from __future__ import annotations

import datetime
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from typing import Any, Final

from asgiref.sync import iscoroutinefunction
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


def just_sent() -> SentMail | None:
    """Return the row of what a view that is ``recording`` has sent first."""
    rows = _recorded.get()
    return rows[0] if rows else None


def recording(view: Callable[..., Any]) -> Callable[..., Any]:
    """Have ``just_sent`` tell what a view, sync or async, sends."""
    if iscoroutinefunction(view):

        @wraps(view)
        async def asynchronous(*args: Any, **kwargs: Any) -> Any:
            with _recording():
                return await view(*args, **kwargs)

        return asynchronous

    @wraps(view)
    def synchronous(*args: Any, **kwargs: Any) -> Any:
        with _recording():
            return view(*args, **kwargs)

    return synchronous


@contextmanager
def _recording() -> Iterator[None]:
    token = _recorded.set([])
    try:
        yield
    finally:
        _recorded.reset(token)
