"""One SMTP session: opened, sends envelopes, ends."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

import aiosmtplib

from . import errors
from .opening import Opening, StageTimes, translate, translated
from .pipelining import TOO_LONG, Dialogue, Reply, Transcript, group_of

if TYPE_CHECKING:
    from .envelope import Envelope
    from .opening import Address
    from .options import Options

# Seconds that a server gets to answer a NOOP: a firewall that has forgotten the
# connection is silent.
PING_TIMEOUT: Final = 5.0
# Seconds that a server gets to answer a QUIT.
QUIT_TIMEOUT: Final = 2.0


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
    :ivar stages: how long the stages of the message at hand, or the last one, took;
        those of the opening too where it is the first.
    :ivar is_unanswered: whether the wait for the answer to a whole message was
        cancelled.
    :ivar begun: the envelope whose commands went out with the message before, and
        which must be sent next, or the session ended.
    """

    def __init__(
        self,
        options: Options,
        client: aiosmtplib.SMTP,
        transcript: Transcript | None = None,
    ) -> None:
        self.options = options
        self.extensions = frozenset(client.esmtp_extensions)
        self._pipelines = options.pipelining and "pipelining" in self.extensions
        self.on_end: Callable[[], None] = lambda: None
        self.sent = 0
        self.is_used = False
        self.was_ended = False
        self.is_unanswered = False
        self.end_of_life = math.inf
        self.stages = StageTimes()
        self._opened_in: dict[errors.Stage, float] = {}
        self.begun: Envelope | None = None
        self._begun_commands: list[bytes] = []
        self._last_used = asyncio.get_running_loop().time()
        self._dialogue = Dialogue(
            cast("asyncio.Transport", client.transport), self._ended, transcript
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
    async def open(
        cls, options: Options, addresses: list[Address] | None = None
    ) -> Session:
        """
        Connect, upgrade to TLS and log in, as the options say.

        :param addresses: see ``Opening.run``.
        :raises SMTPError: it failed; nothing stays open.
        """
        opening = Opening(options)

        async def run() -> Session:
            session = cls(options, await opening.run(addresses))
            session._opened_in = opening.stages
            return session

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

    async def send(
        self,
        envelope: Envelope,
        following: Callable[[], Envelope | None] = lambda: None,
    ) -> Receipt:
        """
        Send one message: a mail transaction (RFC 5321 section 3.3).

        After an error the session may be used again if it ``is_clean``.

        :param following: returns the message that this session is to send next, if
            there is one by now: then it may be ``begun`` already.
        :raises SMTPError: nothing was delivered, but see its ``maybe_delivered``.
        :raises ValueError: the envelope needs SMTPUTF8, and the server has it not.
        """
        is_begun = self.begun is envelope
        if not is_begun and self.begun is not None:
            raise RuntimeError("Another message was begun on this session.")
        commands = self._begun_commands if is_begun else self._commands(envelope)
        self.stages = StageTimes()
        self.stages.update(self._opened_in)
        self._opened_in = {}
        try:
            if self._pipelines and not is_begun:
                with translated("mail", self.options):
                    await self._dialogue.send(commands, self.options.timeout)
            self.begun = None
            receipt = await self._transact(envelope, commands, following, is_begun)
        except (errors.ResponseError, errors.RecipientsRefused):
            if self.begun is None:
                await self._reset()
            elif not self._dialogue.is_in_step:
                # Whose the next replies are cannot be told.
                self.abort()
            raise
        except BaseException:
            # A reply may still be on its way: it must not answer a later command.
            self.abort()
            raise
        self.sent += 1
        self.is_used = True
        self._last_used = asyncio.get_running_loop().time()
        return receipt

    async def rehearse(self, sender: str, recipient: str | None = None) -> Reply:
        """
        Ask whether the server would take a message, and take that back.

        :param sender: the address for MAIL FROM; ``recipient``: that for RCPT TO.
        :returns: the last reply before RSET.
        :raises SMTPError: it would not.
        :raises ValueError: an address needs SMTPUTF8, and the server has it not.
        """
        mail = f"MAIL FROM:<{sender}>"
        if not f"{sender}{recipient}".isascii():
            if "smtputf8" not in self.extensions:
                raise ValueError("The server takes no non-ASCII addresses (SMTPUTF8).")
            mail += " SMTPUTF8"
        try:
            with translated("mail", self.options):
                reply = await self._command(mail.encode())
                if reply.code != 250:
                    raise aiosmtplib.SMTPSenderRefused(*_words(reply), sender)
            if recipient is not None:
                with translated("rcpt", self.options):
                    reply = await self._command(f"RCPT TO:<{recipient}>".encode())
                    if reply.code not in (250, 251):
                        raise aiosmtplib.SMTPRecipientRefused(*_words(reply), recipient)
        except (errors.ResponseError, errors.RecipientsRefused):
            await self._reset()
            raise
        except BaseException:
            # A server that is silent now would be so to RSET, for as long again.
            self.abort()
            raise
        await self._reset()
        return reply

    async def ping(self) -> bool:
        """Ask with NOOP whether the server is still there; end the session if not."""
        try:
            with translated("mail", self.options):
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
        self.begun = None
        self._dialogue.abort()

    def _ended(self) -> None:
        self.was_ended = True
        self.on_end()

    async def _transact(
        self,
        envelope: Envelope,
        commands: list[bytes],
        following: Callable[[], Envelope | None],
        is_begun: bool,
    ) -> Receipt:
        options = self.options
        mail, *recipients, data = commands
        with translated("mail", options):
            reply = await self._answer(mail)
            self.stages.end("mail")
            if reply.code != 250:
                raise aiosmtplib.SMTPSenderRefused(*_words(reply), envelope.sender)
        accepted: list[str] = []
        refused: dict[str, Reply] = {}
        with translated("rcpt", options):
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
            self.stages.end("rcpt")
            if refused and not accepted:
                raise aiosmtplib.SMTPRecipientsRefused(
                    [
                        aiosmtplib.SMTPRecipientRefused(*_words(no), address)
                        for address, no in refused.items()
                    ]
                )
        with translated("data", options):
            reply = await self._answer(data)
            self.stages.end("data")
        if is_begun and reply.code in (250, 251):
            # One reply too many came after the message before: nothing of this one
            # was accepted.
            with translated("mail", options):
                raise aiosmtplib.SMTPServerDisconnected("Replies out of step")
        with translated("data", options):
            if reply.code != 354:
                raise aiosmtplib.SMTPDataError(*_words(reply))
        # Those refused may get a transaction of their own before the next message.
        upcoming = following() if self._pipelines and not refused else None
        reply = await self._message(envelope.content, upcoming)
        return Receipt(tuple(accepted), refused, reply)

    def _commands(self, envelope: Envelope) -> list[bytes]:
        """Return the commands of a transaction, from MAIL to DATA."""
        return [
            self._mail_command(envelope),
            *(f"RCPT TO:<{address}>".encode() for address in envelope.recipients),
            b"DATA",
        ]

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

    async def _message(self, content: bytes, upcoming: Envelope | None) -> Reply:
        dialogue, options = self._dialogue, self.options
        group = self._group(upcoming)
        try:
            try:
                reply = await dialogue.message(content, options.timeout, group)
                self.stages.end("body")
            finally:
                self.begun = upcoming if dialogue.is_group_sent else None
                self._begun_commands = group
            self._usable(reply)
            if reply.code != 250:
                raise aiosmtplib.SMTPDataError(*_words(reply))
        except aiosmtplib.SMTPDataError as error:
            # Garbage says nothing about what became of the message.
            lost = error.code == -1 and dialogue.is_message_written
            raise translate(error, "body", options, maybe_delivered=lost) from error
        except aiosmtplib.SMTPException as error:
            raise translate(
                error, "body", options, maybe_delivered=dialogue.is_message_written
            ) from error
        except asyncio.CancelledError:
            self.is_unanswered = dialogue.is_message_written
            raise
        return reply

    def _group(self, upcoming: Envelope | None) -> list[bytes]:
        """Return the commands of the next message; none where it cannot be sent."""
        if upcoming is None:
            return []
        try:
            commands = self._commands(upcoming)
            group_of(commands)
        except ValueError:
            # To be raised when its turn has come.
            return []
        return commands

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


def _retrieve(task: asyncio.Task[Any]) -> None:
    """Take note of an outcome that nobody waits for any more."""
    if not task.cancelled():
        task.exception()


def _words(reply: Reply) -> tuple[int, str]:
    return reply.code, reply.text.decode("utf-8", "surrogateescape")
