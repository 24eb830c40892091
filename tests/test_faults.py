"""Random faults at random points: nothing is lost, nothing arrives twice."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import threading
import tracemalloc
from typing import Any

import pytest
from django.core.mail import EmailMessage
from hypothesis import HealthCheck, given, settings, strategies

from django_async_smtp import SMTPError, close_connections
from django_async_smtp.loop import smtp_loop

from .conftest import MakeBackend, end_connections
from .faults import FaultyServer, random_faults
from .servers import open_sockets, wait_until

SOAK_MESSAGES = int(os.environ.get("SOAK_MESSAGES", "2000"))


def emails(count: int, *, recipients: int = 1, start: int = 0) -> list[EmailMessage]:
    to = [f"r{n}@example.com" for n in range(recipients)]
    return [
        EmailMessage(f"m{n}", "Body", "from@example.com", to)
        for n in range(start, start + count)
    ]


def send(backend: Any, messages: list[EmailMessage]) -> tuple[int, list[Any]]:
    """Return how many were sent, and the messages that failed with their errors."""
    try:
        return backend.send_messages(messages), []
    except SMTPError as error:
        return error.sent, error.failures


def check_each(
    server: FaultyServer, messages: list[EmailMessage], failures: list[Any]
) -> None:
    """Each arrived once; or its sender knows, and it arrived at most once."""
    failed = {id(message) for message, _ in failures}
    for message in messages:
        delivery = message.delivery  # type: ignore[attr-defined]
        assert (delivery.state == "sent") == (id(message) not in failed)
        for address in message.to:
            copies = server.arrived[str(message.subject), f"TO:<{address}>"]
            if address in delivery.accepted:
                assert copies == 1
            else:
                assert copies <= 1
                assert address in delivery.refused or delivery.error is not None
            if copies and address not in delivery.accepted:
                # It arrived, and the sender cannot know: it must be told so.
                text = str(delivery.refused.get(address, ""))
                assert (
                    getattr(delivery.error, "maybe_delivered", False)
                    or "may have been delivered" in text
                )


@settings(
    max_examples=int(os.environ.get("FAULT_EXAMPLES", "25")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    seed=strategies.integers(0, 2**32),
    rate=strategies.sampled_from([0.02, 0.1, 0.3]),
    retries=strategies.integers(0, 2),
    connections=strategies.sampled_from([1, 2, 5]),
    recipients=strategies.integers(1, 3),
    pipelining=strategies.booleans(),
)
def test_every_message_arrives_once_or_its_sender_knows(
    make_backend: MakeBackend,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    rate: float,
    retries: int,
    connections: int,
    recipients: int,
    pipelining: bool,
) -> None:
    monkeypatch.setattr("django_async_smtp.delivery.FIRST_PAUSE", 0.001)
    faults = random_faults(seed, rate, silence=0.02)
    with FaultyServer(faults, pipelining=pipelining) as server:
        backend = make_backend(
            server, timeout=0.3, retries=retries, max_connections=connections
        )
        messages = emails(40, recipients=recipients)
        sent, failures = send(backend, messages)
        assert sent + len(failures) == len(messages)
        check_each(server, messages, failures)
        assert server.most_open <= connections
        end_connections()


def test_what_fails_silently_leaves_a_log_record(
    make_backend: MakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    with FaultyServer(random_faults(7, 0.1)) as server:
        backend = make_backend(server, timeout=0.5, fail_silently=True)
        messages = emails(30)
        with caplog.at_level(logging.WARNING, "django_async_smtp"):
            total = sum(backend.send_messages([message]) for message in messages)
        records = [r for r in caplog.records if r.levelno == logging.ERROR]
        assert total + len(records) == len(messages)
        assert 0 < total < len(messages)
        assert all(server.copies(str(message.subject)) <= 1 for message in messages)


@pytest.mark.timeout(1200)
def test_a_long_run_with_faults_grows_nothing_and_loses_nothing(
    make_backend: MakeBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("django_async_smtp.delivery.FIRST_PAUSE", 0.01)
    batch = 100
    with FaultyServer(random_faults(11, 0.05), pipelining=True) as server:
        backend = make_backend(server, timeout=5, retries=1)
        before: tuple[int, int, int, int] | None = None
        counted = failed = 0
        for start in range(0, SOAK_MESSAGES, batch):
            messages = emails(batch, start=start)
            sent, failures = send(backend, messages)
            counted += sent
            failed += len(failures)
            check_each(server, messages, failures)
            server.arrived.clear()
            del messages, failures
            if before is None:
                tracemalloc.start()
                before = measure()
        after = measure()
        tracemalloc.stop()
        assert before is not None
        assert counted + failed == SOAK_MESSAGES
        print(
            f"{SOAK_MESSAGES} messages met {server.injected.total()} faults: "
            f"{counted} sent, {failed} reported as not sent, none lost, none twice; "
            f"memory +{(after[3] - before[3]) / 1024:.0f} KiB"
        )
    assert after[0] <= before[0], "sockets"
    assert after[1] <= before[1], "tasks"
    assert after[2] <= before[2], "threads"
    assert after[3] - before[3] < 2 * 2**20, "memory"


def measure() -> tuple[int, int, int, int]:
    """Return the sockets, tasks, threads and bytes in use, with nothing idle."""
    close_connections()
    smtp = smtp_loop()
    wait_until(lambda: not any(s["in_use"] for s in pool_states()))
    gc.collect()
    tasks = len(asyncio.all_tasks(smtp.loop))
    memory = tracemalloc.get_traced_memory()[0]
    return open_sockets(), tasks, threading.active_count(), memory


def pool_states() -> list[dict[str, int]]:
    return [pool.state() for pool in list(smtp_loop().pools.values())]
