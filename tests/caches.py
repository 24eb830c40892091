"""Django caches that do not work."""

from __future__ import annotations

import threading
from typing import Any, ClassVar

from django.core.cache.backends.locmem import LocMemCache


class FaultyCache(LocMemCache):
    """
    Counts as long as it is up, and then raises, or does not answer.

    :cvar is_up: whether it counts.
    :cvar answers: clear while it is to hang.
    :cvar dead: the threads on whose connections no answer comes any more.
    """

    is_up = True
    answers = threading.Event()
    dead: ClassVar[set[threading.Thread]] = set()

    def incr(self, key: Any, delta: int = 1, version: int | None = None) -> int:
        if not self.is_up:
            raise ConnectionError("redis://:s3cr3t@10.0.0.1 refused")
        self.answers.wait(30)
        if threading.current_thread() in self.dead:
            threading.Event().wait(30)
        count: int = super().incr(key, delta, version)
        return count


FaultyCache.answers.set()
