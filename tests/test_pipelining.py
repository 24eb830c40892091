from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest
import pytest_asyncio
from aiosmtplib import SMTPReadTimeoutError, SMTPServerDisconnected

from django_async_smtp.pipelining import (
    CHUNK_SIZE,
    MAX_LINE_LENGTH,
    MAX_REPLY_LENGTH,
    Dialogue,
    Reply,
)

TOO_LONG = Reply(500, b"Line too long.")


@dataclass
class Peer:
    """The server's end of a connection, played by the test."""

    sock: socket.socket
    heard: bytearray = field(default_factory=bytearray)

    async def says(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def hears_line(self) -> bytes:
        """Return the next line, without its CRLF."""
        while b"\r\n" not in self.heard:
            data = await asyncio.get_running_loop().sock_recv(self.sock, 65536)
            assert data, "the client closed the connection"
            self.heard += data
        line, _, self.heard = self.heard.partition(b"\r\n")
        return bytes(line)

    async def hears_message(self) -> bytes:
        """Return a message, its dots undone (RFC 5321 section 4.5.2)."""
        lines = []
        while (line := await self.hears_line()) != b".":
            lines.append(line.removeprefix(b"."))
        return b"".join(line + b"\r\n" for line in lines)

    async def hears_the_end(self) -> None:
        """Wait until the client has closed the connection."""
        while await asyncio.get_running_loop().sock_recv(self.sock, 65536):
            pass

    def closes(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def resets(self) -> None:
        self.sock.setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        self.sock.close()


@dataclass
class Talk:
    """A dialogue, its peer, and how often it called its ``on_end``."""

    dialogue: Dialogue
    peer: Peer
    ends: asyncio.Queue[None]

    async def ended(self) -> None:
        """Wait until the dialogue has told of its end."""
        await asyncio.wait_for(self.ends.get(), 5)
        assert not self.dialogue.is_clean

    async def command(self, *packets: bytes, timeout: float = 5.0) -> Reply:
        """Send a command, and get these packets as the answer."""
        task = asyncio.create_task(self.dialogue.command(b"NOOP", timeout))
        assert await self.peer.hears_line() == b"NOOP"
        for packet in packets:
            self.dialogue.data_received(packet)
        return await task


@pytest_asyncio.fixture
async def talk() -> AsyncIterator[Talk]:
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        ours = socket.create_connection(listener.getsockname())
        sock, _ = listener.accept()
    # What the test does not read stays with the dialogue.
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    sock.setblocking(False)
    transport, _ = await loop.create_connection(asyncio.Protocol, sock=ours)
    ends: asyncio.Queue[None] = asyncio.Queue()
    dialogue = Dialogue(transport, lambda: ends.put_nowait(None))
    with sock:
        yield Talk(dialogue, Peer(sock), ends)
        dialogue.abort()


def bytewise(data: bytes) -> list[bytes]:
    return [bytes([byte]) for byte in data]


REPLIES = {
    b"250 ok\r\n": Reply(250, b"ok"),
    b"250 ok\n": Reply(250, b"ok"),
    b"250\r\n": Reply(250, b""),
    b"250 \r\n": Reply(250, b""),
    b"250-a\r\n250-b c\r\n250 d\r\n": Reply(250, b"a\nb c\nd"),
    b"250-\r\n250\r\n": Reply(250, b"\n"),
    b"550  5.1.1 no\t \r\n": Reply(550, b"5.1.1 no"),
    b"250 \xff\xc3\xa9\r\n": Reply(250, b"\xff\xc3\xa9"),
    b"250 " + b"x" * (MAX_LINE_LENGTH - 6) + b"\r\n": Reply(
        250, b"x" * (MAX_LINE_LENGTH - 6)
    ),
}


@pytest.mark.parametrize("split", [lambda data: [data], bytewise], ids=["whole", "cut"])
@pytest.mark.parametrize("data", REPLIES, ids=lambda data: repr(data[:30]))
@pytest.mark.asyncio
async def test_a_reply_is_the_same_however_it_is_split(
    talk: Talk, data: bytes, split: Callable[[bytes], list[bytes]]
) -> None:
    assert await talk.command(*split(data)) == REPLIES[data]
    assert talk.dialogue.is_clean
    assert talk.ends.empty()


@pytest.mark.asyncio
async def test_a_reply_too_many_answers_no_command(talk: Talk) -> None:
    assert await talk.command(b"250 mine\r\n550 nobody's\r\n") == Reply(250, b"mine")
    assert not talk.dialogue.is_clean
    assert await talk.command(b"251 next\r\n") == Reply(251, b"next")
    assert not talk.dialogue.is_clean


@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n",
        b"\r\n",
        b"\n",
        b"25\r\n",
        b"25\n",
        b"2x0 ok\r\n",
        b"-50 ok\r\n",
        b" 250 ok\r\n",
        b"\xb2\xb5\xb0 ok\r\n",
        b"250-one\r\ntwo\r\n",
        b"\x16\x03\x01\x02\x00\n",
    ],
)
@pytest.mark.parametrize("split", [lambda data: [data], bytewise], ids=["whole", "cut"])
@pytest.mark.asyncio
async def test_what_is_no_reply_has_the_code_minus_one(
    talk: Talk, data: bytes, split: Callable[[bytes], list[bytes]]
) -> None:
    assert (await talk.command(*split(data))).code == -1
    assert not talk.dialogue.is_clean


@pytest.mark.parametrize(
    "packets",
    [
        pytest.param([b"250 " + b"x" * MAX_LINE_LENGTH + b"\r\n"], id="line"),
        pytest.param([b"250 " + b"x" * MAX_LINE_LENGTH], id="line without an end"),
        pytest.param([b"250 "] + [b"x" * 1000] * 9, id="line in pieces"),
        pytest.param([b"250-" + b"x" * 1000 + b"\r\n"] * 40, id="long reply"),
        pytest.param([b"250-\r\n"] * MAX_REPLY_LENGTH, id="empty lines"),
        pytest.param([b"250-\r\n" * MAX_REPLY_LENGTH], id="empty lines at once"),
    ],
)
@pytest.mark.asyncio
async def test_a_reply_without_end_is_cut_off(talk: Talk, packets: list[bytes]) -> None:
    assert await talk.command(*packets) == TOO_LONG
    assert not talk.dialogue.is_clean


@pytest.mark.parametrize(
    "data",
    [
        b"421 bye\r\n",
        b"421-bye\r\n",
        b"421-bye\r\n421 now\r\n",
        b"421 bye\r\n421 bye\r\n",
        b"42",
        b"hello\r\n",
        b"x" * (MAX_LINE_LENGTH + 1),
    ],
    ids=lambda data: repr(data[:20]),
)
@pytest.mark.asyncio
async def test_a_word_unasked_ends_the_dialogue_once(talk: Talk, data: bytes) -> None:
    await talk.peer.says(data)
    await talk.ended()
    talk.peer.closes()
    await talk.dialogue.quit(5)
    assert talk.ends.empty()
    await talk.peer.hears_the_end()


@pytest.mark.parametrize("end", [Peer.closes, Peer.resets])
@pytest.mark.asyncio
async def test_the_servers_end_is_noticed_at_once(
    talk: Talk, end: Callable[[Peer], None]
) -> None:
    assert talk.dialogue.is_clean
    end(talk.peer)
    await talk.ended()
    with pytest.raises(SMTPServerDisconnected) as caught:
        await talk.dialogue.command(b"NOOP", 5)
    assert isinstance(caught.value.__cause__, ConnectionResetError)
    await talk.dialogue.quit(5)
    assert talk.ends.empty()


@pytest.mark.parametrize("end", [Peer.closes, Peer.resets])
@pytest.mark.asyncio
async def test_a_command_ends_with_the_connection(
    talk: Talk, end: Callable[[Peer], None]
) -> None:
    command = asyncio.create_task(talk.dialogue.command(b"NOOP", 5))
    await talk.peer.hears_line()
    end(talk.peer)
    with pytest.raises(SMTPServerDisconnected):
        await command
    assert not talk.dialogue.is_clean


@pytest.mark.asyncio
async def test_a_reply_before_the_end_of_the_connection_counts(talk: Talk) -> None:
    command = asyncio.create_task(talk.dialogue.command(b"NOOP", 5))
    await talk.peer.hears_line()
    await talk.peer.says(b"421 bye\r\n")
    talk.peer.closes()
    assert await command == Reply(421, b"bye")


@pytest.mark.asyncio
async def test_a_dialogue_over_a_closed_connection_has_ended() -> None:
    ends: list[None] = []
    ours, theirs = socket.socketpair()
    with theirs:
        transport, _ = await asyncio.get_running_loop().create_connection(
            asyncio.Protocol, sock=ours
        )
        transport.close()
        dialogue = Dialogue(transport, lambda: ends.append(None))
        assert not dialogue.is_clean
        await dialogue.quit(5)
    assert len(ends) == 1


@pytest.mark.asyncio
async def test_a_missing_reply_leaves_the_dialogue_unclean(talk: Talk) -> None:
    with pytest.raises(SMTPReadTimeoutError):
        await talk.dialogue.command(b"NOOP", 0.01)
    assert not talk.dialogue.is_clean
    talk.dialogue.data_received(b"250 late\r\n")
    assert not talk.dialogue.is_clean
    assert not talk.dialogue.is_clean


@pytest.mark.parametrize("character", [*range(32), 127])
@pytest.mark.asyncio
async def test_a_command_with_a_control_character_is_not_sent(
    talk: Talk, character: int
) -> None:
    for command in (b"RCPT TO:<a%cb>", b"%cNOOP", b"NOOP%c"):
        with pytest.raises(ValueError, match="control characters"):
            await talk.dialogue.command(command % character, 5)
    assert talk.dialogue.is_clean
    await talk.command(b"250 ok\r\n")
    assert not talk.peer.heard


def _random_content(seed: int) -> bytes:
    chance = random.Random(seed)
    pieces = (b".", b"..", b"\r\n", b"\r\n.", b"\r\n.\r\n", b"x", b"x" * 31)
    content = b"".join(chance.choices(pieces, k=chance.choice((3, 30, 30_000))))
    return content + b"\r\n"


CONTENTS = [
    b"plain\r\n",
    b"\r\n",
    b".\r\n",
    b"..\r\n",
    b".\r\n.\r\n.\r\n",
    b".a\r\n..b\r\n...c\r\nd.\r\n",
    b"a\r\n.\r\nQUIT\r\n",
    b".\r\n" * CHUNK_SIZE,
    b"." * (2 * CHUNK_SIZE) + b"\r\n",
    *(b"x" * (n * CHUNK_SIZE - 2) + b"\r\n" for n in (1, 2, 3)),
    *(b"x" * (CHUNK_SIZE + n) + b"\r\n.\r\n..y\r\n" for n in range(-8, 3)),
    *(_random_content(seed) for seed in range(20)),
]


@pytest.mark.asyncio
async def test_any_content_arrives_as_it_was(talk: Talk) -> None:
    for content in CONTENTS:
        message = asyncio.create_task(talk.dialogue.message(content, 5))
        heard = await talk.peer.hears_message()
        assert heard == content
        assert not talk.peer.heard
        await talk.peer.says(b"250 ok\r\n")
        assert await message == Reply(250, b"ok")
        assert talk.dialogue.is_message_written
        assert talk.dialogue.is_clean


LARGE = (b"x" * 62 + b"\r\n") * (20 * CHUNK_SIZE // 64)


@pytest.mark.parametrize("code", [452, 552])
@pytest.mark.parametrize("chunks", [2, 3, 20])
@pytest.mark.asyncio
async def test_a_refusal_stops_a_message_halfway(
    talk: Talk, code: int, chunks: int
) -> None:
    content = LARGE[: chunks * CHUNK_SIZE]
    message = asyncio.create_task(talk.dialogue.message(content, 30))
    await talk.peer.hears_line()
    await talk.peer.says(b"%d too big\r\n" % code)
    # It reads no more: only the reply can wake the writer.
    assert await asyncio.wait_for(message, 5) == Reply(code, b"too big")
    assert not talk.dialogue.is_message_written
    assert not talk.dialogue.is_clean


@pytest.mark.parametrize("chunks", [2, 3, 20])
@pytest.mark.asyncio
async def test_a_yes_to_half_a_message_is_no_reply_to_it(
    talk: Talk, chunks: int
) -> None:
    content = LARGE[: chunks * CHUNK_SIZE]
    message = asyncio.create_task(talk.dialogue.message(content, 30))
    await talk.peer.hears_line()
    await talk.peer.says(b"250 ok\r\n")
    assert (await asyncio.wait_for(message, 5)).code == -1
    assert not talk.dialogue.is_message_written
    assert not talk.dialogue.is_clean


@pytest.mark.parametrize("end", [Peer.closes, Peer.resets])
@pytest.mark.asyncio
async def test_a_message_ends_with_the_connection(
    talk: Talk, end: Callable[[Peer], None]
) -> None:
    message = asyncio.create_task(talk.dialogue.message(LARGE, 30))
    await talk.peer.hears_line()
    end(talk.peer)
    with pytest.raises(SMTPServerDisconnected):
        await asyncio.wait_for(message, 5)
    assert not talk.dialogue.is_message_written
    assert not talk.dialogue.is_clean


@pytest.mark.asyncio
async def test_a_server_that_takes_nothing_more_is_a_timeout(talk: Talk) -> None:
    with pytest.raises(SMTPReadTimeoutError):
        await talk.dialogue.message(LARGE, 0.1)
    assert not talk.dialogue.is_message_written
    assert not talk.dialogue.is_clean


@pytest.mark.asyncio
async def test_a_message_that_got_no_answer_was_written(talk: Talk) -> None:
    with pytest.raises(SMTPReadTimeoutError):
        await talk.dialogue.message(b"Hello\r\n", 0.1)
    assert talk.dialogue.is_message_written
    assert not talk.dialogue.is_clean


@pytest.mark.asyncio
async def test_quit_waits_for_the_servers_goodbye(talk: Talk) -> None:
    quitting = asyncio.create_task(talk.dialogue.quit(5))
    assert await talk.peer.hears_line() == b"QUIT"
    await talk.peer.says(b"221 bye\r\n")
    await talk.peer.hears_the_end()
    await asyncio.wait_for(quitting, 5)


@pytest.mark.asyncio
async def test_quit_does_not_wait_for_a_silent_server(talk: Talk) -> None:
    await asyncio.wait_for(talk.dialogue.quit(0.05), 5)
    assert await talk.peer.hears_line() == b"QUIT"
    await talk.peer.hears_the_end()


@pytest.mark.asyncio
async def test_quit_says_nothing_while_a_reply_is_due(talk: Talk) -> None:
    with pytest.raises(SMTPReadTimeoutError):
        await talk.dialogue.command(b"NOOP", 0.01)
    await talk.dialogue.quit(5)
    assert await talk.peer.hears_line() == b"NOOP"
    await talk.peer.hears_the_end()


@pytest.mark.asyncio
async def test_a_dialogue_can_be_ended_twice(talk: Talk) -> None:
    talk.dialogue.abort()
    talk.dialogue.abort()
    await asyncio.wait_for(talk.dialogue.quit(5), 5)
    await talk.peer.hears_the_end()
