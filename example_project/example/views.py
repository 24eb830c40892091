"""Views that send mail: one sync, one async."""

from django.core.mail import send_mail
from django.http import HttpRequest, HttpResponse

from django_async_smtp import asend_mail


def contact(request: HttpRequest) -> HttpResponse:
    """Send what was posted: as in any Django project, only faster."""
    sent = send_mail(
        request.POST["subject"], request.POST["text"], None, [request.POST["to"]]
    )
    return HttpResponse(f"{sent} sent")


async def contact_async(request: HttpRequest) -> HttpResponse:
    """Do the same without blocking the event loop."""
    sent = await asend_mail(
        request.POST["subject"], request.POST["text"], None, [request.POST["to"]]
    )
    return HttpResponse(f"{sent} sent")
