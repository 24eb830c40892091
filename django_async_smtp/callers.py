"""
Who waits for work on the SMTP loop: threads, and coroutines of other loops.

Work is ``async def work(in_caller, *args)``. While its caller waits, it can have
functions run there, where user code belongs (``InCaller``).
"""

from __future__ import annotations

import asyncio
import contextvars
import sys
import warnings
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeVar
from weakref import WeakKeyDictionary

from asgiref.sync import sync_to_async

from .logs import is_within_a_log_handler, quiet

if TYPE_CHECKING:
    from types import FrameType, TracebackType

T = TypeVar("T")
R = TypeVar("R")

# How many calls of a loop begin at a time, and the seconds after which as many more do.
AT_A_TIME: Final = 10
PATIENCE: Final = 0.01


class InCaller(Protocol):
    """Runs a function in the thread and the context of the caller; awaitable."""

    def __call__(
        self, function: Callable[..., R], *args: Any
    ) -> Coroutine[Any, Any, R]:
        """Return what the function returns, or raise what it raises."""


Work = Callable[..., Coroutine[Any, Any, T]]


class CallerStopped(Exception):
    """User code raised what no task can: KeyboardInterrupt, SystemExit and such."""

    def __init__(self, reason: BaseException) -> None:
        super().__init__(reason)
        self.reason = reason


class Caller(ABC, Generic[T]):
    """One call of some work."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[T] | None = None
        self._is_cancelled = False

    def start(self, loop: asyncio.AbstractEventLoop, work: Work[T], *args: Any) -> None:
        """Have the work started on a loop, from any thread."""
        self._loop = loop
        loop.call_soon_threadsafe(self._start, work, args)

    def cancel(self) -> None:
        """Cancel the work, started or not."""
        self._is_cancelled = True
        if self._loop is not None:
            # RuntimeError: the loop has ended, and with it the task.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._cancel_task)

    @abstractmethod
    async def in_caller(self, function: Callable[..., R], *args: Any) -> R:
        """Run a function in the caller's thread; to be awaited by the work."""

    @abstractmethod
    def _done(self, task: asyncio.Task[T]) -> None:
        """Tell the caller that the work is done."""

    def _start(self, work: Work[T], args: tuple[Any, ...]) -> None:
        if not self._is_cancelled:
            # In an empty context: what is started would keep the caller's for long.
            self._task = asyncio.get_running_loop().create_task(
                work(self.in_caller, *args), context=contextvars.Context()
            )
            self._task.add_done_callback(_retrieve)
            self._task.add_done_callback(self._done)

    def _cancel_task(self) -> None:
        if self._task is not None:
            self._task.cancel()


class ThreadCaller(Caller[T]):
    """
    A thread that waits for its work, and meanwhile runs what that asks for.

    Not asgiref's ``async_to_sync``: that takes a context, a task and an executor for
    each function, ten times the CPU. Nor a ``Future``: an exception of a signal handler
    in its lock would leave it taken, and the loop waiting for it.
    """

    def __init__(self) -> None:
        super().__init__()
        # Functions to run, and in the end the task of the work.
        self._requests: SimpleQueue[Callable[[], None] | asyncio.Task[T]]
        self._requests = SimpleQueue()

    def result(self, loop: asyncio.AbstractEventLoop, work: Work[T], *args: Any) -> T:
        """Start the work, run what it asks for until it is done; return its result."""
        self.start(loop, work, *args)
        while not isinstance(request := self._requests.get(), asyncio.Task):
            request()
        return request.result()

    async def in_caller(self, function: Callable[..., R], *args: Any) -> R:
        outcome: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._requests.put(partial(self._answer, outcome, function, args))
        return await outcome

    def _done(self, task: asyncio.Task[T]) -> None:
        self._requests.put(task)

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
        outcome.get_loop().call_soon_threadsafe(settle)


class CoroutineCaller(Caller[T]):
    """
    A coroutine that awaits its work, on a loop of its own.

    The work may be started from another thread than the coroutine's. To be used with
    ``async with``: what is not done at its end is cancelled.
    """

    def __init__(self) -> None:
        super().__init__()
        self._callers_loop = asyncio.get_running_loop()
        # asgiref's idea of the thread, and the variables that user code sees.
        self._context = self._users_context = contextvars.copy_context()
        self._outcome: asyncio.Future[T] = self._callers_loop.create_future()
        self._running: asyncio.Task[Any] | None = None

    async def __aenter__(self) -> CoroutineCaller[T]:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._outcome.done() and not self._outcome.cancelled():
            # Nobody may have looked at it.
            self._outcome.exception()
        else:
            self.cancel()
            if self._running is not None:
                self._running.cancel()

    def start(self, loop: asyncio.AbstractEventLoop, work: Work[T], *args: Any) -> None:
        # With what user code has set by now, such as the language.
        self._users_context = contextvars.copy_context()
        super().start(loop, work, *args)

    async def result(self) -> T:
        """Return the result of the work, which was started."""
        try:
            return await self._outcome
        except CallerStopped as stopped:
            raise stopped.reason from None

    async def in_caller(self, function: Callable[..., R], *args: Any) -> R:
        answer: Future[Future[R]] = Future()
        run = partial(_capturing, self._users_context.run, function, *args)
        # From the caller's own loop, because asgiref picks the thread there.
        self._callers_loop.call_soon_threadsafe(
            self._run, run, answer, context=self._context.copy()
        )
        try:
            outcome = await asyncio.wrap_future(answer)
        except asyncio.CancelledError as cancelled:
            if _is_being_cancelled():
                raise
            # Somebody on the caller's loop did that: what the function took is lost.
            raise CallerStopped(cancelled) from None
        return _released(outcome)

    def _run(
        self,
        run: Callable[[], Coroutine[Any, Any, Future[R]]],
        answer: Future[Future[R]],
    ) -> None:
        # A loop that is about to end would leave a new task pending.
        if self._is_cancelled:
            answer.cancel()
            return
        self._running = self._callers_loop.create_task(run())
        self._running.add_done_callback(partial(_give, answer))
        answer.add_done_callback(self._cancel_running)

    def _cancel_running(self, answer: Future[Any]) -> None:
        if answer.cancelled() and self._running is not None:
            # RuntimeError: the caller's loop has ended, and with it the task.
            with suppress(RuntimeError):
                self._callers_loop.call_soon_threadsafe(self._running.cancel)

    def _done(self, task: asyncio.Task[T]) -> None:
        # RuntimeError: the caller's loop has ended.
        with suppress(RuntimeError):
            self._callers_loop.call_soon_threadsafe(self._settle, task)

    def _settle(self, task: asyncio.Task[T]) -> None:
        if self._is_cancelled or self._outcome.done():
            return
        if task.cancelled():
            self._outcome.cancel()
        elif error := task.exception():
            self._outcome.set_exception(error)
        else:
            self._outcome.set_result(task.result())


def _retrieve(task: asyncio.Task[Any]) -> None:
    """Take note of an outcome that nobody may wait for any more."""
    if not task.cancelled():
        task.exception()


def _give(answer: Future[R], task: asyncio.Task[R]) -> None:
    """Hand a task's outcome over, to whoever still waits for it."""
    if task.cancelled():
        answer.cancel()
    elif error := task.exception():
        if answer.set_running_or_notify_cancel():
            answer.set_exception(error)
    elif answer.set_running_or_notify_cancel():
        answer.set_result(task.result())


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


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _is_unfit_for_tasks(error: BaseException) -> bool:
    return isinstance(error, StopIteration) or not isinstance(error, Exception)


class _Turns:
    """Lets a few calls of a loop begin at a time, and others where those take long."""

    def __init__(self) -> None:
        self._left = AT_A_TIME
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    async def take(self) -> None:
        if self._left > 0:
            self._left -= 1
            return
        loop = asyncio.get_running_loop()
        waiter = loop.create_future()
        self._waiting.append(waiter)
        self._look_again(loop)
        try:
            await waiter
        except BaseException:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
                self._rest()
            elif not waiter.cancelled():
                self.give_back()
            raise

    def give_back(self) -> None:
        self._left += 1
        self._serve(self._left)

    def _serve(self, number: int) -> None:
        while self._waiting and number > 0:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                self._left -= 1
                number -= 1
        self._rest()

    def _rest(self) -> None:
        """Let go of the loop where nobody waits."""
        if self._timer is not None and not self._waiting:
            self._timer.cancel()
            self._timer = None

    def _look_again(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._timer is None:
            self._timer = loop.call_later(
                PATIENCE, self._give_more, loop, context=contextvars.Context()
            )

    def _give_more(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        self._serve(AT_A_TIME)
        if self._waiting:
            self._look_again(loop)


_turns: WeakKeyDictionary[asyncio.AbstractEventLoop, _Turns] = WeakKeyDictionary()


@asynccontextmanager
async def turn() -> AsyncIterator[None]:
    """
    Begin a call when it is its turn on this loop.

    A loop that is told of hundreds of functions that ended in a thread stands still
    meanwhile. What begins may wait for what is behind it: that begins all the same.
    """
    loop = asyncio.get_running_loop()
    turns = _turns.get(loop)
    if turns is None:
        turns = _turns[loop] = _Turns()
    await turns.take()
    try:
        yield
    finally:
        turns.give_back()


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


def warn_of_blocking() -> None:
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
