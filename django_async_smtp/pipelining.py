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


# Called with each line of a dialogue, without credentials: "C" or "S", for client and
# server, and the line.
Transcript = Callable[[str, str], None]


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


def group_of(lines: list[bytes]) -> bytes:
    """
    Return commands as they go over the wire.

    :raises ValueError: a control character in a command.
    """
    if any(_CONTROL_CHARACTER.search(line) for line in lines):
        raise ValueError("An SMTP command must not hold control characters.")
    return b"".join(line + b"\r\n" for line in lines)


class Dialogue(asyncio.Protocol):
    """
    A sequence of commands and replies, after the greeting.

    :param transport: an open connection without a reply due.
    :param on_end: called once, when the connection has ended, or when the server
        spoke unasked, as it does before it ends it.
    :param transcript: told of all but the message.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        on_end: Callable[[], None],
        transcript: Transcript | None = None,
    ) -> None:
        self._transport = transport
        self._on_end: Callable[[], None] | None = on_end
        self._transcript = transcript
        self._buffer = bytearray()
        self._lines: list[bytes] = []
        self._reply_length = 0
        self._replies: deque[Reply] = deque()
        self._due = 0
        self._in_step = True
        self.is_message_written = False
        self.is_group_sent = False
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

    @property
    def is_in_step(self) -> bool:
        """Whether every reply so far was due, and a reply."""
        return self._in_step

    async def command(self, line: bytes, timeout: float) -> Reply:
        """Send a command and return the reply to it; see ``send`` and ``reply``."""
        await self.send([line], timeout)
        return await self.reply(timeout)

    async def send(self, lines: list[bytes], timeout: float) -> None:
        """
        Send a group of commands in one write (RFC 2920); ``reply`` returns the answers.

        Only the last one may be DATA.

        :param timeout: seconds in which the server takes nothing.
        :raises ValueError: a control character in a command: nothing was sent.
        :raises SMTPServerDisconnected: the connection has ended.
        :raises SMTPReadTimeoutError: the server took nothing in time.
        """
        group = group_of(lines)
        self._note_commands(lines)
        # Replies come while a large group is written, and are read all the time: a
        # server that stops reading until then (RFC 2920 section 3.1) goes on.
        self._due += len(lines)
        for start in range(0, len(group), CHUNK_SIZE):
            self._write(group[start : start + CHUNK_SIZE])
            while self._is_full and self._lost is None:
                await self._progress(timeout)

    async def reply(self, timeout: float) -> Reply:
        """
        Return the next reply that is due.

        :param timeout: seconds to wait for the whole reply.
        :raises SMTPServerDisconnected: the connection ended before the reply.
        :raises SMTPReadTimeoutError: no reply in time.
        """
        return await self._next_reply(timeout)

    async def settle(self, timeout: float) -> None:
        """
        Read the replies that are still due after a transaction was broken off.

        Where the server asks for a message without recipients, it gets an empty one,
        as RFC 2920 section 3.1 has it; where it has recipients all the same, the
        connection ends instead, lest they get that.

        :raises SMTPServerDisconnected: the connection ended.
        :raises SMTPReadTimeoutError: no reply in time.
        """
        has_recipients = False
        while self._due or self._replies:
            reply = await self._next_reply(timeout)
            has_recipients |= reply.code in (250, 251)
            if reply.code == 354 and has_recipients:
                self.abort()
                return
            if reply.code == 354:
                self._write(b".\r\n")
                self._due += 1

    async def message(
        self, content: bytes, timeout: float, following: list[bytes] | None = None
    ) -> Reply:
        """
        Send a message's content after DATA (RFC 5321 section 4.1.1.4).

        A server that answers before it has all of it has refused it; the rest is not
        sent. ``is_message_written`` tells whether all of it was.

        :param content: ends with CRLF.
        :param following: the next group of commands (see ``send``), for the same write
            (RFC 2920) if that is small; ``is_group_sent`` tells.
        :param timeout: seconds in which the server takes nothing, or does not reply.
        """
        self._due += 1
        self.is_message_written = self.is_group_sent = False
        self._note("C", b"(the message: %d bytes)" % len(content))
        stuffed = content.replace(b"\r\n.", b"\r\n..")
        if stuffed.startswith(b"."):
            stuffed = b"." + stuffed
        last = (len(stuffed) - 1) // CHUNK_SIZE * CHUNK_SIZE
        view = memoryview(stuffed)
        for start in range(0, last, CHUNK_SIZE):
            self._write(view[start : start + CHUNK_SIZE])
            # An early reply is seen, and others get their turn, also where the kernel
            # takes all of it at once.
            await asyncio.sleep(0)
            await self._drained(timeout)
            if self._replies:
                return self._early_reply()
        self._write_end(stuffed[last:] + b".\r\n", following or [])
        await self._drained(timeout)
        if self._is_full:
            return self._early_reply()
        self.is_message_written = True
        return await self._next_reply(timeout)

    def _write_end(self, end: bytes, following: list[bytes]) -> None:
        group = group_of(following)
        size = self._transport.get_write_buffer_size() + len(end) + len(group)
        # Not above the mark from which on writing waits: that what waits is the
        # group, and not the message, could not be told.
        if following and size <= CHUNK_SIZE:
            self._note_commands(following)
            self._due += len(following)
            self.is_group_sent = True
            end += group
        self._write(end)

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

    def _note_commands(self, lines: list[bytes]) -> None:
        for line in lines:
            self._note("C", line)

    def _note(self, side: str, line: bytes) -> None:
        if self._transcript is not None:
            self._transcript(side, line.decode("utf-8", "replace").rstrip("\r"))

    def _write(self, data: bytes | memoryview) -> None:
        if self._lost is not None or self._transport.is_closing():
            raise SMTPServerDisconnected("Connection lost") from self._lost
        self._transport.write(data)

    async def _next_reply(self, timeout: float) -> Reply:
        if self._replies:
            return self._replies.popleft()
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
            await self._progress(timeout)

    async def _progress(self, timeout: float) -> None:
        """Wait until something is written, or received."""
        left = self._transport.get_write_buffer_size()
        self._reading = asyncio.get_running_loop().create_future()
        done, _ = await asyncio.wait(
            {cast("asyncio.Future[None]", self._writing), self._reading},
            timeout=timeout,
            return_when=asyncio.FIRST_COMPLETED,
        )
        if not done and self._transport.get_write_buffer_size() >= left:
            raise SMTPReadTimeoutError("Timed out sending")

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
        self._note("S", line)
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
