"""What was sent, to look at."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.http import HttpRequest

from .models import SentMail


@admin.register(SentMail)
class SentMailAdmin(admin.ModelAdmin):  # type: ignore[type-arg]
    """Read-only: a record is not edited."""

    list_display = ("created", "subject", "mailer", "state", "server", "milliseconds")
    list_filter = ("state", "mailer")
    search_fields = ("subject", "accepted")

    @admin.display(description="ms", ordering="seconds")
    def milliseconds(self, mail: SentMail) -> str:
        return f"{mail.seconds * 1000:.1f}"

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False
