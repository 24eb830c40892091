"""
A fast SMTP server that throws messages away, where smtp-sink is missing or lacks TLS.

    python -m benchmarks.server [--no-pipelining] [--private FOLDER]

It prints its port, and ends with its standard input. A private one wants STARTTLS and a
login, and leaves the certificate of its authority in the folder, as ``ca.pem``.

It does next to nothing for a message, so that the client is what is measured: more than
10,000 messages/s go through one process.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import ssl
import sys
from pathlib import Path
from typing import Final, cast

HOST: Final = "127.0.0.1"
USERNAME: Final = "alice"
PASSWORD: Final = "correct horse battery"
_END: Final = b"\r\n.\r\n"
_PLAIN: Final = base64.b64encode(f"\0{USERNAME}\0{PASSWORD}".encode())


class Server:
    """
    What all connections share.

    :param tls: for STARTTLS; where there is one, a login is wanted after it.
    """

    def __init__(self, tls: ssl.SSLContext | None, *, pipelining: bool) -> None:
        self.tls = tls
        self.pipelining = pipelining

    def extensions(self, *, is_tls: bool) -> list[str]:
        """Return what EHLO offers."""
        offered = {
            "PIPELINING": self.pipelining,
            "8BITMIME": True,
            "STARTTLS": self.tls is not None and not is_tls,
            "AUTH PLAIN": is_tls,
        }
        return [name for name, is_offered in offered.items() if is_offered]


class Connection(asyncio.Protocol):
    """One client; the answers to what came in one packet go out in one."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._transport: asyncio.Transport
        self._buffer = bytearray()
        self._searched = 0
        self._in_body = False
        self._is_tls = False
        self._upgrading: asyncio.Future[None] | None = None
        self._logged_in = False
        self._has_quit = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(b"220 benchmark ESMTP\r\n")

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._upgrading is None:
            self._answer_all()

    def _answer_all(self) -> None:
        replies: list[bytes] = []
        while (reply := self._next_reply()) is not None:
            replies.append(reply)
        if replies:
            self._transport.write(b"".join(replies))
        if self._has_quit:
            self._transport.close()

    def _next_reply(self) -> bytes | None:
        """Answer the next line, or body, that is there; None if it is not."""
        end = _END if self._in_body else b"\r\n"
        at = self._buffer.find(end, max(0, self._searched - len(end)))
        if at < 0:
            self._searched = len(self._buffer)
            return None
        line = b"" if self._in_body else bytes(self._buffer[:at])
        del self._buffer[: at + len(end)]
        self._searched = 0
        if self._in_body:
            self._in_body = False
            return b"250 2.0.0 Ok\r\n"
        return self._answer(line)

    def _answer(self, line: bytes) -> bytes:
        match line[:4].upper():
            case b"EHLO":
                offered = self._server.extensions(is_tls=self._is_tls)
                lines = ["benchmark", *offered, "SIZE 0"]
                text = "".join(f"250-{line}\r\n" for line in lines[:-1])
                return f"{text}250 {lines[-1]}\r\n".encode()
            case b"MAIL" if self._server.tls is not None and not self._logged_in:
                return b"530 5.7.0 Authentication required\r\n"
            case b"DATA":
                # A body may be empty: its end is then the line of the dot.
                self._in_body = True
                self._buffer[:0] = b"\r\n"
                return b"354 Go on\r\n"
            case b"STAR":
                self._upgrading = asyncio.ensure_future(self._start_tls())
                return b"220 Go on\r\n"
            case b"AUTH":
                self._logged_in = line == b"AUTH PLAIN " + _PLAIN
                is_right = self._logged_in
                return b"235 2.7.0 Ok\r\n" if is_right else b"535 5.7.8 Wrong\r\n"
            case b"QUIT":
                self._has_quit = True
                return b"221 2.0.0 Bye\r\n"
            case _:
                return b"250 2.1.0 Ok\r\n"

    async def _start_tls(self) -> None:
        assert self._server.tls is not None
        try:
            upgraded = await asyncio.get_running_loop().start_tls(
                self._transport, self, self._server.tls, server_side=True
            )
        except OSError:
            return
        assert upgraded is not None
        self._transport, self._is_tls, self._upgrading = upgraded, True, None
        # What came with the end of the handshake came before there was a transport.
        self._answer_all()


async def serve(server: Server) -> None:
    """Serve until standard input ends."""
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(lambda: Connection(server), HOST, backlog=1024)
    print(listener.sockets[0].getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)


def context_of_new_authority(folder: Path) -> ssl.SSLContext:
    """Return a server's context, and leave the authority's certificate there."""
    import trustme

    ca = trustme.CA()
    ca.cert_pem.write_to_path(folder / "ca.pem")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert(HOST).configure_cert(context)
    return context


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--no-pipelining", action="store_true")
    parser.add_argument("--private", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    folder = arguments.private
    tls = context_of_new_authority(folder) if folder else None
    asyncio.run(serve(Server(tls, pipelining=not arguments.no_pipelining)))


if __name__ == "__main__":
    main()
