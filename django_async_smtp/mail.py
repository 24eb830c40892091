"""``send_mail()`` and its kin, awaited; with any email backend."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from asgiref.sync import sync_to_async
from django.conf import settings
from django.core import mail
from django.core.exceptions import ImproperlyConfigured
from django.core.mail import EmailMessage, EmailMultiAlternatives
from django.utils.functional import Promise


async def asend_mail(
    subject: str,
    message: str,
    from_email: str | None,
    recipient_list: Sequence[str],
    *,
    fail_silently: bool = False,
    auth_user: str | None = None,
    auth_password: str | None = None,
    connection: Any = None,
    html_message: str | None = None,
    using: str | None = None,
) -> int:
    """
    Do as ``django.core.mail.send_mail()``, without blocking the event loop.

    :param using: a MAILERS alias (Django 6.1 and later).
    :returns: 1 if it was sent, 0 otherwise.
    :raises SMTPError: with this package's backend; another raises its own errors.
    """
    backend = _backend(using, connection, fail_silently, auth_user, auth_password)
    email = EmailMultiAlternatives(subject, message, from_email, recipient_list)
    if html_message:
        email.attach_alternative(html_message, "text/html")
    if not email.recipients():
        return 0
    return await _send(backend, [email])


async def asend_mass_mail(
    datatuple: Iterable[tuple[str, str, str | None, Sequence[str]]],
    *,
    fail_silently: bool = False,
    auth_user: str | None = None,
    auth_password: str | None = None,
    connection: Any = None,
    using: str | None = None,
) -> int:
    """
    Do as ``django.core.mail.send_mass_mail()``, without blocking the event loop.

    :param datatuple: ``(subject, message, from_email, recipient_list)`` of each.
    :returns: how many were sent.
    """
    backend = _backend(using, connection, fail_silently, auth_user, auth_password)
    # In a thread, for it may be a generator that asks the database.
    messages = await sync_to_async(_emails)(datatuple)
    return await _send(backend, messages)


async def amail_admins(
    subject: str,
    message: str,
    *,
    fail_silently: bool = False,
    connection: Any = None,
    html_message: str | None = None,
    using: str | None = None,
) -> None:
    """Do as ``django.core.mail.mail_admins()``, without blocking the event loop."""
    to = _addresses("ADMINS")
    await _mail_staff(
        to, subject, message, html_message, using, connection, fail_silently
    )


async def amail_managers(
    subject: str,
    message: str,
    *,
    fail_silently: bool = False,
    connection: Any = None,
    html_message: str | None = None,
    using: str | None = None,
) -> None:
    """Do as ``django.core.mail.mail_managers()``, without blocking the event loop."""
    to = _addresses("MANAGERS")
    await _mail_staff(
        to, subject, message, html_message, using, connection, fail_silently
    )


def _emails(
    datatuple: Iterable[tuple[str, str, str | None, Sequence[str]]],
) -> list[EmailMessage]:
    return [EmailMessage(*fields) for fields in datatuple]


async def _mail_staff(
    to: list[str],
    subject: str,
    message: str,
    html_message: str | None,
    using: str | None,
    connection: Any,
    fail_silently: bool,
) -> None:
    if not to:
        return
    await asend_mail(
        f"{settings.EMAIL_SUBJECT_PREFIX}{subject}",
        message,
        settings.SERVER_EMAIL,
        to,
        fail_silently=fail_silently,
        connection=connection,
        html_message=html_message,
        using=using,
    )


def _addresses(setting: str) -> list[str]:
    """Return the addresses of ADMINS or MANAGERS: strings, or (name, address) pairs."""
    entries = getattr(settings, setting) or []
    found = [
        entry[1] if isinstance(entry, list | tuple) and len(entry) == 2 else entry
        for entry in (entries if isinstance(entries, list | tuple) else [None])
    ]
    if not all(isinstance(address, str | Promise) for address in found):
        raise ImproperlyConfigured(
            f"The {setting} setting must be a list of email address strings."
        )
    return [str(address) for address in found]


def _backend(
    using: str | None,
    connection: Any,
    fail_silently: bool,
    auth_user: str | None,
    auth_password: str | None,
) -> Any:
    """Return the backend that Django's own function would send through."""
    overrides: dict[str, Any] = {
        name: value
        for name, value in {
            "fail_silently": fail_silently or None,
            "username": auth_user,
            "password": auth_password,
        }.items()
        if value is not None
    }
    if using is not None:
        if connection is not None or overrides:
            raise TypeError(
                "'using' excludes 'connection', 'fail_silently', 'auth_user' and "
                "'auth_password': set them in MAILERS."
            )
        if not hasattr(mail, "mailers"):
            raise TypeError("'using' needs Django 6.1 or later.")
        return mail.mailers[using]
    if connection is not None:
        if overrides:
            raise TypeError(
                "'connection' excludes 'fail_silently', 'auth_user' and "
                "'auth_password': pass them to get_connection()."
            )
        return connection
    if hasattr(mail, "mailers") and not overrides:
        return mail.mailers.default
    return mail.get_connection(**overrides)


async def _send(backend: Any, messages: list[EmailMessage]) -> int:
    if hasattr(backend, "asend_messages"):
        sent = await backend.asend_messages(messages)
    else:
        sent = await sync_to_async(backend.send_messages)(messages)
    return int(sent or 0)
