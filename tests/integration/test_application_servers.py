"""The example project under gunicorn and uvicorn, as it is deployed."""

from __future__ import annotations

import os
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import pytest

from tests.servers import (
    PASSWORD,
    USERNAME,
    MailServer,
    free_port,
    is_listening,
    wait_until,
)

ROOT = Path(__file__).parents[2]
# What a browser was given with the form, and gives back.
CSRF_TOKEN = "a" * 32


@pytest.fixture
def mail_server(server_tls: ssl.SSLContext) -> Iterator[MailServer]:
    with MailServer(tls=server_tls, auth=True) as running:
        yield running


@contextmanager
def serving(
    arguments: list[str],
    port: int,
    mail_server: MailServer,
    cafile: Path,
    folder: Path,
) -> Iterator[str]:
    """Run an application server, and provide its address."""
    environment = {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "example.settings",
        "DATABASE": str(folder / "db.sqlite3"),
        "SMTP_HOST": mail_server.host,
        "SMTP_PORT": str(mail_server.port),
        "SMTP_USER": USERNAME,
        "SMTP_PASSWORD": PASSWORD,
        "SMTP_CA_FILE": str(cafile),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "example_project")]),
    }
    migrate = [sys.executable, "-m", "django", "migrate", "--verbosity", "0"]
    subprocess.run(migrate, cwd=ROOT, env=environment, check=True, timeout=50)
    with subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            wait_until(lambda: is_listening(port) or process.poll() is not None, 30)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=30)
    assert "Traceback" not in errors, errors
    # uvicorn ends by the signal that it was sent.
    assert process.returncode in (0, -signal.SIGTERM), errors


def post(url: str, subject: str) -> str:
    """Send a form; return the subject of the page that it leads to."""
    form = {"subject": subject, "text": "Body", "to": "to@example.com"}
    form["csrfmiddlewaretoken"] = CSRF_TOKEN
    headers = {"Cookie": f"csrftoken={CSRF_TOKEN}"}
    request = Request(url, urlencode(form).encode(), headers)
    with urlopen(request, timeout=30) as response:
        assert "/sent/" in response.url
        text: str = response.read().decode()
    assert "queued as" in text
    return text.partition("<h1>")[2].partition("</h1>")[0]


def subjects(mail_server: MailServer) -> list[str]:
    return sorted(
        line.removeprefix(b"Subject: ").decode()
        for received in mail_server.received
        for line in received.content.split(b"\r\n")
        if line.startswith(b"Subject: ")
    )


def send_many(address: str) -> list[str]:
    """Post to both views at once, and return the subjects."""
    paths = ["contact/", "contact-async/"] * 10
    sent = [f"{n:02} {path}" for n, path in enumerate(paths)]
    with ThreadPoolExecutor(4) as threads:
        urls = [f"{address}/{path}" for path in paths]
        answers = list(threads.map(post, urls, sent))
    assert answers == sent
    return sent


def test_under_uvicorn(mail_server: MailServer, cafile: Path, tmp_path: Path) -> None:
    port = free_port()
    arguments = ["uvicorn", "example.asgi:application", "--port", str(port)]
    arguments += ["--lifespan", "off"]
    with serving(arguments, port, mail_server, cafile, tmp_path) as address:
        sent = send_many(address)
    assert subjects(mail_server) == sorted(sent)
    assert mail_server.connections <= 5


def test_under_gunicorn_with_a_preloaded_application_that_has_sent_mail(
    mail_server: MailServer, cafile: Path, tmp_path: Path
) -> None:
    port = free_port()
    arguments = ["gunicorn", "tests.integration.preloaded:application", "--preload"]
    arguments += ["--workers", "2", "--threads", "2", "--bind", f"127.0.0.1:{port}"]
    with serving(arguments, port, mail_server, cafile, tmp_path) as address:
        sent = send_many(address)
    assert subjects(mail_server) == sorted([*sent, "From the master"])
    # No worker has used the master's connection.
    (master,) = (r for r in mail_server.received if b"From the master" in r.content)
    assert all(
        received.connection != master.connection
        for received in mail_server.received
        if received is not master
    )
