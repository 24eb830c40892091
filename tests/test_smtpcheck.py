from __future__ import annotations

import base64
import json
import os
import re
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
from django.core.mail.utils import DNS_NAME
from django.core.management import CommandError, call_command
from jsonschema import Draft202012Validator

from django_async_smtp import diagnosis
from django_async_smtp.diagnosis import STAGES, STATES, Finding, StageReport
from django_async_smtp.management.commands import smtpcheck
from django_async_smtp.management.commands.smtpcheck import EXIT_STATUS, WIDTH

from .conftest import DJANGOS, OURS, configure, configure_queue
from .servers import (
    DEFAULT,
    PASSWORD,
    SILENCE,
    USERNAME,
    MailServer,
    Pause,
    Script,
    ScriptedServer,
    Turns,
    free_port,
)
from .settings import USES_MAILERS

LOCMEM = "django.core.mail.backends.locmem.EmailBackend"
LOGIN = {"username": USERNAME, "password": PASSWORD}
NOBODY = b"550 5.1.1 <to@example.com>: user unknown\r\n"

email_settings = pytest.mark.skipif(USES_MAILERS, reason="EMAIL_* only")
mailers = pytest.mark.skipif(not USES_MAILERS, reason="MAILERS only")

SCHEMA = json.loads(
    Path(diagnosis.__file__).with_name("smtpcheck.schema.json").read_text()
)


@dataclass
class Run:
    """A run of the command."""

    status: int
    out: str

    @property
    def lines(self) -> list[str]:
        return self.out.splitlines()

    def line(self, stage: str) -> str:
        """Return the line of a stage."""
        (found,) = (line for line in self.lines if line[4:].startswith(f"{stage} "))
        return found


def run(*arguments: str, stdout: Any = None, **options: Any) -> Run:
    out = stdout or StringIO()
    status = 0
    try:
        call_command("smtpcheck", *arguments, stdout=out, **options)
    except SystemExit as stop:
        status = int(stop.code or 0)
    return Run(status, out.getvalue() if isinstance(out, StringIO) else "")


def run_encoded(encoding: str, *arguments: str) -> Run:
    """Run it with a standard output of an encoding, and none of its errors hidden."""
    raw = BytesIO()
    out = TextIOWrapper(raw, encoding=encoding, errors="strict")
    status = run(*arguments, stdout=out).status
    out.flush()
    return Run(status, raw.getvalue().decode(encoding))


def run_json(*arguments: str) -> dict[str, Any]:
    """Run it for JSON, check that against the schema, and return it."""
    outcome = run("--format", "json", *arguments)
    report: dict[str, Any] = json.loads(outcome.out)
    Draft202012Validator(SCHEMA).validate(report)
    assert report["exit_status"] == outcome.status
    return report


def stages(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {stage["name"]: stage for stage in result["stages"]}


def signs(outcome: Run) -> dict[str, str]:
    """Return each stage's sign."""
    found = (re.match(r"  ([✓–!✗]) (\w+) ", line) for line in outcome.lines)  # noqa: RUF001
    return {match[2]: match[1] for match in found if match}


Configure = Callable[..., None]


@pytest.fixture
def project(settings: Any) -> Configure:
    """Set the project's mail settings to a server's."""
    settings.SERVER_EMAIL = settings.DEFAULT_FROM_EMAIL

    def make(server: Any, path: str = OURS, **options: Any) -> None:
        address = {"host": server.host, "port": server.port}
        if path == OURS:
            address["local_hostname"] = "client.example"
        configure(settings, path, **{**address, **options})

    return make


@pytest.fixture
def secure(
    project: Configure, server_tls: ssl.SSLContext, cafile: Path
) -> Callable[..., ScriptedServer]:
    """Make a server with TLS and AUTH, and set the project's settings to it."""

    def make(
        *scripts: Script, auth: str = "AUTH PLAIN", **options: Any
    ) -> ScriptedServer:
        server = ScriptedServer(scripts=scripts or ({},), tls=server_tls)
        server.extensions = (auth, "PIPELINING", "SMTPUTF8")
        more = {"use_tls": True, "ssl_cafile": str(cafile), **LOGIN, **options}
        project(server, **more)
        return server

    return make


# Text.


def test_a_server_that_works_is_told_line_by_line(
    secure: Callable[..., ScriptedServer],
) -> None:
    with secure() as server:
        outcome = run("--to", "to@example.com", "--send", "--connections", "2")
    assert outcome.status == 0
    assert outcome.lines[0] == (f"default: 127.0.0.1:{server.port}, STARTTLS, a login")
    assert signs(outcome) == dict.fromkeys(EXIT_STATUS, "✓")
    assert list(signs(outcome)) == ["settings", *STAGES]
    assert outcome.lines[-1] == "No problem found: 11 passed."
    (message,) = server.received
    assert b"Subject: smtpcheck: mail works\r\n" in message.content
    assert re.search(r"250 ok queued +\d+ ms \S*$", outcome.line("message"))


def test_without_send_no_message_is_sent(
    server: MailServer, project: Configure
) -> None:
    project(server)
    outcome = run("--to", "to@example.com")
    assert outcome.status == 0
    assert signs(outcome)["recipient"] == "✓"
    assert "none was sent" in outcome.line("message")
    assert not server.received


def test_a_failure_is_told_with_its_hint(secure: Callable[..., ScriptedServer]) -> None:
    with secure({"auth": b"535 5.7.8 Authentication failed\r\n"}):
        outcome = run()
    assert outcome.status == EXIT_STATUS["auth"]
    assert outcome.line("auth").startswith("  ✗ auth ")
    assert "not reached: auth failed" in outcome.line("sender")
    setting = 'OPTIONS["username"]' if USES_MAILERS else "EMAIL_HOST_USER"
    (hint,) = (n for n, line in enumerate(outcome.lines) if "→" in line)
    assert outcome.lines[hint].startswith(f"{' ' * 16}→ The server refused {setting}")
    assert outcome.lines[hint + 1].startswith(" " * 18)
    assert outcome.lines[-2:] == [
        "Mail cannot be sent: 6 passed; auth failed.",
        f"Exit status {EXIT_STATUS['auth']}.",
    ]


def test_each_hint_stands_below_its_finding(settings: Any, project: Configure) -> None:
    no = (b"501 5.1.7 bad sender syntax\r\n", b"553 5.7.1 not owned by user\r\n")
    with ScriptedServer(scripts=({"mail": Turns(*no)},)) as server:
        project(server)
        settings.SERVER_EMAIL = "root@localhost"
        lines = run().lines
    order = [
        next(number for number, line in enumerate(lines) if text in line)
        for text in (
            "✗ sender      DEFAULT_FROM_EMAIL",
            "→ The sender is no full address",
            "SERVER_EMAIL root@localhost",
            "→ The account that logs in may not send",
        )
    ]
    assert order == sorted(order)


def test_a_hint_of_several_findings_is_told_once(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{number}", port))
        for number in (1, 2, 3)
    ]
    # No name of every machine has several addresses.
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
    configure(settings, OURS, host="many.example", local_hostname="client.example")
    outcome = run()
    assert outcome.out.count("Connection refused") == 3
    assert outcome.out.count("→") == 1


def test_a_refused_recipient_does_not_mean_that_no_mail_can_be_sent(
    server: MailServer, project: Configure
) -> None:
    project(server)
    outcome = run("--to", "nouser@example.com")
    assert outcome.status == EXIT_STATUS["recipient"]
    assert outcome.lines[-2] == "6 passed; recipient failed."


def test_a_refused_server_email_does_not_mean_that_no_mail_can_be_sent(
    settings: Any, project: Configure
) -> None:
    no = b"553 5.7.1 <root@localhost>: not owned by user\r\n"
    with ScriptedServer(scripts=({"mail": Turns(DEFAULT, no)},)) as server:
        project(server)
        settings.SERVER_EMAIL = "root@localhost"
        outcome = run("--to", "to@example.com")
    assert outcome.status == EXIT_STATUS["sender"]
    assert outcome.lines[-2] == "6 passed; sender failed."


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("utf-8", "✓–!✗"), ("ascii", "+-!x"), ("latin-1", "+-!x"), ("cp437", "+-!x")],  # noqa: RUF001
)
def test_it_reads_well_at_80_columns_in_any_encoding(
    encoding: str,
    shown: str,
    secure: Callable[..., ScriptedServer],
    settings: Any,
) -> None:
    settings.SERVER_EMAIL = f"a.very.long.name.{'x' * 40}@{'long.' * 20}example.com"
    long = b"-".join([b"long"] * 30) + b" grob\xc3\xbcn \xe2\x9c\x93 " + b"x" * 120
    said = b"%d " + long + b"\r\n"
    script: Script = {
        "greeting": said % 220,
        "mail": Turns(said % 250, said % 553),
        "rcpt": said % 550,
    }
    with secure(script, local_hostname="client"):
        outcome = run_encoded(
            encoding, "--to", "to@example.com", "--transcript", "--connections", "20"
        )
    assert outcome.status == EXIT_STATUS["sender"]
    assert max(map(len, outcome.lines)) <= WIDTH == 80
    signs = {line[2] for line in outcome.lines if re.match("  . [a-z]+ {2,}", line)}
    assert signs == set(shown)
    assert ("→" in outcome.out) is (encoding == "utf-8")
    assert "x" * 120 in re.sub(r"\s", "", outcome.out), "nothing is left out"


def test_a_time_of_minutes_keeps_to_its_column() -> None:
    out = StringIO()
    command = smtpcheck.Command(stdout=out, no_color=True)
    for seconds in (99.9, 100.0, 9999.0):
        report = StageReport("dns", (Finding("x" * 45),), seconds)
        smtpcheck._Text(command).stage(report, transcript=False)
    lines = out.getvalue().splitlines()
    assert [line[61:69].strip() for line in lines] == ["99900 ms", "100 s", "9999 s"]
    assert {len(line) for line in lines} == {80}


def test_the_bar_grows_with_the_time(project: Configure) -> None:
    pause = (Pause(0.35), DEFAULT)
    with ScriptedServer(scripts=({"greeting": pause},)) as server:
        project(server)
        outcome = run()
        ascii_only = run_encoded("ascii")
    assert re.search(r" 3\d\d ms ███\S$", outcome.line("greeting"))
    assert "█" not in outcome.line("connect")
    assert re.search(r" 3\d\d ms ####?$", ascii_only.line("greeting"))


def test_colours_are_djangos(server: MailServer, project: Configure) -> None:
    project(server, local_hostname="client")
    assert "\x1b" not in run().out
    assert "\x1b" not in run("--no-color").out
    coloured = run("--force-color").out
    assert "\x1b[32;1m  ✓ dns" in coloured
    assert "\x1b[33;1m  ! ehlo" in coloured


class Watch(StringIO):
    """A standard output that notes when what was written."""

    def __init__(self) -> None:
        super().__init__()
        self.flushed: list[tuple[float, str]] = []

    def flush(self) -> None:
        self.flushed.append((time.monotonic(), self.getvalue()))

    def time_of(self, text: str) -> float:
        return next(when for when, written in self.flushed if text in written)


def test_lines_appear_as_the_stages_run(project: Configure) -> None:
    script: Script = {name: (Pause(0.3), DEFAULT) for name in ("greeting", "mail")}
    out = Watch()
    with ScriptedServer(scripts=(script,)) as server:
        project(server)
        run(stdout=out)
    times = [out.time_of(f"✓ {name}") for name in ("connect", "greeting", "sender")]
    assert times[1] - times[0] > 0.25
    assert times[2] - times[1] > 0.25


def test_what_a_server_says_cannot_steer_a_terminal(project: Configure) -> None:
    said = b"%d \x1b[31mred\x1b]0;title\x07 \x9b2J \xe2\x80\xae\x00 \xff\r\n"
    script: Script = {"greeting": said % 220, "mail": said % 250, "rcpt": said % 550}
    arguments = ("--to", "to@example.com", "--transcript")
    with ScriptedServer(scripts=(script,)) as server:
        project(server)
        outcome = run(*arguments)
        report = run_json(*arguments)
    assert "red" in outcome.out
    assert all(line.isprintable() for line in outcome.lines)
    assert not re.search(r"\\u00[01]|\\u007f|\\u009b|\\u202e|\\ud", json.dumps(report))


# The exit status.


def test_the_exit_statuses_are_these() -> None:
    assert EXIT_STATUS == {
        "settings": 1,
        "dns": 3,
        "connect": 4,
        "greeting": 5,
        "ehlo": 6,
        "tls": 7,
        "auth": 8,
        "sender": 9,
        "recipient": 10,
        "message": 11,
        "connections": 12,
    }


@pytest.mark.parametrize(
    ("stage", "script", "options"),
    [
        ("settings", {}, {"timeout": "soon"}),
        ("dns", {}, {"host": "smtp..example.com"}),
        ("connect", {}, {"port": 0}),
        ("greeting", {"greeting": b"554 no\r\n"}, {}),
        ("ehlo", {"ehlo": b"504 no\r\n", "helo": b"504 no\r\n"}, {}),
        ("tls", {"starttls": b"454 no\r\n"}, {}),
        ("auth", {"auth": b"535 no\r\n"}, {}),
        ("sender", {"mail": b"550 no\r\n"}, {}),
        ("recipient", {"rcpt": NOBODY}, {}),
        ("message", {"body": b"554 no\r\n"}, {}),
        ("connections", {}, {"max_connections": 5}),
    ],
)
def test_each_stage_has_its_exit_status(
    stage: str,
    script: Script,
    options: dict[str, Any],
    secure: Callable[..., ScriptedServer],
) -> None:
    busy: Script = {"greeting": b"421 too many connections\r\n"}
    if "port" in options:
        options = {"port": free_port()}
    with secure(script, busy, **options):
        arguments = ["--to", "to@example.com", "--send"]
        if stage == "connections":
            arguments += ["--connections", "3"]
        report = run_json(*arguments)
    assert report["exit_status"] == EXIT_STATUS[stage]
    (result,) = report["results"]
    assert result["state"] == "failed"
    names = [name for name, one in stages(result).items() if one["state"] == "failed"]
    assert names == [stage]


def test_the_schema_knows_the_stages_states_and_exit_statuses() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    defined = SCHEMA["$defs"]
    assert defined["stage"]["properties"]["name"]["enum"] == list(EXIT_STATUS)
    assert defined["state"]["enum"] == list(STATES)
    numbers = [0, *EXIT_STATUS.values()]
    assert SCHEMA["properties"]["exit_status"]["enum"] == numbers
    told = SCHEMA["properties"]["exit_status"]["description"]
    assert all(f" {number} {name}" in told for name, number in EXIT_STATUS.items())


def test_the_schema_allows_nothing_else(server: MailServer, project: Configure) -> None:
    project(server)
    validator = Draft202012Validator(SCHEMA)
    report = run_json("--until", "settings")
    result = report["results"][0]
    stage = result["stages"][0]
    finding = stage["findings"][0]
    for part, wrong in (
        (report, {"exit_status": 2}),
        (stage, {"findings": []}),
        (stage, {"name": "nowhere"}),
        *((part, {"more": 1}) for part in (report, result, stage, finding)),
    ):
        right = dict(part)
        part.update(wrong)
        assert not validator.is_valid(report)
        part.clear()
        part.update(right)
        assert validator.is_valid(report)


def test_warnings_count_where_they_are_asked_to(
    server: MailServer, project: Configure
) -> None:
    project(server, local_hostname="client")
    assert run().status == 0
    outcome = run("--fail-on-warning")
    assert outcome.status == EXIT_STATUS["ehlo"]
    assert outcome.lines[-2] == "5 passed; 1 with a warning: ehlo."


def test_a_failure_counts_before_an_earlier_warning(project: Configure) -> None:
    with ScriptedServer(scripts=({"mail": b"550 no\r\n"},)) as server:
        project(server, local_hostname="client")
        assert run("--fail-on-warning").status == EXIT_STATUS["sender"]


# Settings.


def test_until_settings_makes_no_connection(project: Configure) -> None:
    with ScriptedServer() as server:
        project(server)
        report = run_json("--until", "settings")
        assert server.connections == 0
    (result,) = report["results"]
    assert list(stages(result)) == ["settings"]
    assert result["server"] == f"127.0.0.1:{server.port}"


def test_until_names_the_last_stage(server: MailServer, project: Configure) -> None:
    project(server)
    for stage in ("dns", "ehlo", "auth"):
        assert list(signs(run("--until", stage)))[-1] == stage


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"timeout": "soon"}, "timeout"),
        ({"use_tls": True, "use_ssl": True}, "use_ssl"),
        ({"max_connections": 0}, "max_connections"),
        ({"max_conections": 5}, "max_conections"),
        ({"use_tls": True, "ssl_cafile": "/nowhere/ca.pem"}, "/nowhere/ca.pem"),
        ({"host": ""}, "host"),
    ],
)
def test_broken_settings_are_told_without_a_connection(
    options: dict[str, Any], named: str, project: Configure
) -> None:
    with ScriptedServer() as server:
        project(server, **options)
        outcome = run("--send", "--to", "to@example.com")
        report = run_json()
        assert server.connections == 0
    assert outcome.status == report["exit_status"] == 1
    assert outcome.lines[0] == "default"
    assert named in re.sub(r"\s", "", outcome.out).lower()
    assert set(list(signs(outcome).values())[1:]) == {"–"}  # noqa: RUF001
    assert "not reached: settings failed" in outcome.line("dns")
    assert outcome.lines[-2] == "Mail cannot be sent: 0 passed; settings failed."
    assert report["results"][0]["server"] is None
    for last in ("settings", "connect"):
        (until,) = run_json("--until", last)["results"]
        expected = ["settings", "dns", "connect"] if last == "connect" else [last]
        assert list(stages(until)) == expected


def test_an_unknown_backend_is_told(settings: Any) -> None:
    configure(settings, "nowhere.Backend")
    outcome = run()
    assert outcome.status == 1
    assert "django_async_smtp.Backend" in outcome.out


def test_a_default_sender_that_is_no_address_is_told(
    settings: Any, server: MailServer, project: Configure
) -> None:
    project(server)
    settings.DEFAULT_FROM_EMAIL = settings.SERVER_EMAIL = "a@example.com, b@example.com"
    outcome = run("--to", "to@example.com", "--send")
    assert outcome.status == EXIT_STATUS["settings"]
    assert "DEFAULT_FROM_EMAIL is not one address" in outcome.out
    assert {signs(outcome)[n] for n in ("sender", "recipient", "message")} == {"–"}  # noqa: RUF001
    assert not server.received


@mailers
def test_a_queue_names_the_mailer_to_check(settings: Any, server: MailServer) -> None:
    configure_queue(settings, {"host": server.host, "port": server.port})
    settings.DEBUG = True
    outcome = run()
    assert "queues mail for 'smtp': check --using smtp" in " ".join(outcome.out.split())


def test_another_backend_has_nothing_to_check(settings: Any) -> None:
    configure(settings, LOCMEM)
    outcome = run()
    assert outcome.status == 0
    assert f"{LOCMEM} does not send over SMTP" in " ".join(outcome.out.split())
    assert outcome.lines[-1] == "Nothing to check."
    (result,) = run_json("--fail-on-warning")["results"]
    assert (result["state"], result["server"]) == ("skipped", None)
    assert list(stages(result)) == ["settings"]


@pytest.mark.parametrize("kind", ["use_tls", "use_ssl"])
def test_djangos_own_backend_is_checked_too(
    kind: str,
    server_tls: ssl.SSLContext,
    project: Configure,
    monkeypatch: pytest.MonkeyPatch,
    cafile: Path,
) -> None:
    # Django's backend trusts the machine's authorities.
    monkeypatch.setenv("SSL_CERT_FILE", str(cafile))
    with ScriptedServer(
        tls=server_tls, implicit=kind == "use_ssl", extensions=("AUTH PLAIN",)
    ) as server:
        project(server, DJANGOS, **{kind: True}, **LOGIN, timeout=5)
        report = run_json("--to", "to@example.com", "--send")
    (result,) = report["results"]
    assert report["exit_status"] == 0
    assert result["backend"] == DJANGOS
    for name in ("tls", "auth", "sender", "recipient", "message"):
        assert stages(result)[name]["state"] == "ok", name
    assert len(server.received) == 1


def test_each_fallback_is_checked(project: Configure) -> None:
    refusing = ScriptedServer(scripts=({"mail": b"550 no\r\n"},))
    with ScriptedServer() as first, refusing as second:
        fallback = {"host": second.host, "port": second.port}
        project(first, fallbacks=[fallback])
        report = run_json()
    servers = [result["server"] for result in report["results"]]
    assert servers == [f"127.0.0.1:{first.port}", f"127.0.0.1:{second.port}"]
    assert [result["state"] for result in report["results"]] == ["ok", "failed"]
    assert "settings" in stages(report["results"][0])
    assert "settings" not in stages(report["results"][1])
    assert report["exit_status"] == EXIT_STATUS["sender"]


def test_a_fallback_is_named_as_such(project: Configure) -> None:
    with ScriptedServer() as first:
        project(first, fallbacks=[{"host": "127.0.0.1", "port": free_port()}])
        outcome = run()
    assert "default, a fallback: 127.0.0.1:" in outcome.out
    assert "Mail cannot be sent by this fallback:" in outcome.out
    text = " ".join(outcome.out.split())
    assert '"host" in ' in text
    assert "EMAIL_HOST" not in text.split("a fallback:")[1]


def test_djangos_backend_is_told_what_it_has(project: Configure) -> None:
    refusing: Script = {"ehlo": b"501 bad name\r\n", "helo": b"501 bad name\r\n"}
    with ScriptedServer(scripts=(refusing,)) as server:
        project(server, DJANGOS)
        outcome = run()
    text = " ".join(outcome.out.split())
    assert "local_hostname (with django_async_smtp.Backend)" in text
    assert "ASYNC_SMTP" not in text
    assert 'OPTIONS["local_hostname"]' not in text


def test_a_message_that_was_asked_for_and_not_sent_is_a_failure(
    project: Configure,
) -> None:
    with ScriptedServer(extensions=("AUTH PLAIN",)) as server:
        project(server, username=USERNAME, password=PASSWORD)
        assert run().status == 0
        outcome = run("--send", "--to", "to@example.com")
        assert not server.commands(b"AUTH")
        assert not server.received
    assert outcome.status == EXIT_STATUS["recipient"]
    assert signs(outcome)["message"] == "✗"


@pytest.mark.parametrize("nothing", [None, ""])
def test_no_mail_comes_from_none(
    server: MailServer, project: Configure, settings: Any, nothing: str | None
) -> None:
    project(server)
    settings.SERVER_EMAIL = nothing
    report = run_json()
    (result,) = report["results"]
    found = [finding["text"] for finding in stages(result)["sender"]["findings"]]
    assert len(found) == 1
    settings.DEFAULT_FROM_EMAIL = nothing
    run("--send", "--to", "to@example.com")
    assert not server.received


def test_a_slow_lookup_of_the_own_name_is_told(
    server: MailServer, project: Configure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smtpcheck, "SLOW_NAME", 0.1)
    asked = []

    def get_fqdn() -> str:
        asked.append(True)
        time.sleep(0.2)
        return "client.example"

    monkeypatch.setattr(DNS_NAME, "get_fqdn", get_fqdn)
    project(server)
    run()
    assert not asked  # It is set: local_hostname.
    project(server, local_hostname=None)
    run("--until", "settings")
    assert not asked
    (result,) = run_json()["results"]
    assert "slow-own-name" in stages(result)["settings"]["hint_ids"]


@mailers
def test_one_mailer_or_all_are_checked(settings: Any) -> None:
    refusing = ScriptedServer(scripts=({"mail": b"550 no\r\n"},))
    with ScriptedServer() as one, refusing as two:
        named = {"local_hostname": "client.example"}
        settings.MAILERS = {
            "default": {
                "BACKEND": OURS,
                "OPTIONS": {"host": one.host, "port": one.port, **named},
            },
            "bulk": {
                "BACKEND": OURS,
                "OPTIONS": {"host": two.host, "port": two.port, **named},
            },
            "gone": {
                "BACKEND": OURS,
                "OPTIONS": {"host": one.host, "port": free_port()},
            },
            "tests": {"BACKEND": LOCMEM},
        }
        assert run().status == 0
        assert run("--using", "bulk").status == EXIT_STATUS["sender"]
        assert run("--using", "tests").status == 0
        report = run_json("--all")
    assert report["exit_status"] == EXIT_STATUS["connect"]
    states = {result["mailer"]: result["state"] for result in report["results"]}
    assert states == {
        "default": "ok",
        "bulk": "failed",
        "gone": "failed",
        "tests": "skipped",
    }


@email_settings
def test_email_settings_are_the_default_mailer(
    server: MailServer, project: Configure
) -> None:
    project(server)
    for arguments in (["--using", "default"], ["--all"]):
        (result,) = run_json(*arguments)["results"]
        assert (result["mailer"], result["state"]) == ("default", "ok")


def test_an_unknown_mailer_is_wrong_usage(
    server: MailServer, project: Configure
) -> None:
    project(server)
    with pytest.raises(CommandError, match=r"no mailer 'nope'\. Known: default\."):
        run("--using", "nope")


# Usage.


@pytest.mark.parametrize(
    "arguments",
    [
        ["--nonsense"],
        ["--send"],
        ["--until", "nowhere"],
        ["--to", "a@example.com\r\nDATA"],
        ["--to", "a@example.com, b@example.com"],
        ["--to", ""],
        ["--timeout", "0"],
        ["--timeout", "inf"],
        ["--timeout", "soon"],
        ["--connections", "0"],
        ["--connections", "x"],
        ["--cert-days", "x"],
        ["--format", "xml"],
        ["-4", "-6"],
        ["--using", "default", "--all"],
    ],
)
def test_wrong_usage_makes_no_connection(
    arguments: list[str], project: Configure
) -> None:
    with ScriptedServer() as server:
        project(server)
        with pytest.raises(CommandError):
            run(*arguments)
        assert server.connections == 0


CommandLine = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def command_line(tmp_path: Path) -> CommandLine:
    """Run it in a process of its own, for a project with a server."""

    def run(
        port: int, *arguments: str, host: str = "127.0.0.1", code: str = ""
    ) -> subprocess.CompletedProcess[str]:
        options = {"host": host, "port": port}
        mail = (
            f"MAILERS = {{'default': {{'BACKEND': {OURS!r}, 'OPTIONS': {options}}}}}"
            if USES_MAILERS
            else f"EMAIL_HOST = {host!r}\nEMAIL_PORT = {port}"
        )
        (tmp_path / "project.py").write_text(
            f"from tests.settings import *\n{mail}\n{code}"
        )
        root = Path(__file__).parent.parent
        path = (str(tmp_path), str(root), os.environ.get("PYTHONPATH", ""))
        return subprocess.run(
            [sys.executable, "-m", "django", "smtpcheck", *arguments],
            env={
                **os.environ,
                "DJANGO_SETTINGS_MODULE": "project",
                "PYTHONPATH": os.pathsep.join(filter(None, path)),
                "PYTHONIOENCODING": "ascii",
            },
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    return run


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--send"], "--send needs --to ADDRESS."),
        (["--using", "nope"], "There is no mailer 'nope'"),
        (
            ["--send", "--to", "a@example.com", "--until", "recipient"],
            "--send needs --until message",
        ),
        (["--connections", "2", "--until", "auth"], "--connections needs --until"),
    ],
)
def test_wrong_usage_is_status_1_from_the_command_line(
    arguments: list[str], said: str, command_line: CommandLine
) -> None:
    done = command_line(25, *arguments)
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_it_runs_from_the_command_line(command_line: CommandLine) -> None:
    with ScriptedServer() as server:
        done = command_line(server.port, "--to", "to@example.com")
        assert server.commands(b"RCPT")
    assert done.returncode == 0, done
    assert f"default: 127.0.0.1:{server.port}, no TLS, no login\n" in done.stdout
    assert "  + recipient   to@example.com: 250 ok" in done.stdout


def test_a_failed_stage_is_the_status_on_the_command_line(
    command_line: CommandLine,
) -> None:
    done = command_line(free_port())
    assert done.returncode == EXIT_STATUS["connect"], done
    assert "Traceback" not in done.stderr


def test_a_reader_that_has_seen_enough_is_no_error(
    command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    closed = """
import os
read, write = os.pipe()
os.close(read)
os.dup2(write, 1)
"""
    done = command_line(free_port(), code=closed)
    assert done.returncode == 141, done
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


SILENT_RESOLVER = """
import socket, time

def getaddrinfo(*args, flags=0, **kwargs):
    if not flags:
        time.sleep(20)
    raise socket.gaierror(socket.EAI_NONAME, "unknown")

socket.getaddrinfo = getaddrinfo
"""


def test_a_silent_resolver_does_not_keep_the_process(command_line: CommandLine) -> None:
    start = time.monotonic()
    done = command_line(
        25, "--timeout", "0.6", host="slow.example", code=SILENT_RESOLVER
    )
    assert time.monotonic() - start < 10
    assert done.returncode == EXIT_STATUS["dns"], done
    assert "DNS resolver gave no answer" in " ".join(done.stdout.split())


def test_the_options_are_explained(command_line: CommandLine) -> None:
    done = command_line(25, "--help")
    assert done.returncode == 0
    assert "--fail-on-warning" in done.stdout


def test_the_time_limit_holds(project: Configure) -> None:
    with ScriptedServer(scripts=({"mail": SILENCE},)) as server:
        project(server)
        start = time.monotonic()
        outcome = run("--timeout", "0.9")
    assert time.monotonic() - start < 0.9 + 2
    assert outcome.status == EXIT_STATUS["sender"]


def test_a_family_can_be_chosen(server: MailServer, project: Configure) -> None:
    project(server)
    assert run("-4").status == 0
    outcome = run("-6")
    assert outcome.status == EXIT_STATUS["dns"]
    assert "has no IPv6 address" in outcome.line("dns")


def test_cert_days_say_when_to_warn(secure: Callable[..., ScriptedServer]) -> None:
    with secure():
        assert signs(run("--until", "tls"))["tls"] == "✓"
        late = run("--until", "tls", "--cert-days", "999999", "--fail-on-warning")
    assert late.status == EXIT_STATUS["tls"]


# Secrets.

PLAIN = f"\0{USERNAME}\0{PASSWORD}"


def base64_of(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


SECRETS = [
    PASSWORD,
    base64_of(PASSWORD),
    base64_of(PLAIN),
    base64_of(f"{USERNAME}\0{USERNAME}\0{PASSWORD}"),
    base64_of(PASSWORD).rstrip("="),
]


def assert_holds_no_secret(text: str) -> None:
    # Lines are wrapped, and the password holds spaces.
    joined = re.sub(r"\s", "", text)
    for secret in SECRETS:
        assert re.sub(r"\s", "", secret) not in joined


def all_outputs(*arguments: str) -> str:
    """Return what the command says, in every way in which it says it."""
    return "\n".join(
        [
            run(*arguments).out,
            run("--transcript", *arguments).out,
            run("--format", "json", *arguments).out,
            run("--format", "json", "--transcript", *arguments).out,
        ]
    )


METHODS = pytest.mark.parametrize("method", ["PLAIN", "LOGIN", "CRAM-MD5"])


@METHODS
def test_the_transcript_masks_the_login(
    method: str, secure: Callable[..., ScriptedServer]
) -> None:
    arguments = ("--to", "to@example.com", "--send")
    with secure(auth=f"AUTH {method}") as server:
        said = all_outputs(*arguments)
        (result,) = run_json("--transcript", *arguments)["results"]
        assert any(
            secret.encode() in b"\n".join(server.lines) for secret in SECRETS
        ) is (method != "CRAM-MD5")
    assert_holds_no_secret(said)
    transcript = stages(result)["auth"]["transcript"]
    lines = {
        "PLAIN": ["C: AUTH PLAIN ***", "S: 235 welcome"],
        "LOGIN": [
            "C: AUTH LOGIN ***",
            "S: 334 UGFzc3dvcmQ6",
            "C: ***",
            "S: 235 welcome",
        ],
        "CRAM-MD5": [
            "C: AUTH CRAM-MD5",
            "S: 334 PDEyMzRAdGVzdD4=",
            "C: ***",
            "S: 235 welcome",
        ],
    }
    assert transcript == lines[method]


@METHODS
@pytest.mark.parametrize("stage", ["auth", "mail", "rcpt", "body"])
def test_a_server_that_quotes_the_password_is_told_without_it(
    stage: str, method: str, secure: Callable[..., ScriptedServer]
) -> None:
    quotes = "".join(f"535-{secret}\r\n" for secret in SECRETS)
    quote = f"535-5.7.8 cannot take\r\n{quotes}535 and so on\r\n".encode()
    with secure({stage: quote}, auth=f"AUTH {method}"):
        said = all_outputs("--to", "to@example.com", "--send")
    assert "cannot take" in said
    assert_holds_no_secret(said)


@pytest.mark.parametrize("secret", SECRETS)
def test_a_greeting_or_ehlo_that_quotes_the_password_is_told_without_it(
    secret: str, secure: Callable[..., ScriptedServer]
) -> None:
    script: Script = {
        "greeting": b"220 hello " + secret.encode() + b"\r\n",
        "ehlo": b"250-test\r\n250 AUTH " + secret.encode() + b"\r\n",
    }
    with secure(script):
        assert_holds_no_secret(all_outputs())


def test_the_transcript_leaves_the_message_out(
    server: MailServer, project: Configure
) -> None:
    project(server)
    outcome = run("--to", "to@example.com", "--send", "--transcript")
    content = server.received[0].content
    assert b"This is a test message" in content
    assert "This is a test message" not in outcome.out
    assert "Subject:" not in outcome.out
    assert "      C: DATA" in outcome.lines
    assert re.search(r"C: \(the message: \d+ bytes\)", outcome.out)


def test_without_transcript_there_is_none(
    server: MailServer, project: Configure
) -> None:
    project(server)
    assert "EHLO client" not in run().out
    (result,) = run_json()["results"]
    assert not any("transcript" in stage for stage in result["stages"])


def test_settings_that_are_broken_are_told_without_the_password(
    secure: Callable[..., ScriptedServer],
) -> None:
    with secure(timeout="soon") as server:
        said = all_outputs()
        assert server.connections == 0
    assert "timeout" in said.lower()
    assert_holds_no_secret(said)
