"""
Settings that are broken in the ways that people break them.

What smtpcheck says must be enough to know which setting to change.
"""

from __future__ import annotations

import datetime
import json
import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trustme
from django.core.management import call_command

from django_async_smtp import hints, options
from django_async_smtp.management.commands.smtpcheck import EXIT_STATUS, WIDTH

from .conftest import OURS, configure
from .servers import (
    CLOSE,
    PASSWORD,
    READ,
    USERNAME,
    Script,
    ScriptedServer,
    address_without_answer,
    free_port,
)
from .settings import USES_MAILERS

NOT_YOURS = b"553 5.7.1 Sender address rejected: not owned by user alice\r\n"
EXTENSIONS = ("PIPELINING", "SMTPUTF8", "SIZE 10000000")

Server = Callable[[Mapping[str, ssl.SSLContext]], AbstractContextManager[Any]]


def scripted(
    script: Script | None = None,
    tls: str | None = "good",
    *,
    implicit: bool = False,
    auth: bool = True,
) -> Server:
    """Return what makes a server that has one of the certificates."""

    def make(contexts: Mapping[str, ssl.SSLContext]) -> ScriptedServer:
        return ScriptedServer(
            scripts=(script or {},),
            tls=contexts[tls] if tls else None,
            implicit=implicit,
            extensions=("AUTH PLAIN LOGIN", *EXTENSIONS) if auth else EXTENSIONS,
        )

    return make


@contextmanager
def dead_port(contexts: object) -> Iterator[Any]:
    yield SimpleNamespace(host="127.0.0.1", port=free_port())


@contextmanager
def blackhole(contexts: object) -> Iterator[Any]:
    with address_without_answer() as (host, port):
        yield SimpleNamespace(host=host, port=port)


@dataclass
class Case:
    """
    Broken settings.

    :ivar options: what differs from settings that work.
    :ivar settings: likewise, of the project's.
    :ivar stage: where the exit status says that it fails.
    :ivar hint: the id of the hint, or of the check.
    :ivar names: the options or settings that its hint must name.
    """

    id: str
    stage: str
    hint: str
    names: tuple[str, ...]
    server: Server = field(default_factory=scripted)
    options: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()


def check_id(key: str) -> str:
    return f"django_async_smtp.{key}"


# Warnings that keep a check from going on, or are all that it finds.
WARNED = ("--fail-on-warning",)
# 465 and 587 are not for tests to listen on.
SETTINGS_ALONE = (*WARNED, "--until", "settings")

CASES = [
    Case(
        "starttls-where-tls-is-from-the-start",
        "greeting",
        "tls-port",
        ("use_ssl", "use_tls", "port"),
        scripted(implicit=True),
    ),
    Case(
        "starttls-on-465",
        "settings",
        check_id("W003"),
        ("use_ssl", "use_tls", "port"),
        options={"port": 465},
        arguments=SETTINGS_ALONE,
    ),
    Case(
        "tls-from-the-start-where-starttls-is",
        "tls",
        "wrong-version-number",
        ("use_ssl", "use_tls", "port"),
        options={"use_tls": False, "use_ssl": True},
    ),
    Case(
        "use_ssl-on-587",
        "settings",
        check_id("W003"),
        ("use_ssl", "use_tls", "port"),
        options={"use_tls": False, "use_ssl": True, "port": 587},
        arguments=SETTINGS_ALONE,
    ),
    Case(
        "both-kinds-of-tls",
        "settings",
        check_id("E002"),
        ("use_ssl", "use_tls"),
        options={"use_tls": True, "use_ssl": True},
    ),
    Case(
        "starttls-not-offered",
        "tls",
        "starttls-not-offered",
        ("use_tls",),
        scripted(tls=None),
    ),
    Case(
        "typo-in-the-host-name",
        "dns",
        "unknown-host",
        ("host",),
        options={"host": "smtp.exmaple.invalid"},
    ),
    Case(
        "alias-that-is-not-in-the-certificate",
        "tls",
        "certificate-host-name",
        ("host", "mail.example.com"),
        scripted(tls="other-name"),
        options={"host": "localhost"},
        arguments=("-4",),
    ),
    Case(
        "wrong-password",
        "auth",
        "credentials-refused",
        ("username", "password"),
        scripted({"auth": b"535 5.7.8 Error: authentication failed\r\n"}),
        options={"password": "wrong"},
    ),
    Case(
        "user-without-password",
        "sender",
        check_id("W002"),
        ("username", "password"),
        scripted({"mail": b"530 5.7.0 Authentication required\r\n"}),
        options={"password": ""},
    ),
    Case(
        "login-without-tls",
        "tls",
        "login-not-tried",
        ("use_tls", "use_ssl"),
        options={"use_tls": False},
        arguments=WARNED,
    ),
    Case(
        "relay-without-a-login",
        "recipient",
        "relaying-denied",
        ("username", "password"),
        scripted({"rcpt": b"554 5.7.1 Relay access denied\r\n"}),
        options={"username": "", "password": ""},
        arguments=("--to", "ada@example.org"),
    ),
    Case(
        "refused-sender",
        "sender",
        "sender-is-not-yours",
        ("DEFAULT_FROM_EMAIL", "username"),
        scripted({"mail": NOT_YOURS}),
    ),
    Case(
        "sender-without-a-domain",
        "sender",
        "sender-syntax",
        ("DEFAULT_FROM_EMAIL",),
        scripted({"mail": b"501 5.1.7 Bad sender address syntax\r\n"}),
        settings={"DEFAULT_FROM_EMAIL": "hello", "SERVER_EMAIL": "hello"},
    ),
    Case(
        "sender-of-django",
        "settings",
        check_id("W007"),
        ("DEFAULT_FROM_EMAIL",),
        settings={"DEFAULT_FROM_EMAIL": "webmaster@localhost"},
        arguments=WARNED,
    ),
    Case(
        "untrusted-authority",
        "tls",
        "certificate-unknown-issuer",
        ("ssl_cafile",),
        options={"ssl_cafile": None},
    ),
    Case(
        "expired-certificate",
        "tls",
        "certificate-expired",
        # No setting mends it.
        ("The server must get a new one",),
        scripted(tls="expired"),
    ),
    Case(
        "ssh-server",
        "greeting",
        "ssh-server",
        ("host", "port"),
        scripted({"greeting": [b"SSH-2.0-OpenSSH_9.6\r\n", CLOSE]}),
    ),
    Case(
        "web-server",
        "greeting",
        "http-server",
        ("host", "port"),
        scripted({"greeting": [READ, b"HTTP/1.1 400 Bad Request\r\n", CLOSE]}),
    ),
    Case("dead-port", "connect", "connection-refused", ("host", "port"), dead_port),
    Case("no-answer", "connect", "connect-timeout", ("host", "port"), blackhole),
    Case(
        "unknown-option",
        "settings",
        check_id("E001"),
        ("'max_connection'", "Did you mean 'max_connections'?"),
        options={"max_connection": 3},
    ),
    Case(
        "ca-file-that-is-not-there",
        "settings",
        check_id("E003"),
        ("ssl_cafile",),
        options={"ssl_cafile": "no-such-file.pem"},
    ),
]


@pytest.fixture(scope="module")
def contexts(
    ca: trustme.CA, server_tls: ssl.SSLContext
) -> Mapping[str, ssl.SSLContext]:
    """The servers' certificates, by what is wrong with them."""
    yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    issued = {
        "expired": ca.issue_cert("127.0.0.1", not_after=yesterday),
        "other-name": ca.issue_cert("mail.example.com"),
    }
    found = {"good": server_tls}
    for name, certificate in issued.items():
        found[name] = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        certificate.configure_cert(found[name])
    return found


@pytest.fixture(autouse=True)
def _no_container(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the hints the same, wherever the tests run."""
    monkeypatch.setattr(hints, "is_in_container", lambda: False)


def smtpcheck(*arguments: str) -> tuple[int, str]:
    out, status = StringIO(), 0
    try:
        call_command("smtpcheck", "--timeout", "1.5", *arguments, stdout=out)
    except SystemExit as stop:
        status = int(stop.code or 0)
    return status, out.getvalue()


def named(name: str) -> str:
    """Return what the project's settings call an option."""
    known = name in options.TYPES
    return options.setting(name, in_mailers=USES_MAILERS) if known else name


@pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in CASES])
def test_the_output_tells_which_setting_to_change(
    case: Case, settings: Any, contexts: Mapping[str, ssl.SSLContext], cafile: Path
) -> None:
    settings.DEFAULT_FROM_EMAIL = settings.SERVER_EMAIL = "hello@example.com"
    for name, value in case.settings.items():
        setattr(settings, name, value)
    with case.server(contexts) as server:
        works = {
            "host": server.host,
            "port": server.port,
            "username": USERNAME,
            "password": PASSWORD,
            "use_tls": True,
            "ssl_cafile": str(cafile),
            "local_hostname": "client.example",
        }
        configure(settings, OURS, **{**works, **case.options})
        status, text = smtpcheck(*case.arguments)
        as_json = smtpcheck("--format", "json", *case.arguments)[1]
    assert status == EXIT_STATUS[case.stage]
    assert max(map(len, text.splitlines())) <= WIDTH
    (result,) = json.loads(as_json)["results"]
    findings = [one for stage in result["stages"] for one in stage["findings"]]
    # Not in the whole output: other findings may name a setting, too.
    (finding, *_) = [one for one in findings if one["hint_id"] == case.hint]
    whole = f"{finding['text']} {finding['hint']}"
    # The text of a finding names its sender; that of a system check is its own.
    is_check = case.hint.startswith(check_id(""))
    for name in case.names:
        is_setting = name in options.TYPES or name.isupper()
        assert named(name) in (
            finding["hint"] if is_setting and not is_check else whole
        )
    assert " ".join(finding["hint"].split()) in " ".join(text.split())


@pytest.mark.parametrize("value", ["False", "0"])
def test_the_output_tells_of_a_string_for_a_boolean(value: str, settings: Any) -> None:
    settings.DEFAULT_FROM_EMAIL = settings.SERVER_EMAIL = "hello@example.com"
    configure(settings, OURS, host="mail.example.com", port=2525, use_tls=value)
    status, text = smtpcheck(*SETTINGS_ALONE)
    assert status == EXIT_STATUS["settings"]
    # MAILERS takes no string at all.
    assert ("'use_tls'" if USES_MAILERS else "EMAIL_USE_TLS is a string") in text
    assert ("True or False" if USES_MAILERS else "Set True or False") in text
