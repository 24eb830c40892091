from __future__ import annotations

import asyncio
import gc
import socket
import ssl
import threading
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import FrozenInstanceError, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trustme

from django_async_smtp.diagnosis import STAGES, StageName, StageReport, diagnose
from django_async_smtp.diagnosis.probes import connect_to_each
from django_async_smtp.envelope import Envelope
from django_async_smtp.opening import resolve
from django_async_smtp.options import Options

from .conftest import options_for
from .servers import (
    CLOSE,
    DEFAULT,
    PASSWORD,
    READ,
    RESET,
    SILENCE,
    USERNAME,
    MailServer,
    Pause,
    Script,
    ScriptedServer,
    Step,
    Turns,
    address_without_answer,
    free_port,
    open_sockets,
    wait_until,
)

LOGIN = {"username": USERNAME, "password": PASSWORD}
SENDERS = {"DEFAULT_FROM_EMAIL": "from@example.com"}
TWO_SENDERS = {**SENDERS, "SERVER_EMAIL": "server@example.com"}
TO = "to@example.com"
MESSAGE = Envelope("from@example.com", (TO,), b"Subject: Hi\r\n\r\nHi\r\n")
EVERYTHING: dict[str, Any] = {
    "senders": SENDERS,
    "recipient": TO,
    "message": MESSAGE,
    "connections": 2,
}

Reports = dict[str, StageReport]


async def checked(options: Options, **request: Any) -> Reports:
    """Run a whole diagnosis, and check that it leaves nothing behind."""
    before, tasks = open_sockets(), asyncio.all_tasks()
    async with aclosing(diagnose(options, **request)) as reports:
        found = {report.stage: report async for report in reports}
    await nothing_left(before, tasks)
    return found


async def nothing_left(sockets: int, tasks: set[asyncio.Task[Any]]) -> None:
    """Check that there are no more sockets and tasks than before."""
    assert asyncio.all_tasks() <= tasks
    # The server's side of the connections counts, too.
    await asyncio.to_thread(wait_until, lambda: open_sockets() <= sockets)


async def finished(tasks: set[asyncio.Task[Any]]) -> None:
    if tasks:
        await asyncio.wait(tasks)


def texts(report: StageReport) -> list[str]:
    return [finding.text for finding in report.findings]


def hint_ids(report: StageReport) -> list[str]:
    return [finding.hint_id for finding in report.findings if finding.hint_id]


def states(reports: Reports) -> dict[str, str]:
    return {name: report.state for name, report in reports.items()}


def failed_at(stage: str, reports: Reports) -> StageReport:
    """Check that only one stage failed, and the later ones were skipped for it."""
    names = list(reports)
    assert [name for name in names if reports[name].state == "failed"] == [stage]
    for name in names[names.index(stage) + 1 :]:
        assert reports[name].state == "skipped"
        assert texts(reports[name]) == [f"not reached: {stage} failed"]
    return reports[stage]


def secured(kind: str, context: ssl.SSLContext, **more: Any) -> dict[str, Any]:
    """Return options for one kind of TLS."""
    return {kind: True, "ssl_context": context, **more}


KINDS = pytest.mark.parametrize("kind", ["use_tls", "use_ssl"])


@pytest.fixture
def resolves_to(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Options]:
    """Give the host "many.example" addresses, and return options for it."""

    def make(*addresses: tuple[str, int]) -> Options:
        found = [
            (
                socket.AF_INET6 if ":" in address[0] else socket.AF_INET,
                socket.SOCK_STREAM,
                6,
                "",
                address,
            )
            for address in addresses
        ]
        # No name of every machine has several addresses, and dead ones.
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: found)
        return Options(
            host="many.example",
            port=addresses[0][1],
            timeout=5,
            local_hostname="client.example",
        )

    return make


# All stages.


@pytest.mark.asyncio
async def test_a_server_that_works_passes_every_stage(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    with MailServer(tls=server_tls, auth=True, smtputf8=True) as server:
        options = options_for(server, **secured("use_tls", client_tls, **LOGIN))
        reports = await checked(options, **EVERYTHING)
    assert states(reports) == dict.fromkeys(STAGES, "ok")
    assert all(report.seconds > 0 for report in reports.values())
    assert texts(reports["dns"]) == ["127.0.0.1"]
    assert texts(reports["message"]) == ["sent: 250 2.0.0 Ok: queued as 0001"]
    (received,) = server.received
    assert (received.content, received.tls, received.login) == (
        MESSAGE.content,
        True,
        True,
    )


@pytest.mark.parametrize(
    ("kind", "order"),
    [
        ("use_tls", ["connect", "greeting", "ehlo", "tls", "auth"]),
        ("use_ssl", ["connect", "tls", "greeting", "ehlo", "auth"]),
        (None, ["connect", "greeting", "ehlo", "tls", "auth"]),
    ],
)
@pytest.mark.asyncio
async def test_the_stages_come_in_the_order_of_the_kind_of_tls(
    kind: str | None,
    order: list[str],
    server_tls: ssl.SSLContext,
    client_tls: ssl.SSLContext,
) -> None:
    tls = server_tls if kind else None
    options = secured(kind, client_tls) if kind else {}
    with ScriptedServer(tls=tls, implicit=kind == "use_ssl") as server:
        reports = await checked(options_for(server, **options), senders=SENDERS)
    assert list(reports) == ["dns", *order, "sender", "recipient", "message"]
    assert "failed" not in states(reports).values()


@pytest.mark.asyncio
async def test_what_was_not_asked_for_is_skipped(server: MailServer) -> None:
    reports = await checked(options_for(server))
    assert states(reports) == {
        "dns": "ok",
        "connect": "ok",
        "greeting": "ok",
        "ehlo": "ok",
        "tls": "skipped",
        "auth": "skipped",
        "sender": "skipped",
        "recipient": "skipped",
        "message": "skipped",
    }
    assert not server.received


@KINDS
@pytest.mark.parametrize("until", STAGES)
@pytest.mark.asyncio
async def test_nothing_is_said_after_the_last_stage_but_quit(
    until: StageName,
    kind: str,
    server_tls: ssl.SSLContext,
    client_tls: ssl.SSLContext,
) -> None:
    after: dict[str, bytes] = {
        "auth": b"AUTH",
        "sender": b"MAIL",
        "recipient": b"RCPT",
        "message": b"DATA",
    }
    implicit = kind == "use_ssl"
    with ScriptedServer(
        tls=server_tls, implicit=implicit, extensions=("AUTH PLAIN",)
    ) as server:
        options = options_for(server, **secured(kind, client_tls, **LOGIN))
        reports = await checked(options, until=until, **EVERYTHING)
    names = list(reports)
    assert names[-1] == until
    for name, verb in after.items():
        assert bool(server.commands(verb)) is (name in names)
    if "ehlo" in names:
        assert server.lines[-1] == b"QUIT"


@pytest.mark.asyncio
async def test_reports_are_frozen(server: MailServer) -> None:
    reports = await checked(options_for(server), until="dns")
    with pytest.raises(FrozenInstanceError):
        reports["dns"].seconds = 0  # type: ignore[misc]


# Addresses.


@pytest.mark.parametrize(
    ("number", "hint_id"),
    [
        (socket.EAI_NONAME, "unknown-host"),
        (socket.EAI_AGAIN, "resolver-failure"),
    ],
)
@pytest.mark.asyncio
async def test_a_name_without_an_address_fails(
    number: int, hint_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise socket.gaierror(number, "said so")

    # What a resolver answers is a fact of the machine.
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    options = Options(host="nowhere.example", port=25)
    report = failed_at("dns", await checked(options, senders=SENDERS))
    assert hint_ids(report) == [hint_id]
    assert "nowhere.example" in texts(report)[0]
    assert "EMAIL_HOST" in report.findings[0].hint or hint_id == "resolver-failure"


@pytest.mark.parametrize("host", ["smtp..example.com", "a" * 64 + ".example"])
@pytest.mark.asyncio
async def test_what_cannot_be_a_host_name_has_no_address(host: str) -> None:
    report = failed_at("dns", await checked(Options(host=host, port=25)))
    assert hint_ids(report) == ["unknown-host"]


def test_a_silent_resolver_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    awake = threading.Event()

    def wait(*args: object, flags: int = 0, **kwargs: object) -> None:
        if not flags:
            awake.wait(10)
        raise socket.gaierror(socket.EAI_NONAME, "unknown")

    # What a resolver does is a fact of the machine.
    monkeypatch.setattr(socket, "getaddrinfo", wait)
    options = Options(host="slow.example", port=25)
    start = time.monotonic()
    try:
        # As the command does: asyncio.run() waits for its executor's threads.
        reports = asyncio.run(checked(options, timeout=0.6))
        assert time.monotonic() - start < 2
    finally:
        awake.set()
    report = failed_at("dns", reports)
    assert hint_ids(report) == ["resolver-failure"]


@pytest.mark.asyncio
async def test_every_address_is_tried_and_timed(
    resolves_to: Callable[..., Options],
) -> None:
    with ScriptedServer() as server:
        # All of 127.0.0.0/8 is this machine, the server on one address.
        reports = await checked(
            resolves_to((server.host, server.port), ("127.0.0.2", server.port))
        )
        assert server.connections == 1
    assert texts(reports["dns"]) == ["127.0.0.1, 127.0.0.2"]
    there, dead = reports["connect"].findings
    assert there.state == "ok"
    assert there.text.startswith("127.0.0.1 (IPv4) in ")
    assert there.text.endswith(" ms")
    assert dead.state == "warning"
    assert dead.text.startswith("127.0.0.2 (IPv4): Connection refused (")
    assert dead.hint_id == "address-unreachable"


@pytest.mark.asyncio
async def test_a_dead_family_is_a_warning(resolves_to: Callable[..., Options]) -> None:
    with ScriptedServer() as server:
        options = resolves_to(("::1", free_port()), (server.host, server.port))
        reports = await checked(options, senders=SENDERS)
        dead, there = reports["connect"].findings
        assert (dead.state, there.state) == ("warning", "ok")
        assert "::1 (IPv6): " in dead.text
        assert reports["sender"].state == "ok"


@pytest.mark.asyncio
async def test_a_silent_address_does_not_take_all_the_time(
    resolves_to: Callable[..., Options],
) -> None:
    with ScriptedServer() as server, address_without_answer() as silent:
        options = resolves_to(silent, (server.host, server.port))
        options = replace(options, timeout=0.3)
        reports = await checked(options, senders=SENDERS)
    silence, there = reports["connect"].findings
    assert (silence.state, there.state) == ("warning", "ok")
    assert "no answer within 0.3 s" in silence.text
    assert reports["sender"].state == "ok"


@pytest.mark.asyncio
async def test_an_address_that_is_slow_gets_some_seconds_after_the_first(
    resolves_to: Callable[..., Options],
) -> None:
    with ScriptedServer() as server, address_without_answer() as silent:
        options = resolves_to(silent, (server.host, server.port))
        addresses = await resolve(options)
        silence, there = await connect_to_each(addresses, options, patience=0.1)
        there.close()
    assert silence.seconds == 0.1
    assert "no answer within 0.1 s" in str(silence.outcome)


@pytest.mark.parametrize(
    ("family", "used"),
    [(socket.AF_INET, ["127.0.0.1"]), (socket.AF_INET6, ["::1"])],
)
@pytest.mark.asyncio
async def test_one_family_alone_can_be_asked_for(
    family: socket.AddressFamily,
    used: list[str],
    resolves_to: Callable[..., Options],
) -> None:
    with ScriptedServer() as server:
        options = resolves_to((server.host, server.port), ("::1", server.port))
        reports = await checked(options, family=family)
    assert texts(reports["dns"]) == used
    assert len(reports["connect"].findings) == 1
    assert reports["connect"].state == ("ok" if "." in used[0] else "failed")


@pytest.mark.asyncio
async def test_a_name_without_an_address_of_the_family_fails(
    server: MailServer,
) -> None:
    reports = await checked(options_for(server), family=socket.AF_INET6)
    report = failed_at("dns", reports)
    assert texts(report) == ["127.0.0.1 has no IPv6 address"]
    assert hint_ids(report) == ["no-address-of-family"]


@pytest.mark.asyncio
async def test_all_dead_addresses_are_told(resolves_to: Callable[..., Options]) -> None:
    with address_without_answer() as silent:
        options = replace(resolves_to(("127.0.0.1", free_port()), silent), timeout=0.3)
        report = failed_at("connect", await checked(options))
    refused, silence = report.findings
    assert refused.text.startswith("127.0.0.1 (IPv4): Connection refused (")
    assert "no answer within 0.3 s" in silence.text
    assert hint_ids(report)[1:] == ["connect-timeout"]
    assert hint_ids(report)[0] in {"connection-refused", "localhost-in-container"}


# What listens there.

BANNERS = [
    (b"SSH-2.0-OpenSSH_9.6\r\n", "ssh-server"),
    (b"* OK IMAP4rev1 ready\r\n", "imap-server"),
    (b"+OK POP3 ready\r\n", "pop3-server"),
    (b"HTTP/1.1 400 Bad Request\r\n\r\n", "http-server"),
]


@pytest.mark.parametrize(("banner", "hint_id"), BANNERS)
@pytest.mark.asyncio
async def test_another_protocol_is_named(banner: bytes, hint_id: str) -> None:
    with ScriptedServer(scripts=({"greeting": (banner, SILENCE)},)) as server:
        report = failed_at("greeting", await checked(options_for(server)))
    assert hint_ids(report) == [hint_id]
    assert server.host in report.findings[0].hint


@pytest.mark.parametrize(
    ("banner", "hint_id"),
    [*BANNERS, (b"220 mail.example ESMTP\r\n", "wrong-version-number")],
)
@pytest.mark.asyncio
async def test_a_port_without_tls_is_named_where_tls_is_set(
    banner: bytes, hint_id: str, client_tls: ssl.SSLContext
) -> None:
    with ScriptedServer(scripts=({"greeting": (banner, SILENCE)},)) as server:
        options = options_for(server, **secured("use_ssl", client_tls))
        report = failed_at("tls", await checked(options))
    assert hint_ids(report) == [hint_id]
    assert banner.split(b"\r")[0].decode() in " ".join(texts(report))


# Says nothing before it is asked something.
WEB_SERVER: Script = {"greeting": (READ, b"HTTP/1.0 400 Bad Request\r\n", CLOSE)}


@pytest.mark.parametrize(
    ("kind", "is_https"), [(None, False), ("use_ssl", True), ("use_tls", True)]
)
@pytest.mark.asyncio
async def test_a_web_server_that_waits_for_a_request_is_named(
    kind: str | None,
    is_https: bool,
    server_tls: ssl.SSLContext,
    client_tls: ssl.SSLContext,
) -> None:
    tls = server_tls if is_https else None
    with ScriptedServer(scripts=(WEB_SERVER,), tls=tls, implicit=is_https) as server:
        more = secured(kind, client_tls) if kind else {}
        options = options_for(server, timeout=0.4, **more)
        report = failed_at("greeting", await checked(options))
    assert hint_ids(report) == ["http-server"]
    assert "HTTP/1.0 400 Bad Request" in texts(report)[0]


@pytest.mark.parametrize("kind", ["use_tls", None])
@pytest.mark.parametrize("is_trusted", [True, False])
@pytest.mark.asyncio
async def test_silence_on_a_tls_port_is_found_out(
    is_trusted: bool,
    kind: str | None,
    server_tls: ssl.SSLContext,
    client_tls: ssl.SSLContext,
) -> None:
    context = client_tls if is_trusted else ssl.create_default_context()
    more = {**secured("use_tls", context), "use_tls": kind is not None}
    with ScriptedServer(tls=server_tls, implicit=True) as server:
        options = options_for(server, timeout=0.4, **more)
        report = failed_at("greeting", await checked(options))
    assert hint_ids(report) == ["tls-port"]
    assert texts(report)[0].endswith("; but it answers in TLS")
    assert "EMAIL_USE_SSL" in report.findings[0].hint


@pytest.mark.asyncio
async def test_silence_is_told_as_such() -> None:
    with ScriptedServer(scripts=({"greeting": SILENCE},)) as server:
        options = options_for(server, timeout=0.2)
        report = failed_at("greeting", await checked(options))
    assert hint_ids(report) == ["greeting-timeout"]


@pytest.mark.asyncio
async def test_a_failure_is_told_though_no_time_is_left_to_find_out_more(
    resolves_to: Callable[..., Options],
) -> None:
    slow = ScriptedServer(scripts=({"greeting": SILENCE},))
    with slow as server, address_without_answer() as silent:
        options = resolves_to(silent, (server.host, server.port))
        # The time is over while other protocols are tried.
        reports = await checked(options, timeout=0.75)
    assert hint_ids(failed_at("greeting", reports)) == ["greeting-timeout"]


@pytest.mark.parametrize(
    ("step", "hint_id"),
    [
        (CLOSE, "connection-closed"),
        # After the client has seen that it is connected.
        ((Pause(0.1), RESET), "connection-closed"),
        (b"421 4.3.2 too many connections\r\n", "too-many-connections"),
        (b"554 5.7.1 no thanks\r\n", "server-refuses-client"),
        (b"what?\r\n", "no-smtp-server"),
    ],
)
@pytest.mark.asyncio
async def test_a_bad_greeting_fails(step: Any, hint_id: str) -> None:
    with ScriptedServer(scripts=({"greeting": step},)) as server:
        report = failed_at("greeting", await checked(options_for(server)))
    assert hint_ids(report) == [hint_id]


@pytest.mark.asyncio
async def test_a_greeting_that_refuses_after_tls_is_no_failure_of_tls(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    script: Script = {"greeting": (b"554 5.7.1 no thanks\r\n", CLOSE)}
    with ScriptedServer(scripts=(script,), tls=server_tls, implicit=True) as server:
        options = options_for(server, **secured("use_ssl", client_tls))
        reports = await checked(options)
    assert texts(reports["tls"])[0].startswith("TLSv1.3, TLS_")
    assert hint_ids(failed_at("greeting", reports)) == ["server-refuses-client"]


@pytest.mark.parametrize("last", ["greeting", "ehlo"])
@pytest.mark.parametrize("kind", ["use_tls", "use_ssl", None])
@pytest.mark.asyncio
async def test_a_connection_that_ends_between_two_stages_is_told_as_such(
    kind: str | None,
    last: str,
    server_tls: ssl.SSLContext,
    client_tls: ssl.SSLContext,
) -> None:
    script: Script = {last: (DEFAULT, CLOSE)}
    implicit = kind == "use_ssl"
    tls = server_tls if kind else None
    with ScriptedServer(
        scripts=(script,), tls=tls, implicit=implicit, extensions=("AUTH PLAIN",)
    ) as server:
        more = secured(kind, client_tls, **LOGIN) if kind else {}
        found = {}
        async with aclosing(diagnose(options_for(server, **more))) as reports:
            async for report in reports:
                found[report.stage] = report
                if report.stage == last:
                    await asyncio.to_thread(
                        wait_until, lambda: not server.open_connections
                    )
    names = list(found)
    report = failed_at(names[names.index(last) + 1], found)
    assert "closed the connection" in texts(report)[0]


@pytest.mark.asyncio
async def test_the_greeting_is_told() -> None:
    greeting = b"220-mx.example ESMTP\r\n220 no \x1b[31mspam\x1b[0m\r\n"
    with ScriptedServer(scripts=({"greeting": greeting},)) as server:
        reports = await checked(options_for(server), until="greeting")
    assert texts(reports["greeting"]) == ["220 mx.example ESMTP no  [31mspam [0m"]


# EHLO.


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("client.example", "ok"),
        ("[127.0.0.1]", "ok"),
        ("client", "warning"),
        ("localhost", "warning"),
        ("3f2a9c81d04e", "warning"),
        ("3f2a9c81d04e.internal.example", "warning"),
    ],
)
@pytest.mark.asyncio
async def test_a_name_that_is_not_full_is_a_warning(name: str, state: str) -> None:
    with ScriptedServer() as server:
        options = options_for(server, local_hostname=name)
        reports = await checked(options, senders=SENDERS)
    said = reports["ehlo"].findings[0]
    assert said.state == state
    assert name in said.text
    assert (said.hint_id == "ehlo-name-unqualified") is (state == "warning")
    assert reports["sender"].state == "ok"


@pytest.mark.asyncio
async def test_the_name_is_this_machines_where_none_is_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What a machine is called is a fact of it.
    monkeypatch.setattr(socket, "getfqdn", lambda: "this.machine.example")
    with ScriptedServer() as server:
        options = options_for(server, local_hostname=None)
        reports = await checked(options, until="ehlo")
        assert server.lines[0] == b"EHLO this.machine.example"
    assert texts(reports["ehlo"])[0] == "as this.machine.example"


@pytest.mark.parametrize(
    ("extensions", "told"),
    [
        (
            ("PIPELINING", "8BITMIME", "SMTPUTF8", "SIZE 52428800", "AUTH PLAIN LOGIN"),
            "PIPELINING, 8BITMIME, SMTPUTF8, SIZE 50 MB, AUTH PLAIN LOGIN",
        ),
        (("SIZE 0",), "SIZE without a limit; not PIPELINING, SMTPUTF8"),
        (("SIZE 1000", "SMTPUTF8"), "SMTPUTF8, SIZE 1000 B; not PIPELINING"),
        (("SIZE",), "no extensions; not PIPELINING, SMTPUTF8"),
        (("SIZE many",), "no extensions; not PIPELINING, SMTPUTF8"),
    ],
)
@pytest.mark.asyncio
async def test_the_extensions_are_told(extensions: tuple[str, ...], told: str) -> None:
    with ScriptedServer(extensions=extensions) as server:
        reports = await checked(options_for(server), until="ehlo")
    assert texts(reports["ehlo"]) == ["as client.example", told]


@pytest.mark.asyncio
async def test_a_server_that_knows_helo_only_passes() -> None:
    with ScriptedServer(scripts=({"ehlo": b"502 what?\r\n"},)) as server:
        reports = await checked(options_for(server), **EVERYTHING)
    assert texts(reports["ehlo"])[1] == "no extensions: the server knows HELO only"
    assert reports["ehlo"].state == "ok"
    assert reports["message"].state == "ok"


@pytest.mark.asyncio
async def test_a_refused_name_fails() -> None:
    no = b"504 5.5.2 <client.example>: Helo command rejected: need fully-qualified\r\n"
    with ScriptedServer(scripts=({"ehlo": no, "helo": no},)) as server:
        report = failed_at("ehlo", await checked(options_for(server)))
    assert hint_ids(report) == ["ehlo-name"]


# TLS.


@KINDS
@pytest.mark.asyncio
async def test_tls_is_told(
    kind: str, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    with ScriptedServer(tls=server_tls, implicit=kind == "use_ssl") as server:
        options = options_for(server, **secured(kind, client_tls))
        reports = await checked(options, senders=SENDERS)
    version, certificate, left = texts(reports["tls"])
    assert version.startswith("TLSv1.3, TLS_")
    assert certificate.startswith("for 127.0.0.1, localhost, issued by trustme v")
    assert left.endswith(" days left")
    assert reports["tls"].state == reports["sender"].state == "ok"


def server_context(certificate: trustme.LeafCert) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificate.configure_cert(context)
    return context


def in_days(days: float) -> datetime:
    return datetime.now(UTC) + timedelta(days=days)


@KINDS
@pytest.mark.parametrize(
    ("left", "cert_days", "text", "state"),
    [
        (10.5, 21, "10 days left", "warning"),
        (10.5, 11, "10 days left", "warning"),
        (10.5, 10, "10 days left", "ok"),
        (1.5, 21, "1 day left", "warning"),
        (0.5, 0, "0 days left", "ok"),
    ],
)
@pytest.mark.asyncio
async def test_a_certificate_that_expires_soon_is_a_warning(
    left: float,
    cert_days: int,
    text: str,
    state: str,
    kind: str,
    ca: trustme.CA,
    client_tls: ssl.SSLContext,
) -> None:
    tls = server_context(ca.issue_cert("127.0.0.1", not_after=in_days(left)))
    with ScriptedServer(tls=tls, implicit=kind == "use_ssl") as server:
        options = options_for(server, **secured(kind, client_tls))
        reports = await checked(options, cert_days=cert_days, until="tls")
    found = reports["tls"].findings[-1]
    assert (found.text, found.state) == (text, state)
    assert (found.hint_id == "certificate-expires-soon") is (state == "warning")


def of_another_name(ca: trustme.CA, folder: Path) -> ssl.SSLContext:
    names = ("mail.other.example", "smtp.other.example", "a.example", "b.example")
    return server_context(ca.issue_cert(*names))


def of_unknown_issuer(ca: trustme.CA, folder: Path) -> ssl.SSLContext:
    return server_context(trustme.CA().issue_cert("127.0.0.1"))


def expired(ca: trustme.CA, folder: Path) -> ssl.SSLContext:
    return server_context(ca.issue_cert("127.0.0.1", not_after=in_days(-1)))


def not_yet_valid(ca: trustme.CA, folder: Path) -> ssl.SSLContext:
    return server_context(
        ca.issue_cert("127.0.0.1", not_before=in_days(1), not_after=in_days(9))
    )


def of_private_ca(ca: trustme.CA, folder: Path) -> ssl.SSLContext:
    other = trustme.CA()
    chain = folder / "chain.pem"
    certificate = other.issue_cert("127.0.0.1")
    certificate.private_key_and_cert_chain_pem.write_to_path(chain)
    other.cert_pem.write_to_path(chain, append=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(chain)
    return context


def self_signed(ca: trustme.CA, folder: Path) -> ssl.SSLContext:
    other, pem = trustme.CA(), folder / "self.pem"
    other.private_key_pem.write_to_path(pem)
    other.cert_pem.write_to_path(pem, append=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pem)
    return context


@KINDS
@pytest.mark.parametrize(
    ("certificate", "hint_id"),
    [
        (of_another_name, "certificate-host-name"),
        (of_unknown_issuer, "certificate-unknown-issuer"),
        (expired, "certificate-expired"),
        (not_yet_valid, "certificate-not-yet-valid"),
        (of_private_ca, "certificate-private-ca"),
        (self_signed, "certificate-self-signed"),
    ],
)
@pytest.mark.asyncio
async def test_bad_certificates_are_told_apart(
    certificate: Callable[[trustme.CA, Path], ssl.SSLContext],
    hint_id: str,
    kind: str,
    ca: trustme.CA,
    client_tls: ssl.SSLContext,
    tmp_path: Path,
) -> None:
    tls = certificate(ca, tmp_path)
    with ScriptedServer(
        tls=tls, implicit=kind == "use_ssl", extensions=("AUTH PLAIN",)
    ) as server:
        options = options_for(server, **secured(kind, client_tls, **LOGIN))
        report = failed_at("tls", await checked(options, **EVERYTHING))
        assert not server.commands(b"AUTH")
    assert hint_ids(report) == [hint_id]
    named = "mail.other.example, smtp.other.example, a.example and 1 more"
    (text,) = texts(report)
    assert text.endswith(f" It is for {named}.") is (hint_id == "certificate-host-name")


@KINDS
@pytest.mark.asyncio
async def test_a_host_name_mismatch_is_told_though_the_names_cannot_be_asked_for(
    kind: str, ca: trustme.CA, client_tls: ssl.SSLContext, tmp_path: Path
) -> None:
    busy: Script = {"greeting": b"421 busy\r\n", "tls": CLOSE}
    with ScriptedServer(
        scripts=({}, busy),
        tls=of_another_name(ca, tmp_path),
        implicit=kind == "use_ssl",
    ) as server:
        options = options_for(server, **secured(kind, client_tls))
        report = failed_at("tls", await checked(options))
        assert server.connections == 2
    assert hint_ids(report) == ["certificate-host-name"]
    assert "It is for" not in texts(report)[0]


@pytest.mark.asyncio
async def test_silence_where_tls_should_begin_fails(client_tls: ssl.SSLContext) -> None:
    with ScriptedServer(scripts=({"greeting": SILENCE},)) as server:
        options = options_for(server, timeout=0.3, **secured("use_ssl", client_tls))
        report = failed_at("tls", await checked(options))
    assert hint_ids(report) == ["tls-timeout"]


@pytest.fixture(params=["any certificate", "any name"])
def lax_tls(request: pytest.FixtureRequest, cafile: Path) -> ssl.SSLContext:
    """A client's context that does not verify who the server is."""
    context = ssl.create_default_context(cafile=str(cafile))
    context.check_hostname = False
    if request.param == "any certificate":
        context.verify_mode = ssl.CERT_NONE
    return context


@KINDS
@pytest.mark.asyncio
async def test_a_certificate_that_is_not_verified_is_a_warning(
    kind: str, server_tls: ssl.SSLContext, lax_tls: ssl.SSLContext
) -> None:
    with ScriptedServer(tls=server_tls, implicit=kind == "use_ssl") as server:
        options = options_for(server, **secured(kind, lax_tls))
        reports = await checked(options, senders=SENDERS)
    assert "certificate-not-verified" in hint_ids(reports["tls"])
    assert reports["tls"].state == "warning"
    assert reports["sender"].state == "ok"


@KINDS
@pytest.mark.asyncio
async def test_no_password_goes_to_a_server_that_is_not_verified(
    kind: str, server_tls: ssl.SSLContext, lax_tls: ssl.SSLContext
) -> None:
    with ScriptedServer(
        tls=server_tls, implicit=kind == "use_ssl", extensions=("AUTH PLAIN LOGIN",)
    ) as server:
        options = options_for(server, **secured(kind, lax_tls, **LOGIN))
        reports = await checked(options, **EVERYTHING)
        assert not server.commands(b"AUTH")
        assert not server.received
    assert hint_ids(reports["auth"]) == ["login-not-tried-unverified"]
    # They were asked for, and nothing else has failed.
    for stage in ("recipient", "message", "connections"):
        assert reports[stage].state == "failed"
    assert reports["sender"].state == "skipped"


@pytest.mark.asyncio
async def test_tls_that_is_offered_and_not_used_is_a_warning(
    server_tls: ssl.SSLContext,
) -> None:
    with ScriptedServer(tls=server_tls) as server:
        reports = await checked(options_for(server), senders=SENDERS)
        assert not server.commands(b"STARTTLS")
    assert hint_ids(reports["tls"]) == ["tls-not-used"]
    assert reports["tls"].state == "warning"
    assert reports["sender"].state == "ok"


@pytest.mark.parametrize(
    ("step", "hint_id"),
    [
        (None, "starttls-not-offered"),
        (b"454 4.7.0 TLS not available\r\n", "starttls-refused"),
        ((b"220 go\r\n", CLOSE), "tls-failed"),
    ],
)
@pytest.mark.asyncio
async def test_starttls_that_does_not_work_fails(
    step: Any,
    hint_id: str,
    server_tls: ssl.SSLContext,
    client_tls: ssl.SSLContext,
) -> None:
    script: Script = {} if step is None else {"starttls": step}
    tls = None if step is None else server_tls
    with ScriptedServer(
        scripts=(script,), tls=tls, extensions=("AUTH PLAIN",)
    ) as server:
        options = options_for(server, **secured("use_tls", client_tls, **LOGIN))
        report = failed_at("tls", await checked(options, **EVERYTHING))
        assert not server.commands(b"AUTH")
    assert hint_ids(report) == [hint_id]


# The login.


@KINDS
@pytest.mark.parametrize("method", ["PLAIN", "LOGIN", "CRAM-MD5"])
@pytest.mark.asyncio
async def test_the_method_is_told(
    method: str,
    kind: str,
    server_tls: ssl.SSLContext,
    client_tls: ssl.SSLContext,
) -> None:
    offered = f"AUTH XOAUTH2 {method}"
    with ScriptedServer(
        tls=server_tls, implicit=kind == "use_ssl", extensions=(offered,)
    ) as server:
        options = options_for(server, **secured(kind, client_tls, **LOGIN))
        reports = await checked(options, senders=SENDERS)
    assert texts(reports["auth"]) == [
        f"logged in with {method} (offered: XOAUTH2 {method})"
    ]
    assert reports["sender"].state == "ok"


@pytest.mark.asyncio
async def test_a_server_that_knows_the_client_already_passes(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    script: Script = {"auth": b"503 already authenticated\r\n"}
    with ScriptedServer(
        scripts=(script,), tls=server_tls, extensions=("AUTH PLAIN",)
    ) as server:
        options = options_for(server, **secured("use_tls", client_tls, **LOGIN))
        reports = await checked(options)
    assert texts(reports["auth"]) == ["logged in with an earlier AUTH (offered: PLAIN)"]


@pytest.mark.asyncio
async def test_credentials_are_never_sent_without_tls() -> None:
    with ScriptedServer(extensions=("AUTH PLAIN LOGIN CRAM-MD5",)) as server:
        reports = await checked(options_for(server, **LOGIN), **EVERYTHING)
        verbs = [line.split()[0] for line in server.lines]
    assert verbs == [b"EHLO", b"QUIT"]
    assert hint_ids(reports["auth"]) == ["login-not-tried"]
    assert "offered: PLAIN LOGIN CRAM-MD5" in texts(reports["auth"])[0]
    assert reports["auth"].state == "warning"
    for stage in ("sender", "recipient", "message", "connections"):
        assert texts(reports[stage]) == ["not reached: not logged in"]


@pytest.mark.parametrize(
    ("offered", "reply", "hint_id"),
    [
        ("AUTH PLAIN", b"535 5.7.8 Authentication failed\r\n", "credentials-refused"),
        ("AUTH XOAUTH2", b"", "no-auth-method-in-common"),
        ("8BITMIME", b"", "auth-not-offered"),
    ],
)
@pytest.mark.asyncio
async def test_a_login_that_does_not_work_fails(
    offered: str,
    reply: bytes,
    hint_id: str,
    server_tls: ssl.SSLContext,
    client_tls: ssl.SSLContext,
) -> None:
    with ScriptedServer(
        scripts=({"auth": reply},), tls=server_tls, extensions=(offered,)
    ) as server:
        options = options_for(server, **secured("use_tls", client_tls, **LOGIN))
        report = failed_at("auth", await checked(options, **EVERYTHING))
        assert server.connections == 1
        assert len(server.commands(b"AUTH")) == bool(reply)
    assert hint_ids(report) == [hint_id]


# Transactions.


@pytest.mark.asyncio
async def test_every_sender_is_tried_and_taken_back() -> None:
    with ScriptedServer() as server:
        reports = await checked(options_for(server), senders=TWO_SENDERS)
    assert server.lines == [
        b"EHLO client.example",
        b"MAIL FROM:<from@example.com>",
        b"RSET",
        b"MAIL FROM:<server@example.com>",
        b"RSET",
        b"QUIT",
    ]
    assert texts(reports["sender"]) == [
        "DEFAULT_FROM_EMAIL from@example.com: 250 ok",
        "SERVER_EMAIL server@example.com: 250 ok",
    ]


NOT_OWNED = b"553 5.7.1 <server@example.com>: Sender address rejected: not owned\r\n"


@pytest.mark.asyncio
async def test_a_refused_second_sender_does_not_end_the_check() -> None:
    script: Script = {"mail": Turns(DEFAULT, NOT_OWNED)}
    with ScriptedServer(scripts=(script,)) as server:
        reports = await checked(
            options_for(server), senders=TWO_SENDERS, recipient=TO, message=MESSAGE
        )
    assert reports["sender"].state == "failed"
    default, other = reports["sender"].findings
    assert default.state == "ok"
    assert other.text.startswith("SERVER_EMAIL server@example.com: MAIL FROM refused")
    assert other.hint_id == "sender-refused"
    assert "SERVER_EMAIL" in other.hint
    assert "DEFAULT_FROM_EMAIL" not in other.hint
    assert reports["recipient"].state == reports["message"].state == "ok"


@pytest.mark.asyncio
async def test_a_refused_first_sender_ends_the_check_after_the_second() -> None:
    script: Script = {"mail": Turns(NOT_OWNED)}
    with ScriptedServer(scripts=(script,)) as server:
        reports = await checked(
            options_for(server), senders=TWO_SENDERS, recipient=TO, message=MESSAGE
        )
        assert len(server.commands(b"RSET")) == 2
        assert not server.received
    report = failed_at("sender", reports)
    assert [finding.state for finding in report.findings] == ["failed", "ok"]


@pytest.mark.parametrize(
    ("step", "hint_id"),
    [
        (b"421 4.3.2 closing\r\n", "server-busy"),
        (CLOSE, "connection-closed"),
        (SILENCE, "reply-timeout"),
    ],
)
@pytest.mark.asyncio
async def test_the_failure_of_the_first_sender_is_told_though_the_connection_ends(
    step: Step, hint_id: str
) -> None:
    with ScriptedServer(scripts=({"mail": step},)) as server:
        options = options_for(server, timeout=0.3)
        reports = await checked(options, senders=TWO_SENDERS, recipient=TO)
    report = failed_at("sender", reports)
    assert hint_ids(report) == [hint_id]
    assert texts(report)[1] == (
        "SERVER_EMAIL server@example.com: not reached: the connection has ended"
    )


@pytest.mark.parametrize("is_offered", [True, False])
@pytest.mark.asyncio
async def test_a_non_ascii_sender_needs_smtputf8(is_offered: bool) -> None:
    senders = {"DEFAULT_FROM_EMAIL": "jörg@example.com"}
    extensions = ("SMTPUTF8",) if is_offered else ()
    with ScriptedServer(extensions=extensions) as server:
        reports = await checked(options_for(server), senders=senders, recipient=TO)
        commands = server.commands(b"MAIL")
    if is_offered:
        assert reports["recipient"].state == "ok"
        assert commands[0] == "MAIL FROM:<jörg@example.com> SMTPUTF8".encode()
    else:
        assert hint_ids(failed_at("sender", reports)) == ["smtputf8-needed"]
        assert commands == []


@pytest.mark.asyncio
async def test_what_would_be_another_command_is_not_said() -> None:
    with ScriptedServer() as server:
        reports = await checked(
            options_for(server), senders=SENDERS, recipient="to@a.example>\r\nDATA"
        )
        assert not server.commands(b"RCPT")
        assert not server.commands(b"DATA")
    assert reports["recipient"].state == "failed"
    assert "control characters" in texts(reports["recipient"])[0]


@pytest.mark.asyncio
async def test_a_recipient_is_tried_and_no_message_sent() -> None:
    with ScriptedServer() as server:
        reports = await checked(options_for(server), senders=SENDERS, recipient=TO)
    assert server.lines[-4:] == [
        b"MAIL FROM:<from@example.com>",
        b"RCPT TO:<to@example.com>",
        b"RSET",
        b"QUIT",
    ]
    assert not server.commands(b"DATA")
    assert texts(reports["recipient"]) == ["to@example.com: 250 ok"]


@pytest.mark.parametrize(
    ("recipient", "hint_id"),
    [("nouser@example.com", "unknown-recipient"), ("greylisted@a.example", "")],
)
@pytest.mark.asyncio
async def test_a_refused_recipient_fails(
    recipient: str, hint_id: str, server: MailServer
) -> None:
    reports = await checked(
        options_for(server), senders=SENDERS, recipient=recipient, message=MESSAGE
    )
    report = failed_at("recipient", reports)
    assert hint_ids(report) == [hint_id or "greylisting"]
    assert texts(report)[0].startswith(f"{recipient}: RCPT TO")
    assert not server.received


@pytest.mark.asyncio
async def test_a_refused_message_fails(server: MailServer) -> None:
    message = replace(MESSAGE, content=b"Subject: reject me\r\n\r\nHi\r\n")
    reports = await checked(options_for(server), senders=SENDERS, message=message)
    report = failed_at("message", reports)
    assert "554 5.6.0 rejected" in texts(report)[0]


# Several connections.


@pytest.mark.parametrize(
    ("wanted", "each", "told"),
    [
        (4, 2, 'ASYNC_SMTP["max_connections"] = 2: enough for 2 processes'),
        (4, 3, 'ASYNC_SMTP["max_connections"] = 3: enough for 1 process'),
        (4, 5, None),
        (1, 5, None),
    ],
)
@pytest.mark.asyncio
async def test_the_connections_that_a_server_allows_are_counted(
    wanted: int, each: int, told: str | None
) -> None:
    with ScriptedServer() as server:
        options = options_for(server, max_connections=each)
        reports = await checked(options, connections=wanted)
        assert server.connections == wanted
        assert len(server.commands(b"QUIT")) == wanted
    counted = [f"{wanted} of {wanted} opened at once"]
    assert texts(reports["connections"]) == counted + ([told] if told else [])
    assert reports["connections"].state == "ok"


@pytest.mark.parametrize(("each", "state"), [(2, "warning"), (3, "failed")])
@pytest.mark.asyncio
async def test_fewer_connections_than_are_used_fail(each: int, state: str) -> None:
    busy: Script = {"greeting": b"421 4.7.0 too many connections\r\n"}
    with ScriptedServer(scripts=({}, {}, busy)) as server:
        options = options_for(server, max_connections=each)
        reports = await checked(options, connections=4)
    report = reports["connections"]
    assert report.state == state
    assert texts(report)[0].startswith("2 of 4 opened at once; then: the greeting")
    assert hint_ids(report) == ["fewer-connections-allowed"]


@pytest.mark.asyncio
async def test_connections_are_tried_though_a_message_is_refused() -> None:
    with ScriptedServer(scripts=({"mail": NOT_OWNED},)) as server:
        reports = await checked(options_for(server), senders=SENDERS, connections=2)
    assert reports["sender"].state == "failed"
    assert texts(reports["connections"])[0] == "2 of 2 opened at once"


@pytest.mark.asyncio
async def test_further_connections_lead_to_the_address_that_was_checked(
    resolves_to: Callable[..., Options],
) -> None:
    with ScriptedServer() as server, ScriptedServer() as other:
        options = resolves_to((server.host, server.port), ("::1", other.port))
        reports = await checked(options, connections=3, family=socket.AF_INET)
        assert server.connections == 3
        assert other.connections == 0
    assert texts(reports["connections"])[0] == "3 of 3 opened at once"


@pytest.mark.asyncio
async def test_silence_is_not_taken_for_a_limit_of_connections() -> None:
    silent: Script = {"greeting": SILENCE}
    with ScriptedServer(scripts=({}, silent)) as server:
        options = options_for(server, max_connections=1, timeout=0.3)
        reports = await checked(options, connections=2)
    assert hint_ids(reports["connections"]) == ["greeting-timeout"]
    assert reports["connections"].state == "warning"


# Time, and the end.

WHERE_SILENT: dict[str, str] = {
    "greeting": "greeting",
    "ehlo": "ehlo",
    "starttls": "tls",
    "tls": "tls",
    "auth": "auth",
    "mail": "sender",
    "rcpt": "recipient",
    "data": "message",
    "body": "message",
}
STEPS = pytest.mark.parametrize(("step", "stage"), WHERE_SILENT.items())


def tls_and_login(step: str, tls: ssl.SSLContext) -> ScriptedServer:
    """Return a server that is silent from a step of its dialogue on."""
    return ScriptedServer(
        scripts=({step: SILENCE},), tls=tls, extensions=("AUTH PLAIN",)
    )


@STEPS
@pytest.mark.asyncio
async def test_silence_is_reported_in_time(
    step: str,
    stage: str,
    server_tls: ssl.SSLContext,
    client_tls: ssl.SSLContext,
) -> None:
    with tls_and_login(step, server_tls) as server:
        options = options_for(server, **secured("use_tls", client_tls, **LOGIN))
        start = time.monotonic()
        request = {**EVERYTHING, "connections": 0}
        reports = await checked(options, timeout=1.2, **request)
        assert time.monotonic() - start < 1.2 + 2
    report = failed_at(stage, reports)
    (found,) = report.findings
    assert "within the timeout" in found.text
    # Not the project's own timeout was too short.
    assert "--timeout makes it longer" in found.hint
    # One wait of a third of the time; at first, other protocols are tried, too, and a
    # server may take all that is left to look at a message.
    assert report.seconds < (1.2 if stage in {"greeting", "message"} else 0.7)


@pytest.mark.asyncio
async def test_a_server_may_look_at_a_message_for_longer_than_at_a_command() -> None:
    script: Script = {"body": (Pause(1.0), DEFAULT)}
    with ScriptedServer(scripts=(script,)) as server:
        reports = await checked(
            options_for(server), timeout=2.4, senders=SENDERS, message=MESSAGE
        )
    assert reports["message"].state == "ok"


@pytest.mark.asyncio
async def test_a_projects_own_timeout_is_named_where_it_is_the_shorter_one() -> None:
    with ScriptedServer(scripts=({"mail": SILENCE},)) as server:
        options = options_for(server, timeout=0.2)
        reports = await checked(options, senders=SENDERS)
    (found,) = reports["sender"].findings
    assert "--timeout" not in found.hint
    assert options.setting("timeout") in found.hint


@pytest.mark.parametrize("step", ["rset", "quit"])
@pytest.mark.asyncio
async def test_silence_on_the_way_out_harms_no_finding(step: str) -> None:
    with ScriptedServer(scripts=({step: SILENCE},)) as server:
        start = time.monotonic()
        reports = await checked(options_for(server), senders=SENDERS, timeout=0.9)
        assert time.monotonic() - start < 0.9 + 2.5
    assert reports["sender"].state == "ok"


@KINDS
@pytest.mark.asyncio
async def test_a_slow_server_gets_no_more_than_the_whole_time(
    kind: str, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    slow = (Pause(0.25), DEFAULT)
    script: Script = dict.fromkeys(("greeting", "ehlo", "mail", "rcpt", "data"), slow)
    with ScriptedServer(
        scripts=(script,), tls=server_tls, implicit=kind == "use_ssl"
    ) as server:
        options = options_for(server, **secured(kind, client_tls))
        start = time.monotonic()
        reports = await checked(options, timeout=0.9, **EVERYTHING)
        assert time.monotonic() - start < 0.9 + 2.5
    names = [name for name in reports if reports[name].state == "failed"]
    assert "check-timeout" in hint_ids(reports[names[0]])
    assert "not finished within the check's 0.9 s" in texts(reports[names[0]])[0]


@pytest.mark.asyncio
async def test_connections_are_closed_when_the_time_is_over() -> None:
    pause = (Pause(0.2), DEFAULT)
    slow: Script = {"greeting": pause, "ehlo": pause}
    with ScriptedServer(scripts=(slow, {}, slow)) as server:
        reports = await checked(options_for(server), timeout=0.7, connections=4)
        assert server.connections == 4
    assert hint_ids(reports["connections"]) == ["check-timeout"]


def all_of(
    server: ScriptedServer, kind: str, context: ssl.SSLContext
) -> AsyncGenerator[StageReport, None]:
    options = options_for(server, **secured(kind, context, **LOGIN))
    return diagnose(options, **EVERYTHING)


@KINDS
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.asyncio
async def test_nothing_is_left_open_after_an_early_end(
    stage: StageName,
    kind: str,
    server_tls: ssl.SSLContext,
    client_tls: ssl.SSLContext,
) -> None:
    with ScriptedServer(
        tls=server_tls, implicit=kind == "use_ssl", extensions=("AUTH PLAIN",)
    ) as server:
        before, tasks = open_sockets(), asyncio.all_tasks()
        async with aclosing(all_of(server, kind, client_tls)) as reports:
            async for report in reports:
                if report.stage == stage:
                    break
        await nothing_left(before, tasks)


@KINDS
@pytest.mark.parametrize("step", [*WHERE_SILENT, "rset", "quit"])
@pytest.mark.asyncio
async def test_nothing_is_left_open_after_a_cancellation(
    step: str,
    kind: str,
    server_tls: ssl.SSLContext,
    client_tls: ssl.SSLContext,
) -> None:
    if kind == "use_ssl" and step == "starttls":
        step = "tls"
    with tls_and_login(step, server_tls) as server:
        server.implicit = kind == "use_ssl"
        before, tasks = open_sockets(), asyncio.all_tasks()

        async def run() -> None:
            async with aclosing(all_of(server, kind, client_tls)) as reports:
                async for _ in reports:
                    pass

        running = asyncio.create_task(run())
        await asyncio.to_thread(wait_until, lambda: server.unread)
        running.cancel()
        start = time.monotonic()
        with pytest.raises(asyncio.CancelledError):
            await running
        # No QUIT is tried where a reply is due.
        assert time.monotonic() - start < 1
        await nothing_left(before, tasks)


@pytest.mark.asyncio
async def test_nothing_is_left_open_after_a_cancellation_while_connecting(
    resolves_to: Callable[..., Options],
) -> None:
    with ScriptedServer() as server, address_without_answer() as silent:
        options = resolves_to((server.host, server.port), silent)
        before, tasks = open_sockets(), asyncio.all_tasks()
        running = asyncio.create_task(checked(options))
        await asyncio.to_thread(wait_until, lambda: server.connections)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await nothing_left(before, tasks)


@pytest.mark.asyncio
async def test_a_greeting_that_nobody_waits_for_fails_unheard(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    heard: list[object] = []
    tasks = asyncio.all_tasks()
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda loop, context: heard.append(context))
    script: Script = {"greeting": (b"554 no\r\n", CLOSE)}
    with ScriptedServer(scripts=(script,), tls=server_tls, implicit=True) as server:
        options = options_for(server, **secured("use_ssl", client_tls))
        async with aclosing(diagnose(options)) as reports:
            async for report in reports:
                if report.stage == "tls":
                    break
            await finished(asyncio.all_tasks() - tasks)
    gc.collect()
    assert not heard


@KINDS
def test_nothing_is_left_open_where_the_loop_ends_at_once(
    kind: str, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    async def run(server: ScriptedServer, stage: str) -> None:
        async with aclosing(all_of(server, kind, client_tls)) as reports:
            async for report in reports:
                if report.stage == stage:
                    break

    before = open_sockets()
    for stage in STAGES:
        with ScriptedServer(
            tls=server_tls, implicit=kind == "use_ssl", extensions=("AUTH PLAIN",)
        ) as server:
            asyncio.run(run(server, stage))
        wait_until(lambda: open_sockets() <= before)


# The transcript.


@pytest.mark.asyncio
async def test_the_transcript_is_the_dialogue(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    with ScriptedServer(tls=server_tls, extensions=("AUTH PLAIN",)) as server:
        options = options_for(server, **secured("use_tls", client_tls, **LOGIN))
        reports = await checked(options, senders=SENDERS, recipient=TO, message=MESSAGE)
    assert {name: list(report.transcript) for name, report in reports.items()} == {
        "dns": [],
        "connect": [],
        "greeting": ["S: 220 test ESMTP"],
        "ehlo": [
            "C: EHLO client.example",
            "S: 250-test",
            "S: 250-AUTH PLAIN",
            "S: 250 STARTTLS",
        ],
        "tls": [
            "C: STARTTLS",
            "S: 220 go",
            "C: EHLO client.example",
            "S: 250-test",
            "S: 250 AUTH PLAIN",
        ],
        "auth": ["C: AUTH PLAIN ***", "S: 235 welcome"],
        "sender": [
            "C: MAIL FROM:<from@example.com>",
            "S: 250 ok",
            "C: RSET",
            "S: 250 ok",
        ],
        "recipient": [
            "C: MAIL FROM:<from@example.com>",
            "S: 250 ok",
            "C: RCPT TO:<to@example.com>",
            "S: 250 ok",
            "C: RSET",
            "S: 250 ok",
        ],
        "message": [
            "C: MAIL FROM:<from@example.com>",
            "S: 250 ok",
            "C: RCPT TO:<to@example.com>",
            "S: 250 ok",
            "C: DATA",
            "S: 354 go",
            f"C: (the message: {len(MESSAGE.content)} bytes)",
            "S: 250 ok queued",
        ],
    }
