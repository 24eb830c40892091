"""
Check the settings, send real mail in every way that a project does, and show what
arrived.

Ends with exit status 1 where anything did not arrive; where the check failed, with its.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import django
from mailserver import HOST, INBOX, PASSWORD, USER, Authority, MailServer, Received

MASS = 20
FORM = {"to": "ada@example.org", "text": "It works.\n"}

Send = Callable[[], None]


def main() -> int:
    with mail_server():
        django.setup()
        make_tables()
        check_settings()
        warm_up()
        seconds = {
            label: timed(send) for label, send in (ways() | async_ways()).items()
        }
        received = INBOX.after(0)
        use_djangos_backend()
        compared = {label: timed(send) for label, send in ways().items()}

    print_messages(received)
    print_times(seconds, compared)
    return report_missing(received)


@contextmanager
def mail_server() -> Iterator[None]:
    """Run one, and have the settings lead to it."""
    with tempfile.TemporaryDirectory() as folder:
        authority = Authority(Path(folder))
        with MailServer(authority.context()) as server:
            os.environ.update(
                DJANGO_SETTINGS_MODULE="example.settings",
                DATABASE=str(Path(folder) / "db.sqlite3"),
                SMTP_HOST=HOST,
                SMTP_PORT=str(server.port),
                SMTP_USER=USER,
                SMTP_PASSWORD=PASSWORD,
                SMTP_CA_FILE=str(authority.file),
                # Django's own backend trusts the system's authorities only.
                SSL_CERT_FILE=str(authority.file),
            )
            yield


def ways() -> dict[str, Send]:
    """Return what is sent, by whatever backend the settings name."""
    from django.core.mail import send_mail, send_mass_mail
    from django.test import Client

    def sync_view() -> None:
        Client().post("/contact/", FORM | {"subject": "From a sync view"})

    def mass_mail() -> None:
        send_mass_mail(bulk())

    def one_more() -> None:
        send_mail("One more", FORM["text"], None, [FORM["to"]])

    return {
        "send_mail() in a sync view": sync_view,
        f"send_mass_mail(), {MASS} messages": mass_mail,
        "one more send_mail()": one_more,
    }


def async_ways() -> dict[str, Send]:
    """Return what Django's own backend has no way for."""
    from django.test import AsyncClient

    def async_view() -> None:
        form: Any = FORM | {"subject": "From an async view"}
        asyncio.run(AsyncClient().post("/contact-async/", form))

    return {"asend_mail() in an async view": async_view}


def make_tables() -> None:
    """Have the views keep what became of each message."""
    from django.core.management import call_command

    call_command("migrate", verbosity=0)


def check_settings() -> None:
    """Do as ``manage.py smtpcheck``; exit where it fails."""
    from django.core.management import call_command

    print("What smtpcheck says of the settings:\n", flush=True)
    call_command("smtpcheck", "--to", FORM["to"])
    print()


def warm_up() -> None:
    """Have Django load what its first request needs."""
    from django.test import Client

    logging.disable()
    Client().get("/")
    logging.disable(logging.NOTSET)


def use_djangos_backend() -> None:
    from django.conf import settings

    path = "django.core.mail.backends.smtp.EmailBackend"
    if django.VERSION >= (6, 1):
        options = dict(settings.MAILERS["default"]["OPTIONS"])
        del options["ssl_cafile"]
        settings.MAILERS = {"default": {"BACKEND": path, "OPTIONS": options}}
    else:
        settings.EMAIL_BACKEND = path


def bulk() -> list[tuple[str, str, None, list[str]]]:
    """Return the messages of the mass mail."""
    return [
        (f"News {number}", FORM["text"], None, [f"reader{number}@example.org"])
        for number in range(1, MASS + 1)
    ]


def timed(send: Send) -> float:
    """Return how many seconds it took; say what failed, and go on."""
    start = time.perf_counter()
    try:
        send()
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    return time.perf_counter() - start


def print_messages(received: list[Received]) -> None:
    print(f"What the server received (Django {django.__version__}):\n")
    row = "{:<18} {:<24} {:<22} {:>6}  {:<8} {:<6}"
    print(row.format("from", "to", "subject", "bytes", "TLS", "login"))
    for message in received:
        print(
            row.format(
                message.sender,
                ", ".join(message.recipients),
                message.subject,
                message.size,
                message.tls,
                message.login,
            )
        )


def print_times(ours: dict[str, float], djangos: dict[str, float]) -> None:
    print("\nTime, in milliseconds:\n")
    row = "{:<34} {:>18} {:>18}"
    print(row.format("", "django-async-smtp", "Django's backend"))
    for label, seconds in ours.items():
        compared = f"{djangos[label] * 1000:.1f}" if label in djangos else "-"
        print(row.format(label, f"{seconds * 1000:.1f}", compared))


def report_missing(received: list[Received]) -> int:
    """Return the exit status."""
    subjects = {m.subject for m in received if "no" not in (m.tls, m.login)}
    expected = {"From a sync view", "From an async view", "One more"}
    expected |= {subject for subject, *_ in bulk()}
    missing = sorted(expected - subjects)
    if missing or len(received) != len(expected):
        print(
            f"\nFAILED: {len(received)} of {len(expected)} messages arrived"
            f"{'; missing: ' if missing else ''}{', '.join(missing)}",
            file=sys.stderr,
        )
        return 1
    print(f"\nAll {len(expected)} messages arrived, over TLS, after a login.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
