"""Messages over a pool: which session each takes, and what became of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Literal

from . import errors
from .envelope import Envelope, prepare

if TYPE_CHECKING:
    from django.core.mail import EmailMessage

    from .loop import InCaller
    from .pool import Pool
    from .session import Receipt, Session

State = Literal["sent", "refused", "failed", "unknown", "not_sent"]


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """
    What became of a message; ``message.delivery`` after sending.

    :ivar state: ``sent`` (at least one recipient accepted), ``refused`` (by the
        server), ``failed`` (no answer, no connection, or it could not be built),
        ``unknown`` (the answer to the whole message was lost: it may have been
        delivered), or ``not_sent`` (not tried).
    :ivar accepted: the recipients that the server took the message for.
    :ivar refused: the other recipients: ``{address: (reply code, text)}``.
    :ivar reply: the server's answer to the message, such as ``"2.0.0 Ok: queued as
        4bQx"``.
    :ivar server: ``"host:port"``.
    :ivar attempts: how often it was tried.
    :ivar seconds: from the first attempt to the outcome.
    :ivar error: what was, or would be, raised.
    """

    state: State
    accepted: tuple[str, ...] = ()
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    reply: str = ""
    server: str = ""
    attempts: int = 0
    seconds: float = 0.0
    error: Exception | None = None


@dataclass
class Batch:
    """
    The outcome of one call. Keeps only the messages that need a word.

    :ivar sent: how many messages went out.
    :ivar notable: those that failed, or that some recipient did not get.
    """

    sent: int = 0
    notable: list[tuple[EmailMessage, Delivery]] = field(default_factory=list)

    def note(self, message: EmailMessage, delivery: Delivery) -> None:
        """Count a message's outcome, and set it as its ``delivery``."""
        # Not an attribute of Django's class, but any message will carry it.
        message.delivery = delivery  # type: ignore[attr-defined]
        self.sent += delivery.state == "sent"
        if delivery.error is not None or delivery.refused:
            self.notable.append((message, delivery))

    @property
    def failures(self) -> list[tuple[EmailMessage, Exception]]:
        """The messages that were not sent, with the reason, in order."""
        return [(m, d.error) for m, d in self.notable if d.error is not None]


# Where it fails, a fresh connection would fail as well.
_BEFORE_MAIL: Final = {"connect", "greeting", "ehlo", "tls", "auth"}


async def deliver(
    in_caller: InCaller, pool: Pool, messages: Iterator[EmailMessage]
) -> Batch:
    """
    Send messages in order. A refused one does not stop the others.

    The messages are taken and built in the caller's thread, one at a time. Each gets
    its ``Delivery`` as the attribute ``delivery``.
    """
    batch = Batch()
    with pool.held():
        while (item := await in_caller(_take, messages)) is not None:
            message, envelope = item
            delivery = await _deliver(pool, envelope)
            batch.note(message, delivery)
            if getattr(delivery.error, "stage", None) in _BEFORE_MAIL:
                break
    return batch


def _take(
    messages: Iterator[EmailMessage],
) -> tuple[EmailMessage, Envelope | Exception | None] | None:
    """Return the next message and its envelope, in the caller's thread."""
    for message in messages:
        if not message.recipients():
            return message, None
        try:
            return message, prepare(message)
        except Exception as error:
            return message, error
    return None


async def _deliver(pool: Pool, envelope: Envelope | Exception | None) -> Delivery:
    server = pool.options.server
    if envelope is None:
        return Delivery(state="not_sent", server=server)
    if isinstance(envelope, Exception):
        return Delivery(state="failed", server=server, error=envelope)
    start = time.monotonic()
    attempt = Attempt(pool, envelope)
    try:
        receipt = await attempt.send()
    except Exception as error:
        outcome = _failure(error)
    else:
        outcome = _success(receipt)
    return replace(
        outcome,
        server=server,
        attempts=attempt.count,
        seconds=time.monotonic() - start,
    )


class Attempt:
    """
    Sending one envelope.

    :ivar count: how often it was tried, each time on another session.
    """

    def __init__(self, pool: Pool, envelope: Envelope) -> None:
        self.pool = pool
        self.envelope = envelope
        self.count = 0

    async def send(self) -> Receipt:
        """
        Send it, on a second session where the first had died while it was idle.

        That is safe: nothing of the message was accepted yet.
        """
        session = await self._acquire()
        was_idle = session.was_idle
        try:
            return await self._send(session)
        except errors.SMTPError as error:
            if not (was_idle and _had_died(error)):
                raise
        return await self._send(await self._acquire(fresh=True))

    async def _acquire(self, *, fresh: bool = False) -> Session:
        self.count += 1
        return await self.pool.acquire(fresh=fresh)

    async def _send(self, session: Session) -> Receipt:
        try:
            return await session.send(self.envelope)
        finally:
            self.pool.release(session)


def _had_died(error: errors.SMTPError) -> bool:
    if isinstance(error, errors.SenderRefused):
        return error.smtp_code == 421
    return (
        error.stage == "mail"
        and isinstance(error, errors.Disconnected)
        and not isinstance(error, errors.ReplyTimeout)
    )


def _success(receipt: Receipt) -> Delivery:
    return Delivery(
        state="sent",
        accepted=receipt.accepted,
        refused=_texts(receipt.refused),
        reply=receipt.reply.text.decode("utf-8", "replace"),
    )


def _failure(error: Exception) -> Delivery:
    refused = {}
    state: State = "failed"
    if getattr(error, "maybe_delivered", False):
        state = "unknown"
    elif isinstance(error, errors.RecipientsRefused):
        state, refused = "refused", _texts(error.recipients)
    elif getattr(error, "stage", None) not in _BEFORE_MAIL and isinstance(
        error, errors.ResponseError
    ):
        state = "refused"
    return Delivery(state=state, refused=refused, error=error)


def _texts(
    refused: Mapping[str, tuple[int, bytes]],
) -> dict[str, tuple[int, str]]:
    return {
        address: (code, text.decode("utf-8", "replace"))
        for address, (code, text) in refused.items()
    }
