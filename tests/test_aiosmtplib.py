"""What this package leans on in aiosmtplib; see opening.py."""

from __future__ import annotations

import asyncio
import ssl
from base64 import b64encode
from typing import Any

import aiosmtplib
import pytest

from django_async_smtp import errors

from .servers import PASSWORD, USERNAME, Script, ScriptedServer


class Recorder(aiosmtplib.SMTP):
    """Knows the commands that went through ``execute_command()``."""

    def __init__(self, **options: Any) -> None:
        self.commands: list[bytes] = []
        super().__init__(start_tls=False, timeout=10, **options)

    async def execute_command(
        self, *args: bytes, **options: Any
    ) -> aiosmtplib.SMTPResponse:
        self.commands.append(b" ".join(args))
        return await super().execute_command(*args, **options)


async def connected(server: ScriptedServer, **options: Any) -> Recorder:
    client = Recorder(hostname=server.host, port=server.port, **options)
    assert client.transport is None
    await client.connect()
    return client


@pytest.mark.asyncio
async def test_the_transport_is_that_of_the_connection_and_then_of_tls(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    with ScriptedServer(tls=server_tls) as server:
        client = await connected(server, tls_context=client_tls)
        plain: Any = client.transport
        assert plain.get_extra_info("ssl_object") is None
        await client.ehlo()
        await client.starttls()
        secured: Any = client.transport
        assert secured is not plain
        assert secured.get_extra_info("ssl_object").version()
        client.close()


@pytest.mark.asyncio
async def test_another_protocol_can_take_the_transport_over() -> None:
    received = asyncio.Event()

    class Listener(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            assert data == b"250 ok\r\n"
            received.set()

    with ScriptedServer() as server:
        client = await connected(server)
        transport: Any = client.transport
        transport.set_protocol(Listener())
        transport.write(b"NOOP\r\n")
        await asyncio.wait_for(received.wait(), 10)
        transport.abort()


@pytest.mark.asyncio
async def test_all_commands_up_to_the_login_can_be_watched() -> None:
    with ScriptedServer(extensions=("AUTH PLAIN LOGIN CRAM-MD5",)) as server:
        client = await connected(server, local_hostname="me.example")
        await client.ehlo()
        await client.helo()
        await client.auth_plain(USERNAME, PASSWORD)
        await client.auth_login(USERNAME, PASSWORD)
        await client.auth_crammd5(USERNAME, PASSWORD)
        client.close()
        assert client.commands == server.lines
    assert client.commands[:2] == [b"EHLO me.example", b"HELO me.example"]
    assert client.commands[4] == b64encode(PASSWORD.encode())


@pytest.mark.asyncio
async def test_what_was_not_read_is_in_the_buffer_and_nothing_else() -> None:
    script: Script = {"ehlo": b"what?\r\n250 late\r\n"}
    with ScriptedServer(scripts=(script,)) as server:
        client = await connected(server)
        protocol: Any = client.protocol
        assert protocol._buffer == bytearray()
        with pytest.raises(aiosmtplib.SMTPResponseException):
            await client.ehlo()
        assert bytes(protocol._buffer).startswith(b"what?")
        protocol._buffer.clear()
        assert (await client.helo()).code == 250
        client.close()


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (b"what?\r\n", errors.MALFORMED + "what?"),
        (b"250 " + b"x" * 40000 + b"\r\n", errors.TOO_LONG),
    ],
    ids=["malformed", "too long"],
)
@pytest.mark.asyncio
async def test_what_is_no_reply_is_told_in_known_words(said: bytes, words: str) -> None:
    with ScriptedServer(scripts=({"ehlo": said},)) as server:
        client = await connected(server)
        with pytest.raises(aiosmtplib.SMTPResponseException) as caught:
            await client.ehlo()
        assert caught.value.message.strip() == words
        client.close()
