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
from typing import Final, NamedTuple, cast

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


# Stands for a line, or a reply, that is longer than allowed; smtplib's words.
TOO_LONG: Final = Reply(500, b"Line too long.")


class Dialogue(asyncio.Protocol):
    """
    A sequence of commands and replies, after the greeting.

    :param transport: an open connection without a reply due.
    :param on_end: called once, when the connection has ended, or when the server
        spoke unasked, as it does before it ends it.
    """

    def __init__(
        self, transport: asyncio.Transport, on_end: Callable[[], None]
    ) -> None:
        self._transport = transport
        self._on_end: Callable[[], None] | None = on_end
        self._buffer = bytearray()
        self._lines: list[bytes] = []
        self._reply_length = 0
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
            and not self._replies
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
                return self._early_reply()
        self._write(stuffed[last:] + b".\r\n")
        await self._drained(timeout)
        if self._is_full:
            return self._early_reply()
        self.is_message_written = True
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

    @property
    def _is_full(self) -> bool:
        return self._writing is not None and not self._writing.done()

    async def _drained(self, timeout: float) -> None:
        """
        Wait until the transport takes more, or a reply is there.

        :raises SMTPReadTimeoutError: the server took nothing for ``timeout`` seconds.
        """
        while self._is_full and not self._replies:
            left = self._transport.get_write_buffer_size()
            self._reading = asyncio.get_running_loop().create_future()
            done, _ = await asyncio.wait(
                {cast("asyncio.Future[None]", self._writing), self._reading},
                timeout=timeout,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not done and self._transport.get_write_buffer_size() >= left:
                raise SMTPReadTimeoutError("Timed out sending the message")

    def _early_reply(self) -> Reply:
        """Return the answer to a message that the server does not have whole."""
        self._in_step = False
        code, text = self._replies.popleft()
        # Nobody can have accepted what was not sent.
        return Reply(code if code >= 300 else -1, text)

    # What the transport calls.

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\n", 0, MAX_LINE_LENGTH)) != -1:
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            self._line_received(line)
        if len(self._buffer) >= MAX_LINE_LENGTH:
            self._buffer.clear()
            self._garbage_received(TOO_LONG)
        if not self._due and (self._buffer or self._lines):
            self._unasked()
        self._wake_reader()

    def _line_received(self, line: bytes) -> None:
        self._lines.append(line[4:].strip(b" \t\r"))
        self._reply_length += len(line)
        if len(line) < 3 or not line[:3].isdigit():
            self._garbage_received(Reply(-1, self._lines[-1]))
        elif self._reply_length > MAX_REPLY_LENGTH:
            self._garbage_received(TOO_LONG)
        elif line[3:4] != b"-":
            self._reply_received(Reply(int(line[:3]), b"\n".join(self._lines)))

    def _garbage_received(self, reply: Reply) -> None:
        self._in_step = False
        self._reply_received(reply)

    def _reply_received(self, reply: Reply) -> None:
        self._lines = []
        self._reply_length = 0
        if self._due:
            self._due -= 1
            self._replies.append(reply)
        else:
            self._unasked()

    def _unasked(self) -> None:
        self._in_step = False
        self._tell_end()

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
            self._tell_end()

    def _tell_end(self) -> None:
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end()

    def _wake_reader(self) -> None:
        if self._reading is not None and not self._reading.done():
            self._reading.set_result(None)
