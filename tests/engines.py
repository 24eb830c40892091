"""Task backends that keep what is enqueued, and a queue for mail over them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from django.utils.module_loading import import_string

from django_async_smtp.tasks import engine
from django_async_smtp.tasks.worker import send_queued

LIBRARY: str = engine.library().__name__

DummyBackend: Any = import_string(f"{LIBRARY}.backends.dummy.DummyBackend")
IMMEDIATE = f"{LIBRARY}.backends.immediate.ImmediateBackend"


class Keeping(DummyBackend):  # type: ignore[misc]
    """Keeps what is enqueued, by whichever thread."""

    enqueued: list[Any] = []  # noqa: RUF012

    def enqueue(self, task: Any, args: Any, kwargs: Any) -> Any:
        result = super().enqueue(task, args, kwargs)
        self.enqueued.append(result)
        return result

    async def aenqueue(self, task: Any, args: Any, kwargs: Any) -> Any:
        result = await super().aenqueue(task, args, kwargs)
        # Where the base class does not call enqueue().
        if result.id not in [one.id for one in self.enqueued]:
            self.enqueued.append(result)
        return result


class NotDeferring(Keeping):
    supports_defer = False


class Down(Keeping):
    """An engine that cannot be reached; its error tells a password."""

    def enqueue(self, task: Any, args: Any, kwargs: Any) -> Any:
        raise ConnectionError("redis://:s3cr3t@10.0.0.1 refused")

    async def aenqueue(self, task: Any, args: Any, kwargs: Any) -> Any:
        return self.enqueue(task, args, kwargs)


def tasks_of(cls: type[Any] | str, **params: Any) -> dict[str, Any]:
    """Return TASKS with one task backend."""
    path = cls if isinstance(cls, str) else f"{cls.__module__}.{cls.__qualname__}"
    return {"default": {"BACKEND": path, **params}}


def payloads() -> list[Any]:
    """Return what the tasks hold, in the order in which they were enqueued."""
    return [result.args[0] for result in Keeping.enqueued]


def work(payload: Any) -> Any:
    """Run a task, as a worker does."""
    return send_queued.call(payload)


@contextmanager
def nothing_enqueued() -> Iterator[None]:
    """Forget what is enqueued, before and after."""
    Keeping.enqueued.clear()
    try:
        yield
    finally:
        Keeping.enqueued.clear()
