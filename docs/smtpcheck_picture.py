"""
Capture the runs of smtpcheck that the README shows.

    python -m docs.smtpcheck_picture [FOLDER]

Writes smtpcheck.svg and smtpcheck.txt, into docs without a folder. The servers are embedded ones, behind
a delay line; all that is pretended is what DNS says of smtp.example.com and
mail.example.com, and that port 587 there is a port here.
"""

from __future__ import annotations

import datetime
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import StringIO
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import django
import trustme
from django.conf import settings
from django.core.management import call_command
from rich.console import Console
from rich.text import Text

from django_async_smtp import opening
from django_async_smtp.diagnosis import probes
from django_async_smtp.opening import Address
from tests.servers import PASSWORD, USERNAME, Script, ScriptedServer

WIDTH: Final = 80
ROUND_TRIP_MS: Final = 20

SERVER: Final = "smtp.example.com"
ALIAS: Final = "mail.example.com"
# Addresses for documentation (RFC 5737).
ADDRESSES: Final = {SERVER: "192.0.2.25", ALIAS: "192.0.2.25"}

GREETING: Final = b"220 smtp.example.com ESMTP\r\n"
REFUSAL: Final = b"535 5.7.8 Error: authentication failed: bad credentials\r\n"
EXTENSIONS: Final = ("PIPELINING", "8BITMIME", "SMTPUTF8", "SIZE 26214400")

# Rich's own loads fonts from the network.
SVG: Final = """\
<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{
    font-family: Menlo, Consolas, "DejaVu Sans Mono", monospace;
    font-size: {char_height}px;
    line-height: {line_height}px;
}}
.{unique_id}-title {{ font: bold 18px sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def main(target: Path) -> None:
    """Capture both runs, into a folder."""
    with tempfile.TemporaryDirectory() as folder:
        ca = trustme.CA(organization_name="Example Trust", organization_unit_name="R1")
        ca_file = Path(folder) / "ca.pem"
        ca.cert_pem.write_to_path(ca_file)
        configure(ca_file)
        with reached_by_name(ca, {"greeting": GREETING, "auth": REFUSAL}):
            picture = captured("smtpcheck", host=SERVER, color=True)
        with reached_by_name(ca, {"greeting": GREETING}):
            text = captured("smtpcheck", "--until", "tls", host=ALIAS, color=False)
    (target / "smtpcheck.svg").write_text(drawn(picture))
    (target / "smtpcheck.txt").write_text(text)


def configure(ca_file: Path) -> None:
    """Have settings as a project would write them, for the Django that is there."""
    options = {
        "host": SERVER,
        "port": 587,
        "username": USERNAME,
        "password": PASSWORD,
        "use_tls": True,
    }
    extra = {"ssl_cafile": str(ca_file), "local_hostname": "www.example.com"}
    mail: dict[str, Any] = {
        "EMAIL_BACKEND": "django_async_smtp.Backend",
        "EMAIL_HOST": options["host"],
        "EMAIL_PORT": options["port"],
        "EMAIL_HOST_USER": options["username"],
        "EMAIL_HOST_PASSWORD": options["password"],
        "EMAIL_USE_TLS": options["use_tls"],
        "ASYNC_SMTP": extra,
    }
    if django.VERSION >= (6, 1):
        mailer = {"BACKEND": mail["EMAIL_BACKEND"], "OPTIONS": {**options, **extra}}
        mail = {"MAILERS": {"default": mailer}}
    settings.configure(
        INSTALLED_APPS=["django_async_smtp"],
        USE_TZ=True,
        DEFAULT_FROM_EMAIL="Shop <shop@example.com>",
        SERVER_EMAIL="shop@example.com",
        **mail,
    )
    django.setup()


@contextmanager
def reached_by_name(ca: trustme.CA, script: Script) -> Iterator[None]:
    """Run a server whose certificate has nine days left, far away, at port 587."""
    # And some hours, so that nine whole days are left for the length of the run.
    expires = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=9, hours=1)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    ca.issue_cert(SERVER, not_after=expires).configure_cert(context)
    server = ScriptedServer(
        scripts=(script,), tls=context, extensions=("AUTH PLAIN", *EXTENSIONS)
    )
    with server, delayed(server.port) as port:
        look_up, connect = socket.getaddrinfo, opening.connect_to

        def look_up_here(host: Any, *args: Any, **options: Any) -> list[Any]:
            is_numeric = bool(options.get("flags", 0) & socket.AI_NUMERICHOST)
            name = host if is_numeric else ADDRESSES.get(host, host)
            return look_up(name, *args, **options)

        async def connect_here(address: Address, source: Any) -> socket.socket:
            here: Any = (*address[:4], ("127.0.0.1", port))
            return await connect(here, source)

        with (
            patch.object(socket, "getaddrinfo", look_up_here),
            patch.object(probes, "connect_to", connect_here),
        ):
            yield


@contextmanager
def delayed(port: int) -> Iterator[int]:
    """Yield the port of a delay line to a port."""
    command = [sys.executable, "-m", "benchmarks.delay_line"]
    line = subprocess.Popen(
        [*command, str(port), str(ROUND_TRIP_MS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with line:
        assert line.stdout is not None
        yield int(line.stdout.readline())
        line.terminate()


def captured(command: str, *arguments: str, host: str, color: bool) -> str:
    """Return what a run with a host writes, with the command line above it."""
    colors: dict[str, Any] = {"force_color": True} if color else {"no_color": True}
    out = StringIO()
    # Its exit status: both runs end with a failure.
    with set_host(host), suppress(SystemExit):
        call_command(command, *arguments, stdout=out, **colors)
    shown = " ".join(["$ python manage.py", command, *arguments])
    return f"{shown}\n{out.getvalue()}"


@contextmanager
def set_host(host: str) -> Iterator[None]:
    """Change the host in the settings."""
    if django.VERSION >= (6, 1):
        options = settings.MAILERS["default"]["OPTIONS"]
        with patch.dict(options, host=host):
            yield
    else:
        with patch.object(settings, "EMAIL_HOST", host):
            yield


def drawn(text: str) -> str:
    """Return the picture of a terminal that shows a text."""
    console = Console(record=True, width=WIDTH, file=StringIO())
    console.print(Text.from_ansi(text))
    picture = console.export_svg(
        title="smtpcheck", code_format=SVG, unique_id="smtpcheck"
    )
    # Of the lines that Rich fills up.
    return "\n".join(line.rstrip() for line in picture.splitlines()) + "\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
