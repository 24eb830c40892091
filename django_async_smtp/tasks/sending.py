"""Envelopes that are built already, over the pools that direct sending uses."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from django.core import mail
from django.core.exceptions import ImproperlyConfigured

from .. import options as opts
from ..backend import Backend
from ..callers import InCaller
from ..delivery import Delivery
from ..dispatch import Done, Item, Outcome, deliver
from ..envelope import Envelope
from ..loop import smtp_loop
from ..mailing import ONE_CONNECTION

if TYPE_CHECKING:
    from ..options import Route

# Seconds after which a task begins no further message. RQ breaks it off after 180 s;
# ``requeue_mail`` takes one that runs for half an hour for lost.
TASK_SECONDS: Final = 100.0
# Seconds that a call that was broken off gets to say what it had sent.
LAST_WORDS: Final = 2.0


class Parcel(Protocol):
    """
    What is sent, and what became of it.

    :ivar delivery: None until that is known.
    """

    envelope: Envelope
    delivery: Delivery | None


@dataclass
class _Single:
    envelope: Envelope
    delivery: Delivery | None = None


class _Shipment:
    """Gives parcels, one after another, to those who send them."""

    def __init__(self, parcels: Sequence[Parcel]) -> None:
        self._parcels = parcels
        self._taken = 0
        self._end = time.monotonic() + TASK_SECONDS

    def take(self, done: Sequence[Done], count: int) -> list[Item]:
        """Note what became of some; return the next, up to a count; none at the end."""
        self.finish(done)
        if self._taken and time.monotonic() > self._end:
            return []
        first, self._taken = self._taken, min(self._taken + count, len(self._parcels))
        return [self._item(index) for index in range(first, self._taken)]

    def _item(self, index: int) -> Item:
        parcel: Any = self._parcels[index]
        count = len(self._parcels)
        has_backlog = index == 0 and count > ONE_CONNECTION
        return Item(index, parcel, parcel.envelope, has_backlog, index == count - 1)

    def finish(self, done: Sequence[Done]) -> None:
        """Note what became of the last ones."""
        for item, delivery in done:
            item.message.delivery = delivery  # type: ignore[attr-defined]


def sender(mailer: str | None) -> Backend:
    """
    Return the backend that a queue's messages are sent through.

    :param mailer: its key in MAILERS; None with ``EMAIL_*``.
    :raises ImproperlyConfigured: there is none, or it is not this package's.
    """
    if mailer is None:
        if opts.uses_mailers():
            problem = (
                "The task was queued with EMAIL_* settings; now there are MAILERS."
            )
            raise ImproperlyConfigured(problem)
        return Backend()
    found = mail.mailers[mailer]
    if not isinstance(found, Backend):
        problem = "A queue's mailer must be a django_async_smtp.Backend."
        raise opts.setting_error(problem, problem, mailer)
    return found


def send(parcels: Sequence[Parcel], backend: Backend) -> None:
    """
    Send parcels; what became of each is its ``delivery`` then.

    Where it is broken off, as by a time limit of the worker, it is that of those that
    were sent by then, or may have been; the others keep None. So do those that a task
    has no time for.

    :raises ImproperlyConfigured: the backend's options cannot be used.
    """
    route = backend.route()
    shipment, ended = _Shipment(parcels), threading.Event()
    try:
        outcome = smtp_loop().call(_deliver, shipment, route, ended)
    except BaseException:
        ended.wait(LAST_WORDS)
        raise
    shipment.finish(outcome.untold)
    if outcome.broken is not None:
        raise outcome.broken
    error = outcome.ended_by
    if error is not None:
        rest = Delivery(state="not_sent", server=error.server, error=error)
        for parcel in parcels:
            parcel.delivery = parcel.delivery or rest


def send_now(envelope: Envelope, mailer: str | None) -> Delivery:
    """
    Send one message.

    :raises ImproperlyConfigured: there is no such mailer, or it cannot be used.
    """
    parcel = _Single(envelope)
    send([parcel], sender(mailer))
    return parcel.delivery or Delivery(state="not_sent")


async def _deliver(
    in_caller: InCaller, shipment: _Shipment, route: Route, ended: threading.Event
) -> Outcome:
    try:
        with smtp_loop().pools_for(route) as pools:
            return await deliver(in_caller, shipment, route, pools, [])
    finally:
        ended.set()
