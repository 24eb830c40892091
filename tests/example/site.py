"""The example's site in a process of its own, and what a client does with it."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import smtplib
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from email.message import EmailMessage
from html import unescape
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlencode

from tests.servers import free_port

ROOT = Path(__file__).parents[2]
# What a browser is given with a form, and gives back.
CSRF_TOKEN = "a" * 32
FORM = {"to": "ada@example.org", "subject": "Hello", "text": "Body"}
FORM_TYPE = "application/x-www-form-urlencoded"
BOUNDARY = "----boundary"


def environment() -> dict[str, str]:
    """Return that of a person at a shell, not of the tests."""
    # Of coverage, too: a process that is killed leaves half of what it would read.
    own = (
        "DJANGO",
        "PYTHONDEVMODE",
        "PYTHONWARNINGS",
        "MAIL_SETTINGS",
        "TZ",
        "COVERAGE_PROCESS",
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    return {**kept, "PYTHONPATH": str(ROOT)}


class Page:
    """
    What a request was answered with.

    :ivar url: where redirects led to.
    """

    def __init__(self, url: str, response: http.client.HTTPResponse) -> None:
        self.url = url
        self.status = response.status
        self.headers = response.headers
        self.content = response.read()

    @property
    def html(self) -> str:
        return self.content.decode()

    @property
    def text(self) -> str:
        """What is to be read, without tags, on one line."""
        body = self.html.partition("<main")[2].partition("</main>")[0]
        return " ".join(unescape(re.sub(r"<[^>]*>", " ", body)).split())


class Site:
    """
    ``serve.py`` on a free port.

    :param options: further arguments of it.
    :ivar errors: what it wrote to standard error, once it has ended.
    """

    def __init__(self, *options: str) -> None:
        self._options = options
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.errors = ""
        self._session = ""

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            [
                sys.executable,
                "example_project/serve.py",
                str(self.port),
                *self._options,
            ],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout
        # Its address comes when it answers.
        self.first_line = self.process.stdout.readline()
        self.second_line = self.process.stdout.readline()
        if not self.second_line:
            self.end()
            raise AssertionError(self.errors)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.end()

    def end(self, number: int = signal.SIGTERM) -> int:
        """Stop it; return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            _, errors = self.process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        self.errors += errors or ""
        return self.process.returncode

    @property
    def admin_password(self) -> str:
        return self.second_line.split()[-1]

    def log_in(self) -> None:
        """Be the admin from now on."""
        form = {"username": "admin", "password": self.admin_password, "next": "/admin/"}
        with closing(self._connection()) as connection:
            body = _form(form)
            answer = _send(connection, "POST", "/admin/login/", body, FORM_TYPE, {})
            cookies = answer.headers.get_all("Set-Cookie", [])
        (cookie,) = (one for one in cookies if one.startswith("sessionid="))
        self._session = cookie.partition(";")[0]

    def deliver(self, message: EmailMessage | bytes) -> None:
        """Give a message to the mail server, as another client would."""
        content = bytes(message).replace(b"\n", b"\r\n")
        found = re.search(r"127\.0\.0\.1:(\d+)", self.post("/contact/", **FORM).text)
        assert found
        with smtplib.SMTP("127.0.0.1", int(found[1])) as client:
            # The client's trust is not what is tested.
            client.starttls(context=ssl._create_unverified_context())
            client.login("demo", "demo-password")
            client.sendmail("eve@example.com", ["ada@example.org"], content)

    def get(self, path: str, **headers: str) -> Page:
        cookies = f"csrftoken={CSRF_TOKEN}; {self._session}"
        return self._ask("GET", path, headers={"Cookie": cookies, **headers})

    def head(self, path: str) -> Page:
        return self._ask("HEAD", path)

    def post(self, path: str, token: str = CSRF_TOKEN, **form: Any) -> Page:
        return self._ask("POST", path, _form(form, token), FORM_TYPE)

    def upload(self, path: str, name: str, content: bytes, **form: str) -> Page:
        """Post a form with an attachment."""
        fields = {"csrfmiddlewaretoken": CSRF_TOKEN, **form}
        parts = [
            f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n'
            f"{value}\r\n".encode()
            for key, value in fields.items()
        ]
        head = f'name="attachment"; filename="{name}"'
        parts += [
            f"--{BOUNDARY}\r\nContent-Disposition: form-data; {head}\r\n".encode(),
            b"Content-Type: text/plain\r\n\r\n",
            content,
            f"\r\n--{BOUNDARY}--\r\n".encode(),
        ]
        kind = f"multipart/form-data; boundary={BOUNDARY}"
        return self._ask("POST", path, b"".join(parts), kind)

    def _ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        kind: str = "",
        headers: dict[str, str] | None = None,
    ) -> Page:
        with closing(self._connection()) as connection:
            answer = _send(connection, method, path, body, kind, headers or {})
            page = Page(path, answer)
        if page.status in (301, 302):
            return self._ask("GET", page.headers["Location"])
        return page

    def _connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)

    @contextmanager
    def stream(
        self, path: str, form: dict[str, Any] | None = None, **headers: str
    ) -> Iterator[Stream]:
        """Read server-sent events; the client goes away at the end of the block."""
        body = None if form is None else _form(form)
        method = "GET" if body is None else "POST"
        with (
            closing(self._connection()) as connection,
            closing(
                _send(connection, method, path, body, FORM_TYPE, headers)
            ) as response,
        ):
            yield Stream(response)


def _form(form: dict[str, Any], token: str = CSRF_TOKEN) -> bytes:
    return urlencode({"csrfmiddlewaretoken": token, **form}).encode()


def _send(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: bytes | None,
    kind: str,
    headers: dict[str, str],
) -> http.client.HTTPResponse:
    sent = {"Cookie": f"csrftoken={CSRF_TOKEN}", **headers}
    if body is not None:
        sent["Content-Type"] = kind
    connection.request(method, path, body, sent)
    return connection.getresponse()


class Stream:
    """Events as they come."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.kind = response.headers["Content-Type"]
        self._response = response

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        name = ""
        for line in self._response:
            key, _, value = line.decode().rstrip("\n").partition(": ")
            if key == "event":
                name = value
            elif key == "data":
                yield name, json.loads(value)

    def until(self, name: str) -> list[tuple[str, Any]]:
        """Return the events up to one of a name."""
        seen = []
        for event in self:
            seen.append(event)
            if event[0] == name:
                return seen
        raise AssertionError(f"ended without {name!r}: {seen}")
