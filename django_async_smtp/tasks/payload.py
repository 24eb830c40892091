"""
What a task holds, as JSON: envelopes with their bytes, and how far they came.

The worker may be of another version than what queued it, so the form has a version.
"""

from __future__ import annotations

import base64
import binascii
import email
import email.policy
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from email.message import EmailMessage as ParsedMessage
from functools import cached_property
from json import dumps
from typing import Any, Final

from ..delivery import Delivery
from ..envelope import Envelope, with_crlf
from .options import QUEUE, QueueOptions

VERSION: Final = 1
# Of a message's bytes, unpacked: more than any server takes, and no bomb.
MAX_CONTENT: Final = 256 * 2**20
# A quick one: what is sent is mostly base64, which gets little smaller.
LEVEL: Final = 1


class PayloadError(ValueError):
    """A task holds what this version cannot read."""


@dataclass(frozen=True)
class Packed:
    """
    A message as it is queued.

    :ivar content: the bytes, compressed, in base64.
    :ivar size: how many bytes they are.
    :ivar earlier: what became of it so far: ``Delivery``, as a dict.
    """

    sender: str
    recipients: Sequence[str]
    smtputf8_error: str | None
    content: str
    size: int
    earlier: Mapping[str, Any] | None = None

    @property
    def task_size(self) -> int:
        """How many bytes it takes of a task."""
        return len(self.content) + len(dumps(asdict(replace(self, content=""))))


@dataclass(frozen=True)
class Payload:
    """
    What a task holds.

    :ivar attempt: which one it is, from 1.
    :ivar quiet: whether a log handler sent it: what fails then is not logged, for the
        handler would send again.
    """

    queue: QueueOptions
    messages: Sequence[Packed]
    attempt: int = 1
    quiet: bool = False

    @property
    def size(self) -> int:
        """How many bytes it takes, as JSON."""
        return len(dumps(self.as_json()))

    def as_json(self) -> dict[str, Any]:
        """Return it as dicts, lists, strings and numbers."""
        return {"version": VERSION, **asdict(self)}


class QueuedMessage:
    """
    A message at the worker: what ``post_send`` gives there in place of the project's.

    :ivar from_email: the sender's address, without a name.
    :ivar to: the recipients of this attempt, of To, Cc and Bcc alike.
    :ivar delivery: what became of it, once that is known.
    """

    def __init__(self, packed: Packed) -> None:
        """:raises PayloadError: it is damaged."""
        self.packed = packed
        self.envelope = _envelope(packed)
        self.from_email = self.envelope.sender
        self.to = list(self.envelope.recipients)
        self.earlier = _delivery(packed.earlier or {"state": "not_sent"})
        self.delivery: Delivery | None = None

    def recipients(self) -> list[str]:
        """Return the recipients of this attempt."""
        return list(self.to)

    def message(self) -> ParsedMessage:
        """Return the whole message, parsed."""
        return _parsed(self.envelope.content)

    @property
    def subject(self) -> str:
        """Its subject, decoded."""
        return str(self._header.get("Subject", ""))

    @property
    def message_id(self) -> str:
        """Its Message-ID, which all attempts share."""
        return str(self._header.get("Message-ID", ""))

    @cached_property
    def _header(self) -> ParsedMessage:
        return _parsed(self.envelope.content.partition(b"\r\n\r\n")[0])


def packed(envelope: Envelope) -> Packed:
    """Return an envelope as it is queued."""
    return Packed(
        envelope.sender,
        list(envelope.recipients),
        envelope.smtputf8_error,
        base64.b64encode(zlib.compress(envelope.content, LEVEL)).decode(),
        len(envelope.content),
    )


def unpacked(payload: Any) -> tuple[Payload, list[QueuedMessage]]:
    """
    Return what a task holds.

    :raises PayloadError: it is of an unknown version, or damaged.
    """
    version = payload.get("version") if isinstance(payload, Mapping) else None
    if version != VERSION:
        # Of another type, it may be anything.
        told = version if isinstance(version, int) else "unknown"
        raise PayloadError(
            f"The task is of version {told}, and this worker knows {VERSION}: "
            "run the same release of django-async-smtp everywhere."
        )
    try:
        messages = [QueuedMessage(Packed(**one)) for one in payload["messages"]]
        found = Payload(
            queue=_queue(payload["queue"]),
            messages=[message.packed for message in messages],
            attempt=payload["attempt"],
            quiet=payload["quiet"],
        )
    except PayloadError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        # Its words may hold what the task does.
        problem = f"The task is damaged: {type(error).__name__}."
        raise PayloadError(problem) from None
    if type(found.attempt) is not int or type(found.quiet) is not bool:
        raise PayloadError("The task is damaged: attempt or quiet.")
    return found, messages


def _queue(values: Mapping[str, Any]) -> QueueOptions:
    """Return the options; without those that a later release may have added."""
    known = {name: values[name] for name in QUEUE if values.get(name) is not None}
    if not all(QUEUE[name][1](value) for name, value in known.items()):
        raise PayloadError("The task is damaged: its options.")
    return QueueOptions(**known)


def _parsed(content: bytes) -> ParsedMessage:
    return email.message_from_bytes(content, policy=email.policy.default)


def _envelope(packed: Packed) -> Envelope:
    addresses = [packed.sender, *packed.recipients]
    is_list = isinstance(packed.recipients, list) and len(addresses) > 1
    if not is_list or not all(
        type(one) is str and one.isprintable() for one in addresses
    ):
        raise PayloadError("The task is damaged: an address.")
    if not isinstance(packed.smtputf8_error, str | None):
        raise PayloadError("The task is damaged: smtputf8_error.")
    content = _content(packed)
    return Envelope(
        packed.sender, tuple(packed.recipients), content, packed.smtputf8_error
    )


def _content(packed: Packed) -> bytes:
    if not 0 <= packed.size <= MAX_CONTENT:
        raise PayloadError("The task is damaged: a message's size.")
    unpacking = zlib.decompressobj()
    try:
        data = base64.b64decode(packed.content, validate=True)
        content = unpacking.decompress(data, packed.size + 1)
    except (binascii.Error, zlib.error) as error:
        problem = f"The task is damaged: a message's bytes: {error}."
        raise PayloadError(problem) from None
    if len(content) != packed.size or not unpacking.eof:
        raise PayloadError("The task is damaged: a message's bytes are not its size.")
    if with_crlf(content) != content:
        raise PayloadError("The task is damaged: a message's line endings.")
    return content


def _delivery(values: Mapping[str, Any]) -> Delivery:
    """Return an earlier outcome."""
    found = Delivery(**values)
    # What the outcome of this attempt is added to, after it.
    numbers, texts = (found.attempts, found.seconds), (found.reply, *found.accepted)
    if not all(isinstance(number, int | float) for number in numbers) or not all(
        isinstance(text, str) for text in texts
    ):
        raise PayloadError("The task is damaged: an earlier outcome.")
    refused = {a: (code, text) for a, (code, text) in found.refused.items()}
    return replace(found, accepted=tuple(found.accepted), refused=refused)
