"""What can be learned about a server beside the way of a message."""

from __future__ import annotations

import asyncio
import errno
import re
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from ..errors import SMTPError
from ..hints import HINTS
from ..opening import Address, Opening, connect_to

if TYPE_CHECKING:
    import socket

    from ..options import Options

# Seconds that the other addresses get after the first one answered.
PATIENCE: Final = 3.0
# Seconds that something other than an SMTP server gets to say what it is, at most.
PROBE_TIMEOUT: Final = 3.0
# Makes web servers speak, which wait for the client; a mail server has greeted by then.
HTTP_REQUEST: Final = b"HEAD / HTTP/1.0\r\n\r\n"
# The hints that name a protocol by its server's first line.
PROTOCOLS: Final = {"http-server", "ssh-server", "imap-server", "pop3-server"}


@dataclass(frozen=True)
class Attempt:
    """
    An attempt to connect to one address.

    :ivar outcome: the socket, or why there is none.
    """

    address: Address
    seconds: float
    outcome: socket.socket | OSError

    @property
    def is_connected(self) -> bool:
        """Whether the address answered."""
        return not isinstance(self.outcome, OSError)

    def close(self) -> None:
        """Close the connection, where there is one."""
        if not isinstance(self.outcome, OSError):
            self.outcome.close()


async def connect_to_each(
    addresses: list[Address], options: Options, patience: float = PATIENCE
) -> list[Attempt]:
    """
    Connect to all addresses at once.

    :param patience: seconds that the others get after the first one answered.
    """
    running = [asyncio.create_task(_attempt(address, options)) for address in addresses]
    try:
        await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        while not all(task.done() for task in running):
            has_one = any(
                task.done() and task.result().is_connected for task in running
            )
            await asyncio.wait(
                [task for task in running if not task.done()],
                timeout=patience if has_one else None,
                return_when="ALL_COMPLETED" if has_one else "FIRST_COMPLETED",
            )
            if has_one:
                break
        return [
            task.result() if task.done() else _unanswered(address, patience)
            for task, address in zip(running, addresses, strict=True)
        ]
    except BaseException:
        for task in running:
            task.add_done_callback(_close_unused)
        raise
    finally:
        for task in running:
            task.cancel()
        await asyncio.wait(running)


async def _attempt(address: Address, options: Options) -> Attempt:
    start = time.monotonic()
    try:
        async with asyncio.timeout(options.timeout):
            connected = await connect_to(address, options.source_address)
    except OSError as error:
        if not error.args:
            return _unanswered(address, options.timeout)
        return Attempt(address, time.monotonic() - start, error)
    return Attempt(address, time.monotonic() - start, connected)


def _unanswered(address: Address, seconds: float) -> Attempt:
    error = TimeoutError(errno.ETIMEDOUT, f"no answer within {round(seconds, 1):g} s")
    return Attempt(address, seconds, error)


def _close_unused(attempt: asyncio.Task[Attempt]) -> None:
    if not attempt.cancelled():
        attempt.result().close()


async def speaks_tls(address: Address, options: Options) -> bool:
    """Whether a server speaks TLS from the start; any certificate is an answer."""
    try:
        async with _connected(address, options, tls=True):
            return True
    except ssl.SSLCertVerificationError:
        return True
    except OSError:
        return False


async def first_line(address: Address, options: Options, *, tls: bool) -> str:
    """Return what a server says that is not spoken to in SMTP; empty: nothing."""
    for say in (b"", HTTP_REQUEST):
        with suppress(OSError):
            if line := await _first_line(address, options, tls=tls, say=say):
                return line
    return ""


async def _first_line(
    address: Address, options: Options, *, tls: bool, say: bytes
) -> str:
    """:raises OSError: no connection, no TLS, or it says nothing."""
    async with _connected(address, options, tls=tls) as (reader, writer):
        async with asyncio.timeout(_patience(options)):
            writer.write(say)
            line = await reader.read(200)
        return line.decode("utf-8", "replace").partition("\n")[0].strip()


@asynccontextmanager
async def _connected(
    address: Address, options: Options, *, tls: bool
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """:raises OSError: no connection, or no TLS."""
    context = options.ssl_context or ssl.create_default_context()
    async with asyncio.timeout(_patience(options)):
        reader, writer = await asyncio.open_connection(
            sock=await connect_to(address, options.source_address),
            ssl=context if tls else None,
            server_hostname=options.host if tls else None,
        )
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


def _patience(options: Options) -> float:
    """Return the seconds for an answer; several must fit into the time of a check."""
    return min(PROBE_TIMEOUT, options.timeout / 2)


def protocol_of(line: str) -> str | None:
    """Return the id of the hint that names the protocol of a server's first line."""
    for hint in HINTS:
        if hint.id in PROTOCOLS and re.search(hint.text, line, re.I):
            return hint.id
    return None


@dataclass(frozen=True)
class Certificate:
    """
    What a server's verified certificate says.

    :ivar names: the host names and addresses that it is for.
    :ivar issuer: who signed it.
    :ivar seconds_left: until it expires.
    """

    names: tuple[str, ...]
    issuer: str
    seconds_left: float

    @classmethod
    def of(cls, peer: dict[str, Any]) -> Certificate:
        """Read what ``ssl.SSLSocket.getpeercert()`` returns."""
        subject, issuer = (
            dict(pair for part in peer.get(name, ()) for pair in part)
            for name in ("subject", "issuer")
        )
        names = [name for _, name in peer.get("subjectAltName", ())]
        organisation = issuer.get("organizationName", "")
        return cls(
            names=tuple(names or filter(None, [subject.get("commonName")])),
            issuer=" ".join(filter(None, [organisation, issuer.get("commonName", "")])),
            seconds_left=ssl.cert_time_to_seconds(peer["notAfter"]) - time.time(),
        )


async def names_in_certificate(address: Address, options: Options) -> tuple[str, ...]:
    """
    Return the names that the server's certificate is for; empty: cannot be told.

    The certificate is verified but for the name, and nothing is sent but STARTTLS.
    """
    context = ssl.create_default_context()
    context.check_hostname = False
    if options.ssl_context is not None:
        trusted = options.ssl_context.get_ca_certs(binary_form=True)
        if trusted:
            context.load_verify_locations(cadata=b"".join(trusted))
    opening = Opening(replace(options, ssl_context=context))
    try:
        opening.take(await connect_to(address, options.source_address))
        await opening.greeting()
        if options.use_tls:
            await opening.ehlo()
            await opening.starttls()
        secured: Any = opening.client.ssl_object
        return Certificate.of(secured.getpeercert()).names
    except (OSError, SMTPError):
        return ()
    finally:
        await opening.aclose()


def chain_length(secured: ssl.SSLObject) -> int:
    """Return how many certificates were verified; 0 where Python does not tell."""
    # Python 3.13 and later.
    verified = getattr(secured, "get_verified_chain", None)
    return len(verified()) if verified is not None else 0
