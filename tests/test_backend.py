from __future__ import annotations

from typing import Any

from django.core.mail import EmailMessage, send_mail

from .conftest import MakeBackend
from .servers import MailServer


def email(subject: str = "Hello", **kwargs: Any) -> EmailMessage:
    to = kwargs.pop("to", ["to@example.com"])
    return EmailMessage(subject, "Body", "from@example.com", to, **kwargs)


def test_send_mail_goes_through_the_backend(
    server: MailServer, make_backend: MakeBackend
) -> None:
    make_backend(server)
    assert send_mail("Hello", "Body", "from@example.com", ["to@example.com"]) == 1
    (received,) = server.received
    assert received.sender == "from@example.com"
    assert received.recipients == ["to@example.com"]
    assert b"Subject: Hello" in received.content


def test_open_says_whether_it_opened(
    server: MailServer, make_backend: MakeBackend
) -> None:
    backend = make_backend(server)
    assert backend.connection is None
    assert backend.open() is True
    assert backend.connection is not None
    assert backend.open() is False
    backend.close()
    assert backend.connection is None
