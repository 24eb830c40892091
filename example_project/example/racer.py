"""
One side of a race: sends messages with a backend, and says how many are through.

    python -m example.racer BACKEND PORT COUNT

It prints "ready", waits for a line, then prints the number of messages sent each time
that it grows, and at the end the seconds. It ends with its standard input.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

from django.core.mail import EmailMessage

from benchmarks.sender import OURS, configure, messages, new_backend


class Progress:
    """Counts messages, and prints the count."""

    def __init__(self) -> None:
        self._count = 0

    def one_more(self, **kwargs: Any) -> None:
        """Count; a receiver of ``post_send``."""
        self._count += 1
        print(self._count, flush=True)

    def between(self, waiting: Iterable[EmailMessage]) -> Iterator[EmailMessage]:
        """Yield messages to a backend that takes each when the last one is sent."""
        for message in waiting:
            yield message
            self.one_more()


def main(path: str, port: int, count: int) -> None:
    logging.disable()
    configure(path, {"host": "127.0.0.1", "port": port})
    progress, waiting = Progress(), messages(count)
    sending: Iterable[EmailMessage] = waiting
    if path == OURS:
        from django_async_smtp import post_send

        post_send.connect(progress.one_more)
    else:
        sending = progress.between(waiting)
    print("ready", flush=True)
    sys.stdin.readline()
    threading.Thread(target=end_with_standard_input, daemon=True).start()
    start = time.perf_counter()
    new_backend().send_messages(sending)
    print("seconds", time.perf_counter() - start, flush=True)


def end_with_standard_input() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
