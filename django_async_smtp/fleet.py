"""
A rate limit that all processes share, on all machines, counted in a Django cache.

Time is cut into slots of ``1 / rate`` seconds, one for each message, and the slots into
windows of about a second. A key of the cache counts how many slots of its window are
taken: what ``incr`` returns is the ticket for one of them.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import cached_property
from hashlib import sha256
from queue import SimpleQueue
from typing import Any, Final

from django.core.cache import caches

from .logs import log

# Seconds that the cache gets for an answer, and that it is left alone where it gave
# none.
ANSWER_TIMEOUT: Final = 2.0
DOWN_TIME: Final = 5.0
# Seconds after which an answer will not come any more: the cache's client may wait for
# ever on a connection that is dead.
LOST_AFTER: Final = 60.0
# Seconds that a count is kept for after its window: clocks differ.
KEPT_FOR: Final = 3600


class FleetLimit:
    """
    The slots of one server.

    :param alias: the cache's; its ``incr`` must be atomic, as Redis' and Memcached's.
    :param rate: messages a second, of all processes together.
    """

    def __init__(self, alias: str, server: str, rate: float) -> None:
        self._alias = alias
        self._server = server
        self._rate = rate
        self._slots = max(1, math.floor(rate))
        self._seconds = self._slots / rate
        # Windows before this one have no free slot.
        self._first_free = 0
        self._down_until = 0.0
        self._is_told = False

    @cached_property
    def _key(self) -> str:
        # Options are made for every message; only those of a pool are counted with.
        digest = sha256(f"{self._server} {self._rate!r}".encode()).hexdigest()[:32]
        return f"django_async_smtp:rate:{digest}"

    async def wait_for(self, timeout: float) -> float | None:
        """
        Take the next slot.

        :param timeout: how far ahead it may be, in seconds.
        :returns: the seconds until it begins; more than the timeout where none is
            free; None where the cache does not answer.
        """
        if time.monotonic() < self._down_until:
            return None
        asked = _ask(self._alias, self._take, timeout)
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                wait: float = await asyncio.wrap_future(asked)
        except Exception as error:
            # Whatever the cache's client raises.
            self._note_down(error)
            return None
        if self._is_told:
            self._is_told = False
            message = "The cache %r counts the messages to %s again (rate_limit_cache)."
            _tell(logging.INFO, message, self._alias, self._server)
        return wait

    def _note_down(self, error: Exception) -> None:
        self._down_until = time.monotonic() + DOWN_TIME
        if self._is_told:
            return
        self._is_told = True
        what = "no answer" if isinstance(error, TimeoutError) else type(error).__name__
        _tell(
            logging.WARNING,
            "The cache %r does not count the messages to %s (rate_limit_cache): %s. "
            "Until it does, each process keeps to rate_limit by itself.",
            self._alias,
            self._server,
            what,
        )

    def _take(self, timeout: float) -> float:
        """Take a slot; in a thread."""
        now = time.time()
        if self._first_free * self._seconds > now + timeout + self._seconds:
            # The clock was set back.
            self._first_free = 0
        window = max(math.floor(now / self._seconds), self._first_free)
        while window * self._seconds <= now + timeout:
            slot = self._ticket(window, now) - 1
            if slot < self._slots:
                return max(0.0, window * self._seconds + slot / self._rate - now)
            window += 1
            self._first_free = window
        return math.inf

    def _ticket(self, window: int, now: float) -> int:
        """Return the number of a slot, from 1, that has not passed."""
        cache: Any = caches[self._alias]
        key = f"{self._key}:{window}"
        passed = max(0, math.floor((now - window * self._seconds) * self._rate))
        try:
            ticket: int = cache.incr(key)
        except ValueError:
            cache.add(key, passed, timeout=KEPT_FOR)
            ticket = cache.incr(key)
        if ticket <= passed:
            ticket = cache.incr(key, passed + 1 - ticket)
        return ticket


class _Asker:
    """A thread that asks one cache; it keeps the cache's connection."""

    def __init__(self) -> None:
        # None ends it.
        self.questions: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._asked_at = math.inf
        threading.Thread(
            target=self._run, name="django-async-smtp-cache", daemon=True
        ).start()

    @property
    def is_lost(self) -> bool:
        """Whether it has been waiting for an answer for too long."""
        return time.monotonic() - self._asked_at > LOST_AFTER

    def _run(self) -> None:
        while (question := self.questions.get()) is not None:
            self._asked_at = time.monotonic()
            question()
            self._asked_at = math.inf


_askers: dict[str, _Asker] = {}


def _ask(alias: str, question: Callable[[float], float], timeout: float) -> Any:
    """Have a question put to the cache; return a future."""
    answer: Future[float] = Future()

    def put() -> None:
        if not answer.set_running_or_notify_cancel():
            return
        try:
            answer.set_result(question(timeout))
        except BaseException as error:
            answer.set_exception(error)

    _asker(alias).questions.put(put)
    return answer


def _asker(alias: str) -> _Asker:
    asker = _askers.get(alias)
    if asker is None or asker.is_lost:
        if asker is not None:
            asker.questions.put(None)
        asker = _askers[alias] = _Asker()
    return asker


def _tell(level: int, message: str, *args: object) -> None:
    """Log in a thread: a handler may send mail, and wait for this one's loop."""
    threading.Thread(target=log, args=(level, message, *args), daemon=True).start()


if hasattr(os, "register_at_fork"):
    # The threads stay in the parent.
    os.register_at_fork(after_in_child=_askers.clear)
