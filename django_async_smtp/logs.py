"""The one logger, and what must not appear in it."""

from __future__ import annotations

import base64
import logging
import re
import sys
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, AnyStr, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from types import FrameType

logger = logging.getLogger("django_async_smtp")

# Set where the call of a log handler goes on in another thread: the handler's lock is
# taken, and nothing may be logged until it is free.
quiet: ContextVar[bool] = ContextVar("quiet", default=False)

_WORD = r"[^\s<>()\[\],;:\"'@]"
# Linear, for it meets what servers say: it never goes back, nor starts in a word.
_ADDRESS = re.compile(
    rf'(?:(?<!{_WORD})({_WORD}){_WORD}*+|"([^"\\])(?:[^"\\]|\\.){{0,64}}+")'
    rf"@(\[[^\s\]]{{0,64}}+\]|{_WORD}++)"
)
_HANDLING = {logging.Handler.handle.__code__, logging.Logger.callHandlers.__code__}
_BASE64 = re.compile(r"[A-Za-z0-9+/]{4,}={0,2}")
_PERCENT_ENCODED = re.compile(r"(?:%[0-9A-Fa-f]{2})++|.", re.DOTALL)
# How much of a secret in a row is more than chance.
_PART: Final = 6
# What servers say of a login in their own words. To hide a part of one would tell that
# the password has it, and keep the hints from knowing the reply.
_ORDINARY = re.compile(
    r"\b(?:authenticat(?:e|ed|ion)|credentials?|(?:in)?correct|passwords?|"
    r"(?:un)?successful|user ?names?)\b",
    re.IGNORECASE,
)


def masked(text: str) -> str:
    """Return the text with its addresses masked: ``j***@example.com``."""
    return _ADDRESS.sub(r"\1\2***@\3", text)


def redacted(text: str, secrets: tuple[str, ...]) -> str:
    """
    Return the text without the secrets, in clear or within base64.

    Servers that do not know a command often quote it in their reply, which in a
    login is the password; some cut it, or glue it to something else.

    :param secrets: the password first, of which no part stays that tells much. The
        others are hidden in clear only as a whole: a user name's domain may stay.
    """
    kept, end = "", 0
    for start, stop in _merged([*_in_clear(text, secrets), *_in_base64(text, secrets)]):
        kept += f"{text[end:start]}***"
        end = stop
    return kept + text[end:]


def _merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the spans in order, those that overlap or touch as one."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        else:
            found.append((start, stop))
    return found


def _in_clear(text: str, secrets: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """Yield from where to where to hide what stands there as it is, or as in a URL."""
    views: list[tuple[str, Sequence[int]]] = [(text, range(len(text) + 1))]
    if "%" in text:
        views.append(_unquoted(text))
    ends = {
        at: word.end()
        for word in _ORDINARY.finditer(text)
        for at in range(*word.span())
    }
    for number, secret in enumerate(secrets):
        size = len(secret) if number else min(len(secret), _PART)
        parts = _parts(secret, size)
        spans = (
            (places[index], places[index + size])
            for view, places in views
            for index in _places(view, parts, size)
        )
        for start, stop in _merged(spans):
            if stop - start >= len(secret) or ends.get(start, 0) < stop:
                yield start, stop


def _in_base64(text: str, secrets: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """Yield from where to where to hide base64 with a part of a secret in it."""
    hidden = []
    for secret in (secret.encode() for secret in secrets):
        size = min(len(secret), _PART)
        hidden.append((_parts(secret, size), size))
    for match in _BASE64.finditer(text):
        if any(
            True
            for decoded in _decodings(match[0].rstrip("="))
            for parts, size in hidden
            for _ in _places(decoded, parts, size)
        ):
            yield match.span()


def _parts(secret: AnyStr, size: int) -> set[AnyStr]:
    """Return all parts of this size; none of an empty secret."""
    if not size:
        return set()
    return {secret[at : at + size] for at in range(len(secret) - size + 1)}


def _places(text: AnyStr, parts: set[AnyStr], size: int) -> Iterator[int]:
    """Yield where in the text one of the parts, all of this size, begins."""
    for at in range(len(text) - size + 1):
        if text[at : at + size] in parts:
            yield at


def _decodings(token: str) -> Iterator[bytes]:
    """Yield what base64 stands for, wherever its groups of four begin."""
    for skipped in range(4):
        group = token[skipped:]
        # A single character of the last group stands for less than a byte.
        group = group[:-1] if len(group) % 4 == 1 else group
        yield base64.b64decode(group + "=" * (-len(group) % 4))


def _unquoted(text: str) -> tuple[str, list[int]]:
    """Return the text without percent-encoding, and where each character stood."""
    found, places = [], []
    for match in _PERCENT_ENCODED.finditer(text):
        chars, place, width = match[0], match.start(), 0
        if len(chars) > 1:
            octets = bytes.fromhex(chars.replace("%", ""))
            chars, width = octets.decode(errors="surrogateescape"), len("%20")
        for char in chars:
            found.append(char)
            places.append(place)
            place += width * len(char.encode(errors="surrogateescape")) if width else 1
    return "".join(found), [*places, len(text)]


def log(level: int, message: str, *args: object, **extra: Any) -> None:
    """
    Log with addresses masked and ``extra`` as the record's fields.

    A handler that mails what is logged (Django's AdminEmailHandler) sends through
    this package, too. What fails in there goes to stderr alone: logged, it would be
    mailed, and fail, without end.
    """
    if not logger.isEnabledFor(level):
        return
    # On one line: a server's words must not look like another record.
    text = "".join(c if c.isprintable() else " " for c in masked(message % args))
    if quiet.get() or is_within_a_log_handler():
        if level >= logging.WARNING and logging.lastResort is not None:
            record = logger.makeRecord(logger.name, level, "", 0, text, (), None)
            logging.lastResort.handle(record)
        return
    logger.log(level, "%s", text, extra=extra, stacklevel=2)


def is_within_a_log_handler() -> bool:
    """Whether this call was made, at whatever distance, by a log handler."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code in _HANDLING:
            return True
        frame = frame.f_back
    return False
