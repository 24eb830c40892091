"""The mailers to choose from, for both generations of mail settings."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.core import mail

from django_async_smtp import Backend, QueuedBackend

DEFAULT = "default"


def aliases() -> list[str]:
    """Return their names; the first one works."""
    return [DEFAULT, *settings.BROKEN_MAILERS]


def backend(alias: str) -> Any:
    """Return a new backend."""
    if hasattr(mail, "mailers"):
        return mail.mailers[alias]
    if alias == DEFAULT:
        return mail.get_connection()
    return Backend(**settings.BROKEN_MAILERS[alias])


def smtp_backend(alias: str) -> Any:
    """Return a new backend that sends: that of the worker, where mail is queued."""
    found = backend(alias)
    if not isinstance(found, QueuedBackend):
        return found
    return mail.mailers[found.queue.mailer] if found.queue.mailer else Backend()


def through(alias: str) -> dict[str, Any]:
    """Return the argument that makes ``send_mail()`` and its kin take a mailer."""
    # One mailer of several is Django 6.1's; before, a connection says which.
    return (
        {"using": alias} if hasattr(mail, "mailers") else {"connection": backend(alias)}
    )
