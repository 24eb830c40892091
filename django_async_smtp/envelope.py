"""Django's EmailMessage -> an Envelope: what goes over the wire."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from email.headerregistry import Address, AddressHeader
from email.message import Message
from functools import lru_cache
from typing import Any, Final

from django.core.mail import EmailMessage
from django.utils.encoding import force_str, punycode

from .policy import KEPT_HEADERS, KEPT_LENGTH, SMTP, SMTPUTF8, plain_mailbox

# The stdlib's words, its stray parenthesis included.
_NOT_ASCII = "local-part contains non-ASCII characters)"
_NO_DOMAIN = "addr-spec local part with no domain"

# But for one that folds.
_LINE_BREAK = re.compile(r"\r(?!\n)|\n(?![ \t])")

# Django 6.0 and later.
TAKES_POLICY: Final = "policy" in inspect.signature(EmailMessage.message).parameters


@dataclass(frozen=True)
class Envelope:
    """
    One mail transaction (RFC 5321 section 3.3).

    :ivar sender: the address for MAIL FROM, without brackets.
    :ivar recipients: the addresses for RCPT TO.
    :ivar content: header and body, every line ended by CRLF, no dots doubled.
    :ivar smtputf8_error: where an address cannot go out without SMTPUTF8 (RFC
        6531), what to say if the server does not offer it.
    """

    sender: str
    recipients: tuple[str, ...]
    content: bytes
    smtputf8_error: str | None = None

    def __repr__(self) -> str:
        return f"<Envelope: {len(self.recipients)} recipients, {len(self.content)} B>"


def prepare(message: EmailMessage) -> Envelope:
    """
    Build the envelope of a message, its content byte for byte as Django's backend.

    This is user code (lazy strings, subclasses) and CPU: up to 1 ms for a small
    message, a fifth of a second or more for 5 MB of attachments.

    :raises ValueError: an address is not exactly one valid address, or a header
        holds a line break.
    """
    addresses = [force_str(a) for a in (message.from_email, *message.recipients())]
    sender, *recipients = mailboxes = [mailbox(address) for address in addresses]
    not_ascii = [
        address
        for address, spec in zip(addresses, mailboxes, strict=True)
        if not spec.isascii()
    ]
    return Envelope(
        sender,
        tuple(recipients),
        content(message, utf8=bool(not_ascii)),
        f"Invalid address {not_ascii[0]!r}: {_NOT_ASCII}" if not_ascii else None,
    )


def mailbox(address: object) -> str:
    """
    Return the addr-spec of an address, its domain in ASCII (IDNA).

    Django's rules: a display name is allowed, a missing domain is, too.

    :raises ValueError: it is no address, more than one, or holds a line break.
    """
    text = force_str(address)
    if plain := plain_mailbox(text):
        return "@".join(plain[1:])
    if type(text) is str and len(text) <= KEPT_LENGTH:
        return kept_mailbox(text)
    return parsed_mailbox(text)


def parsed_mailbox(text: str) -> str:
    """Return the addr-spec of an address in whichever form."""
    if "\r" in text or "\n" in text:
        # The parser takes one behind a space for folding.
        raise ValueError(f"Invalid address {text!r}: line break")
    try:
        parsed = AddressHeader.value_parser(text)
    except Exception as error:
        # The parser trips over some garbage, such as "a@" before Python 3.12.2.
        raise ValueError(f"Invalid address {text!r}") from error
    defects = {str(defect) for defect in parsed.all_defects}
    defects -= {_NO_DOMAIN, _NOT_ASCII}
    if defects:
        raise ValueError(f"Invalid address {text!r}: {'; '.join(sorted(defects))}")
    mailboxes = parsed.all_mailboxes
    if len(mailboxes) != 1:
        raise ValueError(f"Invalid address {text!r}: must be a single address")
    found = mailboxes[0]
    if found.domain and not found.domain.isascii():
        spec = str(Address(username=found.local_part, domain=punycode(found.domain)))
    else:
        spec = str(found.addr_spec)
    if not all(spec.rsplit("@", 1)):
        raise ValueError(f"Invalid address {text!r}: a part of it is empty")
    if not spec.isprintable():
        raise ValueError(f"Invalid address {text!r}: control character")
    return spec


kept_mailbox = lru_cache(maxsize=KEPT_HEADERS)(parsed_mailbox)


def content(message: EmailMessage, *, utf8: bool) -> bytes:
    """
    Return the message's bytes with CRLF line endings.

    :param utf8: keep non-ASCII addresses in headers as UTF-8 (RFC 6532).
    """
    built: Any
    if TAKES_POLICY:
        built = message.message(policy=SMTPUTF8 if utf8 else SMTP)
    else:
        built = message.message()
        if utf8:
            _keep_utf8_addresses(built, message)
    _refuse_line_breaks(built, message)
    del built["Bcc"]  # Django 6.1 refuses it as a header; earlier ones would send it.
    data: bytes = built.as_bytes() if TAKES_POLICY else built.as_bytes(linesep="\r\n")
    return with_crlf(data)


def _refuse_line_breaks(built: Message, message: EmailMessage) -> None:
    """Do so where Django leaves it to a Python that overlooks some of them."""
    extra = message.extra_headers
    for given in (message.subject, *(message.reply_to or ()), *extra, *extra.values()):
        # A lazy string runs user code, and has done so: see below.
        if isinstance(given, str) and ("\r" in given or "\n" in given):
            raise ValueError("A header holds a line break.")
    # Those in encoded words as well, which are decoded by now.
    if any(_LINE_BREAK.search(str(value)) for value in built.values()):
        raise ValueError("A header holds an encoded line break.")


def with_crlf(data: bytes) -> bytes:
    """
    End every line with CRLF: a lone CR or LF could end the message for a server
    that is less strict than the next one (SMTP smuggling).
    """
    if not data.count(b"\r\n") == data.count(b"\n") == data.count(b"\r"):
        data = (
            data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\n", b"\r\n")
        )
    return data if data.endswith(b"\r\n") else data + b"\r\n"


def _keep_utf8_addresses(built: Message, message: EmailMessage) -> None:
    """Undo the encoded words that Django 5.2 makes of non-ASCII local parts."""
    values = {
        "From": message.from_email,
        "To": message.to,
        "Cc": message.cc,
        "Reply-To": message.reply_to,
    }
    for name, value in (values | message.extra_headers).items():
        # One address a line: the generator does not fold what it takes for bytes.
        text = ",\n ".join(map(str, value)) if isinstance(value, list) else str(value)
        if name in values and name in built and not text.isascii():
            del built[name]
            # The generator writes surrogates as the bytes that they stand for.
            raw = text.encode().decode("ascii", "surrogateescape")
            Message.__setitem__(built, name, raw)
