"""Settings: what smtpcheck finds for every mailer, as it finds it."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import asdict
from email.utils import parseaddr
from typing import Any, Final

from asgiref.sync import sync_to_async
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.shortcuts import render
from django.views.decorators.http import require_GET, require_safe

from django_async_smtp.diagnosis import Finding, StageReport, diagnose
from django_async_smtp.options import Options

from ..events import Event, event_stream
from ..mailers import aliases, smtp_backend

# Seconds for a mailer, all stages together.
TIMEOUT: Final = 15.0
UNTIL: Final = "sender"

# What is to be seen of those that fail.
ABOUT: Final = {
    "default": "The embedded server, with STARTTLS and a login.",
    "wrong-port": "Nothing listens there.",
    "wrong-password": "The server knows the user, not this password.",
    "expired-certificate": "The certificate's last day is over.",
    "refused-sender": "The account may not send from the project's address.",
}


@require_safe
def mailers(request: HttpRequest) -> HttpResponse:
    """List the mailers; the findings come as events."""
    rows = [{"alias": alias, "about": ABOUT.get(alias, "")} for alias in aliases()]
    return render(request, "example/settings.html", {"mailers": rows})


@require_GET
async def findings(request: HttpRequest) -> StreamingHttpResponse:
    """Check one mailer after the other."""
    return event_stream(_findings())


async def _findings() -> AsyncGenerator[Event, None]:
    for alias in aliases():
        async with aclosing(_reports(alias)) as reports:
            async for report in reports:
                yield "stage", {"mailer": alias, **_shown(report)}
        yield "checked", {"mailer": alias}
    yield "end", {}


async def _reports(alias: str) -> AsyncGenerator[StageReport, None]:
    """Do as ``manage.py smtpcheck --until sender``, for the mailer's first server."""
    try:
        server, seconds = await sync_to_async(_server)(alias)
    except (ImproperlyConfigured, OSError) as error:
        yield StageReport("settings", (Finding(str(error), "failed"),))
        return
    kind = "STARTTLS" if server.use_tls else "TLS" if server.use_ssl else "no TLS"
    found = Finding(f"{server.server}, {kind}, user {server.username or 'none'}")
    yield StageReport("settings", (found,), seconds)
    senders = {"DEFAULT_FROM_EMAIL": parseaddr(settings.DEFAULT_FROM_EMAIL)[1]}
    diagnosis = diagnose(server, until=UNTIL, senders=senders, timeout=TIMEOUT)
    async with aclosing(diagnosis):
        async for report in diagnosis:
            yield report


def _server(alias: str) -> tuple[Options, float]:
    """Return what the settings come to, and the seconds that it took."""
    start = time.monotonic()
    server: Options = smtp_backend(alias).route().servers[0]
    return server, time.monotonic() - start


def _shown(report: StageReport) -> dict[str, Any]:
    return {
        "stage": report.stage,
        "state": report.state,
        "milliseconds": round(report.seconds * 1000, 1),
        "findings": [asdict(finding) for finding in report.findings],
    }
