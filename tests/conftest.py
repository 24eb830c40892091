"""What the tests share: certificates, servers, and backends for the settings in use."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from django.core import mail
from django.core.mail import EmailMessage

from django_async_smtp import Backend, delivery
from django_async_smtp.loop import smtp_loop
from django_async_smtp.options import DJANGO_SETTINGS, Options

from .servers import MailServer, ScriptedServer

OURS = "django_async_smtp.Backend"
QUEUED = "django_async_smtp.QueuedBackend"
DJANGOS = "django.core.mail.backends.smtp.EmailBackend"

MakeBackend = Callable[..., Backend]


@pytest.fixture(scope="session")
def ca() -> trustme.CA:
    """A certificate authority that nobody else knows."""
    return trustme.CA()


@pytest.fixture(scope="session")
def cafile(ca: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The authority's certificate, in PEM."""
    path = tmp_path_factory.mktemp("ca") / "ca.pem"
    ca.cert_pem.write_to_path(path)
    return path


@pytest.fixture(scope="session")
def server_tls(ca: trustme.CA) -> ssl.SSLContext:
    """A server's context, valid for 127.0.0.1 and localhost."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert("127.0.0.1", "localhost").configure_cert(context)
    return context


@pytest.fixture(scope="session")
def client_tls(ca: trustme.CA) -> ssl.SSLContext:
    """A client's context, which trusts that authority."""
    context = ssl.create_default_context()
    ca.configure_trust(context)
    return context


def options_for(server: ScriptedServer | MailServer, **more: Any) -> Options:
    """Return the options of a connection to a server."""
    address = {"host": server.host, "port": server.port}
    return Options(
        **{**address, "timeout": 10.0, "local_hostname": "client.example", **more}
    )


@pytest.fixture
def server() -> Iterator[MailServer]:
    """A server without TLS and AUTH."""
    with MailServer() as running:
        yield running


def configure_queue(settings: Any, smtp: dict[str, Any], **options: Any) -> None:
    """Set a queue up as the project's mailer; its worker sends with ``smtp``."""
    if hasattr(settings, "MAILERS"):
        queue = {"BACKEND": QUEUED, "OPTIONS": {"mailer": "smtp", **options}}
        settings.MAILERS = {
            "default": queue,
            "smtp": {"BACKEND": OURS, "OPTIONS": smtp},
        }
        return
    configure(settings, QUEUED, **smtp)
    settings.ASYNC_SMTP_QUEUE = options


def configure(settings: Any, path: str, **options: Any) -> None:
    """Set the project's mail settings, of whichever generation, to a backend."""
    if hasattr(settings, "MAILERS"):
        settings.MAILERS = {"default": {"BACKEND": path, "OPTIONS": options}}
        return
    settings.EMAIL_BACKEND = path
    for name, setting in DJANGO_SETTINGS.items():
        if name in options:
            setattr(settings, setting, options.pop(name))
    settings.ASYNC_SMTP = options


def default_backend() -> Any:
    """Return a new backend as the project's settings say."""
    return mail.mailers.default if hasattr(mail, "mailers") else mail.get_connection()


@pytest.fixture
def make_backend(settings: Any) -> MakeBackend:
    """Set our backend up in the project's settings, and return one."""

    def make(server: Any = None, *, fail_silently: bool = False, **options: Any) -> Any:
        if server is not None:
            options = {"host": server.host, "port": server.port, **options}
        configure(settings, OURS, **options)
        backend = default_backend()
        backend.fail_silently = fail_silently
        return backend

    return make


@pytest.fixture
def make_django_backend(settings: Any) -> Callable[..., Any]:
    """Set Django's own backend up in the project's settings, and return one."""

    def make(server: Any, *, fail_silently: bool = False, **options: Any) -> Any:
        options = {"host": server.host, "port": server.port, **options}
        configure(settings, DJANGOS, **options)
        backend = default_backend()
        backend.fail_silently = fail_silently
        return backend

    return make


def end_connections() -> None:
    """Say QUIT on every idle connection of our backends."""
    smtp = smtp_loop()

    async def end_all(in_caller: object) -> None:
        for pool in list(smtp.pools.values()):
            pool.stop_keeping()
            await pool.closed()
        smtp.pools.clear()

    smtp.call(end_all)


@pytest.fixture(autouse=True)
def _no_connections_left() -> Iterator[None]:
    """End every connection after a test, so that none serves the next one."""
    yield
    end_connections()


@pytest.fixture
def retry_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave next to no pause before a retry."""
    monkeypatch.setattr(delivery, "FIRST_PAUSE", 0.0001)


def email(subject: str = "Hello", to: Iterable[str] = ("to@example.com",)) -> Any:
    """Return a message; Any, because a message that was sent has its ``delivery``."""
    return EmailMessage(subject, "Body", "from@example.com", list(to))


def emails(number: int) -> list[Any]:
    """Return so many messages, with the subjects "0", "1" and so on."""
    return [email(f"{n}") for n in range(number)]


def subjects(server: ScriptedServer | MailServer) -> list[str]:
    """Return the subjects of the messages that arrived, in order."""
    return [
        line.removeprefix(b"Subject: ").decode()
        for message in server.received
        for line in message.content.splitlines()
        if line.startswith(b"Subject: ")
    ]


def states(messages: Iterable[Any]) -> list[str]:
    """Return what became of each message."""
    return [message.delivery.state for message in messages]
