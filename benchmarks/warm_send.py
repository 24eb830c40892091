"""
Time of one `send_mail()` on a warm connection, against Django's own backend.

Over STARTTLS and a login, on loopback, the server in a process of its own. Both
backends send in turn; printed are medians, and the median of the pairs' ratios.

    python benchmarks/warm_send.py [rounds]
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import django
from django.conf import settings
from django.core import mail
from django.core.mail import EmailMessage

SERVER = Path(__file__).parent.parent / "example_project" / "mailserver.py"
# Where Debian, Ubuntu and Alpine keep the authorities that a system trusts.
SYSTEM_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")
OURS = "django_async_smtp.Backend"
DJANGOS = "django.core.mail.backends.smtp.EmailBackend"


def main(rounds: int) -> None:
    with subprocess.Popen(
        [sys.executable, SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout
        port, ca_file = server.stdout.readline().split()
        trusted = Path(ca_file)
        if SYSTEM_BUNDLE.exists():
            trusted.write_bytes(SYSTEM_BUNDLE.read_bytes() + trusted.read_bytes())
        os.environ["SSL_CERT_FILE"] = ca_file
        configure(int(port))
        pairs = [(send(DJANGOS), send(OURS)) for _ in range(rounds + 1)][1:]
        server.communicate()
    theirs, ours = zip(*pairs, strict=True)
    print(
        f"Django {django.__version__}, Python {sys.version.split()[0]}, {rounds} rounds"
    )
    print(f"Django's backend   {statistics.median(theirs) * 1000:7.2f} ms")
    print(f"django-async-smtp  {statistics.median(ours) * 1000:7.2f} ms")
    ratio = statistics.median(their / our for their, our in pairs)
    print(f"ratio              {ratio:7.2f}")


def configure(port: int) -> None:
    login = {"username": "demo", "password": "demo-password"}
    if django.VERSION >= (6, 1):
        options = {"host": "127.0.0.1", "port": port, "use_tls": True, **login}
        mailers = {p: {"BACKEND": p, "OPTIONS": options} for p in (OURS, DJANGOS)}
        settings.configure(MAILERS=mailers)
    else:
        settings.configure(
            EMAIL_HOST="127.0.0.1",
            EMAIL_PORT=port,
            EMAIL_USE_TLS=True,
            EMAIL_HOST_USER=login["username"],
            EMAIL_HOST_PASSWORD=login["password"],
        )
    django.setup()


def send(path: str) -> float:
    """Send one message as `send_mail()` does; return the seconds it took."""
    message = EmailMessage("Hello", "Body\n", "a@example.com", ["b@example.com"])
    start = time.perf_counter()
    if django.VERSION >= (6, 1):
        backend = mail.mailers[path]
    else:
        backend = mail.get_connection(path)
    assert backend.send_messages([message]) == 1
    return time.perf_counter() - start


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
