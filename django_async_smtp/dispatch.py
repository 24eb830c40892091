"""The messages of a call over its workers: who takes which, and what is left."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar, cast

from . import errors
from .callers import CallerStopped
from .delivery import Courier, Delivery, is_before_mail
from .envelope import Envelope

if TYPE_CHECKING:
    from django.core.mail import EmailMessage

    from .callers import InCaller
    from .options import Route
    from .pool import Pool

T = TypeVar("T")

# How many messages a worker has built, at most, while it sends another one. With the
# second, the first can begin with the end of that one, and this with the end of it.
AHEAD: Final = 2


@dataclass(frozen=True)
class Item:
    """
    A message's turn.

    :ivar envelope: None where it has no recipients; the error where it could not be
        built.
    :ivar has_backlog: whether many more are waiting behind it.
    :ivar is_last: whether it is known that none is.
    """

    index: int
    message: EmailMessage
    envelope: Envelope | Exception | None
    has_backlog: bool = False
    is_last: bool = False


Done = tuple[Item, Delivery]


class Source(Protocol):
    """Where messages come from; its methods run in the caller's thread."""

    def take(self, done: Sequence[Done]) -> Item | None:
        """Say what became of some, and return the next, or None at the end."""

    def finish(self, done: Sequence[Done]) -> None:
        """Say what became of the last ones."""


@dataclass
class Outcome:
    """
    How a call ended.

    :ivar untold: what became of the last messages; ``Source.finish`` is to be told.
    :ivar left: what was taken and not tried, where it ended early.
    :ivar ended_by: the error that did that.
    :ivar broken: what the source raised; it gives no more.
    """

    untold: Sequence[Done]
    left: Sequence[Item]
    ended_by: errors.SMTPError | None
    broken: Exception | None


async def deliver(
    in_caller: InCaller,
    source: Source,
    route: Route,
    pools: list[Pool],
    taken: list[Item],
) -> Outcome:
    """
    Send the messages of a source, on several sessions where it has a backlog.

    A message that fails does not stop the others. What a fresh connection would meet
    as well does: then the rest is left in the source.

    :param pools: those of the route's servers.
    :param taken: what was taken from the source already; emptied, lest it is kept.
    :raises CallerStopped: user code raised what no task can.
    """
    work = _Work(in_caller, source, route, pools)
    work.left.extend(taken)
    taken.clear()
    await work.run()
    return Outcome(work.untold, work.left, work.ended_by, work.broken)


class _Work:
    """
    One call's workers: the first one, and helpers that come for a backlog.

    :ivar left: taken already, by workers that could not send them.
    :ivar untold: what became of messages, to be told in the caller's thread.
    :ivar at_work: how many workers will look there again.
    """

    def __init__(
        self, in_caller: InCaller, source: Source, route: Route, pools: list[Pool]
    ) -> None:
        self.source = source
        self.ended_by: errors.SMTPError | None = None
        self.broken: Exception | None = None
        self.left: deque[Item] = deque()
        self.untold: list[Done] = []
        self.at_work = 0
        self._in_caller = in_caller
        self._route = route
        self._pools = pools
        self._tasks: set[asyncio.Task[Any]] = set()
        # User code is not entered again while it waits for a send of its own.
        self._callers_turn = asyncio.Lock()
        # Helpers that wait for a session, and hold no message.
        self._idle_helpers: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        try:
            while not self._tasks:
                self.start(self._work(Courier(self._route, self._pools)))
                while self._tasks:
                    await asyncio.wait(self._tasks)
                if not self.left or self.is_over:
                    break
        except BaseException:
            self._cancel_others()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            raise
        finally:
            # The caller may be stopped before it is told.
            _note(self.untold)
        if self._is_stopped:
            raise cast("CallerStopped", self.broken)

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a task that ends with this work."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def take(self, done: list[Done]) -> Item | None:
        """
        Return a message that a worker could not send, or the next of the source.

        :param done: to be told; emptied when it is.
        """
        if self.left:
            return self.left.popleft()
        async with self._callers_turn:
            if self._is_stopped:
                return None
            # Told but once, even where that raises.
            told = done[:]
            done.clear()
            try:
                return await self._in_caller(self.source.take, told)
            except BaseException as broken:
                _note(told)
                if isinstance(broken, Exception):
                    self.broken = self.broken or broken
                raise

    def get_help(self) -> None:
        """Have further workers come, as many as the options allow."""
        first = self._route.servers[0]
        workers = first.max_connections
        if first.rate_limit is not None:
            # No more than the limit keeps busy: they would wait for each other.
            workers = min(workers, int(first.rate_limit * first.timeout / 2))
        for _ in range(workers - 1):
            self._idle_helpers.add(self.start(self._help()))

    async def _work(self, courier: Courier) -> None:
        worker = _Worker(self, courier)
        try:
            await worker.run()
        except Exception as broken:
            self.broken = self.broken or broken
            if isinstance(broken, CallerStopped):
                self._cancel_others()
        finally:
            worker.stop()
            # What is left is in the hands of others.
            for helper in self._idle_helpers:
                helper.cancel()
            courier.finish()

    async def _help(self) -> None:
        task = cast("asyncio.Task[None]", asyncio.current_task())
        courier = Courier(self._route, self._pools)
        try:
            await courier.prepare()
        except errors.SMTPError:
            # The first worker meets the same, and says so.
            return
        finally:
            self._idle_helpers.discard(task)
        await self._work(courier)

    def _cancel_others(self) -> None:
        for task in self._tasks - {asyncio.current_task()}:
            task.cancel()

    @property
    def is_over(self) -> bool:
        """Whether no more may be sent, built or not."""
        return self.ended_by is not None or self._is_stopped

    @property
    def _is_stopped(self) -> bool:
        """Whether no more user code may run."""
        return isinstance(self.broken, CallerStopped)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()


class _Worker:
    """Sends one message while the next ones are built."""

    def __init__(self, work: _Work, courier: Courier) -> None:
        self._work = work
        self._courier = courier
        self._done: list[Done] = []
        self._ahead: deque[asyncio.Task[Item | None]] = deque()

    async def run(self) -> None:
        """Send until nothing is left, or nothing can be sent."""
        work = self._work
        work.at_work += 1
        try:
            await self._send_all()
            await self._leave_rest()
        except CallerStopped:
            raise
        except Exception:
            # Of user code: ``work.broken``. What it gave before is sent.
            await self._leave_rest()
        finally:
            work.at_work -= 1
            work.untold += self._done

    def stop(self) -> None:
        """Break off what is being built."""
        for building in self._ahead:
            building.cancel()

    async def _send_all(self) -> None:
        work, courier = self._work, self._courier
        item = await work.take(self._done)
        while item is not None and not work.is_over:
            if item.has_backlog:
                work.get_help()
            if not item.is_last:
                self._build_ahead()
            delivery = await courier.deliver(item.envelope, self._upcoming)
            self._done.append((item, delivery))
            error = delivery.error
            if courier.is_cut_off(error):
                work.ended_by = work.ended_by or error
            item = await self._next()
            if is_before_mail(error) and work.at_work > 1:
                # The others have connections, and go on.
                break
        if item is not None:
            work.left.append(item)

    def _build_ahead(self) -> None:
        while len(self._ahead) < AHEAD and self._work.broken is None:
            self._ahead.append(self._work.start(self._work.take(self._done)))

    async def _next(self) -> Item | None:
        item = await self._ahead.popleft() if self._ahead else None
        if item is None and self._work.left:
            item = self._work.left.popleft()
        return item

    async def _leave_rest(self) -> None:
        """Leave what was built and not sent to the others."""
        while self._ahead:
            item = await self._ahead.popleft()
            if item is not None:
                self._work.left.append(item)

    def _upcoming(self) -> Envelope | None:
        """Return the next message, if it is built by now."""
        building = self._ahead[0] if self._ahead else None
        if building is None or not building.done() or building.cancelled():
            return None
        item = None if building.exception() else building.result()
        envelope = item.envelope if item is not None else None
        return envelope if isinstance(envelope, Envelope) else None


def _note(done: list[Done]) -> None:
    """Leave with the messages what cannot be told in the caller's thread."""
    for item, delivery in done:
        item.message.delivery = delivery  # type: ignore[attr-defined]
