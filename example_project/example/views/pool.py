"""Pool: the connections of this process, live."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import asdict
from typing import Any, Final

from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.shortcuts import render
from django.views.decorators.http import require_GET, require_POST, require_safe

from django_async_smtp import asend_mail, pool_stats

from ..events import Event, event_stream
from ..receivers import LAST_ERRORS

# Seconds between two looks.
INTERVAL: Final = 0.1
MESSAGES: Final = 20


@require_safe
def pool(request: HttpRequest) -> HttpResponse:
    """Show the page; the figures come as events."""
    return render(request, "example/pool.html", {"messages_at_once": MESSAGES})


@require_GET
async def pool_events(request: HttpRequest) -> StreamingHttpResponse:
    """Tell what changes."""
    return event_stream(_changes())


async def _changes() -> AsyncGenerator[Event, None]:
    told: Any = None
    while True:
        now = {
            "servers": pool_stats(),
            "errors": [_shown(e) for e in list(LAST_ERRORS)],
        }
        if now != told:
            yield "pool", now
            told = now
        await asyncio.sleep(INTERVAL)


@require_POST
async def send_at_once(request: HttpRequest) -> HttpResponse:
    """Send messages from as many coroutines, for which the server takes its time."""
    await asyncio.gather(
        *(
            asend_mail(f"At once {number}", "Body", None, ["slow@example.org"])
            for number in range(1, MESSAGES + 1)
        ),
        return_exceptions=True,
    )
    return HttpResponse(status=204)


def _shown(error: Any) -> dict[str, str]:
    return {**asdict(error), "at": error.at.isoformat(timespec="seconds")}
