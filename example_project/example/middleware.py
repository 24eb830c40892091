"""The Content-Security-Policy; Django 6.0 has a middleware of its own for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from asgiref.sync import iscoroutinefunction
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django.utils.decorators import sync_and_async_middleware

HEADER: Final = "Content-Security-Policy"
# Files of this site alone; no scripts or styles within the pages.
POLICY: Final = (
    "default-src 'self'; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)


@sync_and_async_middleware
def content_security_policy(get_response: Callable[[HttpRequest], Any]) -> Any:
    """Set the policy on every response that has none of its own."""
    if iscoroutinefunction(get_response):

        async def asynchronous(request: HttpRequest) -> HttpResponseBase:
            return _with_policy(await get_response(request))

        return asynchronous

    def synchronous(request: HttpRequest) -> HttpResponseBase:
        return _with_policy(get_response(request))

    return synchronous


def _with_policy(response: HttpResponseBase) -> HttpResponseBase:
    response.headers.setdefault(HEADER, POLICY)
    return response
