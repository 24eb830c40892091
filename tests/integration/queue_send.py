"""Queues so many messages in one call: python -m tests.integration.queue_send 20."""

import sys

import django
from django.core import mail
from django.core.mail import EmailMessage


def messages(number: int, recipient: str) -> list[EmailMessage]:
    """Return so many messages, with the subjects "0", "1" and so on."""
    return [
        EmailMessage(f"{n}", "Body", "from@example.com", [recipient])
        for n in range(number)
    ]


def backend() -> object:
    """Return the project's backend."""
    return mail.mailers.default if hasattr(mail, "mailers") else mail.get_connection()


def send(number: int, recipient: str = "to@example.com") -> None:
    """Queue so many messages."""
    count = backend().send_messages(messages(number, recipient))  # type: ignore[attr-defined]
    assert count == number, count


if __name__ == "__main__":
    django.setup()
    send(int(sys.argv[1]), *sys.argv[2:])
