"""
The SMTP loop: one event loop in one daemon thread, on which every session lives.

Callers of every kind share it: ``call`` blocks a thread until the work is done,
``acall`` awaits it from a coroutine on any other loop.
"""

from __future__ import annotations

import asyncio
import atexit
import contextvars
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, TypeVar

from aiosmtplib import SMTPServerDisconnected

from .callers import (
    CallerStopped,
    CoroutineCaller,
    ThreadCaller,
    as_in_a_plain_thread,
    is_in_running_loop,
    warn_of_blocking,
)
from .pool import Counts, Pool

if TYPE_CHECKING:
    from .callers import InCaller, Work
    from .options import Options, Route

T = TypeVar("T")

# Seconds that all idle sessions together get for their QUIT when the process ends.
EXIT_TIMEOUT: Final = 1.5
# Seconds for the thread to come up, before it is taken for one that never will.
START_TIMEOUT: Final = 10.0

# How many are kept before those that nobody uses are dropped: settings that change
# with every message would fill the memory otherwise.
MAX_POOLS: Final = 100


class SMTPLoop:
    """
    A running loop, its thread, and the pools on it.

    :ivar pools: to be touched on the loop only.
    :ivar counts: what happened with each server, by ``"host:port"``.
    """

    def __init__(self) -> None:
        self.pools: dict[Options, Pool] = {}
        self.counts: dict[str, Counts] = {}
        self.loop = asyncio.SelectorEventLoop()
        self.thread = threading.Thread(
            target=self._run, name="django-async-smtp", daemon=True
        )
        self.loop.set_exception_handler(_report)
        started = threading.Event()
        self.loop.call_soon(started.set)
        try:
            self.thread.start()
        except RuntimeError:
            self.loop.close()
            raise
        if not started.wait(START_TIMEOUT):
            self.loop.close()
            raise RuntimeError(
                "The SMTP thread does not run. Under uWSGI, set enable-threads."
            )

    @contextmanager
    def pools_for(self, route: Route) -> Iterator[list[Pool]]:
        """Provide the pools of the route's servers; to be used on the loop."""
        pools = [self._pool(options) for options in route.servers]
        for pool in pools:
            pool.users += 1
        try:
            yield pools
        finally:
            for pool in pools:
                pool.users -= 1

    def is_warm(self, route: Route) -> bool:
        """Whether a session with one of the servers is there; from any thread."""
        pools = map(self.pools.get, route.servers)
        return any(pool.has_session and not pool.is_down for pool in pools if pool)

    def _pool(self, options: Options) -> Pool:
        pool = self.pools.get(options)
        if pool is None:
            if len(self.pools) >= MAX_POOLS:
                self._drop_unused_pools()
            counts = self.counts.setdefault(options.server, Counts())
            pool = self.pools[options] = Pool(options, counts)
        return pool

    def _drop_unused_pools(self) -> None:
        for options, pool in list(self.pools.items()):
            if pool.is_unused:
                del self.pools[options]

    def call(self, work: Work[T], *args: Any) -> T:
        """
        Run ``work(in_caller, *args)`` on the loop and wait for it.

        A wait that is broken off, as by KeyboardInterrupt, cancels the work.

        :raises RuntimeError: this is the thread of the loop: it would wait for itself.
        """
        if threading.current_thread() is self.thread:
            raise RuntimeError(
                "Mail cannot be sent synchronously from the SMTP thread: "
                "await asend_messages()."
            )
        if is_in_running_loop():
            warn_of_blocking()
        caller: ThreadCaller[T] = ThreadCaller()
        try:
            return as_in_a_plain_thread(caller.result, self.loop, work, *args)
        except CallerStopped as stopped:
            raise stopped.reason from None
        except BaseException:
            caller.cancel()
            raise

    async def acall(self, work: Work[T], *args: Any) -> T:
        """
        Run ``work(in_caller, *args)`` on the loop, and await it on this one.

        A cancelled wait cancels the work.
        """
        async with CoroutineCaller[T]() as caller:
            caller.start(self.loop, work, *args)
            return await caller.result()

    def close(self, timeout: float) -> None:
        """Say QUIT on idle sessions; the others end when they are released."""
        closing = asyncio.run_coroutine_threadsafe(self._close_pools(), self.loop)
        with suppress(TimeoutError):
            closing.result(timeout)

    def close_idle_soon(self, route: Route) -> None:
        """Close what is idle with the route's servers, without waiting for it."""

        def close() -> None:
            with self.pools_for(route) as pools:
                for pool in pools:
                    pool.close_idle()

        self.loop.call_soon_threadsafe(close)

    async def close_idle(self, in_caller: InCaller) -> None:
        """Close what is idle; to be called on the loop."""
        pools = list(self.pools.values())
        for pool in pools:
            pool.close_idle()
        await asyncio.gather(*(pool.closed() for pool in pools))

    async def _close_pools(self) -> None:
        for pool in list(self.pools.values()):
            pool.stop_keeping()
        await asyncio.gather(*(pool.closed() for pool in list(self.pools.values())))

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # aiosmtplib before 5.1.3 leaves the end of a connection that nobody waits for in
    # a future that nobody looks at.
    if not isinstance(context.get("exception"), SMTPServerDisconnected):
        # In a thread of its own: a handler's lock may be held by one that waits for
        # this loop.
        with suppress(RuntimeError):
            threading.Thread(
                target=loop.default_exception_handler, args=(context,), daemon=True
            ).start()


_current: SMTPLoop | None = None
_starting = threading.Lock()
# Never freed: a finalizer would act on sockets that the parent process still uses.
_inherited: list[SMTPLoop | None] = []


def smtp_loop() -> SMTPLoop:
    """Return this process's loop; the first call starts it."""
    global _current
    with _starting:
        if _current is None or not _current.thread.is_alive():
            # In an empty context: the loop would keep the first caller's for good.
            _current = contextvars.Context().run(SMTPLoop)
        return _current


def pool_stats() -> dict[str, dict[str, Any]]:
    """
    Return this process's connections and counts, for each server (``"host:port"``).

    ``in_use``, ``idle`` and ``waiting`` are of this moment; ``opened``, ``reused``,
    ``messages``, ``errors`` and ``closed`` (by reason) since the process began.
    """
    if _current is None:
        return {}
    # The pools first: each has its counts from the start.
    pools = _current.pools.copy()
    stats: dict[str, dict[str, Any]] = {
        server: {
            "in_use": 0,
            "idle": 0,
            "waiting": 0,
            **vars(counts),
            "closed": dict(counts.closed),
        }
        for server, counts in _current.counts.copy().items()
    }
    for options, pool in pools.items():
        for name, value in pool.state().items():
            stats[options.server][name] += value
    return stats


def close_connections() -> None:
    """Close the idle connections of this process, with QUIT, and wait for it."""
    if _current is not None:
        _current.call(_current.close_idle)


def _close_at_exit() -> None:
    if _current is not None and _current.thread.is_alive():
        _current.close(EXIT_TIMEOUT)


def _forget_in_child() -> None:
    global _current, _starting
    _inherited.append(_current)
    _current, _starting = None, threading.Lock()


atexit.register(_close_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
