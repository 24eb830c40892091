"""
From a host name to a connection that is logged in, step by step, over aiosmtplib.

Sending takes all steps at once (``Opening.run``), a diagnosis one after the other.

What this package leans on in aiosmtplib beyond its documentation; a test holds the
lowest and the newest version to it:

- ``SMTP.transport`` is set when the connection is made, and replaced by STARTTLS; its
  protocol may be set to another one (``pipelining.Dialogue``).
- ``SMTP.ehlo()``, ``helo()`` and ``auth_…()`` go through ``SMTP.execute_command()``.
- ``SMTP.protocol._buffer`` holds what was received and not read (``_forget_input``).
- A line that is no reply raises -1, "Malformed SMTP response line: …"; one that is too
  long "Response too long" (``errors.MALFORMED``, ``errors.TOO_LONG``).
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

import aiosmtplib

from . import errors
from .hints import explained
from .logs import redacted
from .pipelining import CHUNK_SIZE, Transcript

if TYPE_CHECKING:
    import ssl

    from .options import Options

# What getaddrinfo() returns for one address.
Address = tuple[Any, Any, int, str, Any]

# Seconds between the attempts on a host's several addresses (RFC 8305).
ATTEMPT_DELAY: Final = 0.25

# Seconds that a transport gets to notice the end of its connection.
ABORT_DELAY: Final = 0.05

# As in smtplib and aiosmtplib, the method that does not show the password first.
AUTH_METHODS: Final = ("cram-md5", "plain", "login")
# The server does not know the method after all: not a word about the password.
METHOD_UNKNOWN: Final = {500, 502, 504}
ALREADY_AUTHENTICATED: Final = 503


class StageTimes(dict[errors.Stage, float]):
    """Seconds by stage, in the order in which they ended; the clock is running."""

    def __init__(self) -> None:
        super().__init__()
        self._since = time.monotonic()

    def end(self, stage: errors.Stage) -> None:
        """Add the seconds since the end of the stage before, or since the beginning."""
        now = time.monotonic()
        self[stage] = self.get(stage, 0.0) + now - self._since
        self._since = now


class Opening:
    """
    What happens between the options and a session.

    Each step raises ``SMTPError``; after that, ``abort`` is all that is left.

    :ivar client: the connection, from the greeting on.
    :ivar knows_ehlo: whether the server does; else it was told HELO.
    :ivar auth_method: the method that logged in; empty before.
    :ivar stages: how long the steps of ``run`` took.
    """

    def __init__(self, options: Options, transcript: Transcript | None = None) -> None:
        self.options = options
        self.stages = StageTimes()
        self.client = _Client(options, transcript)
        self.knows_ehlo = True
        self.auth_method = ""
        self._socket: socket.socket | None = None

    async def run(self, addresses: list[Address] | None = None) -> aiosmtplib.SMTP:
        """
        Take all steps, as the options say, and return the connection.

        :param addresses: the addresses to connect to, instead of all that the host has.
        """
        self.stages = StageTimes()
        with translated("connect", self.options):
            self.take(await connect(self.options, addresses))
        self.stages.end("connect")
        await self.greeting()
        self.stages.end("tls" if self.options.use_ssl else "greeting")
        await self.ehlo()
        self.stages.end("ehlo")
        if self.options.use_tls:
            await self.starttls()
            self.stages.end("tls")
            await self.ehlo()
            self.stages.end("ehlo")
        if self.options.uses_login:
            await self.log_in()
            self.stages.end("auth")
        return self.client

    def take(self, connected: socket.socket) -> None:
        """Go on with a socket that is connected."""
        self._socket = connected

    def abort(self) -> None:
        """
        Close the socket, whoever has it by now.

        A transport that still has it must notice first: it would act on the file
        descriptor, and that may be another connection's by then.
        """
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            loop = asyncio.get_running_loop()
            loop.call_later(ABORT_DELAY, self._socket.close)

    async def aclose(self) -> None:
        """Close as ``abort`` does, and wait for it, for a loop that ends then."""
        self.abort()
        if self._socket is not None and self._socket.fileno() != -1:
            await asyncio.sleep(ABORT_DELAY)

    def require_connection(self, stage: errors.Stage) -> None:
        """
        Check that the server has not ended the connection since its last reply.

        What it offers is forgotten then, and would seem not to be offered.

        :raises Disconnected: it has.
        """
        if not self.client.is_connected:
            lost = aiosmtplib.SMTPServerDisconnected("Connection lost")
            raise translate(lost, stage, self.options) from lost

    async def greeting(self) -> aiosmtplib.SMTPResponse:
        """Read the greeting, with ``use_ssl`` after a TLS handshake."""
        try:
            greeting = await self.client.connect(sock=self._socket)
        except (aiosmtplib.SMTPException, OSError) as error:
            if isinstance(error, aiosmtplib.SMTPResponseException):
                self.client.note_reply(error.code, error.message)
            stage: errors.Stage = "tls" if _is_of_handshake(error) else "greeting"
            raise translate(error, stage, self.options) from error
        self.client.note_reply(*greeting)
        return greeting

    async def ehlo(self) -> None:
        """Say EHLO, or HELO where the server does not know it."""
        with translated("ehlo", self.options):
            try:
                await self.client.ehlo()
            except aiosmtplib.SMTPResponseException:
                if not self.client.is_connected:
                    raise
                _forget_input(self.client)
                await self.client.helo()
                self.knows_ehlo = False

    async def starttls(self) -> None:
        """Upgrade to TLS; EHLO must follow."""
        client = self.client
        self.require_connection("tls")
        with translated("tls", self.options):
            if not client.supports_extension("starttls"):
                raise aiosmtplib.SMTPNotSupported("STARTTLS is not offered")
            client.note("C", "STARTTLS")
            try:
                reply = await client.starttls()
            except aiosmtplib.SMTPResponseException as error:
                client.note_reply(error.code, error.message)
                raise
            client.note_reply(*reply)
            # aiosmtplib before 5.1.2 keeps what came in plaintext behind the reply
            # to STARTTLS, and takes it for the answer to EHLO (RFC 3207 section 4.2).
            _forget_input(client)

    async def log_in(self) -> None:
        """Log in with the first method that both sides know; one no is final."""
        options, client = self.options, self.client
        self.require_connection("auth")
        offered = client.server_auth_methods
        methods = [name for name in AUTH_METHODS if name in offered]
        with translated("auth", options):
            if not client.supports_extension("auth"):
                after_tls = "" if options.use_tls or options.use_ssl else " without TLS"
                raise aiosmtplib.SMTPNotSupported(
                    f"a user name is set, but AUTH is not offered{after_tls}"
                )
            if not methods:
                raise aiosmtplib.SMTPNotSupported(
                    f"no AUTH method in common: it offers {' '.join(offered)}, this "
                    f"client knows {' '.join(AUTH_METHODS)}"
                )
            for method in methods:
                try:
                    await self._authenticate(method)
                except aiosmtplib.SMTPException as error:
                    code = getattr(error, "code", None)
                    if code == ALREADY_AUTHENTICATED:
                        return
                    if code not in METHOD_UNKNOWN or method == methods[-1]:
                        raise self._without_secrets(error) from None
                else:
                    self.auth_method = method
                    return

    async def _authenticate(self, method: str) -> None:
        username, password = self.options.username, self.options.password
        if method == "cram-md5":
            await self.client.auth_crammd5(username, password)
        elif method == "plain":
            await self.client.auth_plain(username, password)
        else:
            await self.client.auth_login(username, password)

    def _without_secrets(
        self, error: aiosmtplib.SMTPException
    ) -> aiosmtplib.SMTPException:
        secrets = (self.options.password, self.options.username)
        if isinstance(error, aiosmtplib.SMTPResponseException):
            error.message = redacted(error.message, secrets)
            error.args = (error.code, error.message)
        # Error reports show the variables of a traceback's frames.
        error.__context__ = None
        return error.with_traceback(None)


class _Client(aiosmtplib.SMTP):
    """
    aiosmtplib's client, with a transcript.

    :ivar secured: set when the connection is made, with ``use_ssl`` after the TLS
        handshake: when aiosmtplib sets its transport.
    :ivar ssl_object: the TLS connection, also after its end; None before.
    """

    def __init__(self, options: Options, transcript: Transcript | None) -> None:
        self.secured = asyncio.Event()
        self.ssl_object: ssl.SSLObject | None = None
        self._transcript = transcript
        self._secrets = (options.password, options.username)
        super().__init__(
            hostname=options.host,
            timeout=options.timeout,
            local_hostname=options.local_hostname,
            use_tls=options.use_ssl,
            start_tls=False,
            tls_context=options.ssl_context,
        )

    @property
    def transport(self) -> asyncio.BaseTransport | None:
        return self._transport

    @transport.setter
    def transport(self, transport: asyncio.BaseTransport | None) -> None:
        self._transport = transport
        if transport is not None:
            self.ssl_object = transport.get_extra_info("ssl_object")
            self.secured.set()

    async def execute_command(
        self, *args: bytes, **options: Any
    ) -> aiosmtplib.SMTPResponse:
        self.note("C", _without_credentials(args))
        try:
            reply = await super().execute_command(*args, **options)
        except aiosmtplib.SMTPResponseException as error:
            self.note_reply(error.code, error.message)
            raise
        self.note_reply(*reply)
        return reply

    def note(self, side: str, line: str) -> None:
        """Add a line to the transcript."""
        if self._transcript is not None:
            self._transcript(side, line)

    def note_reply(self, code: int, text: str) -> None:
        """Add a reply to the transcript, without credentials that it quotes."""
        if self._transcript is None:
            return
        *lines, last = redacted(text, self._secrets).split("\n")
        for line in lines:
            self._transcript("S", f"{code}-{line}")
        no_reply = errors.MALFORMED
        whole = f"{code} {last}" if code != -1 else last.removeprefix(no_reply)
        self._transcript("S", whole)


def _without_credentials(command: tuple[bytes, ...]) -> str:
    verb, *arguments = (word.decode("ascii", "replace") for word in command)
    if verb in {"EHLO", "HELO"}:
        return " ".join((verb, *arguments))
    if verb == "AUTH":
        return " ".join((verb, *arguments[:1], *("***" for _ in arguments[1:])))
    # All that comes between is part of a login.
    return "***"


def _forget_input(client: aiosmtplib.SMTP) -> None:
    """Drop what was received: a line that is no reply would stay, and fail them all."""
    getattr(client.protocol, "_buffer", bytearray()).clear()


def _is_of_handshake(error: BaseException | None) -> bool:
    """Whether connecting failed before the server could send its greeting."""
    if isinstance(error, aiosmtplib.SMTPResponseException):
        return False
    cause = error.__cause__ if isinstance(error, aiosmtplib.SMTPException) else error
    return not isinstance(cause, aiosmtplib.SMTPException)


def translate(
    error: aiosmtplib.SMTPException | OSError,
    stage: errors.Stage,
    options: Options,
    *,
    maybe_delivered: bool = False,
) -> errors.SMTPError:
    """Make this package's error of aiosmtplib's or the system's, with its hint."""
    made = errors.translate(
        error, stage, options.server, maybe_delivered=maybe_delivered
    )
    return explained(made, options)


@contextmanager
def translated(stage: errors.Stage, options: Options) -> Iterator[None]:
    """Raise this package's errors for those that come from within."""
    try:
        yield
    except (aiosmtplib.SMTPException, OSError) as error:
        raise translate(error, stage, options) from error


async def connect(
    options: Options, addresses: list[Address] | None = None
) -> socket.socket:
    """
    Connect to the first of the host's addresses that answers (RFC 8305).

    :param addresses: those of the host, where they are known.
    :raises SMTPConnectError: with the ``OSError`` as its cause.
    """
    try:
        async with asyncio.timeout(options.timeout):
            return await _first_to_answer(
                addresses or await resolve(options), options.source_address
            )
    except OSError as error:
        raise aiosmtplib.SMTPConnectError(f"{options.server}: {error}") from error


async def resolve(options: Options) -> list[Address]:
    """Return the host's addresses, in the system's order of preference."""
    host, port = options.host, options.port
    try:
        # An address needs no DNS, and so no thread.
        return socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )
    except UnicodeError:
        # As in "smtp..example.com".
        raise socket.gaierror(socket.EAI_NONAME, "not a host name") from None
    except socket.gaierror:
        return await _looked_up(host, port)


async def _looked_up(host: str, port: int) -> list[Address]:
    answer: Future[list[Address]] = Future()

    def look_up() -> None:
        if answer.set_running_or_notify_cancel():
            try:
                found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                answer.set_result(found)
            except BaseException as error:
                answer.set_exception(error)

    try:
        # Not a thread of an executor: a process waits for those before it ends, and
        # DNS that does not answer would hold it up after the time limit.
        threading.Thread(target=look_up, daemon=True).start()
    except RuntimeError:
        # At exit no thread can be started any more, and nobody else has to wait.
        look_up()
    return await asyncio.wrap_future(answer)


async def _first_to_answer(
    addresses: list[Address], source_address: tuple[str, int] | None
) -> socket.socket:
    attempts: list[asyncio.Task[socket.socket]] = []
    winner = None
    try:
        for address in addresses:
            connecting = connect_to(address, source_address)
            attempts.append(asyncio.create_task(connecting))
            is_last = len(attempts) == len(addresses)
            winner = await _winner(attempts, None if is_last else ATTEMPT_DELAY)
            if winner is not None:
                return winner.result()
        error = attempts[-1].exception()
        raise error if error is not None else OSError("no address")
    finally:
        for attempt in attempts:
            if attempt is not winner:
                attempt.cancel()
                attempt.add_done_callback(_close_unused)


async def _winner(
    attempts: list[asyncio.Task[socket.socket]], patience: float | None
) -> asyncio.Task[socket.socket] | None:
    """Wait for a success, until all attempts failed or ``patience`` is over."""
    loop = asyncio.get_running_loop()
    end = None if patience is None else loop.time() + patience
    while running := [attempt for attempt in attempts if not attempt.done()]:
        left = None if end is None else end - loop.time()
        if left is not None and left <= 0:
            break
        await asyncio.wait(running, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if any(not attempt.exception() for attempt in attempts if attempt.done()):
            break
    for attempt in attempts:
        if attempt.done() and attempt.exception() is None:
            return attempt
    return None


async def connect_to(
    address: Address, source_address: tuple[str, int] | None
) -> socket.socket:
    """Connect to one address; :raises OSError: it failed."""
    family, kind, protocol, _, target = address
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setblocking(False)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            # Otherwise the kernel holds megabytes, and their way to a slow server
            # looks like its silence.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, CHUNK_SIZE)
        if source_address is not None:
            sock.bind(source_address)
        await asyncio.get_running_loop().sock_connect(sock, target)
    except OSError as error:
        sock.close()
        if error.errno is not None and not isinstance(error, socket.gaierror):
            # asyncio's words leave out what happened.
            error.strerror = os.strerror(error.errno)
        raise
    except BaseException:
        sock.close()
        raise
    return sock


def _close_unused(attempt: asyncio.Task[socket.socket]) -> None:
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().close()
