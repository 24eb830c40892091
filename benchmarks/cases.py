"""
The cases, each with the bounds that it must keep.

Options are the defaults where a case says nothing else. A `batch` opens its
connections itself, as Django's backend does; `send_mail()` one by one is measured in a
process that has sent before. Where Django's backend does the same for every message,
fewer of them tell its rate: at 20 ms, 500 `send_mail()` would take it 80 seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from tempfile import TemporaryDirectory
from typing import Final

from .lab import ROOT, Lab
from .measure import Limit, Point, Result
from .queue import why_no_redis
from .sender import DJANGOS, OURS

ROUND_TRIP: Final = 20
CONNECTIONS: Final = 5  # The default of max_connections.


def batch(lab: Lab) -> Iterator[Result]:
    port = lab.delayed(lab.sink(), ROUND_TRIP)
    django, ours = lab.senders(port)
    name = "send_messages() of 200, 20 ms"
    rates = [sender.rate("batch", 200) for sender in (django, ours)]
    yield lab.compare(name, "Django", *rates, repeats=3, at_least=12)
    if pool := lab.nodemailer(port, CONNECTIONS):
        rates = [sender.rate("batch", 200) for sender in (pool, ours)]
        yield lab.compare(name, "nodemailer", *rates, repeats=5, at_least=1.5)


def wide_batch(lab: Lab) -> Iterator[Result]:
    port = lab.delayed(lab.sink(), ROUND_TRIP)
    django = lab.sender(DJANGOS, port)
    connections = 20
    ours = lab.sender(OURS, port, max_connections=connections)
    name = "send_messages() of 400, 20 ms, 20 connections"
    rates = [sender.rate("batch", 400) for sender in (django, ours)]
    yield lab.compare(name, "Django", *rates, repeats=3, at_least=30)
    rates = [ours.rate(job, 400) for job in ("build", "batch")]
    yield lab.compare(name, "building", *rates, repeats=7, at_least=0.75)
    # Where building is faster, this is the limit: each message waits for the answer to
    # its DATA (RFC 2920 section 3.1). Some of the time, connections are opened.
    most = connections / (ROUND_TRIP / 1000)
    rates = [lambda: most, ours.rate("batch", 400)]
    against = "one a round trip each"
    yield lab.compare(name, against, *rates, repeats=3, at_least=0.6)


def one_by_one(lab: Lab) -> Iterator[Result]:
    django, ours = lab.senders(lab.delayed(lab.sink(), ROUND_TRIP))
    name = "send_mail() one by one, 20 ms"
    rates = django.rate("one_by_one", 20), ours.rate("one_by_one", 40)
    yield lab.compare(name, "Django", *rates, repeats=5, at_least=3.5)


def one_by_one_tls(lab: Lab) -> Iterator[Result]:
    for name, pipelining, at_least in (("PIPELINING", True, 5), ("without", False, 3)):
        port, options = lab.private_server(pipelining=pipelining)
        django, ours = lab.senders(lab.delayed(port, ROUND_TRIP), **options)
        name = f"the same, STARTTLS and login, {name}"
        rates = django.rate("one_by_one", 10), ours.rate("one_by_one", 40)
        yield lab.compare(name, "Django", *rates, repeats=5, at_least=at_least)


def many_recipients(lab: Lab) -> Iterator[Result]:
    django, ours = lab.senders(lab.delayed(lab.sink(), ROUND_TRIP))
    name = "one message to 100 recipients, 20 ms"
    rates = django.rate("one_by_one", 1, 100), ours.rate("one_by_one", 5, 100)
    yield lab.compare(name, "Django", *rates, repeats=5, at_least=30)


def loopback_batch(lab: Lab) -> Iterator[Result]:
    port = lab.sink()
    django, ours = lab.senders(port)
    name = "send_messages() of 600, loopback"
    rates = [sender.rate("batch", 600) for sender in (django, ours)]
    yield lab.compare(name, "Django", *rates, repeats=7, at_least=2)
    if pool := lab.nodemailer(port, CONNECTIONS):
        rates = [sender.rate("batch", 600) for sender in (pool, ours)]
        yield lab.compare(name, "nodemailer", *rates, repeats=7, at_least=1)


def loopback_one_by_one(lab: Lab) -> Iterator[Result]:
    name = "send_mail() one by one, loopback"
    rates = [sender.rate("one_by_one", 100) for sender in lab.senders(lab.sink())]
    yield lab.compare(name, "Django", *rates, repeats=7, at_least=1.5)


def loopback_one_by_one_tls(lab: Lab) -> Iterator[Result]:
    """Django's backend loads all that a system trusts, for each message."""
    port, options = lab.private_server(pipelining=True)
    django, ours = lab.senders(port, **options)
    name = "the same, STARTTLS and login"
    rates = django.rate("one_by_one", 10), ours.rate("one_by_one", 100)
    yield lab.compare(name, "Django", *rates, repeats=5, at_least=10)


def at_once(lab: Lab) -> Iterator[Result]:
    django, ours = lab.senders(lab.delayed(lab.sink(), ROUND_TRIP))
    name = "500 × asend_mail() at once, 20 ms"
    rates = django.rate("at_once", 20), ours.rate("at_once", 500)
    yield lab.compare(name, "sync_to_async", *rates, repeats=3, at_least=10)
    (stalls,) = lab.in_turn(3, lambda: ours.do("longest_stall", 500))
    yield Limit("the same: longest stall of the loop", [max(stalls)], "ms", below=50)


def memory(lab: Lab) -> Iterator[Result]:
    ours = lab.sender(OURS, lab.sink())
    rise = ours.do("memory", 1000, 10**6)
    yield Limit("memory, 1,000 messages of 1 MB", [rise], "MB", below=50)


def import_time(lab: Lab) -> Iterator[Result]:
    code = (
        "import django.core.mail, time; start = time.perf_counter();"
        "import django_async_smtp; print(time.perf_counter() - start)"
    )

    with TemporaryDirectory() as folder:
        # Compiled, as an installer leaves it.
        compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": folder}

        def milliseconds() -> float:
            command = [sys.executable, "-c", code]
            environment = os.environ | compiled
            seconds = subprocess.check_output(command, cwd=ROOT, env=environment)
            return float(seconds) * 1000

        milliseconds()
        (times,) = lab.in_turn(9, milliseconds)
    yield Limit("import, over django.core.mail", times, "ms", below=60)


def growth(lab: Lab) -> Iterator[Result]:
    """The time per message stays what it is; nothing piles up."""
    ours = lab.sender(OURS, lab.sink())
    for count in (1000, 10_000):
        name = f"send_messages() of {count:,}, loopback"
        rates = ours.rate("batch", 100), ours.rate("batch", count)
        yield lab.compare(name, "100 messages", *rates, repeats=3, at_least=0.8)
    (threads,) = lab.in_turn(1, lambda: ours.do("threads", 1000))
    yield Limit("the same: threads beside the caller's", threads, "", below=2)


def round_trips(lab: Lab) -> Iterator[Result]:
    """Messages/s over the milliseconds of a round trip, for the chart."""
    sink = lab.sink()
    for delay in lab.some((0, 5, 10, 20, 50, 100)):
        port = lab.delayed(sink, delay)
        django, ours = lab.senders(port)
        rates = {
            "Django": django.rate("batch", 30 if delay else 200),
            "ours": ours.rate("batch", 200),
        }
        if pool := lab.nodemailer(port, CONNECTIONS):
            rates["nodemailer"] = pool.rate("batch", 200)
        yield Point("round trips", delay, lab.medians(rates, repeats=3))


def queue(lab: Lab) -> Iterator[Result]:
    """What a request waits for, and what workers send, over their number."""
    sink = lab.sink()
    distant = lab.delayed(sink, ROUND_TRIP)
    direct = lab.sender(OURS, distant)
    engines = ["database", "redis"]
    if why := why_no_redis():
        print(f"SKIPPED: redis: {why}", file=sys.stderr)
        engines.remove("redis")
    queues = {engine: lab.queue(engine, distant) for engine in engines}
    for engine, queued in queues.items():
        rates = direct.rate("one_by_one", 40), queued.rate("one_by_one", 40)
        name = f"send_mail() into a queue ({engine}), 20 ms"
        yield lab.compare(name, "direct", *rates, repeats=5, at_least=5)
    for place, among, count in (
        ("20 ms", queues, 200),
        ("loopback", {engine: lab.queue(engine, sink) for engine in engines}, 1000),
    ):
        for number in lab.some((1, 2, 4)):
            runs = {e: q.rate("workers", count, number) for e, q in among.items()}
            medians = lab.medians(runs, repeats=3)
            yield Point(f"workers of a queue, {place}", number, medians)


def recipients(lab: Lab) -> Iterator[Result]:
    """Messages/s over the number of recipients, for the chart."""
    django, ours = lab.senders(lab.delayed(lab.sink(), ROUND_TRIP))
    for number in lab.some((1, 2, 5, 10, 20, 50, 100)):
        rates = {
            "Django": django.rate("one_by_one", 2, number),
            "ours": ours.rate("one_by_one", 4, number),
        }
        yield Point("recipients", number, lab.medians(rates, repeats=3))


CASES: Final[dict[str, Callable[[Lab], Iterator[Result]]]] = {
    case.__name__: case
    for case in (
        batch,
        wide_batch,
        one_by_one,
        one_by_one_tls,
        many_recipients,
        loopback_batch,
        loopback_one_by_one,
        loopback_one_by_one_tls,
        at_once,
        memory,
        import_time,
        growth,
        round_trips,
        recipients,
        queue,
    )
}
