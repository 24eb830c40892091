"""
Commands and replies over the transport of a connection that aiosmtplib opened.

aiosmtplib connects, greets, upgrades to TLS and logs in. From then on this protocol
sits on the same transport: it knows how many replies are due, so that a reply that
comes late, or unasked, never answers another command; and it writes the message in
pieces, so that a timeout measures silence and not the size of the message.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

from aiosmtplib import SMTPReadTimeoutError, SMTPServerDisconnected

CHUNK_SIZE: Final = 64 * 1024
MAX_LINE_LENGTH: Final = 8192
MAX_REPLY_LENGTH: Final = 4 * MAX_LINE_LENGTH

_CONTROL_CHARACTER = re.compile(rb"[\x00-\x1f\x7f]")


class Reply(NamedTuple):
    """
    A server's reply (RFC 5321 section 4.2).

    ``code`` is -1 where what came is no reply; ``text`` joins the lines of the reply
    with LF, without their codes.
    """

    code: int
    text: bytes


class Dialogue(asyncio.Protocol):
    """
    A sequence of commands and replies, after the greeting.

    :param transport: an open connection without a reply due.
    :param on_end: called once, when the server ended the connection, or spoke
        unasked, as it does before it ends it.
    """

    def __init__(
        self, transport: asyncio.Transport, on_end: Callable[[], None]
    ) -> None:
        self._transport = transport
        self._on_end = on_end
        self._buffer = bytearray()
        self._lines: list[bytes] = []
        self._replies: deque[Reply] = deque()
        self._due = 0
        self._in_step = True
        self.is_message_written = False
        self._lost: Exception | None = None
        self._reading: asyncio.Future[None] | None = None
        self._writing: asyncio.Future[None] | None = None
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        transport.set_write_buffer_limits(high=CHUNK_SIZE)
        transport.set_protocol(self)
        if transport.is_closing():
            # It called connection_lost() on the protocol before this one.
            self.connection_lost(None)

    @property
    def is_clean(self) -> bool:
        """Whether the connection is open, with every reply read and none too many."""
        return (
            self._lost is None
            and self._in_step
            and self._due == 0
            and not self._buffer
            and not self._transport.is_closing()
        )

    async def command(self, line: bytes, timeout: float) -> Reply:
        """
        Send a command and return the reply to it.

        :param timeout: seconds to wait for the whole reply.
        :raises ValueError: a control character in the command: nothing was sent.
        :raises SMTPServerDisconnected: the connection ended before the reply.
        :raises SMTPReadTimeoutError: no reply in time.
        """
        if _CONTROL_CHARACTER.search(line):
            raise ValueError("An SMTP command must not hold control characters.")
        self._write(line + b"\r\n")
        self._due += 1
        return await self._next_reply(timeout)

    async def message(self, content: bytes, timeout: float) -> Reply:
        """
        Send a message's content after DATA (RFC 5321 section 4.1.1.4).

        A server that answers before it has all of it has refused it; the rest is not
        sent. ``is_message_written`` tells whether all of it was.

        :param content: ends with CRLF.
        :param timeout: seconds in which the server takes nothing, or does not reply.
        """
        self._due += 1
        self.is_message_written = False
        stuffed = content.replace(b"\r\n.", b"\r\n..")
        if stuffed.startswith(b"."):
            stuffed = b"." + stuffed
        last = (len(stuffed) - 1) // CHUNK_SIZE * CHUNK_SIZE
        view = memoryview(stuffed)
        for start in range(0, last, CHUNK_SIZE):
            self._write(view[start : start + CHUNK_SIZE])
            await self._drained(timeout)
            if self._replies:
                self._in_step = False
                return self._replies.popleft()
        self._write(stuffed[last:] + b".\r\n")
        self.is_message_written = True
        await self._drained(timeout)
        return await self._next_reply(timeout)

    async def quit(self, timeout: float) -> None:
        """Say QUIT, wait for the end of the connection, and end it if none comes."""
        try:
            async with asyncio.timeout(timeout):
                if self.is_clean:
                    await self.command(b"QUIT", timeout)
                self._transport.close()
                await asyncio.shield(self._ended)
        except (TimeoutError, SMTPServerDisconnected, SMTPReadTimeoutError):
            pass
        finally:
            self.abort()

    def abort(self) -> None:
        """End the connection at once, without a word."""
        self._in_step = False
        self._transport.abort()

    def _write(self, data: bytes | memoryview) -> None:
        if self._lost is not None or self._transport.is_closing():
            raise SMTPServerDisconnected("Connection lost") from self._lost
        self._transport.write(data)

    async def _next_reply(self, timeout: float) -> Reply:
        try:
            async with asyncio.timeout(timeout):
                while not self._replies:
                    if self._lost is not None:
                        raise SMTPServerDisconnected("Connection lost") from self._lost
                    self._reading = asyncio.get_running_loop().create_future()
                    await self._reading
        except TimeoutError as error:
            raise SMTPReadTimeoutError("Timed out waiting for a reply") from error
        finally:
            self._reading = None
        return self._replies.popleft()

    async def _drained(self, timeout: float) -> None:
        """Wait until the transport takes more, as long as it makes progress."""
        while self._writing is not None and not self._writing.done():
            left = self._transport.get_write_buffer_size()
            await asyncio.wait({self._writing}, timeout=timeout)
            if (
                not self._writing.done()
                and self._transport.get_write_buffer_size() >= left
            ):
                raise SMTPReadTimeoutError("Timed out sending the message")

    # What the transport calls.

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\n")) != -1:
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            self._line_received(line)
        if len(self._buffer) > MAX_LINE_LENGTH or (
            sum(map(len, self._lines)) > MAX_REPLY_LENGTH
        ):
            self._buffer.clear()
            self._in_step = False
            self._reply_received(Reply(500, b"Line too long."))
        self._wake_reader()

    def _line_received(self, line: bytes) -> None:
        self._lines.append(line[4:].strip(b" \t\r"))
        if not line[:3].isdigit():
            self._in_step = False
            self._reply_received(Reply(-1, self._lines[-1]))
        elif line[3:4] != b"-":
            self._reply_received(Reply(int(line[:3]), b"\n".join(self._lines)))

    def _reply_received(self, reply: Reply) -> None:
        self._lines = []
        if self._due:
            self._due -= 1
            self._replies.append(reply)
        else:
            self._in_step = False
            self._on_end()

    def eof_received(self) -> None:
        self._end(ConnectionResetError("The server closed the connection"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(exc or ConnectionResetError("The connection was closed"))
        if not self._ended.done():
            self._ended.set_result(None)

    def pause_writing(self) -> None:
        self._writing = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        if self._writing is not None and not self._writing.done():
            self._writing.set_result(None)

    def _end(self, reason: Exception) -> None:
        if self._lost is None:
            self._lost = reason
            self.resume_writing()
            self._wake_reader()
            self._on_end()

    def _wake_reader(self) -> None:
        if self._reading is not None and not self._reading.done():
            self._reading.set_result(None)
