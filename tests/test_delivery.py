"""What becomes of a message: sessions, retries, replacements, transactions."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from django_async_smtp import Backend, delivery, errors
from django_async_smtp.delivery import Courier
from django_async_smtp.envelope import Envelope
from django_async_smtp.loop import pool_stats
from django_async_smtp.options import Route
from django_async_smtp.pool import Counts, Pool

from .conftest import MakeBackend, email, emails, options_for, states, subjects
from .faults import FaultyServer
from .servers import (
    CLOSE,
    DEFAULT,
    RESET,
    SILENCE,
    Action,
    MailServer,
    Pause,
    Script,
    ScriptedServer,
    Step,
    Turns,
    free_port,
    wait_until,
)

NO = b"550 5.7.1 no\r\n"
LATER = b"451 4.3.0 later\r\n"
TOO_MANY = b"452 4.5.3 too many recipients\r\n"


def failure_of(backend: Backend, messages: Any) -> errors.SMTPError:
    """Send messages where that must fail, and return the error."""
    with pytest.raises(errors.SMTPError) as caught:
        backend.send_messages(messages)
    return caught.value


# What is told.


def test_a_delivery_tells_what_the_server_said(make_backend: MakeBackend) -> None:
    script: Script = {
        "no@example.com": "550 5.1.1 gibt es nöt\r\n".encode(),
        "latin@example.com": b"550 n\xf6\r\n",
        "body": b"250 2.0.0 Ok: queued as 4bQx\r\n",
    }
    message = email(to=[f"{name}@example.com" for name in ("a", "no", "latin", "b")])
    with ScriptedServer(scripts=(script,)) as server:
        assert make_backend(server).send_messages([message]) == 1
    told = message.delivery
    assert told.state == "sent"
    assert told.accepted == ("a@example.com", "b@example.com")
    assert told.refused == {
        "no@example.com": (550, "5.1.1 gibt es nöt"),
        "latin@example.com": (550, "n\ufffd"),
    }
    assert told.reply == "2.0.0 Ok: queued as 4bQx"
    assert told.server == f"127.0.0.1:{server.port}"
    assert told.attempts == 1
    assert 0 < told.seconds < 10
    assert told.error is None


def test_a_delivery_tells_how_long_each_stage_took(
    make_backend: MakeBackend,
) -> None:
    slow: Script = {"ehlo": [Pause(0.1), DEFAULT], "data": [Pause(0.2), DEFAULT]}
    messages = [email(), email()]
    with ScriptedServer(scripts=(slow,)) as server:
        make_backend(server, max_connections=1).send_messages(messages)
    first, second = (message.delivery.stages for message in messages)
    opening, transaction = ["connect", "greeting", "ehlo"], ["mail", "rcpt", "data"]
    assert list(first) == [*opening, *transaction, "body"]
    assert list(second) == [*transaction, "body"]
    assert 0.1 <= first["ehlo"] < 0.2 <= first["data"] < 2
    assert 0.2 <= second["data"] <= second["data"] + second["body"] < 2
    assert sum(second.values()) <= messages[1].delivery.seconds


def test_the_stages_end_with_the_one_that_failed(make_backend: MakeBackend) -> None:
    message = email()
    with ScriptedServer(scripts=({"rcpt": NO},)) as server:
        failure_of(make_backend(server), [message])
    assert list(message.delivery.stages)[-2:] == ["mail", "rcpt"]


def test_a_delivery_cannot_be_changed(
    server: MailServer, make_backend: MakeBackend
) -> None:
    message = email()
    make_backend(server).send_messages([message])
    with pytest.raises(FrozenInstanceError):
        message.delivery.state = "failed"


@pytest.mark.parametrize(
    ("script", "state", "kind"),
    [
        ({"mail": NO}, "refused", errors.SenderRefused),
        ({"rcpt": NO}, "refused", errors.RecipientsRefused),
        ({"data": NO}, "refused", errors.DataRefused),
        ({"body": NO}, "refused", errors.DataRefused),
        ({"body": b"421 bye\r\n"}, "refused", errors.DataRefused),
        ({"mail": SILENCE}, "failed", errors.ReplyTimeout),
        ({"rcpt": SILENCE}, "failed", errors.ReplyTimeout),
        ({"data": RESET}, "failed", errors.Disconnected),
        ({"body": CLOSE}, "unknown", errors.Disconnected),
        ({"body": RESET}, "unknown", errors.Disconnected),
        ({"body": SILENCE}, "unknown", errors.ReplyTimeout),
        ({"body": b"what?\r\n"}, "unknown", errors.DataRefused),
    ],
    ids=repr,
)
def test_a_delivery_tells_what_went_wrong(
    script: Script,
    state: str,
    kind: type[errors.SMTPError],
    make_backend: MakeBackend,
) -> None:
    message = email()
    with ScriptedServer(scripts=(script,)) as server:
        error = failure_of(make_backend(server, timeout=0.3), [message])
    told = message.delivery
    assert isinstance(error, kind)
    assert told.state == state
    assert told.error is error
    assert error.maybe_delivered is (state == "unknown")
    assert (told.accepted, told.reply, told.attempts) == ((), "", 1)
    assert told.server == f"127.0.0.1:{server.port}"
    assert told.seconds > 0
    assert error.failures == [(message, error)]


def test_recipients_that_were_all_refused_are_told(
    server: MailServer, make_backend: MakeBackend
) -> None:
    message = email(to=["nouser@example.com", "greylisted@example.com"])
    failure_of(make_backend(server), [message])
    assert message.delivery.state == "refused"
    assert message.delivery.refused == {
        "nouser@example.com": (550, "5.1.1 <nouser@example.com>: user unknown"),
        "greylisted@example.com": (451, "4.7.1 greylisted, try again later"),
    }


def test_a_message_without_recipients_is_not_sent(make_backend: MakeBackend) -> None:
    nobody = email(to=())
    with ScriptedServer() as server:
        messages = [email("first"), nobody, email("last")]
        assert make_backend(server).send_messages(messages) == 2
    assert subjects(server) == ["first", "last"]
    assert nobody.delivery.state == "not_sent"
    assert nobody.delivery.error is None


# Several connections.


def test_up_to_a_dozen_messages_take_one_connection(make_backend: MakeBackend) -> None:
    with MailServer() as server:
        assert make_backend(server).send_messages(emails(12)) == 12
    assert subjects(server) == [f"{n}" for n in range(12)]
    assert server.connections == 1


def test_more_messages_take_more_connections(make_backend: MakeBackend) -> None:
    messages = emails(60)
    with FaultyServer(lambda stage: None, reply_delay=0.005) as server:
        assert make_backend(server, max_connections=4).send_messages(messages) == 60
        assert server.most_open == 4
        assert all(server.copies(f"{n}") == 1 for n in range(60))
    assert states(messages) == ["sent"] * 60


def test_one_connection_keeps_the_order(make_backend: MakeBackend) -> None:
    with MailServer() as server:
        assert make_backend(server, max_connections=1).send_messages(emails(40)) == 40
    assert subjects(server) == [f"{n}" for n in range(40)]
    assert server.connections == 1


def test_a_server_that_takes_few_connections_gets_few(
    make_backend: MakeBackend,
) -> None:
    full: Script = {"greeting": b"421 too many connections\r\n"}
    with ScriptedServer(scripts=({}, full)) as server:
        assert make_backend(server).send_messages(emails(30)) == 30
        assert server.connections <= 5
    assert {received.connection for received in server.received} == {0}


def test_no_connection_is_left_after_a_call_with_idle_timeout_0(
    make_backend: MakeBackend,
) -> None:
    with ScriptedServer() as server:
        assert make_backend(server, idle_timeout=0).send_messages(emails(30)) == 30
        wait_until(lambda: server.open_connections == 0)
        assert server.connections <= 5
        assert len(server.commands(b"QUIT")) == server.connections


# The end of a batch.


def test_what_any_connection_would_meet_ends_a_batch(make_backend: MakeBackend) -> None:
    messages = emails(30)
    error = failure_of(make_backend(host="127.0.0.1", port=free_port()), messages)
    assert isinstance(error, errors.ConnectionRefused)
    assert states(messages) == ["not_sent"] * 30
    assert error.failures == [(message, error) for message in messages]
    assert all(message.delivery.error is error for message in messages)
    assert error.sent == 0


def test_an_unknown_host_ends_a_batch(make_backend: MakeBackend) -> None:
    messages = emails(30)
    error = failure_of(make_backend(host="no.such.host.invalid"), messages)
    assert isinstance(error, errors.UnknownHost)
    assert states(messages) == ["not_sent"] * 30


@pytest.mark.parametrize(
    ("script", "kind"),
    [
        ({"greeting": SILENCE}, errors.ReplyTimeout),
        ({"greeting": b"554 no\r\n"}, errors.GreetingRefused),
        ({"ehlo": CLOSE}, errors.Disconnected),
        ({"auth": b"535 no\r\n"}, errors.AuthenticationRefused),
    ],
    ids=repr,
)
def test_what_fails_before_any_message_is_tried_once(
    script: Script, kind: type[errors.SMTPError], make_backend: MakeBackend
) -> None:
    login = {"username": "alice", "password": "secret"}
    messages = emails(30)
    with ScriptedServer(scripts=(script,), extensions=("AUTH PLAIN",)) as server:
        error = failure_of(make_backend(server, timeout=0.3, **login), messages)
        assert server.connections == 1
    assert isinstance(error, kind)
    assert states(messages) == ["not_sent"] * 30


def test_a_certificate_that_is_not_trusted_ends_a_batch(
    server_tls: Any, make_backend: MakeBackend
) -> None:
    with ScriptedServer(tls=server_tls) as server:
        error = failure_of(make_backend(server, use_tls=True), emails(30))
        assert server.connections == 1
    assert isinstance(error, errors.CertificateError)
    assert len(error.failures) == 30


def test_a_login_that_is_refused_meanwhile_ends_a_batch(
    make_backend: MakeBackend,
) -> None:
    dying: Script = {"mail": Turns(DEFAULT, DEFAULT, CLOSE)}
    scripts: tuple[Script, ...] = (dying, {"auth": b"535 5.7.8 changed\r\n"})
    login = {"username": "alice", "password": "secret", "max_connections": 1}
    messages = emails(30)
    with ScriptedServer(scripts=scripts, extensions=("AUTH PLAIN",)) as server:
        error = failure_of(make_backend(server, **login), messages)
        assert server.connections == 2
    assert isinstance(error, errors.AuthenticationRefused)
    assert states(messages) == ["sent"] * 2 + ["failed"] + ["not_sent"] * 27
    assert [message for message, _ in error.failures] == messages[2:]
    assert error.sent == 2


def test_helpers_try_a_login_that_is_refused_once_each(
    make_backend: MakeBackend,
) -> None:
    scripts: tuple[Script, ...] = ({}, {"auth": b"535 5.7.8 changed\r\n"})
    login = {"username": "alice", "password": "secret", "max_connections": 5}
    with ScriptedServer(scripts=scripts, extensions=("AUTH PLAIN",)) as server:
        assert make_backend(server, **login).send_messages(emails(100)) == 100
        assert server.connections <= 5


def test_connections_that_cannot_be_replaced_leave_the_rest_to_the_others(
    make_backend: MakeBackend,
) -> None:
    dying: Script = {"mail": Turns(DEFAULT, CLOSE)}
    no: Script = {"greeting": b"554 5.7.1 no more\r\n"}
    scripts = ({}, *[dying] * 4, no)
    messages = emails(200)
    with ScriptedServer(scripts=scripts) as server:
        error = failure_of(make_backend(server, max_connections=5), messages)
        # Each of the four is replaced once, in vain; so may be the first one, which
        # is closed with them.
        assert server.connections <= 10
    tried = [m for m in messages if m.delivery.state == "failed"]
    assert len(tried) <= 5
    assert len(error.failures) == 200 - error.sent


def test_a_generator_is_left_alone_after_the_end(make_backend: MakeBackend) -> None:
    messages = emails(100)
    waiting = iter(messages)
    error = failure_of(
        make_backend(host="127.0.0.1", port=free_port()), (m for m in waiting)
    )
    left = list(waiting)
    assert 86 <= len(left) <= 88
    assert len(error.failures) == 100 - len(left)
    assert not hasattr(left[0], "delivery")


# A pooled session that has died.


@pytest.mark.parametrize("step", [CLOSE, RESET, b"421 4.4.2 idle for too long\r\n"])
def test_a_pooled_session_that_has_died_is_replaced_unseen(
    step: Step, make_backend: MakeBackend
) -> None:
    scripts: tuple[Script, ...] = ({"mail": Turns(DEFAULT, step)}, {})
    messages = emails(3)
    with ScriptedServer(scripts=scripts) as server:
        assert make_backend(server).send_messages(messages) == 3
    assert [message.delivery.attempts for message in messages] == [1, 2, 1]
    assert subjects(server) == ["0", "1", "2"]
    assert [message.connection for message in server.received] == [0, 1, 1]


def test_all_idle_sessions_may_have_died_with_one(make_backend: MakeBackend) -> None:
    died: Script = {"mail": Turns(DEFAULT, b"421 restarting\r\n")}
    # Slow, so that all three are on their way at the same time.
    with (
        ScriptedServer(scripts=(died, died, died, {}), slow_body=0.1) as server,
        ThreadPoolExecutor(3) as threads,
    ):
        backend = make_backend(server)
        assert list(threads.map(backend.send_messages, [[m] for m in emails(3)]))
        assert server.connections == 3
        last = email("last")
        assert backend.send_messages([last]) == 1
        assert server.connections == 4
    assert last.delivery.attempts == 2
    assert subjects(server)[-1] == "last"


def test_a_session_is_replaced_once(make_backend: MakeBackend) -> None:
    no = b"421 come back tomorrow\r\n"
    scripts: tuple[Script, ...] = ({"mail": Turns(DEFAULT, no)}, {"mail": no})
    messages = emails(2)
    with ScriptedServer(scripts=scripts) as server:
        error = failure_of(make_backend(server), messages)
        assert server.connections == 2
        assert len(server.commands(b"MAIL")) == 3
    assert messages[1].delivery.attempts == 2
    assert messages[1].delivery.state == "refused"
    assert isinstance(error, errors.SenderRefused)
    assert error.smtp_code == 421
    assert subjects(server) == ["0"]


@pytest.mark.parametrize(
    ("stage", "step"),
    [
        ("mail", SILENCE),
        ("mail", b"what?\r\n"),
        ("mail", b"451 later\r\n"),
        ("rcpt", CLOSE),
        ("rcpt", b"421 bye\r\n"),
        ("data", RESET),
        ("body", CLOSE),
        ("body", RESET),
        ("body", SILENCE),
        ("body", b"421 bye\r\n"),
    ],
)
def test_what_the_server_may_have_heard_is_not_tried_again(
    stage: str, step: Step, make_backend: MakeBackend
) -> None:
    messages = emails(3)
    with ScriptedServer(scripts=({stage: Turns(DEFAULT, step)}, {})) as server:
        error = failure_of(make_backend(server, timeout=0.3), messages)
    assert messages[1].delivery.attempts == 1
    assert messages[1].delivery.state != "sent"
    assert subjects(server).count("1") == (stage == "body")
    # Nor does it stop the next one.
    assert messages[2].delivery.state == "sent"
    assert error.sent == 2


def test_a_server_that_is_gone_meanwhile_is_told_as_that(
    make_backend: MakeBackend,
) -> None:
    messages = emails(3)
    died: Script = {"mail": Turns(DEFAULT, CLOSE)}
    with ScriptedServer(scripts=(died, {"greeting": b"554 no\r\n"})) as server:
        error = failure_of(make_backend(server), messages)
        assert server.connections == 2
    assert messages[1].delivery.attempts == 2
    assert isinstance(error, errors.GreetingRefused)
    assert states(messages) == ["sent", "failed", "not_sent"]


@pytest.mark.asyncio
async def test_a_batch_that_is_cancelled_leaves_nothing_open(
    make_backend: MakeBackend,
) -> None:
    with ScriptedServer(scripts=({"body": Turns(DEFAULT, SILENCE)},)) as server:
        messages = emails(3)
        backend = make_backend(server)
        sending = asyncio.create_task(backend.asend_messages(messages))
        await asyncio.to_thread(wait_until, lambda: len(server.received) == 2)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        await asyncio.to_thread(wait_until, lambda: server.open_connections == 0)
    assert pool_stats()[f"127.0.0.1:{server.port}"]["in_use"] == 0
    await asyncio.to_thread(wait_until, lambda: hasattr(messages[1], "delivery"))
    assert [message.delivery.state for message in messages[:2]] == ["sent", "unknown"]
    assert not hasattr(messages[2], "delivery")
    assert subjects(server) == ["0", "1"]


# Retries.

TEMPORARY: list[Script] = [
    {"greeting": b"421 busy\r\n"},
    {"greeting": LATER},
    {"greeting": CLOSE},
    {"ehlo": CLOSE},
    {"mail": LATER},
    {"mail": b"421 bye\r\n"},
    {"mail": CLOSE},
    {"mail": SILENCE},
    {"rcpt": LATER},
    {"rcpt": RESET},
    {"rcpt": b"421 bye\r\n"},
    {"data": LATER},
    {"data": CLOSE},
    {"body": LATER},
    {"body": b"421 bye\r\n"},
]


@pytest.mark.parametrize("script", TEMPORARY, ids=repr)
@pytest.mark.usefixtures("retry_at_once")
def test_a_temporary_failure_is_tried_again(
    script: Script, make_backend: MakeBackend
) -> None:
    ((stage, step),) = script.items()
    assert isinstance(step, bytes | Action)
    # On the same connection and on the next one.
    bad: Script = {stage: Turns(step, step)}
    message = email()
    with ScriptedServer(scripts=(bad, bad, {})) as server:
        backend = make_backend(server, retries=3, timeout=0.3)
        assert backend.send_messages([message]) == 1
        assert message.delivery.state == "sent"
        # With 4xx in answer to it, the body arrives but is not kept.
        kept = [r for r in server.received if r.recipients]
        assert len(kept) == (3 if stage == "body" else 1)


# A session that died at MAIL is replaced in any case.
NOT_REPLACED = [s for s in TEMPORARY if s.get("mail") in (None, LATER, SILENCE)]


@pytest.mark.parametrize("script", NOT_REPLACED, ids=repr)
def test_a_temporary_failure_is_tried_once_without_retries(
    script: Script, make_backend: MakeBackend
) -> None:
    message = email()
    with ScriptedServer(scripts=(script, {})) as server:
        error = failure_of(make_backend(server, timeout=0.3), [message])
        assert server.connections == 1
    assert error.temporary
    assert message.delivery.attempts <= 1


@pytest.mark.parametrize("stage", ["mail", "rcpt", "data", "body"])
@pytest.mark.usefixtures("retry_at_once")
def test_retries_come_to_an_end(stage: str, make_backend: MakeBackend) -> None:
    message = email()
    with ScriptedServer(scripts=({stage: LATER},)) as server:
        error = failure_of(make_backend(server, retries=3), [message])
        assert len(server.commands(b"MAIL")) == 4
        assert server.connections == 1
    assert message.delivery.attempts == 4
    assert error.temporary


@pytest.mark.parametrize("stage", ["mail", "rcpt", "data", "body"])
@pytest.mark.usefixtures("retry_at_once")
def test_what_is_refused_for_good_is_not_tried_again(
    stage: str, make_backend: MakeBackend
) -> None:
    message = email()
    with ScriptedServer(scripts=({stage: NO},)) as server:
        failure_of(make_backend(server, retries=3), [message])
        assert len(server.commands(b"MAIL")) == 1
    assert message.delivery.attempts == 1


@pytest.mark.parametrize("step", [CLOSE, RESET, SILENCE, b"what?\r\n"], ids=repr)
@pytest.mark.usefixtures("retry_at_once")
def test_a_message_that_may_have_arrived_is_not_tried_again(
    step: Step, make_backend: MakeBackend
) -> None:
    message = email()
    with ScriptedServer(scripts=({"body": step}, {})) as server:
        error = failure_of(make_backend(server, retries=3, timeout=0.3), [message])
        assert server.connections == 1
    assert len(server.received) == 1
    assert message.delivery.state == "unknown"
    assert error.maybe_delivered
    assert not error.temporary


@pytest.mark.usefixtures("retry_at_once")
def test_a_server_that_comes_up_meanwhile_gets_the_message(
    make_backend: MakeBackend,
) -> None:
    server = MailServer()
    name = f"127.0.0.1:{server.port}"
    with ThreadPoolExecutor(1) as thread:
        backend = make_backend(server, retries=16)
        sending = thread.submit(backend.send_messages, [email()])
        wait_until(lambda: pool_stats().get(name, {}).get("errors", 0) >= 2)
        with server:
            assert sending.result(20) == 1
            assert subjects(server) == ["Hello"]


@pytest.mark.usefixtures("retry_at_once")
def test_connecting_is_tried_again_as_often_as_told(make_backend: MakeBackend) -> None:
    with ScriptedServer(scripts=({"greeting": LATER},)) as server:
        error = failure_of(make_backend(server, retries=3), emails(30))
        assert server.connections == 4
    assert isinstance(error, errors.GreetingRefused)
    assert len(error.failures) == 30


def test_no_retry_begins_after_the_deadline(make_backend: MakeBackend) -> None:
    message = email()
    with ScriptedServer(scripts=({"mail": LATER},)) as server:
        backend = make_backend(server, retries=100, retry_deadline=0.01)
        failure_of(backend, [message])
    assert message.delivery.attempts == 1


@pytest.mark.usefixtures("retry_at_once")
def test_the_deadline_ends_the_retries(make_backend: MakeBackend) -> None:
    message = email()
    with ScriptedServer(scripts=({"mail": LATER},)) as server:
        backend = make_backend(server, retries=100, retry_deadline=0.2)
        failure_of(backend, [message])
    # 0.0001 s, doubled each time.
    assert 4 < message.delivery.attempts < 15


@pytest.mark.asyncio
async def test_pauses_double(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    yields = asyncio.sleep

    async def sleep(seconds: float) -> None:
        if seconds:
            pauses.append(seconds)
        await yields(0)

    class Lowest:
        def uniform(self, low: float, high: float) -> float:
            return low

    monkeypatch.setattr(delivery, "_random", Lowest())
    monkeypatch.setattr(asyncio, "sleep", sleep)
    with ScriptedServer(scripts=({"mail": LATER},)) as server:
        options = options_for(server)
        pool = Pool(options, Counts())
        courier = Courier(Route(servers=(options,), retries=4), [pool])
        told = await courier.deliver(Envelope("a@b.example", ("c@d.example",), b"\r\n"))
        pool.stop_keeping()
        await pool.closed()
    assert told.attempts == 5
    assert pauses == [0.25, 0.5, 1, 2]


@pytest.mark.usefixtures("retry_at_once")
def test_a_recipient_that_was_put_off_is_tried_again_alone(
    make_backend: MakeBackend,
) -> None:
    script: Script = {"grey@example.com": Turns(LATER)}
    message = email(to=["a@example.com", "grey@example.com", "b@example.com"])
    with ScriptedServer(scripts=(script,)) as server:
        assert make_backend(server, retries=1).send_messages([message]) == 1
    assert [r.recipients for r in server.received] == [
        ["a@example.com", "b@example.com"],
        ["grey@example.com"],
    ]
    assert message.delivery.refused == {}
    assert message.delivery.accepted[-1] == "grey@example.com"


# More recipients than a transaction takes.


def test_recipients_beyond_the_limit_get_further_transactions(
    make_backend: MakeBackend,
) -> None:
    recipients = [f"r{n}@example.com" for n in range(250)]
    turns: list[Step] = [
        *[DEFAULT] * 100,
        *[TOO_MANY] * 150,
        *[DEFAULT] * 100,
        *[TOO_MANY] * 50,
    ]
    message = email(to=recipients)
    with ScriptedServer(scripts=({"rcpt": Turns(*turns)},)) as server:
        assert make_backend(server).send_messages([message]) == 1
    got = [received.recipients for received in server.received]
    assert got == [recipients[:100], recipients[100:200], recipients[200:]]
    assert message.delivery.accepted == tuple(recipients)
    assert message.delivery.refused == {}
    assert message.delivery.attempts == 3
    assert message.delivery.reply == "ok queued; ok queued; ok queued"
    contents = {received.content for received in server.received}
    assert len(contents) == 1


def test_too_many_recipients_from_the_first_on_are_a_refusal(
    make_backend: MakeBackend,
) -> None:
    message = email(to=["a@example.com", "b@example.com"])
    with ScriptedServer(scripts=({"rcpt": TOO_MANY},)) as server:
        error = failure_of(make_backend(server), [message])
        assert len(server.commands(b"MAIL")) == 1
    assert isinstance(error, errors.RecipientsRefused)
    assert message.delivery.state == "refused"


def test_a_full_mailbox_is_tried_once_more(make_backend: MakeBackend) -> None:
    message = email(to=["a@example.com", "full@example.com", "b@example.com"])
    script: Script = {"full@example.com": b"452 4.2.2 mailbox full\r\n"}
    with ScriptedServer(scripts=(script,)) as server:
        assert make_backend(server).send_messages([message]) == 1
        assert len(server.commands(b"RCPT TO:<FULL@")) == 2
        assert len(server.commands(b"RCPT TO:<A@")) == 1
    assert message.delivery.accepted == ("a@example.com", "b@example.com")
    assert message.delivery.refused == {"full@example.com": (452, "4.2.2 mailbox full")}
    assert len(server.received) == 1


@pytest.mark.parametrize(
    ("stage", "step", "code", "text"),
    [
        ("body", NO, 550, "no"),
        ("body", CLOSE, 0, "it may have been delivered"),
        ("mail", LATER, 451, "later"),
        ("data", CLOSE, 0, "127.0.0.1"),
    ],
    ids=repr,
)
def test_a_further_transaction_that_fails_is_told_of_its_recipients(
    stage: str, step: Step, code: int, text: str, make_backend: MakeBackend
) -> None:
    script: Script = {"rcpt": Turns(DEFAULT, TOO_MANY), stage: Turns(DEFAULT, step)}
    message = email(to=["a@example.com", "b@example.com"])
    with ScriptedServer(scripts=(script,)) as server:
        assert make_backend(server).send_messages([message]) == 1
    assert message.delivery.accepted == ("a@example.com",)
    refused = message.delivery.refused["b@example.com"]
    assert refused[0] == code
    assert text in refused[1]
