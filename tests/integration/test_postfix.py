"""Mail through a real Postfix arrives as it was sent."""

from __future__ import annotations

import os
import smtplib
from collections.abc import Callable, Iterator
from email import message_from_bytes, policy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import trustme
from django.core.mail import EmailMessage, EmailMultiAlternatives

from django_async_smtp import Backend, Delivery, pool_stats
from tests.conftest import MakeBackend
from tests.servers import wait_until

from .postfix import PASSWORD, USERNAME, Postfix, why_missing

missing = why_missing()
if missing and os.environ.get("CI") == "true":
    pytest.fail(f"CI needs Postfix: {missing}", pytrace=False)
pytestmark = pytest.mark.skipif(missing is not None, reason=missing or "")


@pytest.fixture(scope="module")
def postfix(ca: trustme.CA) -> Iterator[Postfix]:
    # pytest's own folders are closed to the user postfix.
    with TemporaryDirectory() as folder, Postfix(Path(folder), ca) as running:
        yield running


@pytest.fixture(params=["starttls", "implicit"])
def backend(
    request: pytest.FixtureRequest,
    postfix: Postfix,
    make_backend: MakeBackend,
    cafile: Path,
) -> Backend:
    options: dict[str, Any] = {"port": postfix.port, "use_tls": True}
    if request.param == "implicit":
        options = {"port": postfix.tls_port, "use_ssl": True}
    return make_backend(
        host=postfix.host,
        username=USERNAME,
        password=PASSWORD,
        ssl_cafile=str(cafile),
        **options,
    )


def email(subject: str, **kwargs: Any) -> EmailMultiAlternatives:
    to = kwargs.pop("to", ["someone@example.com"])
    return EmailMultiAlternatives(subject, "Body\n", "from@example.com", to, **kwargs)


def delivery_of(message: EmailMessage) -> Delivery:
    delivery = message.delivery  # type: ignore[attr-defined]
    assert isinstance(delivery, Delivery)
    return delivery


@pytest.fixture
def arrived(postfix: Postfix) -> Callable[[str], list[Any]]:
    """Wait for the messages with a subject, and return them parsed."""

    def wait(subject: str, count: int = 1) -> list[Any]:
        def found() -> list[Any]:
            parsed = [
                message_from_bytes(m, policy=policy.SMTP) for m in postfix.messages
            ]
            return [m for m in parsed if str(m["Subject"]).startswith(subject)]

        wait_until(lambda: len(found()) >= count, seconds=30)
        return found()

    return wait


def test_every_kind_of_message_arrives_whole(
    backend: Backend, arrived: Callable[..., list[Any]]
) -> None:
    subject = f"Grüße {backend.port}"
    message = email(subject, cc=["Zoë <zoe@example.com>"], bcc=["bcc@example.com"])
    message.body = "Käse\n.\n..dots\n" + "long " * 400 + "\n"
    message.attach_alternative("<p>Käse</p>", "text/html")
    data = os.urandom(1_000_000)
    message.attach("data.bin", data, "application/octet-stream")
    assert backend.send_messages([message]) == 1
    assert "queued as" in delivery_of(message).reply
    copy = arrived(subject)[0]
    assert copy["Bcc"] is None
    text = copy.get_body(("plain",)).get_content()
    assert text.replace("\r\n", "\n") == message.body
    (attachment,) = copy.iter_attachments()
    assert attachment.get_content() == data


def test_many_messages_arrive_exactly_once(
    backend: Backend, arrived: Callable[..., list[Any]], request: Any
) -> None:
    subject = f"Bulk {request.node.name}"
    messages = [email(f"{subject} {n};") for n in range(100)]
    assert backend.send_messages(messages) == 100
    subjects = [str(message["Subject"]) for message in arrived(subject, 100)]
    assert sorted(subjects) == sorted(message.subject for message in messages)


def test_a_refused_recipient_is_named(backend: Backend, request: Any) -> None:
    message = email(request.node.name, to=["nouser@example.com", "ok@example.com"])
    assert backend.send_messages([message]) == 1
    assert delivery_of(message).accepted == ("ok@example.com",)
    assert delivery_of(message).refused["nouser@example.com"][0] == 554


def test_a_refused_login_is_an_authentication_error(
    backend: Backend, request: Any
) -> None:
    backend.password = "wrong"
    with pytest.raises(smtplib.SMTPAuthenticationError) as caught:
        backend.send_messages([email(request.node.name)])
    assert caught.value.smtp_code == 535


def test_connections_are_reused(backend: Backend, request: Any) -> None:
    for number in range(3):
        backend.send_messages([email(f"{request.node.name} {number}")])
    stats = pool_stats()[f"{backend.host}:{backend.port}"]
    assert stats["idle"] == 1
    assert stats["reused"] >= 2


def test_a_non_ascii_mailbox_goes_out_with_smtputf8(
    backend: Backend, arrived: Callable[..., list[Any]], request: Any
) -> None:
    subject = f"UTF8 {request.node.name}"
    message = email(subject, to=["jörg@example.com"])
    assert backend.send_messages([message]) == 1
    (copy,) = arrived(subject)
    assert "jörg@example.com" in str(copy["To"])
