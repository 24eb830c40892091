"""The one thing that the project with a queue does otherwise."""

from django.apps import AppConfig
from django.conf import settings


class Quick(AppConfig):
    """Tries again after a second, where others wait for a minute."""

    name = "tests.integration"
    label = "quick"

    def ready(self) -> None:
        if settings.ENGINE != "celery":
            from django_async_smtp.tasks import worker

            worker.BACKOFF = (1,)  # type: ignore[assignment,misc]
