"""
The SMTP loop: one event loop in one daemon thread, on which every session lives.

Callers of every kind share it: ``call`` blocks a thread until the work is done,
``acall`` awaits it from a coroutine on any other loop. Either way the work can run
functions in the thread of the caller (``InCaller``), where user code belongs.
"""

from __future__ import annotations

import asyncio
import atexit
import contextvars
import os
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeVar

from aiosmtplib import SMTPServerDisconnected
from asgiref.sync import sync_to_async

from .logs import is_within_a_log_handler, quiet
from .pool import Counts, Pool

if TYPE_CHECKING:
    from types import FrameType

    from .options import Options, Route

T = TypeVar("T")
R = TypeVar("R")

# Seconds that all idle sessions together get for their QUIT when the process ends.
EXIT_TIMEOUT: Final = 1.5
# Seconds for the thread to come up, before it is taken for one that never will.
START_TIMEOUT: Final = 10.0

# How many are kept before those that nobody uses are dropped: settings that change
# with every message would fill the memory otherwise.
MAX_POOLS: Final = 100


class InCaller(Protocol):
    """Runs a function in the thread and the context of the caller; awaitable."""

    def __call__(
        self, function: Callable[..., R], *args: Any
    ) -> Coroutine[Any, Any, R]:
        """Return what the function returns, or raise what it raises."""


Work = Callable[..., Coroutine[Any, Any, T]]


class SMTPLoop:
    """
    A running loop, its thread, and the pools on it.

    :ivar pools: to be touched on the loop only.
    :ivar counts: what happened with each server, by ``"host:port"``.
    """

    def __init__(self) -> None:
        self.pools: dict[Options, Pool] = {}
        self.counts: dict[str, Counts] = {}
        self._posted: deque[Callable[[], None]] = deque()
        self._is_waking = False
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
        caller: _Caller[T] = _Caller(self.loop)
        try:
            if is_in_running_loop():
                _warn_of_blocking()
            return as_in_a_plain_thread(caller.result, work, args)
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
        callers_loop = asyncio.get_running_loop()
        context = contextvars.copy_context()

        async def in_caller(function: Callable[..., R], *args: Any) -> R:
            # From the caller's own loop, because asgiref picks the thread there.
            future = context.copy().run(
                asyncio.run_coroutine_threadsafe,
                _capturing(function, *args),
                callers_loop,
            )
            outcome: Future[R] = await asyncio.wrap_future(future)
            return _released(outcome)

        try:
            return await asyncio.wrap_future(self.submit(work, in_caller, args))
        except CallerStopped as stopped:
            raise stopped.reason from None

    def submit(
        self, work: Work[T], in_caller: InCaller, args: tuple[Any, ...]
    ) -> Future[T]:
        """
        Start ``work(in_caller, *args)`` on the loop, from any thread.

        Cancelling what this returns cancels the work, started or not.
        """
        future: Future[T] = Future()

        def start() -> None:
            if future.cancelled():
                return
            # In an empty context: what is started would keep the caller's for long.
            task = self.loop.create_task(
                work(in_caller, *args), context=contextvars.Context()
            )
            task.add_done_callback(partial(_pass_on, future))
            future.add_done_callback(partial(self._pass_cancellation, task))

        try:
            self._soon(start)
        except BaseException:
            # Nobody will wait for it.
            future.cancel()
            raise
        return future

    def _soon(self, callback: Callable[[], None]) -> None:
        """
        Have something called on the loop, from any thread.

        The loop is woken once for all that comes until it runs: each time is a write
        to a socket, in which the caller's own loop could lose the GIL to a busy thread.
        """
        self._posted.append(callback)
        if not self._is_waking:
            try:
                self._is_waking = True
                self.loop.call_soon_threadsafe(self._call_posted)
            except BaseException:
                self._is_waking = False
                raise

    def _call_posted(self) -> None:
        # Before they are taken: what is posted from now on wakes the loop again.
        self._is_waking = False
        while self._posted:
            self._posted.popleft()()

    def _pass_cancellation(self, task: asyncio.Task[T], future: Future[T]) -> None:
        if future.cancelled():
            # RuntimeError: the loop has ended, and with it the task.
            with suppress(RuntimeError):
                self.loop.call_soon_threadsafe(task.cancel)

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


class _Caller(Generic[T]):
    """
    A thread that waits for its work on the loop, and meanwhile runs what that asks for.

    Not asgiref's ``async_to_sync``: that takes a context, a task and an executor for
    each function, ten times the CPU. Nor a ``Future``: an exception of a signal handler
    in its lock would leave it taken, and the loop waiting for it.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        # Functions to run, and in the end the task of the work.
        self._requests: SimpleQueue[Callable[[], None] | asyncio.Task[T]]
        self._requests = SimpleQueue()
        self._task: asyncio.Task[T] | None = None
        self._is_cancelled = False

    def result(self, work: Work[T], args: tuple[Any, ...]) -> T:
        """Run functions, in this thread, until the work is done; return its result."""
        self._loop.call_soon_threadsafe(self._start, work, args)
        while not isinstance(request := self._requests.get(), asyncio.Task):
            request()
        return request.result()

    def cancel(self) -> None:
        """Cancel the work, started or not."""
        self._is_cancelled = True
        # RuntimeError: the loop has ended, and with it the task.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._cancel_task)

    def _start(self, work: Work[T], args: tuple[Any, ...]) -> None:
        if not self._is_cancelled:
            # In an empty context: what is started would keep the caller's for long.
            self._task = self._loop.create_task(
                work(self.run, *args), context=contextvars.Context()
            )
            self._task.add_done_callback(self._requests.put)
            self._task.add_done_callback(_retrieve)

    def _cancel_task(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def run(self, function: Callable[..., R], *args: Any) -> R:
        """Run a function in the caller's thread; to be awaited on the loop."""
        outcome: asyncio.Future[R] = self._loop.create_future()
        self._requests.put(partial(self._answer, outcome, function, args))
        return await outcome

    def _answer(
        self,
        outcome: asyncio.Future[R],
        function: Callable[..., R],
        args: tuple[Any, ...],
    ) -> None:
        if outcome.cancelled():
            return
        try:
            settle = partial(_set_result, outcome, function(*args))
        except BaseException as error:
            # KeyboardInterrupt or SystemExit in a task would end the loop, and with it
            # everybody's mail.
            raised = CallerStopped(error) if _is_unfit_for_tasks(error) else error
            settle = partial(_set_exception, outcome, raised)
        self._loop.call_soon_threadsafe(settle)


def _pass_on(future: Future[T], task: asyncio.Task[T]) -> None:
    """Settle a future as a task has ended, unless it was cancelled meanwhile."""
    error = None if task.cancelled() else task.exception()
    with suppress(InvalidStateError):
        if task.cancelled():
            future.cancel()
        elif error is not None:
            future.set_exception(error)
        else:
            future.set_result(task.result())


def _retrieve(task: asyncio.Task[Any]) -> None:
    """Take note of an outcome that nobody may wait for any more."""
    if not task.cancelled():
        task.exception()


def _set_result(outcome: asyncio.Future[R], result: R) -> None:
    if not outcome.done():
        outcome.set_result(result)


def _set_exception(outcome: asyncio.Future[Any], error: BaseException) -> None:
    if not outcome.done():
        outcome.set_exception(error)


async def _capturing(function: Callable[..., T], *args: Any) -> Future[T]:
    """
    Run the function in the caller's thread; return its outcome, done.

    A KeyboardInterrupt or SystemExit must not be raised within a task: asyncio would
    end the loop, and with it everybody's mail.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(function(*args))
        except BaseException as error:
            outcome.set_exception(error)

    await sync_to_async(run)()
    return outcome


def _released(outcome: Future[T]) -> T:
    error = outcome.exception()
    if error is not None and _is_unfit_for_tasks(error):
        raise CallerStopped(error)
    return outcome.result()


def _is_unfit_for_tasks(error: BaseException) -> bool:
    return isinstance(error, StopIteration) or not isinstance(error, Exception)


class CallerStopped(Exception):
    """User code raised what no task can: KeyboardInterrupt, SystemExit and such."""

    def __init__(self, reason: BaseException) -> None:
        super().__init__(reason)
        self.reason = reason


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


def as_in_a_plain_thread(function: Callable[..., T], *args: Any) -> T:
    """
    Call a function that runs user code, where no event loop runs.

    Where one runs in this thread, it is called in another, in this one's context: the
    ORM and asgiref refuse to work beside a running loop.
    """
    if not is_in_running_loop():
        return function(*args)
    context = contextvars.copy_context()
    context.run(quiet.set, quiet.get() or is_within_a_log_handler())
    executor = ThreadPoolExecutor(1, thread_name_prefix="django-async-smtp-caller")
    try:
        return executor.submit(context.run, function, *args).result()
    finally:
        executor.shutdown(wait=False)


def is_in_running_loop() -> bool:
    """Whether this thread runs an event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _warn_of_blocking() -> None:
    """Warn at the line of the project that sends synchronously in a coroutine."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _is_of_library(frame):
        level, frame = level + 1, frame.f_back
    warnings.warn(
        "Sending mail synchronously blocks this event loop until the server has "
        "answered. Use `await asend_mail(...)` or `await backend.asend_messages(...)`.",
        RuntimeWarning,
        stacklevel=level,
    )


def _is_of_library(frame: FrameType) -> bool:
    package = str(frame.f_globals.get("__name__")).partition(".")[0]
    return package in {"django_async_smtp", "django", "asgiref"}


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
