"""The one logger, and what must not appear in it."""

from __future__ import annotations

import base64
import binascii
import logging
import re
import sys
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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


def masked(text: str) -> str:
    """Return the text with its addresses masked: ``j***@example.com``."""
    return _ADDRESS.sub(r"\1\2***@\3", text)


def redacted(text: str, secrets: tuple[str, ...]) -> str:
    """
    Return the text without the secrets, in clear or within base64.

    Servers that do not know a command often quote it in their reply, which in a
    login is the password.
    """

    def hide(match: re.Match[str]) -> str:
        token = match[0]
        try:
            decoded = base64.b64decode(token + "=" * (-len(token) % 4))
        except binascii.Error:
            return token
        return "***" if any(s.encode() in decoded for s in secrets if s) else token

    for secret in secrets:
        if secret:
            text = text.replace(secret, "***")
    return _BASE64.sub(hide, text)


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
