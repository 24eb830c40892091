"""How many calls of a loop begin at a time, and those that go."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from contextlib import suppress
from typing import Any

import pytest
from asgiref.sync import async_to_sync

from django_async_smtp import asend_mail, callers, pre_send
from django_async_smtp.callers import AT_A_TIME, CoroutineCaller, InCaller, turn
from django_async_smtp.loop import smtp_loop

from .conftest import MakeBackend, subjects
from .servers import MailServer

ADDRESSES = ("Body", "from@example.com", ["to@example.com"])

pytestmark = pytest.mark.asyncio


class Beginnings:
    """Calls that have begun, and end when they may."""

    def __init__(self) -> None:
        self.may_end = asyncio.Event()
        self.at_a_time = self.peak = 0
        self._begun = asyncio.Condition()

    async def begin(self) -> None:
        async with turn():
            self.at_a_time += 1
            self.peak = max(self.peak, self.at_a_time)
            async with self._begun:
                self._begun.notify_all()
            await asyncio.sleep(0)
            await self.may_end.wait()
            self.at_a_time -= 1

    async def reach(self, number: int) -> None:
        """Wait until so many have begun at a time."""
        async with self._begun:
            await self._begun.wait_for(lambda: self.at_a_time >= number)


@pytest.fixture
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no call begin out of turn."""
    monkeypatch.setattr(callers, "PATIENCE", 60)


@pytest.mark.usefixtures("no_patience")
async def test_a_few_calls_begin_at_a_time() -> None:
    beginnings = Beginnings()
    beginnings.may_end.set()
    for _ in range(2):
        await asyncio.gather(*(beginnings.begin() for _ in range(5 * AT_A_TIME)))
    assert beginnings.peak == AT_A_TIME


@pytest.mark.usefixtures("no_patience")
async def test_those_that_wait_begin_in_order() -> None:
    begun: list[int] = []

    async def begin(number: int) -> None:
        async with turn():
            begun.append(number)
            await asyncio.sleep(0)

    await asyncio.gather(*map(begin, range(5 * AT_A_TIME)))
    assert begun == list(range(5 * AT_A_TIME))


@pytest.mark.usefixtures("no_patience")
@pytest.mark.parametrize("is_served", [False, True])
async def test_a_cancelled_wait_leaves_the_turn_to_the_next(is_served: bool) -> None:
    beginnings = Beginnings()
    first = [asyncio.create_task(beginnings.begin()) for _ in range(AT_A_TIME - 1)]
    await asyncio.sleep(0)
    async with turn():
        impatient, last = (asyncio.create_task(beginnings.begin()) for _ in range(2))
        await asyncio.sleep(0)
        if not is_served:
            impatient.cancel()
    # It has the turn now, and has not noticed yet.
    impatient.cancel()
    beginnings.may_end.set()
    async with asyncio.timeout(10):
        await asyncio.gather(*first, last)
    await asyncio.wait([impatient])
    assert impatient.cancelled()
    # No turn was lost, and none came from nowhere.
    beginnings = Beginnings()
    beginnings.may_end.set()
    await asyncio.gather(*(beginnings.begin() for _ in range(5 * AT_A_TIME)))
    assert beginnings.peak == AT_A_TIME


async def test_more_begin_where_those_before_take_long() -> None:
    beginnings = Beginnings()
    count = 3 * AT_A_TIME
    tasks = [asyncio.create_task(beginnings.begin()) for _ in range(count)]
    async with asyncio.timeout(10):
        await beginnings.reach(count)
        beginnings.may_end.set()
        await asyncio.gather(*tasks)


async def test_what_begins_may_wait_for_what_is_behind_it(
    server: MailServer, make_backend: MakeBackend
) -> None:
    """A receiver sends mail by the loop on which many are about to begin."""
    make_backend(server)
    count = 2 * AT_A_TIME

    def report(message: Any, **kwargs: Any) -> None:
        if message.subject != "A report":
            async_to_sync(asend_mail)("A report", *ADDRESSES)

    pre_send.connect(report)
    try:
        async with asyncio.timeout(30):
            mails = (asend_mail(f"{n}", *ADDRESSES) for n in range(count))
            assert sum(await asyncio.gather(*mails)) == count
    finally:
        pre_send.disconnect(report)
    expected = [*(str(n) for n in range(count)), *["A report"] * count]
    assert sorted(subjects(server)) == sorted(expected)


@pytest.mark.parametrize("count", [1, 2 * AT_A_TIME])
@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_a_loop_that_has_ended_is_not_kept(
    count: int, is_cancelled: bool
) -> None:
    async def begin() -> weakref.ref[asyncio.AbstractEventLoop]:
        beginnings = Beginnings()
        begun = [asyncio.create_task(beginnings.begin()) for _ in range(count)]
        await asyncio.sleep(0)
        if not is_cancelled:
            beginnings.may_end.set()
            await asyncio.gather(*begun)
        return weakref.ref(asyncio.get_running_loop())

    ended = await asyncio.to_thread(asyncio.run, begin())
    gc.collect()
    assert ended() is None


async def test_nothing_runs_for_a_caller_that_has_gone() -> None:
    """A loop that ends now would complain of a task that is still to run."""
    ran: list[str] = []
    ended = threading.Event()

    async def work(in_caller: InCaller) -> None:
        try:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(30)
            await in_caller(ran.append, "late")
        finally:
            ended.set()

    async with CoroutineCaller[None]() as caller:
        caller.start(smtp_loop().loop, work)
        await asyncio.wrap_future(
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), smtp_loop().loop)
        )
    assert await asyncio.to_thread(ended.wait, 10)
    assert ran == []
