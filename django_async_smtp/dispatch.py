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

# How many messages wait, built, for each worker at most. With the second, the first can
# begin with the end of the one that is sent, and this with the end of it.
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

    def take(self, done: Sequence[Done], count: int) -> list[Item]:
        """Say what became of some; return the next, up to a count; none at the end."""

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
    work = _Work(in_caller, source, route, pools, taken)
    taken.clear()
    await work.run()
    return Outcome(work.untold, work.ready, work.ended_by, work.broken)


class _Work:
    """
    One call's workers, the first one and helpers that come for a backlog, and what is
    built for them.

    :ivar ready: built, for whichever worker comes first.
    :ivar untold: what became of messages, to be told in the caller's thread.
    :ivar at_work: how many workers will look there again.
    """

    def __init__(
        self,
        in_caller: InCaller,
        source: Source,
        route: Route,
        pools: list[Pool],
        taken: Sequence[Item],
    ) -> None:
        self.source = source
        self.ended_by: errors.SMTPError | None = None
        self.broken: Exception | None = None
        self.ready: deque[Item] = deque()
        self.untold: list[Done] = []
        self.at_work = 0
        self._in_caller = in_caller
        self._route = route
        self._pools = pools
        self._tasks: set[asyncio.Task[Any]] = set()
        # One at a time: user code is not entered again while it sends itself.
        self._is_building = False
        self._has_more = True
        # Workers that wait for messages to be built.
        self._waiting: deque[asyncio.Future[None]] = deque()
        # Helpers that wait for a session, and hold no message.
        self._idle_helpers: set[asyncio.Task[None]] = set()
        if taken:
            self._put(taken)

    async def run(self) -> None:
        try:
            while True:
                self._start(self._work(Courier(self._route, self._pools)))
                while self._tasks:
                    await asyncio.wait(self._tasks)
                if not self.ready or self.is_over:
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

    async def take(self) -> Item | None:
        """Return the next message, built; None at the end."""
        self.build_ahead()
        while not self.ready and self._is_building:
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            await waiter
        return self.take_now()

    def take_now(self) -> Item | None:
        """Return the next message if it is built by now."""
        item = self.ready.popleft() if self.ready else None
        self.build_ahead()
        return item

    def put_back(self, item: Item) -> None:
        """Leave a message that was taken to the others."""
        self.ready.appendleft(item)
        self._wake(1)

    def build_ahead(self) -> None:
        """Have messages built in the caller's thread while others are sent."""
        workers = max(1, self.at_work)
        wanted = AHEAD * workers - len(self.ready)
        # Several at a time: each hand-over between the threads costs as much as
        # building one does.
        if wanted >= workers:
            self._build_more(wanted)

    def get_help(self) -> None:
        """Have further workers come, as many as the options allow."""
        first = self._route.servers[0]
        workers = first.max_connections
        if first.rate_limit is not None:
            # No more than the limit keeps busy: they would wait for each other.
            workers = min(workers, int(first.rate_limit * first.timeout / 2))
        for _ in range(workers - 1):
            self._idle_helpers.add(self._start(self._help()))

    @property
    def is_over(self) -> bool:
        """Whether no more may be sent, built or not."""
        return self.ended_by is not None or self._is_stopped

    @property
    def _is_stopped(self) -> bool:
        """Whether no more user code may run."""
        return isinstance(self.broken, CallerStopped)

    def _start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _build_more(self, count: int) -> None:
        is_open = self._has_more and self.broken is None and not self.is_over
        if count > 0 and is_open and not self._is_building:
            self._is_building = True
            self._start(self._build(count))

    async def _build(self, count: int) -> None:
        # Told but once, even where that raises.
        told, self.untold = self.untold, []
        items = None
        try:
            items = await self._in_caller(self.source.take, told, count)
        except BaseException as broken:
            _note(told)
            if not isinstance(broken, Exception):
                raise
            self.broken = self.broken or broken
            if isinstance(broken, CallerStopped):
                self._cancel_others()
            return
        finally:
            self._is_building = False
            if items is None:
                self._wake(len(self._waiting))
        self._put(items)
        # Whoever waits has the first ones before the others are there.
        self._build_more(count - len(items))
        self.build_ahead()
        self._wake(len(items) if self._is_building else len(self._waiting))

    def _put(self, items: Sequence[Item]) -> None:
        self._has_more = bool(items) and not items[-1].is_last
        self.ready.extend(items)

    def _wake(self, count: int) -> None:
        while self._waiting and count > 0:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                count -= 1

    async def _work(self, courier: Courier) -> None:
        self.at_work += 1
        worker = _Worker(self, courier)
        try:
            await worker.run()
        except Exception as broken:
            self.broken = self.broken or broken
        finally:
            self.at_work -= 1
            worker.leave_rest()
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

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()


class _Worker:
    """Sends one message after the other."""

    def __init__(self, work: _Work, courier: Courier) -> None:
        self._work = work
        self._courier = courier
        self._next: Item | None = None

    async def run(self) -> None:
        """Send until nothing is left, or nothing can be sent."""
        work, courier = self._work, self._courier
        item = await work.take()
        while item is not None and not work.is_over:
            if item.has_backlog:
                work.get_help()
            try:
                delivery = await courier.deliver(item.envelope, self._upcoming)
            except asyncio.CancelledError:
                if courier.broken_off is not None:
                    work.untold.append((item, courier.broken_off))
                raise
            work.untold.append((item, delivery))
            error = delivery.error
            if courier.is_cut_off(error):
                work.ended_by = work.ended_by or error
            if is_before_mail(error) and work.at_work > 1:
                # The others have connections, and go on.
                return
            item, self._next = self._next or await work.take(), None
        self._next = item

    def leave_rest(self) -> None:
        """Leave what it took and did not send to the others."""
        if self._next is not None:
            self._work.put_back(self._next)

    def _upcoming(self) -> Envelope | None:
        """Return the next message, if it is built by now."""
        self._next = self._next or self._work.take_now()
        envelope = self._next.envelope if self._next is not None else None
        return envelope if isinstance(envelope, Envelope) else None


def _note(done: list[Done]) -> None:
    """Leave with the messages what cannot be told in the caller's thread."""
    for item, delivery in done:
        item.message.delivery = delivery  # type: ignore[attr-defined]
