"""
The sessions with one server: in use, idle, closing.

Every change of state happens in a synchronous function, so none can be half done at
an ``await``. Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

from .errors import PoolTimeout
from .session import Session

if TYPE_CHECKING:
    from .options import Options

# Connections of this process to one server; providers allow few.
MAX_CONNECTIONS: Final = 5
# Seconds that an idle connection stays open.
IDLE_TIMEOUT: Final = 20.0


class Pool:
    """
    Sessions for equal options, at most ``MAX_CONNECTIONS`` at a time.

    :param on_empty: called when the last session is gone, unless the pool is ``held``.
    """

    def __init__(self, options: Options, on_empty: Callable[[], None]) -> None:
        self.options = options
        self._on_empty = on_empty
        self._connecting = 0
        self._in_use: set[Session] = set()
        # Idle sessions and the timers that end them; the last one is used first.
        self._idle: dict[Session, asyncio.TimerHandle] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._waiters: deque[asyncio.Future[Session | None]] = deque()
        self._keeps_idle = True
        self._holders = 0

    def __repr__(self) -> str:
        return (
            f"<Pool for {self.options.server}: {len(self._in_use)} in use, "
            f"{len(self._idle)} idle, {self._connecting} connecting, "
            f"{len(self._waiters)} waiting>"
        )

    @property
    def has_session(self) -> bool:
        """Whether the server was reached, and a connection to it is open."""
        return bool(self._in_use or self._idle)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep it from ``on_empty``: more sessions will be asked for."""
        self._holders += 1
        try:
            yield
        finally:
            self._holders -= 1
            self._check_empty()

    async def acquire(self, *, fresh: bool = False) -> Session:
        """
        Return a session for this caller alone; ``release`` it afterwards.

        :param fresh: connect anew, even where a session is idle.
        :raises PoolTimeout: none came free within the options' timeout.
        :raises SMTPError: connecting failed.
        """
        if fresh:
            self._close(*self._idle)
        session = self._take()
        if session is None and self._has_room():
            return await self._connect()
        return session or await self._wait()

    def release(self, session: Session) -> None:
        """Give a session back. It is kept only where it is clean."""
        self._in_use.discard(session)
        if session.is_clean:
            self._make_idle(session)
        else:
            session.abort()
        self._serve_waiters()
        if not self._keeps_idle:
            self._close(*self._idle)
        self._check_empty()

    def stop_keeping(self) -> None:
        """Close the idle sessions, and from now on every one that is released."""
        self._keeps_idle = False
        self._close(*self._idle)
        self._check_empty()

    async def closed(self) -> None:
        """Wait for the sessions that are being closed."""
        while self._closing:
            await asyncio.wait(self._closing)

    def _take(self) -> Session | None:
        while self._idle:
            session, timer = self._idle.popitem()
            timer.cancel()
            session.on_end = _ignore
            if session.is_clean:
                self._in_use.add(session)
                return session
            session.abort()
        return None

    def _has_room(self) -> bool:
        return len(self._in_use) + self._connecting < MAX_CONNECTIONS

    async def _connect(self) -> Session:
        self._connecting += 1
        # An empty context: the connection outlives the request that opened it.
        opening = asyncio.get_running_loop().create_task(
            Session.open(self.options), context=contextvars.Context()
        )
        try:
            session = await opening
        except BaseException:
            opening.cancel()
            opening.add_done_callback(_abort_unclaimed)
            self._connecting -= 1
            self._serve_waiters()
            self._check_empty()
            raise
        self._connecting -= 1
        self._in_use.add(session)
        return session

    async def _wait(self) -> Session:
        waiter: asyncio.Future[Session | None]
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            async with asyncio.timeout(self.options.timeout):
                session = await waiter
        except BaseException as error:
            self._give_up(waiter)
            if isinstance(error, TimeoutError):
                raise self._timeout_error() from None
            raise
        if session is not None:
            return session
        # The room to connect was handed over.
        self._connecting -= 1
        return await self._connect()

    def _give_up(self, waiter: asyncio.Future[Session | None]) -> None:
        if waiter.done() and not waiter.cancelled():
            # It was served in the same moment.
            if session := waiter.result():
                self.release(session)
            else:
                self._connecting -= 1
                self._serve_waiters()
                self._check_empty()
        else:
            with suppress(ValueError):
                self._waiters.remove(waiter)
            self._check_empty()

    def _serve_waiters(self) -> None:
        while self._waiters:
            if self._waiters[0].done():
                self._waiters.popleft()
                continue
            session = self._take()
            if session is None:
                if not self._has_room():
                    return
                self._connecting += 1
            self._waiters.popleft().set_result(session)

    def _make_idle(self, session: Session) -> None:
        session.was_idle = True
        session.on_end = lambda: self._end_idle(session)
        self._idle[session] = asyncio.get_running_loop().call_later(
            IDLE_TIMEOUT, self._end_idle, session, context=contextvars.Context()
        )

    def _end_idle(self, session: Session) -> None:
        self._close(session)
        self._check_empty()

    def _close(self, *sessions: Session) -> None:
        for session in sessions:
            timer = self._idle.pop(session, None)
            if timer is not None:
                timer.cancel()
                session.on_end = _ignore
                closing = asyncio.get_running_loop().create_task(
                    session.quit(), context=contextvars.Context()
                )
                self._closing.add(closing)
                closing.add_done_callback(self._closing.discard)

    def _check_empty(self) -> None:
        if not (
            self._idle
            or self._in_use
            or self._connecting
            or self._waiters
            or self._holders
        ):
            self._on_empty()

    def _timeout_error(self) -> PoolTimeout:
        server, timeout = self.options.server, self.options.timeout
        return PoolTimeout(
            f"no connection to {server} came free within {timeout:g} s: "
            f"all {MAX_CONNECTIONS} are in use",
            stage="connect",
            server=server,
            temporary=True,
        )


def _abort_unclaimed(opening: asyncio.Task[Session]) -> None:
    """End a session that was ready in the moment when its caller gave up."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().abort()


def _ignore() -> None:
    """Stand in for ``Session.on_end`` while somebody else watches the session."""
