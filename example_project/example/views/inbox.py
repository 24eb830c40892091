"""Inbox: what the embedded server received, live."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from email.message import EmailMessage
from email.policy import default as policy
from typing import Any, Final

from django.http import Http404, HttpRequest, HttpResponse, StreamingHttpResponse
from django.http.response import HttpResponseBase
from django.shortcuts import render
from django.urls import reverse
from django.utils.http import content_disposition_header
from django.views.decorators.clickjacking import xframe_options_sameorigin
from django.views.decorators.http import require_GET, require_safe
from mailserver import INBOX, KEPT, Received

from ..events import Event, event_stream

# A mail may bring its own looks, and nothing else: no scripts, no forms, nothing from
# the network, and an origin of its own.
MAIL_POLICY: Final = (
    "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
    "frame-ancestors 'self'"
)


@require_safe
def inbox(request: HttpRequest) -> HttpResponse:
    """List what was received, the newest first."""
    received = list(INBOX)
    context = {
        "rows": [_row(one) for one in received],
        "newest": received[0].number if received else 0,
        "kept": KEPT,
    }
    return render(request, "example/inbox.html", context)


@require_GET
async def inbox_events(request: HttpRequest) -> StreamingHttpResponse:
    """Tell of each message that comes after the one that the page knows."""
    try:
        known = int(request.GET.get("after", "0"))
    except ValueError:
        known = 0
    return event_stream(_arrivals(known))


async def _arrivals(known: int) -> AsyncGenerator[Event, None]:
    arrived = asyncio.Event()
    loop = asyncio.get_running_loop()
    with INBOX.telling(lambda: loop.call_soon_threadsafe(arrived.set)):
        while True:
            arrived.clear()
            for received in INBOX.after(known):
                known = received.number
                yield "mail", _row(received)
            await arrived.wait()


@require_safe
def message(request: HttpRequest, number: int) -> HttpResponse:
    """Show a message: its headers, text, HTML and attachments."""
    received = _received(number)
    mail = received.parsed()
    text, html = _body(mail, "plain"), _body(mail, "html")
    context = {
        "received": received,
        "headers": [(name, _value(name, raw)) for name, raw in mail.raw_items()],
        "text": _content(text) if text is not None else None,
        "has_html": html is not None,
        "attachments": [
            {"name": _name(part, index), "size": len(_payload(part)), "index": index}
            for index, part in enumerate(_attachments(mail))
        ],
    }
    return render(request, "example/message.html", context)


@require_safe
@xframe_options_sameorigin
def message_html(request: HttpRequest, number: int) -> HttpResponse:
    """Return a message's HTML, for a sandboxed frame."""
    html = _body(_received(number).parsed(), "html")
    if html is None:
        raise Http404
    response = HttpResponse(_content(html))
    response.headers["Content-Security-Policy"] = MAIL_POLICY
    return response


@require_safe
def attachment(request: HttpRequest, number: int, index: int) -> HttpResponseBase:
    """Return an attachment, only to be saved."""
    parts = _attachments(_received(number).parsed())
    if index >= len(parts):
        raise Http404
    # Never its own type: a browser must not open what somebody sent.
    response = HttpResponse(
        _payload(parts[index]), content_type="application/octet-stream"
    )
    name = content_disposition_header(True, _name(parts[index], index))
    response.headers["Content-Disposition"] = name
    return response


def _received(number: int) -> Received:
    received = INBOX.find(number)
    if received is None:
        raise Http404
    return received


def _row(received: Received) -> dict[str, Any]:
    return {
        "number": received.number,
        "url": reverse("message", args=[received.number]),
        "subject": received.subject or "(no subject)",
        "sender": received.sender,
        "recipients": ", ".join(received.recipients),
        "at": f"{received.at:%H:%M:%S} UTC",
        "iso": received.at.isoformat(timespec="seconds"),
        "size": f"{received.size / 1000:.1f} kB",
    }


def _value(name: str, raw: str) -> str:
    """Return a header's value, decoded; as it came where that is beyond Python."""
    try:
        return str(policy.header_fetch_parse(name, raw))
    except Exception:
        # Its parser of addresses fails on some that are malformed, in many ways.
        return raw.encode(errors="replace").decode()


def _body(mail: EmailMessage, kind: str) -> Any:
    try:
        return mail.get_body((kind,))
    except AttributeError:
        # A part may only claim to have parts.
        return None


def _content(part: Any) -> str:
    """Return a part's text; what its character set does not know is replaced."""
    try:
        return str(part.get_content(errors="replace"))
    except (LookupError, ValueError):
        # A character set that nobody knows.
        return bytes(part.get_payload(decode=True)).decode(errors="replace")


def _attachments(mail: EmailMessage) -> list[Any]:
    # A message may only claim to have parts.
    return list(mail.iter_attachments()) if mail.is_multipart() else []


def _payload(part: Any) -> bytes:
    """Return an attachment's bytes; of a mail within the mail, its source."""
    if part.is_multipart():
        return b"".join(bytes(inner) for inner in part.get_payload())
    return bytes(part.get_payload(decode=True))


def _name(part: Any, index: int) -> str:
    return part.get_filename() or f"attachment-{index + 1}"
