"""
The site, with a mail server of its own, on http://127.0.0.1:8000 or another port:

    python example_project/serve.py [PORT] [--queue db]

With a queue, a worker in a process of its own sends the mail.
What it keeps is in a temporary folder, and ends with it.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Final

import django
import uvicorn
from django.contrib.staticfiles.handlers import ASGIStaticFilesHandler
from django.core.exceptions import SuspiciousFileOperation
from django.http import Http404, HttpRequest
from mailserver import HOST, NEWSLETTER_USER, PASSWORD, USER, Authority, MailServer

DEFAULT_PORT: Final = 8000
# Seconds that pages in the making get at the end.
GRACE: Final = 3


def main(port: int, queue: str) -> None:
    # As Ctrl-C, it leaves through what is to be ended.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt), tempfile.TemporaryDirectory() as folder:
        authority = Authority(Path(folder))
        with (
            MailServer(authority.context()) as server,
            MailServer(authority.context(is_expired=True)) as expired,
        ):
            os.environ.update(
                DJANGO_SETTINGS_MODULE="example.settings",
                DATABASE=str(Path(folder) / "db.sqlite3"),
                SECRET_KEY=secrets.token_urlsafe(32),
                SMTP_HOST=HOST,
                SMTP_PORT=str(server.port),
                SMTP_USER=USER,
                SMTP_PASSWORD=PASSWORD,
                SMTP_CA_FILE=str(authority.file),
                SMTP_LOCAL_HOSTNAME="www.example.com",
                EXPIRED_PORT=str(expired.port),
                NEWSLETTER_USER=NEWSLETTER_USER,
                QUEUE=queue,
            )
            django.setup()
            password = prepare_database()
            with worker() if queue else nullcontext():
                serve(port, password)


def prepare_database() -> str:
    """Make the tables and a user for the admin; return the password."""
    from django.contrib.auth import get_user_model
    from django.core.management import call_command

    call_command("migrate", verbosity=0)
    password = secrets.token_urlsafe(9)
    users: Any = get_user_model().objects
    users.create_superuser("admin", "admin@example.com", password)
    return password


@contextmanager
def worker() -> Iterator[None]:
    """Run a worker of the task queue."""
    manage = Path(__file__).with_name("manage.py")
    options = ["--interval=0.1", "--no-startup-delay", "--verbosity=0"]
    process = subprocess.Popen([sys.executable, manage, "db_worker", *options])  # noqa: S603
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def serve(port: int, password: str) -> None:
    """Serve until a signal comes."""
    from example.asgi import application

    # On this machine alone, as the accounts and passwords are.
    config = uvicorn.Config(
        StaticFiles(application),
        host=HOST,
        port=port,
        lifespan="off",
        log_level="warning",
        timeout_graceful_shutdown=GRACE,
    )
    Server(config, password).run()


class StaticFiles(ASGIStaticFilesHandler):
    """Serves the apps' files, for which a site has a web server otherwise."""

    def serve(self, request: HttpRequest) -> Any:
        try:
            return super().serve(request)
        except SuspiciousFileOperation as error:
            # A path that leads out of the folders; Django's answer is a 500.
            raise Http404 from error


class Server(uvicorn.Server):
    """Says where it is, and ends its event streams when it stops."""

    def __init__(self, config: uvicorn.Config, password: str) -> None:
        super().__init__(config)
        self._password = password

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.should_exit:
            return
        address = f"http://{self.config.host}:{self.config.port}"
        print(f"The example runs on {address}/ (Ctrl-C ends it).")
        print(f"Its admin: {address}/admin/, user admin, password {self._password}")
        sys.stdout.flush()

    async def shutdown(self, sockets: Any = None) -> None:
        from example.events import end_streams

        end_streams()
        await super().shutdown(sockets)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Serve the example project.")
    parser.add_argument("port", nargs="?", type=int, default=DEFAULT_PORT)
    parser.add_argument("--queue", choices=["db"], default="", help="send through it")
    arguments = parser.parse_args()
    main(arguments.port, arguments.queue)
