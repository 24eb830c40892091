"""A race between two backends, each in a process of its own, over one delay line."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any, Final

from .events import Event

ROOT: Final = Path(__file__).parents[2]
BACKENDS: Final = {
    "django": "django.core.mail.backends.smtp.EmailBackend",
    "ours": "django_async_smtp.Backend",
}
# Seconds: until everything runs, for the race, and between two looks at it.
START_TIMEOUT: Final = 30.0
TIMEOUT: Final = 600.0
INTERVAL: Final = 0.1

_running = asyncio.Lock()


class RaceBroken(Exception):
    """A process ended early, or was not ready in time."""


async def race(messages: int, round_trip: int) -> AsyncGenerator[Event, None]:
    """
    Send so many messages with each backend; yield how many are through.

    All processes end with the generator. Only one race runs at a time.

    :param round_trip: milliseconds.
    """
    if _running.locked():
        yield "refused", {"why": "Another race is running."}
        return
    async with _running, AsyncExitStack() as stack:
        try:
            async with asyncio.timeout(START_TIMEOUT):
                racers = await _at_the_start(stack, messages, round_trip)
        except (RaceBroken, TimeoutError):
            yield "broken", {"why": "The racers could not be started."}
            return
        yield "start", {"messages": messages, "round_trip": round_trip}
        async for event in _run(racers):
            yield event


async def _run(racers: list[_Racer]) -> AsyncGenerator[Event, None]:
    start = time.monotonic()
    reading = [asyncio.ensure_future(racer.run()) for racer in racers]
    try:
        while not all(task.done() for task in reading):
            await asyncio.wait(reading, timeout=INTERVAL)
            # Asked of each: an exception that nobody has seen is logged at the end.
            failures = [task.exception() for task in reading if task.done()]
            if any(failures):
                yield "broken", {"why": "A racer has failed."}
                return
            passed = time.monotonic() - start
            yield "progress", {"seconds": passed, **{r.name: r.sent for r in racers}}
            if passed > TIMEOUT:
                yield "broken", {"why": f"Not over within {TIMEOUT:g} s."}
                return
    finally:
        for task in reading:
            task.cancel()
        await asyncio.wait(reading)
    yield "end", {racer.name: racer.seconds for racer in racers}


async def _at_the_start(
    stack: AsyncExitStack, messages: int, round_trip: int
) -> list[_Racer]:
    """Start a server, a line to it, and both racers; return these, ready."""
    port = await _line(await _process(stack, "benchmarks.server"))
    line = ["benchmarks.delay_line", port, str(round_trip)]
    far = await _line(await _process(stack, *line))
    processes = {
        name: await _process(stack, "example.racer", path, far, str(messages))
        for name, path in BACKENDS.items()
    }
    for process in processes.values():
        await _line(process)
    return [_Racer(name, process) for name, process in processes.items()]


async def _process(stack: AsyncExitStack, module: str, *arguments: str) -> Process:
    folders = [str(ROOT), str(ROOT / "example_project")]
    known = os.environ.get("PYTHONPATH")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *arguments),
        stdin=PIPE,
        stdout=PIPE,
        stderr=DEVNULL,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([*folders, *([known] if known else [])])},
    )
    stack.push_async_callback(_end, process)
    return process


async def _end(process: Process) -> None:
    with suppress(ProcessLookupError):
        process.kill()
    await process.wait()


async def _line(process: Process) -> str:
    stdout: Any = process.stdout
    line: bytes = await stdout.readline()
    if not line:
        raise RaceBroken
    return line.decode().strip()


class _Racer:
    """
    A process that waits for the start.

    :ivar sent: how many messages are through.
    :ivar seconds: how long all of them took.
    """

    def __init__(self, name: str, process: Process) -> None:
        self.name = name
        self.sent = 0
        self.seconds: float | None = None
        self._process = process

    async def run(self) -> None:
        """Start it, and read what it says until its end."""
        stdin: Any = self._process.stdin
        stdin.write(b"\n")
        while self.seconds is None:
            words = (await _line(self._process)).split()
            if words[0] == "seconds":
                self.seconds = float(words[1])
            else:
                self.sent = int(words[0])
