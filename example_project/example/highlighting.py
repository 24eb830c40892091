"""The source of a function, as it runs, for a page."""

from __future__ import annotations

import inspect
import io
import keyword
import token
import tokenize
from collections.abc import Callable
from typing import Any, Final

from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString

# Kinds of token -> the CSS class.
CLASSES: Final = {
    token.STRING: "string",
    token.NUMBER: "number",
    tokenize.COMMENT: "comment",
}


def highlighted(function: Callable[..., Any]) -> SafeString:
    """Return a function's source as HTML, escaped, with spans around its tokens."""
    text = inspect.getsource(function)
    lines = text.splitlines(keepends=True)
    pieces: list[tuple[SafeString | str]] = []
    at = (1, 0)
    for found in tokenize.generate_tokens(io.StringIO(text).readline):
        if found.start < at:
            continue
        pieces += [(_between(lines, at, found.start),), (_marked(found),)]
        at = found.end
    return format_html_join("", "{}", pieces)


def _between(lines: list[str], start: tuple[int, int], end: tuple[int, int]) -> str:
    """Return what stands between two tokens: white space."""
    if start[0] == end[0]:
        return lines[start[0] - 1][start[1] : end[1]]
    first, *rest = lines[start[0] - 1 : end[0]]
    if not rest:
        return first[start[1] :]
    return first[start[1] :] + "".join(rest[:-1]) + rest[-1][: end[1]]


def _marked(found: tokenize.TokenInfo) -> SafeString | str:
    name = CLASSES.get(found.type)
    if found.type == token.NAME and keyword.iskeyword(found.string):
        name = "keyword"
    if found.type in (token.INDENT, token.DEDENT, token.ENDMARKER):
        return found.string if found.type == token.INDENT else ""
    if name is None:
        return found.string
    return format_html('<span class="{}">{}</span>', name, found.string)
