"""Compose: views that send mail, one sync, one async, and what became of it."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.core.mail import send_mail
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render
from django.views.decorators.http import require_safe

from django_async_smtp import SMTPError, asend_mail

from ..forms import ContactForm
from ..highlighting import highlighted
from ..models import SentMail
from ..receivers import just_sent
from ..timing import spans


def contact(request: HttpRequest) -> HttpResponse:
    """Send what was posted: as in any Django project, only faster."""
    form = ContactForm(request.POST or None, request.FILES or None)
    if not form.is_valid():
        return compose_page(request, form)
    mail, using = form.cleaned_data, form.using()
    try:
        if mail["attachment"]:
            form.backend().send_messages([form.email()])
        else:
            send_mail(mail["subject"], mail["text"], None, mail["to"], **using)
    except SMTPError as error:
        return compose_page(request, form, error)
    return redirect(just_sent() or "inbox")


async def contact_async(request: HttpRequest) -> HttpResponse:
    """Do the same without blocking the event loop."""
    form = ContactForm(request.POST or None, request.FILES or None)
    if not form.is_valid():
        return compose_page(request, form)
    mail, using = form.cleaned_data, form.using()
    try:
        if mail["attachment"]:
            await form.backend().asend_messages([form.email()])
        else:
            await asend_mail(mail["subject"], mail["text"], None, mail["to"], **using)
    except SMTPError as error:
        return compose_page(request, form, error)
    return redirect(just_sent() or "inbox")


@require_safe
def compose(request: HttpRequest) -> HttpResponse:
    """Show the form, empty."""
    return compose_page(request, ContactForm())


def compose_page(
    request: HttpRequest, form: ContactForm, error: SMTPError | None = None
) -> HttpResponse:
    """Return the form, with what was typed in, and what went wrong."""
    sources = {
        "sync": highlighted(contact),
        "async": highlighted(contact_async),
    }
    context = {
        "form": form,
        "error": error,
        "sources": sources,
        "limit": settings.ATTACHMENT_LIMIT,
    }
    return render(request, "example/compose.html", context)


@require_safe
def sent(request: HttpRequest, number: int) -> HttpResponse:
    """Show what became of a message."""
    mail = get_object_or_404(SentMail, pk=number)
    context: dict[str, Any] = {"mail": mail, "spans": spans(mail.stages)}
    return render(request, "example/sent.html", context)
