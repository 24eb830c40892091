"""The app, for ``INSTALLED_APPS``: system checks, and ``manage.py smtpcheck``."""

from django.apps import AppConfig
from django.core import checks


class AsyncSMTPConfig(AppConfig):
    """Registers the system checks, under the tag "mail"."""

    name = "django_async_smtp"
    verbose_name = "Async SMTP"

    def ready(self) -> None:
        from .checks import check

        checks.register(check, "mail")
