"""The app."""

from django.apps import AppConfig


class ExampleConfig(AppConfig):
    """Connects the receivers."""

    name = "example"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from . import receivers

        receivers.connect()
