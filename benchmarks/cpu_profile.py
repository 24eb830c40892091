"""
Says where the CPU goes in one `send_messages()` on loopback; see `make profile`.

    python -m benchmarks.cpu_profile [MESSAGES]

First the CPU of each thread, then the functions. Every thread is profiled by itself, in
its own CPU time: cProfile sees one thread, or, from Python 3.12 on, takes the calls of
two for those of one. As with any profiler that sees all calls, what calls much seems to
take more than it does; the first part is free of that.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any, Final

from .lab import Lab
from .sender import OURS, batch, build, configure
from .server import HOST

# Who is called -> what is being done, until it returns or calls another one of these.
GROUPS: Final = {
    "/django_async_smtp/envelope.py": "building messages",
    "/django_async_smtp/policy.py": "building messages",
    "/django_async_smtp/pipelining.py": "sending",
    "/django_async_smtp/session.py": "sending",
    "/django_async_smtp/": "ours: pool, delivery, logs",
    "/asyncio/": "event loop",
    "/asgiref/": "handing over between threads",
    "/concurrent/": "handing over between threads",
    "/benchmarks/": "the benchmark",
}
ADDRESSES: Final = "preparing addresses"


class Profile:
    """
    The time that the functions of one thread take, without those that they call, but
    with those in C.

    :ivar functions: nanoseconds by file and name.
    :ivar groups: nanoseconds by what is being done.
    """

    def __init__(self) -> None:
        self.functions: Counter[tuple[str, str]] = Counter()
        self.groups: Counter[str] = Counter()
        self._stack = [(("outside", ""), "the rest")]
        self._known: dict[Any, tuple[tuple[str, str], str | None]] = {}
        self._last = time.thread_time_ns()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event not in ("call", "return"):
            return
        spent = time.thread_time_ns() - self._last
        function, group = self._stack[-1]
        self.functions[function] += spent
        self.groups[group] += spent
        if event == "call":
            code = frame.f_code
            if code not in self._known:
                self._known[code] = described(code.co_filename, code.co_qualname)
            function, new_group = self._known[code]
            self._stack.append((function, new_group or group))
        elif len(self._stack) > 1:
            self._stack.pop()
        self._last = time.thread_time_ns()


def described(path: str, name: str) -> tuple[tuple[str, str], str | None]:
    """Return a function's short name, and its group if it begins one."""
    groups = (group for part, group in GROUPS.items() if part in path)
    group = ADDRESSES if name.startswith("mailbox") else next(groups, None)
    return ("/".join(Path(path).parts[-2:]), name), group


def print_threads(count: int) -> None:
    """Print what each thread takes, and what building alone would."""
    both, caller = time.process_time(), time.thread_time()
    batch(count)
    both, caller = time.process_time() - both, time.thread_time() - caller
    building = time.thread_time()
    build(count)
    building = time.thread_time() - building
    print("µs of CPU a message:\n")
    for name, spent in {
        "both threads": both,
        "the caller's": caller,
        "of these, building the bytes": building,
        "the SMTP loop's": both - caller,
    }.items():
        print(f"{spent / count * 1e6:7.0f}  {name}")


def print_functions(count: int, profiles: list[Profile]) -> None:
    """Print what was profiled."""
    groups = sum((profile.groups for profile in profiles), Counter[str]())
    functions = sum((p.functions for p in profiles), Counter[tuple[str, str]]())
    total = groups.total()
    print(f"\nProfiled ({total / count / 1e3:.0f} µs a message), by purpose:\n")
    for group, spent in groups.most_common():
        print(f"{spent / total:6.1%}  {group}")
    print("\nBy function:\n")
    for (path, name), spent in functions.most_common(30):
        print(f"{spent / total:6.1%}  {name}  {path}")


def main(count: int) -> None:
    from django_async_smtp.loop import smtp_loop

    with Lab() as lab:
        configure(OURS, {"host": HOST, "port": lab.sink()})
        batch(100)
        print_threads(count)
        profiles = [Profile(), Profile()]
        smtp_loop().loop.call_soon_threadsafe(sys.setprofile, profiles[0])
        sys.setprofile(profiles[1])
        batch(count)
        sys.setprofile(None)
        print_functions(count, profiles)
        smtp_loop().loop.call_soon_threadsafe(sys.setprofile, None)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 500)
