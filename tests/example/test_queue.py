"""The example with a queue: make serve QUEUE=db."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.servers import wait_until

from .site import FORM, Site

pytestmark = pytest.mark.queue_engines


@pytest.fixture(scope="module")
def queued_site() -> Iterator[Site]:
    with Site("--queue", "db") as running:
        yield running
    assert "Traceback" not in running.errors, running.errors
    assert "Warning" not in running.errors, running.errors


@pytest.mark.parametrize("path", ["/contact/", "/contact-async/"])
def test_a_worker_sends_what_a_view_queued(queued_site: Site, path: str) -> None:
    subject = f"By a worker, from {path}"
    assert queued_site.post(path, **FORM | {"subject": subject}).status == 200
    wait_until(lambda: subject in queued_site.get("/inbox/").text)


def test_the_worker_keeps_what_became_of_it(queued_site: Site) -> None:
    subject = "Kept by the worker"
    queued_site.post("/contact/", **FORM | {"subject": subject})
    queued_site.log_in()
    page = "/admin/example/sentmail/"
    wait_until(lambda: subject in queued_site.get(page).html)
    row = queued_site.get(page).html.partition(subject)[2].partition("</tr>")[0]
    assert ">sent<" in row


def test_the_settings_are_those_of_the_worker(queued_site: Site) -> None:
    assert "logged in with" in queued_site.get("/settings/events/").html


def test_the_worker_ends_with_the_site() -> None:
    with Site("--queue", "db") as running:
        assert running.end() == 0
