"""Server-sent events from async views."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any, Final
from weakref import WeakKeyDictionary

from django.http import StreamingHttpResponse

Event = tuple[str, Any]

# Seconds without an event after which a comment says that the stream is there.
HEARTBEAT: Final = 15.0

# An event belongs to the loop that waits for it: a server has one, tests have many.
_endings: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Event] = (
    WeakKeyDictionary()
)


def event_stream(events: AsyncGenerator[Event, None]) -> StreamingHttpResponse:
    """
    Return a response that sends events as they come.

    :param events: pairs of a name, and what becomes JSON. It is closed when the client
        has gone.
    """
    response = StreamingHttpResponse(
        _encoded(events), content_type="text/event-stream; charset=utf-8"
    )
    # Neither caches nor proxies may keep an event back.
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Accel-Buffering"] = "no"
    return response


def end_streams() -> None:
    """End all streams of this loop for good: the server stops, and waits for them."""
    _ending().set()


def _ending() -> asyncio.Event:
    return _endings.setdefault(asyncio.get_running_loop(), asyncio.Event())


async def _encoded(events: AsyncGenerator[Event, None]) -> AsyncGenerator[str, None]:
    ending: asyncio.Future[Any] = asyncio.ensure_future(_ending().wait())
    following = _next(events)
    try:
        while True:
            waiting = {ending, following}
            await asyncio.wait(
                waiting, timeout=HEARTBEAT, return_when=asyncio.FIRST_COMPLETED
            )
            if ending.done():
                return
            if not following.done():
                yield ": still here\n\n"
                continue
            event = following.result()
            if event is None:
                return
            name, data = event
            yield f"event: {name}\ndata: {json.dumps(data)}\n\n"
            following = _next(events)
    finally:
        # What an event waits for is broken off first: a running generator cannot be
        # closed.
        for future in (ending, following):
            future.cancel()
        await asyncio.wait({ending, following})
        await events.aclose()


def _next(events: AsyncGenerator[Event, None]) -> asyncio.Future[Any]:
    return asyncio.ensure_future(anext(events, None))
