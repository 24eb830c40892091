"""
A process that sends mail with one backend, as it is told, and says how long it took.

    python -m benchmarks.sender BACKEND '{"host": "127.0.0.1", "port": 2525}'

Each line on standard input is a JSON list, a job's name and its arguments; each is
answered with a line of JSON.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import resource
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from time import perf_counter
from typing import Any, Final

from asgiref.sync import sync_to_async
from django.conf import settings
from django.core import mail
from django.core.mail import EmailMessage, send_mail

OURS: Final = "django_async_smtp.Backend"
DJANGOS: Final = "django.core.mail.backends.smtp.EmailBackend"

SENDER: Final = "shop@example.com"
SUBJECT: Final = "Your order"
BODY: Final = "Hello,\n\nyour order is on its way to you.\n\nThe shop\n" * 4


def configure(path: str, options: dict[str, Any]) -> None:
    """Set the project's mail settings, of whichever generation, to a backend."""
    if hasattr(mail, "mailers"):
        settings.configure(MAILERS={"default": {"BACKEND": path, "OPTIONS": options}})
    else:
        named = {
            "host": "EMAIL_HOST",
            "port": "EMAIL_PORT",
            "username": "EMAIL_HOST_USER",
            "password": "EMAIL_HOST_PASSWORD",
            "use_tls": "EMAIL_USE_TLS",
        }
        settings.configure(
            EMAIL_BACKEND=path,
            ASYNC_SMTP={k: v for k, v in options.items() if k not in named},
            **{named[k]: v for k, v in options.items() if k in named},
        )


def new_backend() -> Any:
    return mail.mailers.default if hasattr(mail, "mailers") else mail.get_connection()


def arguments(number: int, recipients: int = 1) -> tuple[str, str, str, list[str]]:
    """Return what `send_mail()` takes, another message for each number."""
    to = [f"reader{number + extra}@example.org" for extra in range(recipients)]
    return f"{SUBJECT} {number}", BODY, SENDER, to


def messages(count: int) -> list[EmailMessage]:
    return [EmailMessage(*arguments(number)) for number in range(count)]


def seconds_for(work: Callable[[], object]) -> float:
    start = perf_counter()
    work()
    return perf_counter() - start


def batch(count: int) -> float:
    """One `send_messages()`, which opens its connections itself."""
    end_connections()
    waiting = messages(count)

    def send() -> None:
        assert new_backend().send_messages(waiting) == count

    return seconds_for(send)


def one_by_one(count: int, recipients: int = 1) -> float:
    """A `send_mail()` for each, in a process that has sent one before."""
    send_mail(*arguments(count))

    def send() -> None:
        for number in range(count):
            assert send_mail(*arguments(number, recipients)) == 1

    return seconds_for(send)


def build(count: int) -> float:
    """Only make the bytes of the messages."""
    from django_async_smtp.envelope import prepare

    waiting = messages(count)
    return seconds_for(lambda: [prepare(message) for message in waiting])


def at_once(count: int) -> float:
    """All from coroutines of one loop: `asend_mail()`, or what Django has for it."""
    return asyncio.run(_at_once(count))[0]


def longest_stall(count: int) -> float:
    """How many milliseconds the loop of `at_once` stood still, at most."""
    return asyncio.run(_at_once(count))[1] * 1000


async def _at_once(count: int) -> tuple[float, float]:
    asend: Callable[..., Awaitable[int]] = sync_to_async(send_mail)
    if hasattr(new_backend(), "asend_messages"):
        from django_async_smtp import asend_mail as asend
    longest = 0.0

    async def watch() -> None:
        nonlocal longest
        while True:
            start = perf_counter()
            await asyncio.sleep(0.001)
            longest = max(longest, perf_counter() - start - 0.001)

    watching = asyncio.create_task(watch())
    await asyncio.sleep(0)
    start = perf_counter()
    sent = await asyncio.gather(*(asend(*arguments(n)) for n in range(count)))
    seconds = perf_counter() - start
    watching.cancel()
    assert sent == [1] * count
    return seconds, longest


def memory(count: int, size: int) -> float:
    """One `send_messages()` of a generator; the MB by which the peak has risen."""
    document = bytes(size * 3 // 4)  # base64 makes it a third longer.

    def large() -> Iterator[EmailMessage]:
        for number in range(count):
            message = EmailMessage(*arguments(number))
            message.attach("invoice.pdf", document, "application/pdf")
            yield message

    before = peak_memory()
    assert new_backend().send_messages(large()) == count
    return peak_memory() - before


def peak_memory() -> float:
    """Return the most MB that this process has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def threads(count: int) -> int:
    """One `send_messages()`; the most threads that there were beside the caller's."""
    end_connections()
    counts: list[int] = []

    def counted() -> Iterator[EmailMessage]:
        for message in messages(count):
            counts.append(threading.active_count() - 1)
            yield message
        counts.append(threading.active_count() - 1)

    assert new_backend().send_messages(counted()) == count
    return max(counts)


def end_connections() -> None:
    """Start from nothing, as a command does that sends a mailing."""
    if "django_async_smtp" in sys.modules:
        from django_async_smtp import close_connections

        close_connections()


JOBS: Final[dict[str, Callable[..., Any]]] = {
    job.__name__: job
    for job in (batch, one_by_one, build, at_once, longest_stall, memory, threads)
}


def main(path: str, options: dict[str, Any]) -> None:
    logging.disable()
    configure(path, options)
    print("ready", flush=True)
    for line in sys.stdin:
        name, *rest = json.loads(line)
        gc.collect()
        # Going through all that Django has loaded takes 30 ms, whoever causes it.
        gc.freeze()
        print(json.dumps(JOBS[name](*rest)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
