"""One SMTP session: connect, TLS, log in, send envelopes, quit."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

import aiosmtplib

from . import errors
from .logs import redacted
from .pipelining import CHUNK_SIZE, TOO_LONG, Dialogue, Reply

if TYPE_CHECKING:
    from .envelope import Envelope
    from .options import Options

# Seconds between the attempts on a host's several addresses (RFC 8305).
ATTEMPT_DELAY: Final = 0.25
# Seconds that a server gets to answer a NOOP: a firewall that has forgotten the
# connection is silent.
PING_TIMEOUT: Final = 5.0
# Seconds that a server gets to answer a QUIT.
QUIT_TIMEOUT: Final = 2.0

# As in smtplib and aiosmtplib, the method that does not show the password first.
AUTH_METHODS: Final = ("cram-md5", "plain", "login")
# The server does not know the method after all: not a word about the password.
METHOD_UNKNOWN: Final = {500, 502, 504}
ALREADY_AUTHENTICATED: Final = 503


@dataclass(frozen=True)
class Receipt:
    """
    What the server took.

    :ivar accepted: the recipients that it took the message for.
    :ivar refused: the others: ``{address: reply}``.
    :ivar reply: its answer to the message, often with a queue id.
    """

    accepted: tuple[str, ...]
    refused: dict[str, Reply]
    reply: Reply


class Session:
    """
    A connection that is logged in and ready for a mail transaction.

    Belongs to the event loop that opened it. For one task at a time.

    :ivar on_end: called once, when the server ends the connection.
    :ivar sent: how many messages it took.
    :ivar is_used: whether it was handed over or sent before, and may have died since.
    :ivar was_ended: whether the server ended it.
    :ivar end_of_life: the loop's time at which to replace it.
    """

    def __init__(self, options: Options, client: aiosmtplib.SMTP) -> None:
        self.options = options
        self.extensions = frozenset(client.esmtp_extensions)
        self._pipelines = options.pipelining and "pipelining" in self.extensions
        self.on_end: Callable[[], None] = lambda: None
        self.sent = 0
        self.is_used = False
        self.was_ended = False
        self.end_of_life = math.inf
        self._last_used = asyncio.get_running_loop().time()
        self._dialogue = Dialogue(
            cast("asyncio.Transport", client.transport), self._ended
        )

    def __repr__(self) -> str:
        state = "ready" if self.is_clean else "ended"
        return f"<Session with {self.options.server}: {state}, {self.sent} sent>"

    @property
    def is_clean(self) -> bool:
        """Whether it can take a message: open, and no reply is due or came unasked."""
        return self._dialogue.is_clean

    @property
    def idle_seconds(self) -> float:
        """Seconds since the server last answered."""
        return asyncio.get_running_loop().time() - self._last_used

    @classmethod
    async def open(cls, options: Options) -> Session:
        """
        Connect, upgrade to TLS and log in, as the options say.

        :raises SMTPError: it failed; nothing stays open.
        """
        opening = _Opening(options)

        async def run() -> Session:
            return cls(options, await opening.run())

        running = asyncio.create_task(run())
        try:
            return await asyncio.shield(running)
        except BaseException:
            # Before Python 3.12, aiosmtplib's wait_for() can lose a cancellation:
            # then it is the end of the connection that ends it.
            running.cancel()
            running.add_done_callback(_retrieve)
            opening.abort()
            raise

    async def send(self, envelope: Envelope) -> Receipt:
        """
        Send one message: a mail transaction (RFC 5321 section 3.3).

        After an error the session may be used again if it ``is_clean``.

        :raises SMTPError: nothing was delivered, but see its ``maybe_delivered``.
        :raises ValueError: the envelope needs SMTPUTF8, and the server has it not.
        """
        mail = self._mail_command(envelope)
        try:
            receipt = await self._transact(mail, envelope)
        except (errors.ResponseError, errors.RecipientsRefused):
            await self._reset()
            raise
        except BaseException:
            # A reply may still be on its way: it must not answer a later command.
            self.abort()
            raise
        self.sent += 1
        self.is_used = True
        self._last_used = asyncio.get_running_loop().time()
        return receipt

    async def ping(self) -> bool:
        """Ask with NOOP whether the server is still there; end the session if not."""
        try:
            with _translated("mail", self.options.server):
                timeout = min(PING_TIMEOUT, self.options.timeout)
                reply = self._usable(await self._dialogue.command(b"NOOP", timeout))
                # A farewell (421) may be in the same packet.
                await asyncio.sleep(0)
        except errors.SMTPError:
            reply = None
        except BaseException:
            self.abort()
            raise
        if reply is None or reply.code != 250 or not self.is_clean:
            self.abort()
            return False
        self._last_used = asyncio.get_running_loop().time()
        return True

    async def quit(self) -> None:
        """Say QUIT and close, within two seconds. Never fails."""
        await self._dialogue.quit(QUIT_TIMEOUT)

    def abort(self) -> None:
        """Close at once."""
        self._dialogue.abort()

    def _ended(self) -> None:
        self.was_ended = True
        self.on_end()

    async def _transact(self, mail: bytes, envelope: Envelope) -> Receipt:
        server = self.options.server
        recipients = [
            f"RCPT TO:<{address}>".encode() for address in envelope.recipients
        ]
        with _translated("mail", server):
            if self._pipelines:
                group = [mail, *recipients, b"DATA"]
                await self._dialogue.send(group, self.options.timeout)
            reply = await self._answer(mail)
            if reply.code != 250:
                raise aiosmtplib.SMTPSenderRefused(*_words(reply), envelope.sender)
        accepted: list[str] = []
        refused: dict[str, Reply] = {}
        with _translated("rcpt", server):
            for recipient, command in zip(envelope.recipients, recipients, strict=True):
                reply = await self._answer(command)
                if reply.code in (250, 251):
                    accepted.append(recipient)
                else:
                    refused[recipient] = reply
                if reply.code == 421:
                    # The session is over, also for those accepted before.
                    accepted.clear()
                    break
            if refused and not accepted:
                raise aiosmtplib.SMTPRecipientsRefused(
                    [
                        aiosmtplib.SMTPRecipientRefused(*_words(no), address)
                        for address, no in refused.items()
                    ]
                )
        with _translated("data", server):
            reply = await self._answer(b"DATA")
            if reply.code != 354:
                raise aiosmtplib.SMTPDataError(*_words(reply))
        reply = await self._message(envelope.content)
        return Receipt(tuple(accepted), refused, reply)

    def _mail_command(self, envelope: Envelope) -> bytes:
        command = f"MAIL FROM:<{envelope.sender}>"
        if "size" in self.extensions:
            command += f" SIZE={len(envelope.content)}"
        if "8bitmime" in self.extensions and not envelope.content.isascii():
            command += " BODY=8BITMIME"
        if envelope.smtputf8_error is not None:
            if "smtputf8" not in self.extensions:
                raise ValueError(envelope.smtputf8_error)
            command += " SMTPUTF8"
        return command.encode()

    async def _answer(self, command: bytes) -> Reply:
        """Return the reply to a command of a transaction, sent by now or not."""
        if not self._pipelines:
            return await self._command(command)
        return self._usable(await self._dialogue.reply(self.options.timeout))

    async def _command(self, line: bytes) -> Reply:
        return self._usable(await self._dialogue.command(line, self.options.timeout))

    def _usable(self, reply: Reply) -> Reply:
        if reply is TOO_LONG:
            raise aiosmtplib.SMTPResponseException(*_words(reply))
        if reply.code == 421:
            self.abort()
        return reply

    async def _message(self, content: bytes) -> Reply:
        dialogue, server = self._dialogue, self.options.server
        try:
            reply = self._usable(await dialogue.message(content, self.options.timeout))
            if reply.code != 250:
                raise aiosmtplib.SMTPDataError(*_words(reply))
        except aiosmtplib.SMTPDataError as error:
            # Garbage says nothing about what became of the message.
            lost = error.code == -1 and dialogue.is_message_written
            raise errors.translate(
                error, "body", server, maybe_delivered=lost
            ) from error
        except aiosmtplib.SMTPException as error:
            raise errors.translate(
                error, "body", server, maybe_delivered=dialogue.is_message_written
            ) from error
        return reply

    async def _reset(self) -> None:
        """Make the server forget a transaction that was broken off."""
        try:
            if self._dialogue.is_in_step:
                await self._dialogue.settle(self.options.timeout)
            if not self.is_clean:
                self.abort()
                return
            reply = await self._command(b"RSET")
        except BaseException as error:
            self.abort()
            if not isinstance(error, aiosmtplib.SMTPException):
                raise
        else:
            if reply.code != 250:
                self.abort()


class _Opening:
    """What happens between the options and a session, through aiosmtplib."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.server = options.server
        self.socket: socket.socket | None = None

    async def run(self) -> aiosmtplib.SMTP:
        options = self.options
        with _translated("connect", self.server):
            self.socket = await connect(options)
        client = aiosmtplib.SMTP(
            hostname=options.host,
            sock=self.socket,
            timeout=options.timeout,
            local_hostname=options.local_hostname,
            use_tls=options.use_ssl,
            start_tls=False,
            tls_context=options.ssl_context,
        )
        await self._greeting(client)
        await self._ehlo(client)
        if options.use_tls:
            await self._starttls(client)
            await self._ehlo(client)
        if options.uses_login:
            await self._log_in(client)
        return client

    def abort(self) -> None:
        """
        Close the socket, whoever has it by now.

        A transport that still has it must notice first: it would act on the file
        descriptor, and that may be another connection's by then.
        """
        if self.socket is not None:
            with suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)
            asyncio.get_running_loop().call_later(0.05, self.socket.close)

    async def _greeting(self, client: aiosmtplib.SMTP) -> None:
        try:
            await client.connect()
        except (aiosmtplib.SMTPException, OSError) as error:
            stage: errors.Stage = "tls" if _is_of_handshake(error) else "greeting"
            raise errors.translate(error, stage, self.server) from error

    async def _ehlo(self, client: aiosmtplib.SMTP) -> None:
        with _translated("ehlo", self.server):
            try:
                await client.ehlo()
            except aiosmtplib.SMTPResponseException:
                if not client.is_connected:
                    raise
                _forget_input(client)
                await client.helo()

    async def _starttls(self, client: aiosmtplib.SMTP) -> None:
        with _translated("tls", self.server):
            if not client.supports_extension("starttls"):
                raise aiosmtplib.SMTPNotSupported("STARTTLS is not offered")
            await client.starttls()
            # aiosmtplib before 5.1.2 keeps what came in plaintext behind the reply
            # to STARTTLS, and takes it for the answer to EHLO (RFC 3207 section 4.2).
            _forget_input(client)

    async def _log_in(self, client: aiosmtplib.SMTP) -> None:
        """Log in with the first method that both sides know; one no is final."""
        options, offered = self.options, client.server_auth_methods
        methods = [name for name in AUTH_METHODS if name in offered]
        with _translated("auth", self.server):
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
                    await self._authenticate(client, method)
                except aiosmtplib.SMTPException as error:
                    code = getattr(error, "code", None)
                    if code == ALREADY_AUTHENTICATED:
                        return
                    if code not in METHOD_UNKNOWN or method == methods[-1]:
                        raise self._without_secrets(error) from None
                else:
                    return

    async def _authenticate(self, client: aiosmtplib.SMTP, method: str) -> None:
        username, password = self.options.username, self.options.password
        if method == "cram-md5":
            await client.auth_crammd5(username, password)
        elif method == "plain":
            await client.auth_plain(username, password)
        else:
            await client.auth_login(username, password)

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


def _forget_input(client: aiosmtplib.SMTP) -> None:
    """Drop what was received: a line that is no reply would stay, and fail them all."""
    getattr(client.protocol, "_buffer", bytearray()).clear()


def _is_of_handshake(error: BaseException | None) -> bool:
    """Whether connecting failed before the server could send its greeting."""
    if isinstance(error, aiosmtplib.SMTPResponseException):
        return False
    cause = error.__cause__ if isinstance(error, aiosmtplib.SMTPException) else error
    return not isinstance(cause, aiosmtplib.SMTPException)


@contextmanager
def _translated(stage: errors.Stage, server: str) -> Iterator[None]:
    try:
        yield
    except (aiosmtplib.SMTPException, OSError) as error:
        raise errors.translate(error, stage, server) from error


def _retrieve(task: asyncio.Task[Any]) -> None:
    """Take note of an outcome that nobody waits for any more."""
    if not task.cancelled():
        task.exception()


def _words(reply: Reply) -> tuple[int, str]:
    return reply.code, reply.text.decode("utf-8", "surrogateescape")


async def connect(options: Options) -> socket.socket:
    """
    Connect to the first of the host's addresses that answers (RFC 8305).

    :raises SMTPConnectError: with the ``OSError`` as its cause.
    """
    try:
        async with asyncio.timeout(options.timeout):
            addresses = await _addresses(options.host, options.port)
            return await _first_to_answer(addresses, options.source_address)
    except OSError as error:
        raise aiosmtplib.SMTPConnectError(f"{options.server}: {error}") from error


async def _addresses(host: str, port: int) -> list[Any]:
    with suppress(socket.gaierror):
        # An address needs no DNS, and so no thread.
        return socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )
    loop = asyncio.get_running_loop()
    try:
        return await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except RuntimeError:
        # At exit no thread can be started any more, and nobody else has to wait.
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)


async def _first_to_answer(
    addresses: list[Any], source_address: tuple[str, int] | None
) -> socket.socket:
    attempts: list[asyncio.Task[socket.socket]] = []
    winner = None
    try:
        for address in addresses:
            connecting = _connect_to(address, source_address)
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


async def _connect_to(
    address: Any, source_address: tuple[str, int] | None
) -> socket.socket:
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
    except BaseException:
        sock.close()
        raise
    return sock


def _close_unused(attempt: asyncio.Task[socket.socket]) -> None:
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().close()
