"""A server that fails at random points, and counts what arrived."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Self

from .servers import free_port

# What may happen instead of the reply that was due.
FAULTS: Final = {
    "close": b"",
    "reset": b"",
    "silence": b"",
    "garbage": b"what?\r\n",
    "temporary": b"451 4.3.0 try again later\r\n",
    "permanent": b"554 5.0.0 no\r\n",
    "goodbye": b"421 4.3.2 shutting down\r\n",
    "too many": b"452 4.5.3 too many\r\n",
}
_GOES_ON: Final = {"temporary", "permanent", "too many"}
# After these the server has the message, and the client cannot know.
_KEEPS_MESSAGE: Final = {"close", "reset", "silence", "garbage"}

# Returns the name of a fault for a stage, or None.
Chooser = Callable[[str], str | None]


def random_faults(seed: int, rate: float, *, silence: float = 0.0) -> Chooser:
    """
    Return a chooser of random faults.

    :param rate: the part of the replies that fails.
    :param silence: the part of these that is silence; each costs a timeout.
    """
    rng = random.Random(seed)
    kinds = [name for name in FAULTS if name != "silence"]

    def choose(stage: str) -> str | None:
        if rng.random() >= rate:
            return None
        return "silence" if rng.random() < silence else rng.choice(kinds)

    return choose


class FaultyServer:
    """
    An SMTP server on an event loop of its own.

    :ivar arrived: how often each message (by its subject) was kept, for each recipient.
    :ivar injected: how often each fault was made.
    :ivar most_open: the largest number of connections at a time.
    """

    def __init__(
        self, choose: Chooser, *, reply_delay: float = 0.0, pipelining: bool = False
    ) -> None:
        self.host = "127.0.0.1"
        self.port = free_port()
        self.arrived: Counter[tuple[str, str]] = Counter()
        self.injected: Counter[str] = Counter()
        self.most_open = 0
        self._open = 0
        self._choose = choose
        self._reply_delay = reply_delay
        extensions = ["faulty", *(["PIPELINING"] if pipelining else []), "8BITMIME"]
        marks = ["-"] * (len(extensions) - 1) + [" "]
        self.hello = "".join(
            f"250{mark}{extension}\r\n"
            for mark, extension in zip(marks, extensions, strict=True)
        ).encode()
        self._dialogues: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._run()), daemon=True
        )
        self._started = threading.Event()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def copies(self, subject: str) -> int:
        """Return how many copies of a message its luckiest recipient got."""
        found = [n for (known, _), n in self.arrived.items() if known == subject]
        return max(found, default=0)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        listener = await asyncio.start_server(
            self._serve, self.host, self.port, backlog=200
        )
        self._started.set()
        await self._stop.wait()
        listener.close()
        for dialogue in self._dialogues:
            dialogue.cancel()
        await asyncio.gather(*self._dialogues, return_exceptions=True)

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._dialogues.add(task)
        task.add_done_callback(self._dialogues.discard)
        self._open += 1
        self.most_open = max(self.most_open, self._open)
        try:
            await _Dialogue(self, reader, writer).run()
        except (EOFError, OSError, ValueError, asyncio.CancelledError):
            pass
        finally:
            self._open -= 1
            writer.transport.abort() if self._stop.is_set() else writer.close()

    def fault(self, stage: str) -> str | None:
        """Choose a fault for a stage, and count it."""
        name = self._choose(stage)
        if name is not None:
            self.injected[name] += 1
        return name


class _Dialogue:
    def __init__(
        self,
        server: FaultyServer,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.server = server
        self.reader = reader
        self.writer = writer
        self.recipients: list[str] = []

    async def run(self) -> None:
        await self.answer("greeting", b"220 faulty ESMTP\r\n")
        while line := await self.reader.readline():
            verb, _, argument = line.decode().rstrip().partition(" ")
            match verb:
                case "EHLO" | "HELO":
                    await self.answer("ehlo", self.server.hello)
                case "MAIL":
                    self.recipients = []
                    await self.answer("mail", b"250 ok\r\n")
                case "RCPT":
                    if await self.answer("rcpt", b"250 ok\r\n"):
                        self.recipients.append(argument)
                case "DATA":
                    if await self.answer("data", b"354 go\r\n"):
                        await self.message()
                case "QUIT":
                    await self.answer("quit", b"221 bye\r\n")
                    return
                case _:
                    await self.answer(verb.lower(), b"250 ok\r\n")

    async def message(self) -> None:
        lines: list[bytes] = []
        while (line := await self.reader.readline()) != b".\r\n":
            if not line:
                raise EOFError
            lines.append(line)
        if not lines:
            await self.do(None, b"554 5.5.1 no valid recipients\r\n")
            return
        content = b"".join(lines)
        fault = self.server.fault("body")
        if fault is None or fault in _KEEPS_MESSAGE:
            header = content.partition(b"\r\n\r\n")[0].decode()
            (subject,) = (
                line.removeprefix("Subject: ")
                for line in header.split("\r\n")
                if line.startswith("Subject: ")
            )
            for recipient in self.recipients:
                self.server.arrived[subject, recipient] += 1
        await self.do(fault, b"250 ok queued\r\n")
        # What an idle connection may meet.
        if (fault := self.server.fault("idle")) in {"close", "reset", "goodbye"}:
            await self.do(fault, b"")

    async def answer(self, stage: str, reply: bytes) -> bool:
        return await self.do(self.server.fault(stage), reply)

    async def do(self, fault: str | None, reply: bytes) -> bool:
        """Send a reply, or do the fault; return whether it was the reply."""
        if self.server._reply_delay:
            await asyncio.sleep(self.server._reply_delay)
        if fault is None:
            self.writer.write(reply)
            await self.writer.drain()
            return True
        self.writer.write(FAULTS[fault])
        if fault == "reset":
            self.writer.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
        if fault == "silence":
            with suppress(OSError):
                await self.reader.read()
        if fault not in _GOES_ON and fault != "garbage":
            raise EOFError
        return False
