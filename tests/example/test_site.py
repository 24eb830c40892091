"""The example's site over HTTP, without a browser."""

from __future__ import annotations

import json
import os
import re
import signal
import smtplib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import pytest

from .site import FORM, ROOT, Page, Site, environment

PAGES = ("/", "/inbox/", "/settings/", "/race/", "/pool/")
VIEWS = ("/contact/", "/contact-async/")
MULTIPART = b"Content-Type: multipart/mixed; boundary=x\n\n--x\n\nText\n--x\n"
SECRETS = ("demo-password", "not-the-password")


def arrived(site: Site) -> list[str]:
    """Return the paths of the messages in the inbox, the newest first."""
    return re.findall(r'href="(/inbox/\d+/)"', site.get("/inbox/").html)


def is_wrong(page: Page, field: str, why: str) -> bool:
    """Whether a page says of a field, and at it, why its value is refused."""
    error = f"id_{field}_error"
    (tag,) = re.findall(rf'<(?:input|textarea)[^>]* name="{field}"[^>]*>', page.html)
    (said,) = re.findall(rf'<p class="wrong" id="{error}">(.*?)</p>', page.html)
    described = re.search(r'aria-describedby="([^"]*)"', tag)
    return (
        'aria-invalid="true"' in tag
        and described is not None
        and error in described[1].split()
        and why in said
    )


@pytest.mark.parametrize("path", [*PAGES, "/admin/login/"])
def test_every_page_allows_files_of_the_site_alone(site: Site, path: str) -> None:
    page = site.get(path)
    assert page.status == 200
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy
    assert "unsafe" not in policy
    assert page.headers["X-Content-Type-Options"] == "nosniff"
    assert not re.search(r"<style|style=|<script(?![^>]*src=)|\son\w+=", page.html)
    assert "https://" not in page.html


def test_what_is_not_there_is_said_to_be_so(site: Site) -> None:
    paths = ("/nothing/", "/sent/99999/", "/inbox/99999/", "/inbox/1/99/")
    for path in (*paths, f"/sent/{10**30}/", f"/inbox/{10**30}/html/"):
        page = site.get(path)
        assert page.status == 404
        assert "Not here" in page.text


@pytest.mark.parametrize("path", ["../settings.py", "%2e%2e/settings.py", "a%00b"])
def test_static_files_are_those_of_their_folder(site: Site, path: str) -> None:
    assert site.get(f"/static/example/{path}").status == 404
    assert site.get("/static/example/site.css").status == 200


@pytest.mark.parametrize("path", PAGES)
def test_every_page_answers_head(site: Site, path: str) -> None:
    page = site.head(path)
    assert page.status == 200
    assert page.content == b""


@pytest.mark.parametrize("view", VIEWS)
def test_a_message_arrives_and_its_delivery_is_shown(site: Site, view: str) -> None:
    before = len(arrived(site))
    page = site.post(view, **FORM | {"to": "ada@example.org, nobody@example.org"})
    assert page.url.startswith("/sent/")
    assert "accepted ada@example.org" in page.text
    assert "nobody@example.org: 550 5.1.1" in page.text
    assert "queued as" in page.text
    assert re.search(r"body \d+\.\d ms", page.text)
    newest, *older = arrived(site)
    assert len(older) == before
    assert "From hello@example.com to ada@example.org" in site.get(newest).text


def test_everybody_is_shown_their_own_delivery(site: Site) -> None:
    def is_shown_own(number: int) -> bool:
        name = f"reader{number}@example.org"
        page = site.post(VIEWS[number % 2], **FORM | {"to": name})
        return f"accepted {name}" in page.text

    with ThreadPoolExecutor(6) as at_once:
        assert all(at_once.map(is_shown_own, range(18)))


@pytest.mark.parametrize("view", VIEWS)
def test_an_attachment_arrives_as_a_file_to_save(site: Site, view: str) -> None:
    content = bytes(range(256))
    site.upload(view, "page.html", content, **FORM)
    newest = arrived(site)[0]
    assert "page.html" in site.get(newest).text
    file = site.get(f"{newest}0/")
    assert file.content == content
    assert file.headers["Content-Type"] == "application/octet-stream"
    assert file.headers["Content-Disposition"] == 'attachment; filename="page.html"'
    assert file.headers["X-Content-Type-Options"] == "nosniff"


def test_a_mail_as_an_attachment_stays_a_file(site: Site) -> None:
    site.upload("/contact/", "mail.eml", b"Subject: \xff\r\n\r\nno", **FORM)
    assert site.get(f"{arrived(site)[0]}0/").content == b"Subject: \xff\r\n\r\nno"


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("subject", "Hello\r\nBcc: eve@example.org"),
        ("subject", "Hello\n"),
        ("subject", "\rHello"),
        ("to", "ada@example.org\r\nBcc: eve@example.org"),
        ("to", "ada@example.org\n"),
    ],
)
def test_a_line_break_in_a_header_is_refused(
    site: Site, view: str, field: str, value: str
) -> None:
    before = arrived(site)
    page = site.post(view, **FORM | {field: value})
    assert is_wrong(page, field, "Line breaks (CR or LF) are not allowed")
    assert arrived(site) == before


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("to", "", "required"),
        ("to", "ada@", "“ada@” is not an email address"),
        ("to", "a@example.org," * 11, "At most 10 addresses"),
        ("subject", "", "required"),
        ("subject", "x" * 201, "at most 200 characters"),
        ("text", "x" * 10_001, "at most 10000 characters"),
        ("text", "\0", "Null characters are not allowed"),
    ],
)
def test_wrong_input_is_said_at_its_field(
    site: Site, field: str, value: str, why: str
) -> None:
    page = site.post("/contact/", **FORM | {"subject": "Kept", field: value})
    assert is_wrong(page, field, why)
    if field != "subject":
        assert 'value="Kept"' in page.html


def test_an_attachment_above_the_limit_is_refused(site: Site) -> None:
    page = site.upload("/contact/", "big.bin", bytes(2**20 + 1), **FORM)
    assert is_wrong(page, "attachment", "the limit is 1.0\xa0MB")
    page = site.upload("/contact/", "fits.bin", bytes(2**20), **FORM)
    assert page.url.startswith("/sent/")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_huge_upload_does_not_fill_the_memory(site: Site) -> None:
    site.upload("/contact/", "big.bin", bytes(2**21), **FORM)
    before = peak_memory(site)
    page = site.upload("/contact-async/", "huge.bin", bytes(60 * 2**20), **FORM)
    assert is_wrong(page, "attachment", "This file has 60.0\xa0MB")
    assert peak_memory(site) - before < 30 * 1000


def peak_memory(site: Site) -> int:
    """Return the most kB that the site's process has held."""
    status = Path(f"/proc/{site.process.pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found
    return int(found[1])


def test_a_post_from_elsewhere_is_refused(site: Site) -> None:
    for path in (*VIEWS, "/race/run/", "/pool/send/"):
        assert site.post(path, token="b" * 32, **FORM).status == 403


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(
    ("mailer", "error", "hint"),
    [
        ("wrong-port", "Connection refused", ""),
        ("wrong-password", "AUTH refused", "The server refused"),
        ("expired-certificate", "certificate has expired", "must get a new one"),
        ("refused-sender", "MAIL FROM refused", "Set DEFAULT_FROM_EMAIL"),
    ],
)
def test_a_failure_is_shown_with_its_hint_and_the_form(
    site: Site, view: str, mailer: str, error: str, hint: str
) -> None:
    page = site.post(view, **FORM | {"subject": "Typed in", "mailer": mailer})
    assert "The message was not sent" in page.text
    assert error in page.text
    assert "What to do:" in page.text
    assert hint in page.text
    assert 'value="Typed in"' in page.html
    assert f'<option value="{mailer}" selected>' in page.html
    assert not any(secret in page.html for secret in SECRETS)


def test_markup_is_shown_as_it_is(site: Site) -> None:
    markup = "<script>alert('hi')</script><b>&amp;"
    page = site.post("/contact/", **FORM | {"subject": markup, "text": markup})
    newest = arrived(site)[0]
    pages = [page, site.get("/inbox/"), site.get(newest)]
    pages.append(site.post("/contact/", **FORM | {"to": markup, "subject": markup}))
    for one in pages:
        assert "<script>alert" not in one.html
        assert "&lt;script&gt;alert" in one.html


def test_html_is_shown_in_a_sandbox(site: Site) -> None:
    message = EmailMessage()
    message["Subject"] = "Looks"
    message.set_content("Plain.")
    message.add_alternative("<b style='color:red'>Bold</b><script></script>", "html")
    site.deliver(message)
    newest = arrived(site)[0]
    page = site.get(newest)
    assert re.search(r'<iframe [^>]*sandbox(?!=)[^>]*src="/inbox/\d+/html/"', page.html)
    assert "Plain." in page.text
    frame = site.get(f"{newest}html/")
    assert "<b style" in frame.html
    policy = frame.headers["Content-Security-Policy"].split("; ")
    assert {"sandbox", "default-src 'none'", "frame-ancestors 'self'"} <= set(policy)
    assert frame.headers["X-Frame-Options"] == "SAMEORIGIN"


def test_the_embedded_server_takes_no_huge_message(site: Site) -> None:
    message = EmailMessage()
    message.set_content("x" * 72 + "\n" * 1)
    message.add_attachment(bytes(5 * 2**20), maintype="a", subtype="b")
    with pytest.raises(smtplib.SMTPException) as caught:
        site.deliver(message)
    assert "552" in str(caught.value)


@pytest.mark.parametrize("charset", [b"martian", b"\0"])
def test_a_message_with_an_unknown_character_set_can_be_read(
    site: Site, charset: bytes
) -> None:
    site.deliver(b'Content-Type: text/plain; charset="%b"\n\nBody' % charset)
    page = site.get(arrived(site)[0])
    assert page.status == 200
    assert "Body" in page.text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no headers at all",
        b"Subject: \xff=?utf-8?q?=ff?=\n\n\xff\0",
        b"From: <<<>>>,,;:\nTo: (((\nDate: never\n\nx",
        b"To: =?utf-8?q?=0D=0ABcc:x?=\nCc: a@[\nReply-To: =?utf-8?b?!?=\n\nx",
        b"Content-Type: multipart/mixed\n\nonly claimed",
        b"Content-Type: message/rfc822\n\nSubject: inner\n\nx",
        MULTIPART + b"Content-Type: multipart/related\n\nonly claimed\n--x--",
        MULTIPART + b"Content-Type: message/rfc822\n\nSubject: \xff\n\nx\n--x--",
        MULTIPART
        + b"Content-Type: multipart/mixed; boundary=y\n\n--y\n\nz\n--y--\n--x--",
        MULTIPART
        + b'Content-Type: text/plain; charset="?"; name="../a\n b"\n\n\xff\n--x',
    ],
)
def test_whatever_came_can_be_looked_at(site: Site, content: bytes) -> None:
    site.deliver(content)
    newest = arrived(site)[0]
    assert site.get(newest).status == 200
    for part in ("html/", "0/", "1/"):
        assert site.get(f"{newest}{part}").status in (200, 404)


def test_the_inbox_tells_what_arrives(site: Site) -> None:
    site.post("/contact/", **FORM)
    newest = int(arrived(site)[0].split("/")[2])
    with site.stream("/inbox/events/?after=no-number") as stream:
        assert stream.until("mail")[0][1]["number"] <= newest
    with site.stream(f"/inbox/events/?after={newest}") as stream:
        assert stream.kind.startswith("text/event-stream")
        site.post("/contact/", **FORM | {"subject": "<Live>"})
        (event,) = stream.until("mail")
    assert event[1]["subject"] == "<Live>"
    assert event[1]["url"] == f"/inbox/{newest + 1}/"


def test_the_settings_page_tells_of_every_mailer(site: Site) -> None:
    with site.stream("/settings/events/") as stream:
        events = stream.until("end")
    reports = [data for name, data in events if name == "stage"]
    failed = {r["mailer"]: r for r in reports if r["state"] == "failed"}
    assert {mailer: r["stage"] for mailer, r in failed.items()} == {
        "wrong-port": "connect",
        "wrong-password": "auth",
        "expired-certificate": "tls",
        "refused-sender": "sender",
    }
    assert all(r["findings"][0]["hint"] for r in failed.values())
    good = [r for r in reports if r["mailer"] == "default"]
    assert {r["state"] for r in good} == {"ok"}
    assert good[0]["stage"] == "settings"
    assert all(r["milliseconds"] >= 0 for r in good)
    assert not any(secret in str(events) for secret in SECRETS)


def test_the_pool_page_tells_what_changes(site: Site) -> None:
    site.post("/contact/", **FORM | {"mailer": "wrong-password"})
    with site.stream("/pool/events/") as stream:
        first = stream.until("pool")[-1][1]
        assert site.post("/pool/send/").status == 204
        later = [data for _, data in stream.until("pool")]
    assert first["errors"][0]["text"].startswith("AUTH refused")
    assert len(first["errors"]) <= 5
    assert later[0] != first
    with site.stream("/pool/events/") as stream:
        servers = stream.until("pool")[-1][1]["servers"]
    assert any(stats["messages"] >= 20 for stats in servers.values())


@pytest.mark.parametrize(
    ("form", "field"),
    [
        ({"messages": 9, "round_trip": 20}, "messages"),
        ({"messages": 501, "round_trip": 20}, "messages"),
        ({"messages": "many", "round_trip": 20}, "messages"),
        ({"messages": 10, "round_trip": 101}, "round_trip"),
        ({"messages": 10, "round_trip": -1}, "round_trip"),
    ],
)
def test_a_race_has_its_bounds(site: Site, form: dict[str, Any], field: str) -> None:
    page = site.post("/race/run/", **form)
    assert page.status == 400
    assert list(json.loads(page.html)["errors"]) == [field]


def test_one_race_at_a_time_and_none_without_a_client(site: Site) -> None:
    long = {"messages": 500, "round_trip": 100}
    with site.stream("/race/run/", long) as stream:
        stream.until("progress")
        racers = processes_of(site)
        with site.stream("/race/run/", long) as second:
            assert second.until("refused")[-1][1]["why"] == "Another race is running."
    # Its processes end before the next race may begin.
    while True:
        with site.stream("/race/run/", {"messages": 10, "round_trip": 0}) as stream:
            if next(iter(stream))[0] == "start":
                stream.until("end")
                break
    assert len(racers) in (0, 4)
    assert not set(racers) & set(processes_of(site))


def test_a_race_ends_with_a_racer_that_fails(site: Site) -> None:
    with site.stream("/race/run/", {"messages": 500, "round_trip": 100}) as stream:
        stream.until("progress")
        racers = [pid for pid in processes_of(site) if "racer" in command_of(pid)]
        if not racers:
            pytest.skip("needs /proc")
        os.kill(int(racers[0]), signal.SIGKILL)
        *_, (name, data) = stream
    assert (name, data["why"]) == ("broken", "A racer has failed.")


def command_of(pid: str) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def processes_of(site: Site) -> list[str]:
    """Return the site's child processes; none where the system does not tell."""
    children = Path(f"/proc/{site.process.pid}/task").glob("*/children")
    return [pid for path in children for pid in path.read_text().split()]


def test_sent_mail_is_in_the_admin_to_be_read(site: Site) -> None:
    site.post("/contact/", **FORM | {"subject": "For the record"})
    site.log_in()
    page = site.get("/admin/example/sentmail/")
    assert "For the record" in page.html
    assert "/admin/example/sentmail/add/" not in page.html
    (row,) = re.findall(r"/admin/example/sentmail/\d+/change/", page.html)[:1]
    record = site.get(row)
    assert "queued as" in record.html
    assert 'name="_save"' not in record.html


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_cleanly_while_streams_are_open(number: int) -> None:
    long = {"messages": 500, "round_trip": 100}
    site = Site()
    with (
        site,
        site.stream("/pool/events/") as pool,
        site.stream("/race/run/", long) as race,
    ):
        assert f"{site.address}/" in site.first_line
        pool.until("pool")
        race.until("progress")
        racers = processes_of(site)
        assert site.end(number) == 0
        assert site.errors == ""
    assert not any(Path(f"/proc/{pid}").exists() for pid in racers)


def test_a_port_that_is_taken_is_said_to_be(site: Site) -> None:
    done = subprocess.run(
        [sys.executable, "example_project/serve.py", str(site.port)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode != 0
    assert "address already in use" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def manage(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the example's manage.py."""
    return subprocess.run(
        [sys.executable, "manage.py", *arguments],
        cwd=ROOT / "example_project",
        env={**environment(), "DATABASE": ":memory:"},
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )


def test_the_examples_own_tests_pass() -> None:
    done = manage("test")
    assert done.returncode == 0, done.stderr
    assert "Ran 6 tests" in done.stderr


def test_no_migration_is_missing() -> None:
    done = manage("makemigrations", "--check", "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
