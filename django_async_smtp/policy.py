"""Email policies that build the same messages as email.policy's, in less time."""

from __future__ import annotations

import datetime
import email.policy
import re
import sys
from collections.abc import Iterator
from email.headerregistry import (
    Address,
    BaseHeader,
    ContentTypeHeader,
    Group,
    HeaderRegistry,
    MessageIDHeader,
    UniqueAddressHeader,
    UniqueDateHeader,
    UniqueUnstructuredHeader,
    UnstructuredHeader,
)
from email.utils import format_datetime
from functools import lru_cache, partial
from typing import Any, Final

# What is kept, at most: some 2 kB a header, and what repeats is seldom long.
KEPT_HEADERS: Final = 512
KEPT_LENGTH: Final = 200
KEPT_NAMES: Final = 256
KEPT_FOLDS: Final = 4

# RFC 5322's atoms and names of headers; the stdlib takes more for one.
_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]++"
_DOT_ATOM = rf"{_ATOM}(?:\.{_ATOM})*+"
_NAME = re.compile(r"[!-9;-~]+")

# Plain values: ASCII in which there is nothing to decode, to unquote or to complain
# of, so that the stdlib's parsers give back what they are given.
_TEXT = re.compile(r"[ -~]+")
_MESSAGE_ID = re.compile(rf"<{_DOT_ATOM}@{_DOT_ATOM}>")
_MAILBOX = re.compile(
    rf"(?:({_ATOM}(?: {_ATOM})*) <)?({_DOT_ATOM})@({_DOT_ATOM})(?(1)>)"
)
_MULTIPART = re.compile(r'(multipart/([a-z]+)); (boundary="([0-9=]+)")')
_ENCODED_WORD = "=?"

_NO_TREE: Any = None


def plain_mailbox(text: str) -> tuple[str, str, str] | None:
    """Return name, local part and domain of a mailbox that is plain, else None."""
    found = _MAILBOX.fullmatch(text)
    if found is None or _ENCODED_WORD in text:
        return None
    name, local_part, domain = found.groups("")
    return name, local_part, domain


def _is_plain(value: str, pattern: re.Pattern[str]) -> bool:
    """Whether a value is plain, and one line can hold it."""
    return (
        len(value) < 78
        and pattern.fullmatch(value) is not None
        and _ENCODED_WORD not in value
    )


# Plain values in lines, as the stdlib folds them: behind the label, or all of it on the
# next line, or as much on each as fits. None: where the stdlib goes to more trouble.


def _text_lines(text: str, label: str, limit: int) -> list[str] | None:
    if len(label) + len(text) <= limit:
        return [label + text]
    if len(text) < limit:
        return [label[:-1], f" {text}"]
    return None


def _list_lines(mailboxes: list[str], label: str, limit: int) -> list[str] | None:
    whole = _text_lines(", ".join(mailboxes), label, limit)
    if whole or max(map(len, mailboxes)) + 2 > limit:
        return whole
    return list(_filled_lines(mailboxes, label, limit))


def _filled_lines(mailboxes: list[str], line: str, limit: int) -> Iterator[str]:
    """Yield lines of as many as fit; the comma behind them may not."""
    for number, mailbox in enumerate(mailboxes):
        if number:
            line += ","
        text = f" {mailbox}" if number else mailbox
        if len(line) + len(text) > limit:
            yield line.removesuffix(" ")
            line, text = "", f" {mailbox}"
        line += text
    yield line


def _multipart_lines(
    content_type: str, boundary: str, label: str, limit: int
) -> list[str] | None:
    first, second = f"{label}{content_type};", f" {boundary}"
    if len(first) + len(second) <= limit:
        return [first + second]
    return [first, second] if max(len(first), len(second) + 1) <= limit else None


class Header(BaseHeader):
    """
    A header that needs no parse tree where its value is plain, or kept.

    :ivar plain: what folds a plain value; None for others.
    :ivar folds: what :meth:`CachingPolicy.fold_binary` made of it, and of the same
        header in other messages.
    """

    # What a kept header was parsed from.
    _source: str | None = None

    def init(
        self,
        name: str,
        *,
        parse_tree: Any,
        defects: Any,
        plain: partial[list[str] | None] | None = None,
    ) -> None:
        super().init(name, parse_tree=parse_tree, defects=defects)
        self.plain = plain
        self.folds: dict[tuple[object, ...], bytes] = {}

    def copy(self) -> Header:
        """Return one for another message: who changes that changes no other."""
        twin: Header = str.__new__(type(self), self)
        twin.__dict__.update(self.__dict__)
        return twin

    def without_tree(self, source: str) -> Header:
        """Return a copy to keep: a parse tree takes a hundred times the memory."""
        twin = self.copy()
        BaseHeader.init(twin, self.name, parse_tree=_NO_TREE, defects=[])
        twin._source = source
        return twin

    def fold(self, *, policy: email.policy.Policy) -> str:
        if self.plain is None:
            if self._source is None:
                return super().fold(policy=policy)
            return type(self)(self.name, self._source).fold(policy=policy)
        label = f"{self.name}: "
        limit = policy.max_line_length or sys.maxsize
        is_simple = len(label) <= limit and _NAME.fullmatch(self.name)
        lines = self.plain(label, limit) if is_simple else None
        if lines is None:
            return _stdlib_headers(self.name, str(self)).fold(policy=policy)
        return policy.linesep.join(lines) + policy.linesep


class PlainUnstructured(UnstructuredHeader):
    """Any header without a class of its own."""

    @classmethod
    def parse(cls, value: str, kwds: dict[str, Any]) -> None:
        if type(value) is str and _is_plain(value, _TEXT):
            plain = partial(_text_lines, value)
            kwds.update(decoded=value, parse_tree=_NO_TREE, plain=plain)
        else:
            super().parse(value, kwds)


class PlainSubject(PlainUnstructured, UniqueUnstructuredHeader):
    """Subject."""


class PlainMessageID(MessageIDHeader):
    """Message-ID."""

    @classmethod
    def parse(cls, value: str, kwds: dict[str, Any]) -> None:
        if type(value) is str and _is_plain(value, _MESSAGE_ID):
            plain = partial(_text_lines, value)
            kwds.update(decoded=value, parse_tree=_NO_TREE, plain=plain)
        else:
            super().parse(value, kwds)


class PlainDate(UniqueDateHeader):
    """Date, which Django gives as a datetime."""

    @classmethod
    def parse(cls, value: Any, kwds: dict[str, Any]) -> None:
        if type(value) is datetime.datetime:
            decoded = format_datetime(value)
            plain = partial(_text_lines, decoded)
            kwds.update(decoded=decoded, parse_tree=_NO_TREE, plain=plain)
            kwds.update(datetime=value)
        else:
            super().parse(value, kwds)


class PlainAddresses(UniqueAddressHeader):
    """From, To and the like."""

    @classmethod
    def parse(cls, value: Any, kwds: dict[str, Any]) -> None:
        listed = value.split(", ") if type(value) is str else []
        mailboxes = [found for text in listed if (found := plain_mailbox(text))]
        if listed and len(mailboxes) == len(listed):
            plain = partial(_list_lines, listed)
            groups = [Group(None, [Address(*mailbox)]) for mailbox in mailboxes]
            kwds.update(decoded=value, parse_tree=_NO_TREE, plain=plain, groups=groups)
        else:
            super().parse(value, kwds)


class PlainContentType(ContentTypeHeader):
    """Content-Type, which has another boundary in each multipart."""

    _multipart: str | None = None

    @classmethod
    def parse(cls, value: str, kwds: dict[str, Any]) -> None:
        found = _MULTIPART.fullmatch(value) if type(value) is str else None
        if found:
            content_type, subtype, parameter, boundary = found.groups()
            plain = partial(_multipart_lines, content_type, parameter)
            kwds.update(decoded=value, parse_tree=_NO_TREE, plain=plain)
            kwds.update(params={"boundary": boundary}, multipart=subtype)
        else:
            super().parse(value, kwds)

    def init(self, *args: Any, multipart: str | None = None, **kw: Any) -> None:
        if multipart is None:
            super().init(*args, **kw)
        else:  # Without a parse tree to take them from.
            super(ContentTypeHeader, self).init(*args, **kw)
            self._multipart = multipart

    @property
    def maintype(self) -> str:
        return super().maintype if self._multipart is None else "multipart"

    @property
    def subtype(self) -> str:
        return super().subtype if self._multipart is None else self._multipart


class CachingRegistry(HeaderRegistry):
    """A header factory that keeps the classes it made, and headers that repeat."""

    def __init__(self) -> None:
        self._by_name: dict[str, Any] = {}
        self._by_bases: dict[tuple[type, ...], Any] = {}
        super().__init__(base_class=Header, default_class=PlainUnstructured)
        self.map_to_type("subject", PlainSubject)
        self.map_to_type("message-id", PlainMessageID)
        self.map_to_type("date", PlainDate)
        self.map_to_type("content-type", PlainContentType)
        for name in ("from", "to", "cc", "reply-to"):
            self.map_to_type(name, PlainAddresses)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of a message copies its policy: that makes its own classes.
        return CachingRegistry, ()

    def map_to_type(self, name: str, cls: Any) -> None:
        """Register a class for a header."""
        super().map_to_type(name, cls)
        self._by_name.clear()

    def __getitem__(self, name: str) -> Any:
        """Return the class of a header: always the same one."""
        key = name.lower()
        made = self._by_name.get(key)
        if made is None:
            made = super().__getitem__(name)
            made = self._by_bases.setdefault(made.__bases__, made)
            if len(key) <= KEPT_LENGTH:
                _make_room(self._by_name, KEPT_NAMES)
                self._by_name[key] = made
        return made

    def __call__(self, name: str, value: Any) -> Any:
        """Return a header: a copy of a kept one, where there is one."""
        cls = self[name]
        if (
            type(value) is not str
            or type(name) is not str
            or len(name) + len(value) > KEPT_LENGTH
        ):
            return cls(name, value)
        slot = _slot(cls, name, value)
        if slot:
            return slot[0].copy()
        header = cls(name, value)
        # A defect is an exception: raised, it would hold on to the caller's frames.
        if not header.defects:
            slot.append(header.without_tree(value))
        return header


@lru_cache(maxsize=KEPT_HEADERS)
def _slot(cls: type[Header], name: str, value: str) -> list[Header]:
    """Return the place for a kept header."""
    return []


class CachingPolicy(email.policy.EmailPolicy):
    """A policy that keeps what became of headers that repeat."""

    def fold_binary(self, name: str, value: Any) -> bytes:
        """Fold a header as :class:`email.policy.EmailPolicy` does."""
        if not isinstance(value, Header):
            return super().fold_binary(name, value)
        key = (self.linesep, self.max_line_length, self.utf8, self.cte_type)
        folded = value.folds.get(key)
        if folded is None:
            folded = super().fold_binary(name, value)
            _make_room(value.folds, KEPT_FOLDS)
            value.folds[key] = folded
        return folded


def _make_room(kept: dict[Any, Any], entries: int) -> None:
    if len(kept) >= entries:
        kept.clear()


_stdlib_headers = HeaderRegistry()

SMTP: Final = CachingPolicy(linesep="\r\n", header_factory=CachingRegistry())
SMTPUTF8: Final = SMTP.clone(utf8=True)
