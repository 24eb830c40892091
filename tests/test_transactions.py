"""A pipelined transaction ends as one command at a time does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from django.core.mail import EmailMessage
from hypothesis import HealthCheck, given, settings, strategies

from django_async_smtp import Delivery

from .conftest import MakeBackend, end_connections
from .servers import (
    CLOSE,
    DEFAULT,
    SILENCE,
    Pause,
    Received,
    Script,
    ScriptedServer,
    Step,
)

EXTENSIONS = ("SIZE 10000000", "8BITMIME", "PIPELINING")
TO = ["a@example.com", "b@example.com", "c@example.com"]
REPLIES: list[Step] = [
    b"250 fine\r\n",
    b"250-two\r\n250 lines\r\n",
    b"251 forwarded\r\n",
    b"354 go on\r\n",
    b"450 busy\r\n",
    b"452 too many\r\n",
    b"550 no\r\n",
    b"421 bye\r\n",
    b"what?\r\n",
    CLOSE,
]
PACKETS = ["replies", "bytes", "together"]


def outcome(
    make_backend: MakeBackend, script: Script, packets: str, **options: Any
) -> tuple[Delivery, list[Received], bool]:
    """
    Send a message to a server that follows the script, and another one after it.

    Return what became of the first, what arrived of it, and whether the second went
    out.
    """
    first, second = (
        EmailMessage(subject, "Body", "from@example.com", TO, headers={"Date": "now"})
        for subject in ("first", "second")
    )
    with ScriptedServer((script, {}), extensions=EXTENSIONS, packets=packets) as server:
        backend = make_backend(server, fail_silently=True, timeout=5, **options)
        backend.send_messages([first])
        is_second_sent = backend.send_messages([second]) == 1
        end_connections()
        # Nobody got an empty message.
        assert all(m.content for m in server.received if m.recipients)
        received = [
            replace(message, connection=0, content=b"", options="")
            for message in server.received
            if message.recipients and b"Subject: first" in message.content
        ]
    delivery = first.delivery  # type: ignore[attr-defined]
    return comparable(delivery), received, is_second_sent


def comparable(delivery: Delivery) -> Delivery:
    error: Any = delivery.error
    summary = (type(error), getattr(error, "args", ()), getattr(error, "stage", ""))
    if isinstance(error, OSError) and error.errno:
        summary = (type(error), (), getattr(error, "stage", ""))
    return replace(
        delivery,
        server="",
        seconds=0,
        stages={},
        error=summary,  # type: ignore[arg-type]
    )


def transaction_scripts() -> strategies.SearchStrategy[Script]:
    stages = ["mail", *TO, "data", "body", "rset"]
    return strategies.dictionaries(
        strategies.sampled_from(stages), strategies.sampled_from(REPLIES), max_size=4
    ).map(without_nonsense)


def without_nonsense(script: dict[str, Step]) -> Script:
    """
    Keep to what a server can mean.

    After a refused MAIL no recipient is accepted, and without one no DATA.
    """
    script = dict(script)
    if script.get("mail", DEFAULT) not in (DEFAULT, *REPLIES[:2]):
        for stage in (*TO, "data"):
            script.setdefault(stage, b"503 MAIL first\r\n")
            if script[stage] in REPLIES[:4]:
                script[stage] = b"503 MAIL first\r\n"
    return dict(script)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(script=transaction_scripts(), packets=strategies.sampled_from(PACKETS))
def test_any_failure_in_any_packets_ends_the_same(
    make_backend: MakeBackend, script: Script, packets: str
) -> None:
    one_by_one = outcome(make_backend, script, "replies", pipelining=False)
    together = outcome(make_backend, script, packets)
    assert together[:2] == one_by_one[:2]


SENDERS = [f"{n}@example.com" for n in "12345"]
GARBAGE: Final = b"what?\r\n"
NO_TRANSACTION: list[Step] = [
    b"450 busy\r\n",
    b"550 no\r\n",
    b"421 bye\r\n",
    GARBAGE,
    CLOSE,
]


@strategies.composite
def scripts_of_a_call(draw: strategies.DrawFn) -> Script:
    """For each message at most one stage that fails, in one way."""
    # Slow enough that the next message is built when this one's turn comes.
    script: Script = {"mail": [Pause(0.01), DEFAULT]}
    stages = [None, "mail", "rcpt", TO[0], "data", "body"]
    stage = None
    for sender in SENDERS:
        before, stage = stage, draw(strategies.sampled_from(stages))
        if stage is not None:
            step = draw(strategies.sampled_from(NO_TRANSACTION))
            if before == "body" != stage and step == GARBAGE:
                # With the refusal in one packet, it is taken for a part of that: the
                # message goes over another connection.
                step = CLOSE
            script[f"{stage} {sender}"] = step
        if stage == "mail":
            for later in ("rcpt", "data"):
                script[f"{later} {sender}"] = b"503 MAIL first\r\n"
    return script


def outcomes(
    make_backend: MakeBackend, script: Script, packets: str, **options: Any
) -> tuple[list[Delivery], list[Received], int]:
    """
    Send a message of each sender in one call, over one connection after the other.

    Return what became of each, what arrived, and over how many connections.
    """
    messages = [
        EmailMessage("s", "Body", sender, TO, headers={"Date": "now"})
        for sender in SENDERS
    ]
    with ScriptedServer((script, {}), extensions=EXTENSIONS, packets=packets) as server:
        backend = make_backend(
            server, fail_silently=True, timeout=5, max_connections=1, **options
        )
        backend.send_messages(messages)
        end_connections()
        assert all(m.content for m in server.received if m.recipients)
        received = [
            replace(message, connection=0, content=b"", options="")
            for message in server.received
            if message.recipients
        ]
    deliveries = [
        # A message that began on a connection that then died needs one more attempt.
        replace(comparable(message.delivery), attempts=0)  # type: ignore[attr-defined]
        for message in messages
    ]
    return deliveries, received, server.connections


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(script=scripts_of_a_call(), packets=strategies.sampled_from(PACKETS))
def test_messages_that_begin_with_the_end_of_others_end_the_same(
    make_backend: MakeBackend, script: Script, packets: str
) -> None:
    one_by_one = outcomes(make_backend, script, "replies", pipelining=False)
    together = outcomes(make_backend, script, packets)
    assert together == one_by_one


def test_the_next_message_begins_with_the_end_of_the_one_before(
    make_backend: MakeBackend,
) -> None:
    script: Script = {
        "mail": [Pause(0.2), DEFAULT],
        f"body {SENDERS[0]}": SILENCE,
    }
    with ScriptedServer((script,), extensions=EXTENSIONS) as server:
        backend = make_backend(server, timeout=0.5, fail_silently=True)
        first, second = (EmailMessage("s", "b", sender, TO) for sender in SENDERS[:2])
        backend.send_messages([first, second])
        begun = [line for line in server.unread[0].split(b"\r\n") if line]
    assert [line.split(b":")[0] for line in begun] == [
        b"MAIL FROM",
        *[b"RCPT TO"] * len(TO),
        b"DATA",
    ]
    assert first.delivery.state == "unknown"  # type: ignore[attr-defined]
    assert second.delivery.state == "sent"  # type: ignore[attr-defined]


def commands_before_the_first_reply(
    make_backend: MakeBackend, extensions: tuple[str, ...], **options: Any
) -> int:
    """Return how many commands of a transaction came while MAIL was unanswered."""
    with ScriptedServer(({"mail": SILENCE},), extensions=extensions) as server:
        backend = make_backend(server, timeout=0.3, fail_silently=True, **options)
        backend.send_messages([EmailMessage("s", "b", "from@example.com", TO)])
        (buffer,) = server.unread
        return len(server.commands(b"MAIL")) + buffer.count(b"\r\n")


def test_a_transaction_is_sent_together_where_the_server_offers_it(
    make_backend: MakeBackend,
) -> None:
    count = commands_before_the_first_reply(make_backend, EXTENSIONS)
    assert count == len(["MAIL", *TO, "DATA"])


def test_commands_wait_for_their_replies_where_the_server_does_not(
    make_backend: MakeBackend,
) -> None:
    assert commands_before_the_first_reply(make_backend, ()) == 1


def test_pipelining_can_be_turned_off(make_backend: MakeBackend) -> None:
    count = commands_before_the_first_reply(make_backend, EXTENSIONS, pipelining=False)
    assert count == 1


def test_an_empty_message_is_ended_where_all_recipients_were_refused(
    make_backend: MakeBackend,
) -> None:
    script: Script = {"rcpt": b"550 no\r\n", "data": b"354 go on\r\n"}
    script["body"] = b"554 no recipients\r\n"
    delivery, received, is_second_sent = outcome(make_backend, script, "together")
    assert delivery.state == "refused"
    assert set(delivery.refused) == set(TO)
    assert not received
    # The session is in order: the same script refuses the second one as well.
    assert not is_second_sent


def test_nobody_gets_the_empty_message_of_a_refused_sender(
    make_backend: MakeBackend,
) -> None:
    script: Script = {"mail": b"550 no\r\n"}
    delivery, received, is_second_sent = outcome(make_backend, script, "replies")
    assert delivery.state == "refused"
    assert not received
    assert is_second_sent  # On a fresh connection.


def test_a_thousand_recipients_do_not_block_a_server_that_reads_slowly(
    make_backend: MakeBackend,
) -> None:
    to = [f"{'x' * 50}{n}@example.com" for n in range(3000)]
    message = EmailMessage("s", "b", "from@example.com", to)
    with ScriptedServer(extensions=EXTENSIONS, packets="replies") as server:
        assert make_backend(server, timeout=10).send_messages([message]) == 1
        assert server.received[0].recipients == to
