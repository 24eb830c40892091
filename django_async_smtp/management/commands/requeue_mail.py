"""``manage.py requeue_mail``: runs again what killed workers left behind."""

from __future__ import annotations

from typing import Any

from django.core.exceptions import ImproperlyConfigured
from django.core.management.base import BaseCommand, CommandError, CommandParser


class Command(BaseCommand):
    """See ``help``."""

    help = (
        "Have queued mail sent whose worker was killed before the end of its task. "
        "Run it every some minutes, where the task queue does not do so itself. What "
        "was sent just before may be sent twice, with the same Message-ID."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--task-backend",
            metavar="ALIAS",
            default="default",
            help="the key of TASKS",
        )
        parser.add_argument(
            "--minutes",
            type=float,
            default=30.0,
            help="how long ago a task must have been started (default: 30)",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            from django_async_smtp.tasks.abandoned import requeue

            count = requeue(options["task_backend"], options["minutes"])
        except ImproperlyConfigured as error:
            raise CommandError(str(error)) from error
        self.stdout.write(f"{count} tasks with mail are run again.")
