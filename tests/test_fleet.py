"""The rate limit that processes share."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from django.core.cache import caches
from django.core.exceptions import ImproperlyConfigured
from django.core.mail import EmailMessage

from django_async_smtp import fleet
from django_async_smtp.errors import RateLimited
from django_async_smtp.fleet import FleetLimit

from .caches import FaultyCache
from .conftest import MakeBackend, emails
from .servers import MailServer, wait_until

FAULTY = f"{FaultyCache.__module__}.FaultyCache"


class Clock:
    """A clock that stands still."""

    def __init__(self, now: float) -> None:
        self.now = now

    def time(self) -> float:
        return self.now

    def monotonic(self) -> float:
        return time.monotonic()


@pytest.fixture(autouse=True)
def _cache(settings: Any) -> Iterator[None]:
    """A cache for this test alone."""
    name = f"fleet-{time.monotonic_ns()}"
    settings.CACHES = {"default": {"BACKEND": FAULTY, "LOCATION": name}}
    yield
    FaultyCache.is_up = True
    FaultyCache.answers.set()
    FaultyCache.dead.clear()
    # Their threads' caches are those of this test's settings.
    fleet._askers.clear()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock for the limits, at the beginning of a window of any whole length."""
    clock = Clock(1_800_000_000.0)
    monkeypatch.setattr(fleet, "time", clock)
    return clock


def limits(number: int, rate: float, server: str = "a:25") -> list[FleetLimit]:
    """Return limits as processes have them."""
    return [FleetLimit("default", server, rate) for _ in range(number)]


def taken(processes: list[FleetLimit], number: int, timeout: float = 60) -> list[float]:
    """Return for how long messages wait that the processes send in turn."""
    return [
        processes[n % len(processes)]._take(timeout)  # In a thread, otherwise.
        for n in range(number)
    ]


@pytest.mark.parametrize("rate", [0.25, 1, 2.5, 10, 33.3])
def test_the_slots_of_all_processes_are_even(clock: Clock, rate: float) -> None:
    waits = taken(limits(3, rate), 12)
    # The first has what is left of a slot that has begun.
    assert waits[0] == 0
    assert 0 <= waits[1] <= 1 / rate + 1e-6
    for earlier, later in pairwise(waits[1:]):
        assert later - earlier == pytest.approx(1 / rate, rel=1e-3)


def test_slots_that_have_passed_are_left(clock: Clock) -> None:
    processes = limits(2, 10)
    assert taken(processes, 2) == pytest.approx([0, 0.1])
    clock.now += 0.75
    waits = taken(processes, 4)
    # The one that has begun, and the first of the next window.
    assert waits == pytest.approx([0, 0.05, 0.15, 0.25], abs=1e-6)


def test_after_a_pause_there_is_no_burst(clock: Clock) -> None:
    processes = limits(3, 100)
    taken(processes, 1)
    clock.now += 10.95
    waits = taken(processes, 30)
    assert [wait < 0.011 for wait in waits].count(True) <= 2


def test_servers_and_rates_are_apart(clock: Clock) -> None:
    assert taken(limits(1, 1, "a:25"), 1) == [0]
    assert taken(limits(1, 1, "b:25"), 1) == [0]
    assert taken(limits(1, 2, "a:25"), 1) == [0]
    assert taken(limits(1, 1, "a:25"), 1) == [1]


def test_no_slot_is_taken_beyond_the_timeout(clock: Clock) -> None:
    [one, other] = limits(2, 1)
    assert taken([one], 3, timeout=2) == pytest.approx([0, 1, 2])
    for _ in range(5):
        assert one._take(2) == math.inf
    assert other._take(3) == pytest.approx(3)


def test_an_expired_count_is_begun_anew(clock: Clock) -> None:
    [limit] = limits(1, 10)
    taken([limit], 1)
    clock.now += 0.5
    caches["default"].clear()
    assert taken([limit], 2) == pytest.approx([0, 0.1])


def test_a_clock_that_was_set_back_does_no_harm(clock: Clock) -> None:
    [limit] = limits(1, 1)
    taken([limit], 3, timeout=2)
    assert limit._take(2) == math.inf
    clock.now -= 3600
    assert limit._take(2) == 0


async def wait_for(limit: FleetLimit, timeout: float = 60.0) -> float | None:
    return await limit.wait_for(timeout)


def said(caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    return [
        (record.levelno, record.getMessage())
        for record in caplog.records
        if record.name == "django_async_smtp"
    ]


def test_a_cache_that_is_down_is_told_once_and_so_is_its_return(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(fleet, "DOWN_TIME", 0)
    [limit] = limits(1, 1000)
    FaultyCache.is_up = False
    for _ in range(3):
        assert asyncio.run(wait_for(limit)) is None
    wait_until(lambda: said(caplog))
    FaultyCache.is_up = True
    for _ in range(3):
        assert asyncio.run(wait_for(limit)) is not None
    wait_until(lambda: len(said(caplog)) == 2)
    [(first, text), (second, again)] = said(caplog)
    assert (first, second) == (logging.WARNING, logging.INFO)
    assert text.startswith("The cache 'default' does not count the messages to a:25")
    assert "ConnectionError" in text
    assert "s3cr3t" not in text
    assert "again" in again


def test_a_cache_that_is_down_is_left_alone_for_a_while() -> None:
    [limit] = limits(1, 1000)
    FaultyCache.is_up = False
    assert asyncio.run(wait_for(limit)) is None
    FaultyCache.is_up = True
    assert asyncio.run(wait_for(limit)) is None


def test_a_cache_that_hangs_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fleet, "ANSWER_TIMEOUT", 0.05)
    FaultyCache.answers.clear()
    ticks = 0

    async def ask() -> float | None:
        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.005)

        ticking = asyncio.create_task(tick())
        try:
            return await wait_for(limits(1, 1000)[0])
        finally:
            ticking.cancel()

    assert asyncio.run(ask()) is None
    assert ticks > 3
    wait_until(lambda: said(caplog))
    assert "no answer" in said(caplog)[0][1]


def test_a_connection_to_the_cache_that_is_dead_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fleet, "DOWN_TIME", 0)
    [limit] = limits(1, 1000)
    assert asyncio.run(wait_for(limit)) is not None
    monkeypatch.setattr(fleet, "ANSWER_TIMEOUT", 0.2)
    FaultyCache.dead.update(threading.enumerate())
    assert asyncio.run(wait_for(limit)) is None
    assert asyncio.run(wait_for(limit)) is None
    monkeypatch.setattr(fleet, "LOST_AFTER", 0)
    wait_until(lambda: asyncio.run(wait_for(limit)) is not None)


def limited(
    make_backend: MakeBackend, server: MailServer, rate: float, **more: Any
) -> Any:
    return make_backend(server, rate_limit=rate, rate_limit_cache="default", **more)


def test_backends_share_it(server: MailServer, make_backend: MakeBackend) -> None:
    start = time.monotonic()
    for max_messages in (10, 20, 30):
        # A pool of its own each, as in processes of their own.
        backend = limited(make_backend, server, 20, max_messages=max_messages)
        assert backend.send_messages(emails(4)) == 4
    # The first may be in the middle of a slot.
    assert time.monotonic() - start >= 10 / 20


def test_what_would_wait_for_too_long_fails(
    server: MailServer, make_backend: MakeBackend
) -> None:
    backend = limited(make_backend, server, 0.1, timeout=0.5)
    with pytest.raises(RateLimited, match=r"rate_limit lets 0\.1 a second"):
        backend.send_messages(emails(3))


def test_without_the_cache_each_process_keeps_to_it(
    server: MailServer, make_backend: MakeBackend
) -> None:
    FaultyCache.is_up = False
    backend = limited(make_backend, server, 20)
    start = time.monotonic()
    assert backend.send_messages(emails(5)) == 5
    assert time.monotonic() - start >= 4 / 20


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"rate_limit_cache": "default"}, "needs rate_limit beside it"),
        ({"rate_limit_cache": "missing", "rate_limit": 1}, "must be an alias of CACHE"),
        ({"rate_limit_cache": 1, "rate_limit": 1}, "must be a string, not int"),
    ],
)
def test_an_unusable_cache_is_an_error(
    make_backend: MakeBackend, options: Any, problem: str
) -> None:
    with pytest.raises(ImproperlyConfigured, match=rf"rate_limit_cache.* {problem}"):
        make_backend(host="a.example", **options)


def test_a_message_has_one_turn(server: MailServer, make_backend: MakeBackend) -> None:
    backend = limited(make_backend, server, 1000)
    backend.send_messages([EmailMessage("1", "Body", "a@b.example", ["c@d.example"])])
    assert len(server.received) == 1
