"""
The sessions with one server: in use, idle, closing.

Every change of state happens in a synchronous function, so none can be half done at
an ``await``. Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import Counter, deque
from contextlib import suppress
from dataclasses import dataclass, field
from random import SystemRandom
from typing import TYPE_CHECKING, Final, Literal

from .errors import (
    ConnectError,
    Disconnected,
    PoolTimeout,
    RateLimited,
    ResponseError,
    SMTPError,
)
from .hints import explained
from .session import Session

if TYPE_CHECKING:
    from .options import Options

# Seconds that a server is left alone after it could not be reached, and that the
# number of connections which it allowed is remembered.
DOWN_TIME: Final = 60.0
LIMIT_MEMORY: Final = 60.0
# A connection's lifetime is shortened by up to this part, so that they do not all
# end at once.
AGE_JITTER: Final = 0.1

# Neither the one that a project may seed, nor the same in every forked worker.
_random = SystemRandom()

Reason = Literal["idle", "age", "messages", "ended by server", "unclean", "asked"]


@dataclass
class Counts:
    """What happened with one server since the process began."""

    opened: int = 0
    reused: int = 0
    messages: int = 0
    errors: int = 0
    closed: Counter[Reason] = field(default_factory=Counter)


class Pool:
    """
    Sessions for equal options, at most ``options.max_connections`` at a time.

    :ivar users: how many calls work with it at the moment.
    """

    def __init__(self, options: Options, counts: Counts) -> None:
        self.options = options
        self.counts = counts
        self.users = 0
        self._loop = asyncio.get_running_loop()
        self._connecting = 0
        self._in_use: set[Session] = set()
        # Idle sessions and the timers that end them; the last one is used first.
        self._idle: dict[Session, asyncio.TimerHandle] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._waiters: deque[asyncio.Future[Session | None]] = deque()
        self._keeps_idle = True
        self._allowed = options.max_connections
        self._allowed_until = 0.0
        self._down_until = 0.0
        # Who waits for the rate limit, in order.
        self._turns = asyncio.Lock()
        self._in_turn = 0
        self._next_turn = 0.0

    def __repr__(self) -> str:
        return (
            f"<Pool for {self.options.server}: {len(self._in_use)} in use, "
            f"{len(self._idle)} idle, {self._connecting} connecting, "
            f"{len(self._closing)} closing, {len(self._waiters)} waiting>"
        )

    def state(self) -> dict[str, int]:
        """Return how many connections are in use and idle, and how many wait."""
        return {
            "in_use": len(self._in_use) + self._connecting,
            "idle": len(self._idle),
            "waiting": len(self._waiters),
        }

    @property
    def has_session(self) -> bool:
        """Whether the server was reached, and a connection to it is open."""
        return bool(self._in_use or self._idle)

    @property
    def is_unused(self) -> bool:
        """Whether nothing would be lost with it but what it remembers."""
        return not (self.users or self._taken() or self._idle or self._waiters)

    @property
    def is_down(self) -> bool:
        """Whether the server could not be reached in the last minute."""
        return self._loop.time() < self._down_until

    def mark_down(self) -> None:
        """Have the server left alone for a minute, where there is another."""
        self._down_until = self._loop.time() + DOWN_TIME

    async def turn(self) -> None:
        """
        Wait until the rate limit allows one more message.

        :raises RateLimited: that would take longer than the options' timeout.
        """
        rate = self.options.rate_limit
        if rate is None:
            return
        fleet, timeout = self.options.fleet, self.options.timeout
        shared_wait = await fleet.wait_for(timeout) if fleet is not None else None
        if shared_wait is not None:
            if shared_wait > timeout:
                raise self._rate_limited(rate)
            await asyncio.sleep(shared_wait)
            return
        wait = self._next_turn - self._loop.time() + self._in_turn / rate
        if wait > timeout:
            raise self._rate_limited(rate)
        self._in_turn += 1
        try:
            async with self._turns:
                await asyncio.sleep(self._next_turn - self._loop.time())
                self._next_turn = self._loop.time() + 1 / rate
        finally:
            self._in_turn -= 1

    async def acquire(self, *, fresh: bool = False) -> Session:
        """
        Return a session for this caller alone; ``release`` it afterwards.

        :param fresh: connect anew, even where a session is idle.
        :raises PoolTimeout: none came free within the options' timeout.
        :raises SMTPError: connecting failed.
        """
        deadline = self._loop.time() + self.options.timeout
        if fresh:
            self._close_idle("ended by server")
        is_waiting = False
        while True:
            session = self._take()
            if session is None and self._has_room():
                session = await self._connect()
                if session is not None:
                    return session
                # Another may have come free meanwhile; if not, the place in the
                # queue is kept.
                is_waiting = True
                continue
            if session is None:
                session = await self._wait(deadline, in_front=is_waiting)
                is_waiting = True
            if session is not None and await self._is_alive(session):
                return session

    def release(self, session: Session, *, keep: float | None = None) -> None:
        """
        Give a session back. It is kept only where it may be used again.

        :param keep: seconds to keep it idle, instead of the options' idle_timeout.
        """
        self._in_use.discard(session)
        seconds = self.options.idle_timeout if keep is None else keep
        reason = self._why_not_keep(session)
        if reason is None and seconds <= 0 and not self._waiters:
            reason = "idle"
        if reason is None:
            self._make_idle(session, seconds)
        else:
            self._end(session, reason)
        self._serve_waiters()

    def may_go_on(self, session: Session) -> bool:
        """Whether a session in use may take one more message before it is released."""
        return (
            self._keeps_idle
            and not self._waiters
            and self.options.rate_limit is None
            and session.sent + 1 < self.options.max_messages
            and self._loop.time() < session.end_of_life
        )

    def stop_keeping(self) -> None:
        """Close the idle sessions, and from now on every one that is released."""
        self._keeps_idle = False
        self.close_idle()

    def close_idle(self) -> None:
        """Close the sessions that nobody uses."""
        self._close_idle("asked")

    async def closed(self) -> None:
        """Wait for the sessions that are being closed."""
        while self._closing:
            await asyncio.wait(self._closing)

    def _take(self) -> Session | None:
        """Take an idle session into use."""
        while self._idle:
            session, timer = self._idle.popitem()
            timer.cancel()
            session.on_end = _ignore
            reason = self._why_not_keep(session)
            if reason is None:
                self._in_use.add(session)
                self.counts.reused += session.sent > 0
                return session
            self._end(session, reason)
        return None

    async def _is_alive(self, session: Session) -> bool:
        """Ask a session that was idle for long, and end it if it does not answer."""
        if session.idle_seconds < self.options.ping_after:
            return True
        try:
            is_alive = await session.ping()
        except BaseException:
            self.release(session)
            raise
        if not is_alive:
            self._in_use.discard(session)
            self._end(session, "ended by server")
            # The others have been idle for as long: to ask each takes a timeout.
            self._close_idle("ended by server")
        return is_alive

    def _why_not_keep(self, session: Session) -> Reason | None:
        if not session.is_clean:
            return "ended by server" if session.was_ended else "unclean"
        if not self._keeps_idle:
            return "asked"
        if session.sent >= self.options.max_messages:
            return "messages"
        if self._loop.time() >= session.end_of_life:
            return "age"
        return None

    def _has_room(self) -> bool:
        allowed = self.options.max_connections
        if self._loop.time() < self._allowed_until:
            allowed = min(allowed, self._allowed)
        return self._open() + self._connecting < allowed

    async def _connect(self) -> Session | None:
        """Open a session; None where the server allows no more than there are."""
        self._connecting += 1
        # An empty context: the connection outlives the request that opened it.
        opening = self._loop.create_task(
            Session.open(self.options), context=contextvars.Context()
        )
        try:
            session = await opening
        except BaseException as error:
            opening.cancel()
            opening.add_done_callback(_abort_unclaimed)
            self._connecting -= 1
            if isinstance(error, SMTPError):
                if self._is_at_limit(error):
                    self._allowed = max(1, self._open())
                    self._allowed_until = self._loop.time() + LIMIT_MEMORY
                    return None
                self.counts.errors += 1
            self._serve_waiters()
            raise
        self._connecting -= 1
        lifetime = self.options.max_age * (1 - _random.random() * AGE_JITTER)
        session.end_of_life = self._loop.time() + lifetime
        self._in_use.add(session)
        self._allowed = max(self._allowed, len(self._in_use))
        self.counts.opened += 1
        return session

    def _is_at_limit(self, error: SMTPError) -> bool:
        """Whether the server refuses this connection because of the others."""
        if not error.temporary or error.stage not in {"connect", "greeting", "ehlo"}:
            return isinstance(error, ResponseError) and (
                error.smtp_code in {432, 454} and self._open() > 0
            )
        if isinstance(error, ResponseError):
            return self._open() + self._connecting > 0
        return isinstance(error, ConnectError | Disconnected) and self._open() > 0

    async def _wait(self, deadline: float, *, in_front: bool) -> Session | None:
        """Return a session that came free, or None where there may be room now."""
        waiter: asyncio.Future[Session | None] = self._loop.create_future()
        if in_front:
            self._waiters.appendleft(waiter)
        else:
            self._waiters.append(waiter)
        try:
            async with asyncio.timeout_at(deadline):
                session = await waiter
        except BaseException as error:
            self._give_up(waiter)
            if isinstance(error, TimeoutError):
                raise self._timeout(
                    PoolTimeout, f"all {self._taken()} are in use"
                ) from None
            raise
        if session is None:
            self._connecting -= 1
        return session

    def _give_up(self, waiter: asyncio.Future[Session | None]) -> None:
        if waiter.done() and not waiter.cancelled():
            # It was served in the same moment.
            if session := waiter.result():
                self.release(session)
                return
            self._connecting -= 1
            self._serve_waiters()
        else:
            with suppress(ValueError):
                self._waiters.remove(waiter)

    def _serve_waiters(self) -> None:
        while self._waiters:
            if self._waiters[0].done():
                self._waiters.popleft()
                continue
            session = self._take()
            if session is None:
                if not self._has_room():
                    return
                # Room to connect; it counts as taken until the waiter runs.
                self._connecting += 1
            self._waiters.popleft().set_result(session)

    def _make_idle(self, session: Session, seconds: float) -> None:
        session.is_used = True
        session.on_end = lambda: self._close(session, "ended by server")
        self._idle[session] = self._loop.call_later(
            seconds, self._close, session, "idle", context=contextvars.Context()
        )

    def _close(self, session: Session, reason: Reason) -> None:
        """End an idle session."""
        timer = self._idle.pop(session, None)
        if timer is not None:
            timer.cancel()
            self._end(session, reason)
            self._serve_waiters()

    def _close_idle(self, reason: Reason) -> None:
        for session in list(self._idle):
            self._idle.pop(session).cancel()
            self._end(session, reason)

    def _end(self, session: Session, reason: Reason) -> None:
        """Close a session that is in nobody's hands any more."""
        session.on_end = _ignore
        self.counts.closed[reason] += 1
        if not session.is_clean:
            session.abort()
            return
        closing = self._loop.create_task(session.quit(), context=contextvars.Context())
        self._closing.add(closing)
        closing.add_done_callback(self._closed_one)

    def _closed_one(self, closing: asyncio.Task[None]) -> None:
        self._closing.discard(closing)
        self._serve_waiters()

    def _open(self) -> int:
        """Return how many connections the server may count."""
        return len(self._in_use) + len(self._idle) + len(self._closing)

    def _taken(self) -> int:
        return len(self._in_use) + self._connecting + len(self._closing)

    def _rate_limited(self, rate: float) -> PoolTimeout:
        return self._timeout(RateLimited, f"rate_limit lets {rate:g} a second")

    def _timeout(self, kind: type[PoolTimeout], why: str) -> PoolTimeout:
        server, timeout = self.options.server, self.options.timeout
        error = kind(
            f"no connection to {server} came free within {timeout:g} s: {why}",
            stage="connect",
            server=server,
            temporary=True,
        )
        explained(error, self.options)
        return error


def _abort_unclaimed(opening: asyncio.Task[Session]) -> None:
    """End a session that was ready in the moment when its caller gave up."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().abort()


def _ignore() -> None:
    """Stand in for ``Session.on_end`` while somebody else watches the session."""
