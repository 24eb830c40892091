"""A message over pools: which session it takes, and what is tried again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from random import SystemRandom
from typing import TYPE_CHECKING, Final, Literal, TypeGuard, TypeVar

from . import errors

if TYPE_CHECKING:
    from .envelope import Envelope
    from .options import Route
    from .pool import Pool
    from .session import Receipt, Session

T = TypeVar("T")

Upcoming = Callable[[], "Envelope | None"]

# Neither the one that a project may seed, nor the same in every forked worker.
_random = SystemRandom()

State = Literal["sent", "refused", "failed", "unknown", "not_sent", "queued"]

# No message was on its way yet.
_BEFORE_MAIL: Final = {"connect", "greeting", "ehlo", "tls", "auth"}
TOO_MANY_RECIPIENTS: Final = 452
# Ends the text of a recipient for whom the server's answer was lost.
MAYBE_DELIVERED: Final = " (it may have been delivered)"
# Seconds that a connection stays between the messages of a call, where none is kept
# idle after it.
WITHIN_A_CALL: Final = 20.0
# Seconds before the first retry; doubled for each further one.
FIRST_PAUSE: Final = 0.5


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """
    What became of a message; ``message.delivery`` after sending.

    :ivar state: ``sent`` (at least one recipient accepted), ``refused`` (by the
        server), ``failed`` (no answer, no connection, or it could not be built),
        ``unknown`` (the answer to the whole message was lost: it may have been
        delivered), ``not_sent`` (not tried), or ``queued`` (a worker sends it).
    :ivar accepted: the recipients that the server took the message for.
    :ivar refused: the other recipients: ``{address: (reply code, text)}``.
    :ivar reply: the server's answer to the message, such as ``"2.0.0 Ok: queued as
        4bQx"``.
    :ivar server: ``"host:port"`` of the server that answered, or was tried last.
    :ivar attempts: how often it was tried, each time on another session.
    :ivar seconds: from the first attempt to the outcome.
    :ivar stages: seconds that each stage of the last transaction took, up to its reply:
        ``{"mail": 0.02, "rcpt": …, "data": …, "body": …}``; before them those of the
        connection, ``connect`` to ``auth``, where it was the first message on it (with
        ``use_ssl``, ``tls`` holds the greeting).
    :ivar error: what was, or would be, raised.
    :ivar task_id: the id of the task's result, where it is queued; empty until the
        transaction is committed.
    """

    state: State
    accepted: tuple[str, ...] = ()
    refused: dict[str, tuple[int, str]] = field(default_factory=dict)
    reply: str = ""
    server: str = ""
    attempts: int = 0
    seconds: float = 0.0
    stages: dict[errors.Stage, float] = field(default_factory=dict)
    error: Exception | None = None
    task_id: str = ""


def _nothing() -> None:
    """Stand in for a message that is not there."""


class Courier:
    """
    Sends one message after another.

    Holds a session only while it sends, or where the next message has begun on it:
    else, between messages, user code runs, and may itself need a session.

    :ivar attempts: how often the message at hand was tried.
    :ivar broken_off: what had become of the message whose delivery was cancelled; None
        where that is nothing.
    """

    def __init__(self, route: Route, pools: list[Pool]) -> None:
        self.route = route
        self.pools = pools
        self.attempts = 0
        self._pool = pools[0]
        self._begun_on: Session | None = None
        self._upcoming: Upcoming = _nothing
        self._stages: dict[errors.Stage, float] = {}
        self.broken_off: Delivery | None = None
        # Of the message at hand, whose further transactions go on; and to whom now.
        self._outcome: Delivery | None = None
        self._rest: list[str] = []
        self._is_unanswered = False

    async def prepare(self) -> None:
        """Have a session ready ahead of the first message."""
        session = await self._with_retries(partial(self._acquire, fresh=False))
        self._release(session)

    def finish(self) -> None:
        """End what is not to be kept after the call."""
        self._drop_begun()
        for pool in self.pools:
            if pool.options.idle_timeout == 0 and pool.users == 1:
                pool.close_idle()

    def is_cut_off(self, error: Exception | None) -> TypeGuard[errors.SMTPError]:
        """Whether the next message would meet the same error, on any connection."""
        if not is_before_mail(error) or isinstance(error, errors.RateLimited):
            return False
        # A greeting may be an accident, as long as other connections work.
        return error.stage not in {"greeting", "ehlo"} or not self._pool.has_session

    async def deliver(
        self, envelope: Envelope | Exception | None, upcoming: Upcoming = _nothing
    ) -> Delivery:
        """
        Send an envelope, as often as the route allows; never raises SMTPError.

        :param upcoming: returns the envelope that is delivered next, if it is there by
            now: its commands may go out with the end of this one.
        """
        if envelope is None:
            return Delivery(state="not_sent")
        if isinstance(envelope, Exception):
            return Delivery(state="failed", error=envelope)
        start = time.monotonic()
        self.attempts = 0
        self._stages = {}
        self._upcoming = upcoming
        self._outcome, self._rest = None, []
        try:
            outcome = await self._to_all(envelope)
        except asyncio.CancelledError:
            self.broken_off = self._so_far()
            raise
        except Exception as error:
            # The pool has counted what went wrong on connecting.
            if not is_before_mail(error) or isinstance(error, errors.PoolTimeout):
                self._pool.counts.errors += 1
            outcome = _failure(error)
        else:
            self._pool.counts.messages += 1
        finally:
            # It leads back to whoever holds this courier.
            self._upcoming = _nothing
        return replace(
            outcome,
            server=self._pool.options.server,
            attempts=self.attempts,
            seconds=time.monotonic() - start,
            stages=self._stages,
        )

    def _so_far(self) -> Delivery | None:
        """Return what had become of a message, where that is anything."""
        if not self._is_unanswered and self._outcome is None:
            return None
        server = self._pool.options.server
        error = errors.Disconnected(
            f"the message: the wait for the answer of {server} was broken off",
            stage="body",
            server=server,
            maybe_delivered=True,
        )
        outcome = self._outcome or _failure(error)
        if self._is_unanswered:
            no = (0, f"{error}{MAYBE_DELIVERED}")
            refused = outcome.refused | dict.fromkeys(self._rest, no)
            outcome = replace(outcome, refused=refused)
        return replace(outcome, server=server, attempts=self.attempts)

    async def _to_all(self, envelope: Envelope) -> Delivery:
        """
        Send to all recipients, in further transactions where one takes too few.

        A recipient that was accepted is in no further transaction.
        """
        receipt = await self._with_retries(partial(self._send, envelope))
        outcome = _success(receipt)
        deadline = time.monotonic() + self.route.retry_deadline
        retry, has_progress = 0, True
        put_off = _put_off(outcome.refused)
        while put_off:
            self._outcome = outcome
            rest = [a for a in put_off if put_off[a] == TOO_MANY_RECIPIENTS]
            if not (rest and has_progress):
                if not await self._pause(retry, deadline):
                    break
                retry, rest = retry + 1, list(put_off)
            others = {a: code for a, code in put_off.items() if a not in rest}
            self._rest = rest
            further = await self._further(replace(envelope, recipients=tuple(rest)))
            has_progress = bool(further.accepted)
            outcome = _joined(outcome, further)
            is_final = not getattr(further.error, "temporary", True)
            put_off = others | ({} if is_final else _put_off(further.refused))
        return outcome

    async def _further(self, envelope: Envelope) -> Delivery:
        """Try a further transaction; what fails in it befalls all its recipients."""
        try:
            return _success(await self._send(envelope))
        except Exception as error:
            failure = _failure(error)
            if failure.refused:
                return failure
            text = str(error)
            if failure.state == "unknown":
                text += MAYBE_DELIVERED
            no = (getattr(error, "smtp_code", 0), text)
            return replace(failure, refused=dict.fromkeys(envelope.recipients, no))

    async def _with_retries(self, attempt: Callable[[], Awaitable[T]]) -> T:
        deadline = time.monotonic() + self.route.retry_deadline
        for retry in count():
            try:
                return await attempt()
            except errors.SMTPError as error:
                if not error.temporary or not await self._pause(retry, deadline):
                    raise
        raise AssertionError("unreachable")

    async def _pause(self, retry: int, deadline: float) -> bool:
        """Wait before a retry; return False, at once, where there is none left."""
        pause = FIRST_PAUSE * 2**retry * _random.uniform(0.5, 1)
        if retry >= self.route.retries or time.monotonic() + pause > deadline:
            return False
        self._drop_begun()
        await asyncio.sleep(pause)
        return True

    async def _send(self, envelope: Envelope) -> Receipt:
        """
        Send, on a fresh session where a used one proves dead at MAIL.

        That is safe: nothing of the message was accepted yet.
        """
        session = self._claim_begun(envelope) or await self._take_turn(fresh=False)
        was_used = session.is_used
        try:
            return await self._transact(session, envelope)
        except errors.SMTPError as error:
            if not (was_used and _had_died(error)):
                raise
        return await self._transact(await self._take_turn(fresh=True), envelope)

    async def _transact(self, session: Session, envelope: Envelope) -> Receipt:
        self._is_unanswered = False
        try:
            return await session.send(envelope, partial(self._next_on, session))
        finally:
            self._is_unanswered = session.is_unanswered
            self._stages = dict(session.stages)
            if session.begun is not None:
                self._begun_on = session
            else:
                self._release(session)

    def _next_on(self, session: Session) -> Envelope | None:
        """Return the next message, where it may go over the same session at once."""
        return self._upcoming() if self._pool.may_go_on(session) else None

    def _claim_begun(self, envelope: Envelope) -> Session | None:
        """Return the session on which a message has begun."""
        session = self._begun_on
        if session is None or session.begun is not envelope:
            return None
        self._begun_on = None
        session.is_used = True
        self.attempts += 1
        return session

    def _drop_begun(self) -> None:
        """End the session on which the next message has begun, if one has."""
        session, self._begun_on = self._begun_on, None
        if session is not None:
            session.abort()
            self._release(session)

    async def _take_turn(self, *, fresh: bool) -> Session:
        self.attempts += 1
        self._drop_begun()
        session = await self._acquire(fresh=fresh)
        try:
            await self._pool.turn()
        except BaseException:
            self._release(session)
            raise
        return session

    def _release(self, session: Session) -> None:
        # Until the end of the call, at least: ``finish``.
        keep = self._pool.options.idle_timeout or WITHIN_A_CALL
        self._pool.release(session, keep=keep)

    async def _acquire(self, *, fresh: bool) -> Session:
        """Return a session with the first server that can be reached."""
        tried: list[errors.SMTPError] = []
        pools = [pool for pool in self.pools if not pool.is_down] or self.pools
        for pool in pools:
            self._pool = pool
            try:
                return await pool.acquire(fresh=fresh)
            except errors.SMTPError as error:
                if len(self.pools) == 1 or not _is_outage(error):
                    raise
                pool.mark_down()
                tried.append(error)
        raise _naming_all(tried)


def is_before_mail(error: Exception | None) -> TypeGuard[errors.SMTPError]:
    return isinstance(error, errors.SMTPError) and error.stage in _BEFORE_MAIL


def _is_outage(error: errors.SMTPError) -> bool:
    """Whether another server may do better."""
    if isinstance(error, errors.PoolTimeout | errors.AuthenticationRefused):
        return False
    return error.temporary or isinstance(error, errors.ConnectError)


def _naming_all(tried: list[errors.SMTPError]) -> errors.SMTPError:
    error = tried[-1]
    if len(tried) > 1:
        error.message = "; ".join(str(one) for one in tried)
    return error


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


def _put_off(refused: Mapping[str, tuple[int, str]]) -> dict[str, int]:
    """Return those not refused for good, each with its reply code; 0: no reply."""
    return {a: code for a, (code, _) in refused.items() if code < 500}


def _joined(outcome: Delivery, further: Delivery) -> Delivery:
    """Return the outcome after a further transaction."""
    refused = {a: no for a, no in outcome.refused.items() if a not in further.accepted}
    return replace(
        outcome,
        accepted=outcome.accepted + further.accepted,
        refused=refused | further.refused,
        reply="; ".join(filter(None, (outcome.reply, further.reply))),
    )


def _texts(
    refused: Mapping[str, tuple[int, bytes]],
) -> dict[str, tuple[int, str]]:
    return {
        address: (code, text.decode("utf-8", "replace"))
        for address, (code, text) in refused.items()
    }
