"""The source of a function, as it runs, for a page."""

from __future__ import annotations

import inspect
import io
import keyword
import token
import tokenize
from collections.abc import Callable
from functools import cache
from itertools import accumulate
from typing import Any, Final

from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString

# Kinds of token -> the CSS class.
CLASSES: Final = {
    token.STRING: "string",
    token.NUMBER: "number",
    tokenize.COMMENT: "comment",
}


@cache
def highlighted(function: Callable[..., Any]) -> SafeString:
    """Return a function's source as HTML, escaped, with spans around its tokens."""
    text = inspect.getsource(function)
    lengths = map(len, text.splitlines(keepends=True))
    begins = [0, *accumulate(lengths)]
    pieces: list[tuple[SafeString | str]] = []
    done = 0
    for found in tokenize.generate_tokens(io.StringIO(text).readline):
        name = _class(found)
        if name is None:
            continue
        start = begins[found.start[0] - 1] + found.start[1]
        marked = format_html('<span class="{}">{}</span>', name, found.string)
        pieces += [(text[done:start],), (marked,)]
        done = start + len(found.string)
    return format_html_join("", "{}", [*pieces, (text[done:],)])


def _class(found: tokenize.TokenInfo) -> str | None:
    if found.type == token.NAME and keyword.iskeyword(found.string):
        return "keyword"
    return CLASSES.get(found.type)
