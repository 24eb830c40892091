"""What smtpcheck says of a real Postfix."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import trustme
from django.core.management import call_command

from django_async_smtp.management.commands.smtpcheck import EXIT_STATUS
from tests.conftest import OURS, configure
from tests.servers import wait_until

from .postfix import PASSWORD, USERNAME, Postfix, why_missing

missing = why_missing()
if missing and os.environ.get("CI") == "true":
    pytest.fail(f"CI needs Postfix: {missing}", pytrace=False)
pytestmark = pytest.mark.skipif(missing is not None, reason=missing or "")

LOGIN = {"username": USERNAME, "password": PASSWORD}


@pytest.fixture(scope="module")
def postfix(ca: trustme.CA) -> Iterator[Postfix]:
    # pytest's own folders are closed to the user postfix.
    with TemporaryDirectory() as folder, Postfix(Path(folder), ca) as running:
        yield running


Stages = dict[str, dict[str, Any]]
Check = Callable[..., tuple[int, Stages]]


@pytest.fixture
def check(settings: Any, postfix: Postfix, cafile: Path) -> Check:
    """Set the project's settings to Postfix, and run smtpcheck."""
    settings.DEFAULT_FROM_EMAIL = settings.SERVER_EMAIL = "from@example.com"

    def run(*arguments: str, **options: Any) -> tuple[int, Stages]:
        named = {"host": postfix.host, "local_hostname": "client.example"}
        tls: dict[str, Any] = {"port": postfix.port, "use_tls": True}
        if options.pop("use_ssl", False):
            tls = {"port": postfix.tls_port, "use_ssl": True}
        configure(
            settings, OURS, **{**named, **tls, "ssl_cafile": str(cafile), **options}
        )
        out = StringIO()
        try:
            call_command("smtpcheck", *arguments, "--format", "json", stdout=out)
        except SystemExit:
            assert out.getvalue()
        report = json.loads(out.getvalue())
        (result,) = report["results"]
        return report["exit_status"], {one["name"]: one for one in result["stages"]}

    return run


def text(stage: dict[str, Any]) -> str:
    return "\n".join(finding["text"] for finding in stage["findings"])


def failed(stages: Stages) -> list[str]:
    return [name for name, stage in stages.items() if stage["state"] == "failed"]


@pytest.mark.parametrize("use_ssl", [False, True])
def test_all_is_well_with_tls_and_a_login(
    use_ssl: bool, check: Check, postfix: Postfix
) -> None:
    before = len(postfix.messages)
    status, stages = check(
        "--to", "someone@example.com", "--send", use_ssl=use_ssl, **LOGIN
    )
    assert status == 0
    assert {stage["state"] for stage in stages.values()} == {"ok"}
    assert text(stages["greeting"]).startswith("220 mx.postfix.test ESMTP")
    assert "PIPELINING, 8BITMIME, SMTPUTF8" in text(stages["ehlo"])
    assert "SIZE 50 MB" in text(stages["ehlo"])
    assert "for 127.0.0.1, issued by trustme" in text(stages["tls"])
    assert text(stages["auth"]).startswith("logged in with CRAM-MD5 (offered: ")
    queued = re.search(r"250 2\.0\.0 Ok: queued as (\w+)", text(stages["message"]))
    assert queued is not None
    wait_until(lambda: len(postfix.messages) == before + 1, seconds=30)
    assert queued[1] in postfix.log


def test_a_wrong_password_is_told(check: Check) -> None:
    status, stages = check(username=USERNAME, password="wrong")
    assert status == EXIT_STATUS["auth"]
    assert failed(stages) == ["auth"]
    assert "535 5.7.8" in text(stages["auth"])
    assert stages["auth"]["hint_ids"] == ["credentials-refused"]


def test_relaying_without_a_login_is_told(check: Check) -> None:
    status, stages = check("--to", "someone@elsewhere.example")
    assert status == EXIT_STATUS["recipient"]
    assert failed(stages) == ["recipient"]
    assert stages["auth"]["state"] == "skipped"
    assert "Relay access denied" in text(stages["recipient"])
    assert stages["recipient"]["hint_ids"] == ["relaying-denied"]


def test_a_refused_sender_is_told_with_a_recipient(settings: Any, check: Check) -> None:
    settings.DEFAULT_FROM_EMAIL = settings.SERVER_EMAIL = "refused@example.com"
    # Postfix takes any MAIL FROM, and says no at RCPT TO (smtpd_delay_reject).
    assert check(**LOGIN)[0] == 0
    status, stages = check("--to", "someone@example.com", **LOGIN)
    assert status == EXIT_STATUS["recipient"]
    assert "Sender address rejected" in text(stages["recipient"])


def test_an_unknown_recipient_is_told(check: Check) -> None:
    status, stages = check("--to", "nouser@example.com", **LOGIN)
    assert status == EXIT_STATUS["recipient"]
    assert "nouser@example.com: RCPT TO" in text(stages["recipient"])


def test_a_port_that_speaks_tls_from_the_start_is_found_out(
    check: Check, postfix: Postfix
) -> None:
    status, stages = check("--timeout", "2", port=postfix.tls_port)
    assert status == EXIT_STATUS["greeting"]
    assert stages["greeting"]["hint_ids"] == ["tls-port"]


def test_a_port_that_does_not_speak_tls_from_the_start_is_found_out(
    check: Check, postfix: Postfix
) -> None:
    status, stages = check(use_ssl=True, port=postfix.port)
    assert status == EXIT_STATUS["tls"]
    assert stages["tls"]["hint_ids"] == ["wrong-version-number"]
    assert "; without TLS, '220 mx.postfix.test" in text(stages["tls"])


def test_an_authority_that_is_not_trusted_is_told(check: Check) -> None:
    status, stages = check(ssl_cafile=None)
    assert status == EXIT_STATUS["tls"]
    assert stages["tls"]["hint_ids"] == ["certificate-unknown-issuer"]


def test_connections_are_counted(check: Check) -> None:
    status, stages = check("--connections", "8", max_connections=4, **LOGIN)
    assert status == 0
    counted, enough = text(stages["connections"]).split("\n")
    assert counted == "8 of 8 opened at once"
    assert enough.endswith("= 4: enough for 2 processes")


def test_the_check_leaves_postfix_as_it_was(check: Check, postfix: Postfix) -> None:
    before = len(postfix.messages)
    # Other tests have logged the same.
    logged = len(postfix.log)
    check("--to", "someone@example.com", **LOGIN)
    ended = re.compile(r"disconnect from .*rset=2.* quit=1")
    wait_until(lambda: ended.search(postfix.log, logged) is not None, seconds=30)
    # What cleanup and qmgr say of a message that is queued.
    assert not re.search(r"message-id=|queue active", postfix.log[logged:])
    assert len(postfix.messages) == before
