"""What was sent, and what became of it."""

from __future__ import annotations

from django.core.mail import EmailMessage
from django.db import models
from django.urls import reverse

from django_async_smtp import Delivery, SMTPError


class SentMail(models.Model):
    """A message that was tried, with its ``Delivery``; never its text."""

    created = models.DateTimeField(auto_now_add=True)
    mailer = models.CharField(max_length=100)
    subject = models.CharField(max_length=200)
    state = models.CharField(max_length=10)
    accepted = models.JSONField(default=list)
    refused = models.JSONField(default=dict)
    reply = models.TextField()
    server = models.CharField(max_length=300)
    attempts = models.PositiveIntegerField()
    seconds = models.FloatField()
    stages = models.JSONField(default=dict)
    error = models.TextField()
    hint = models.TextField()

    class Meta:
        ordering = ("-id",)
        verbose_name_plural = "sent mail"

    def __str__(self) -> str:
        return f"{self.subject} ({self.state})"

    def get_absolute_url(self) -> str:
        return reverse("sent", args=[self.pk])

    @classmethod
    def of(
        cls, message: EmailMessage, delivery: Delivery, alias: str | None
    ) -> SentMail:
        """Return the row for a message, not saved yet."""
        error = delivery.error
        return cls(
            # None with EMAIL_* settings.
            mailer=alias or "",
            subject=message.subject[:200],
            state=delivery.state,
            accepted=list(delivery.accepted),
            refused=delivery.refused,
            reply=delivery.reply,
            server=delivery.server,
            attempts=delivery.attempts,
            seconds=delivery.seconds,
            stages=dict(delivery.stages),
            error=str(error or ""),
            hint=error.hint if isinstance(error, SMTPError) else "",
        )
