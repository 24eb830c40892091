from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import pytest
from django.core.mail import EmailMessage

from django_async_smtp import errors
from django_async_smtp.delivery import Batch, Delivery, deliver
from django_async_smtp.pool import Pool

from .conftest import options_for
from .servers import (
    CLOSE,
    DEFAULT,
    RESET,
    SILENCE,
    MailServer,
    Script,
    ScriptedServer,
    Step,
    Turns,
    free_port,
    wait_until,
)

R = TypeVar("R")


def email(subject: str = "Hello", to: Iterable[str] = ("to@example.com",)) -> Any:
    # Any: a message that was sent has its ``delivery``.
    return EmailMessage(subject, "Body", "from@example.com", list(to))


def subjects(server: ScriptedServer | MailServer) -> list[str]:
    """Return the subjects of the messages that arrived, in order."""
    return [
        line.removeprefix(b"Subject: ").decode()
        for message in server.received
        for line in message.content.splitlines()
        if line.startswith(b"Subject: ")
    ]


@asynccontextmanager
async def pool_of(
    server: ScriptedServer | MailServer, **options: Any
) -> AsyncIterator[Pool]:
    pool = Pool(options_for(server, **options), lambda: None)
    yield pool
    assert " 0 in use" in repr(pool)
    pool.stop_keeping()
    await pool.closed()


async def in_caller(function: Callable[..., R], *args: Any) -> R:
    """Run a function in another thread, in place of the caller's."""
    return await asyncio.to_thread(function, *args)


async def delivered(
    server: ScriptedServer | MailServer, *messages: EmailMessage, **options: Any
) -> Batch:
    async with pool_of(server, **options) as pool:
        return await deliver(in_caller, pool, iter(messages))


async def eventually(is_true: Callable[[], object]) -> None:
    """Do as ``wait_until``, while the loop goes on."""
    await asyncio.to_thread(wait_until, is_true)


# Many messages.


@pytest.mark.asyncio
async def test_messages_go_out_in_order_on_one_connection() -> None:
    with MailServer() as server:
        batch = await delivered(server, *(email(f"No. {n}") for n in range(12)))
    assert subjects(server) == [f"No. {n}" for n in range(12)]
    assert server.connections == 1
    assert batch.sent == 12
    assert not batch.notable


@pytest.mark.asyncio
async def test_a_refused_message_does_not_stop_the_others() -> None:
    messages = [
        email("first"),
        email("reject me"),
        email("second"),
        email(to=["nouser@example.com"]),
        email("third"),
        email(to=["greylisted@example.com", "nouser@example.com"]),
        email("fourth", to=["nouser@example.com", "to@example.com"]),
    ]
    with MailServer() as server:
        batch = await delivered(server, *messages)
    assert subjects(server) == ["first", "reject me", "second", "third", "fourth"]
    assert server.connections == 1
    assert batch.sent == 4
    states = [message.delivery.state for message in messages]
    assert states == ["sent", "refused", "sent", "refused", "sent", "refused", "sent"]
    assert [message for message, _ in batch.failures] == messages[1:6:2]
    assert [type(error) for _, error in batch.failures] == [
        errors.DataRefused,
        errors.RecipientsRefused,
        errors.RecipientsRefused,
    ]
    assert batch.notable == [(m, m.delivery) for m in (*messages[1:6:2], messages[6])]


@pytest.mark.asyncio
async def test_a_message_that_cannot_be_built_does_not_stop_the_others() -> None:
    messages = [email("first"), email("two\nlines"), email(to=["a b"]), email("last")]
    with MailServer() as server:
        batch = await delivered(server, *messages)
    assert subjects(server) == ["first", "last"]
    assert batch.sent == 2
    for message in messages[1:3]:
        assert message.delivery.state == "failed"
        assert message.delivery.attempts == 0
        assert isinstance(message.delivery.error, ValueError)
    assert [message for message, _ in batch.failures] == messages[1:3]


@pytest.mark.asyncio
async def test_a_message_without_recipients_is_not_sent() -> None:
    with ScriptedServer() as server:
        nobody = email(to=())
        batch = await delivered(server, nobody)
        assert (batch.sent, batch.notable) == (0, [])
        assert nobody.delivery == Delivery(
            state="not_sent", server=f"127.0.0.1:{server.port}"
        )
        assert server.connections == 0
        batch = await delivered(server, email("first"), nobody, email("last"))
    assert batch.sent == 2
    assert subjects(server) == ["first", "last"]


@pytest.mark.asyncio
async def test_nothing_is_done_for_no_messages() -> None:
    with ScriptedServer() as server:
        assert await delivered(server) == Batch()
    assert server.connections == 0


@pytest.mark.asyncio
async def test_an_error_of_the_iterator_comes_after_the_messages_before_it() -> None:
    messages = [email("first"), email("second")]

    def broken() -> Iterator[EmailMessage]:
        yield from messages
        raise LookupError("no more")

    with MailServer() as server:
        async with pool_of(server) as pool:
            with pytest.raises(LookupError, match="no more"):
                await deliver(in_caller, pool, broken())
    assert subjects(server) == ["first", "second"]
    assert [message.delivery.state for message in messages] == ["sent", "sent"]


@pytest.mark.asyncio
async def test_a_pool_outlives_a_broken_session_within_a_batch() -> None:
    # Otherwise the next caller would get a pool of its own beside this one.
    ends: list[None] = []
    with ScriptedServer(scripts=({"body": CLOSE}, {})) as server:
        pool = Pool(options_for(server), lambda: ends.append(None))
        messages = iter([email("first"), email("second")])
        await deliver(in_caller, pool, messages)
        assert pool.has_session
        assert not ends
        pool.stop_keeping()
        await pool.closed()
        assert len(ends) == 1


@pytest.mark.asyncio
async def test_a_pool_is_given_up_after_a_batch_that_left_it_empty() -> None:
    ends: list[None] = []
    with ScriptedServer(scripts=({"body": CLOSE},)) as server:
        pool = Pool(options_for(server), lambda: ends.append(None))
        await deliver(in_caller, pool, iter([email(), email()]))
        assert len(ends) == 1


# What became of a message.


@pytest.mark.asyncio
async def test_a_delivery_tells_what_the_server_said() -> None:
    script: Script = {
        "no@example.com": "550 5.1.1 gibt es nöt\r\n".encode(),
        "latin@example.com": b"550 n\xf6\r\n",
        "body": b"250 2.0.0 Ok: queued as 4bQx\r\n",
    }
    names = ("a", "no", "latin", "b")
    message = email(to=[f"{name}@example.com" for name in names])
    with ScriptedServer(scripts=(script,)) as server:
        batch = await delivered(server, message)
    delivery = message.delivery
    assert delivery.state == "sent"
    assert delivery.accepted == ("a@example.com", "b@example.com")
    assert delivery.refused == {
        "no@example.com": (550, "5.1.1 gibt es nöt"),
        "latin@example.com": (550, "n\ufffd"),
    }
    assert delivery.reply == "2.0.0 Ok: queued as 4bQx"
    assert delivery.server == f"127.0.0.1:{server.port}"
    assert delivery.attempts == 1
    assert 0 < delivery.seconds < 10
    assert delivery.error is None
    assert batch.sent == 1
    assert batch.failures == []
    assert batch.notable == [(message, delivery)]


NO = b"550 5.7.1 no\r\n"


@pytest.mark.parametrize(
    ("script", "state", "kind"),
    [
        ({"mail": NO}, "refused", errors.SenderRefused),
        ({"rcpt": NO}, "refused", errors.RecipientsRefused),
        ({"data": NO}, "refused", errors.DataRefused),
        ({"body": NO}, "refused", errors.DataRefused),
        ({"body": b"421 bye\r\n"}, "refused", errors.DataRefused),
        ({"mail": CLOSE}, "failed", errors.Disconnected),
        ({"rcpt": SILENCE}, "failed", errors.ReplyTimeout),
        ({"data": RESET}, "failed", errors.Disconnected),
        ({"body": CLOSE}, "unknown", errors.Disconnected),
        ({"body": RESET}, "unknown", errors.Disconnected),
        ({"body": SILENCE}, "unknown", errors.ReplyTimeout),
        ({"body": b"what?\r\n"}, "unknown", errors.DataRefused),
        ({"greeting": NO}, "failed", errors.GreetingRefused),
        ({"ehlo": b"421 busy\r\n"}, "failed", errors.HeloRefused),
    ],
    ids=repr,
)
@pytest.mark.asyncio
async def test_a_delivery_tells_what_went_wrong(
    script: Script, state: str, kind: type[errors.SMTPError]
) -> None:
    message = email()
    with ScriptedServer(scripts=(script,)) as server:
        batch = await delivered(server, message, timeout=0.3)
    delivery = message.delivery
    assert delivery.state == state
    assert isinstance(delivery.error, kind)
    assert delivery.error.maybe_delivered is (state == "unknown")
    assert delivery.accepted == ()
    assert delivery.reply == ""
    assert delivery.server == f"127.0.0.1:{server.port}"
    assert delivery.attempts == 1
    assert delivery.seconds > 0
    assert batch.sent == 0
    assert batch.failures == [(message, delivery.error)]


@pytest.mark.asyncio
async def test_recipients_that_were_all_refused_are_told() -> None:
    message = email(to=["nouser@example.com", "greylisted@example.com"])
    with MailServer() as server:
        await delivered(server, message)
    assert message.delivery.state == "refused"
    assert message.delivery.refused == {
        "nouser@example.com": (550, "5.1.1 <nouser@example.com>: user unknown"),
        "greylisted@example.com": (451, "4.7.1 greylisted, try again later"),
    }


# A second try.


@pytest.mark.parametrize("step", [CLOSE, RESET, b"421 4.4.2 idle for too long\r\n"])
@pytest.mark.asyncio
async def test_a_pooled_session_that_has_died_is_replaced_unseen(step: Step) -> None:
    scripts: tuple[Script, ...] = ({"mail": Turns(DEFAULT, step)}, {})
    messages = [email("first"), email("second"), email("third")]
    with ScriptedServer(scripts=scripts) as server:
        batch = await delivered(server, *messages)
    assert batch.sent == 3
    assert not batch.notable
    assert [message.delivery.attempts for message in messages] == [1, 2, 1]
    assert subjects(server) == ["first", "second", "third"]
    assert [message.connection for message in server.received] == [0, 1, 1]


@pytest.mark.asyncio
async def test_all_idle_sessions_may_have_died_with_one() -> None:
    died: Script = {"mail": Turns(DEFAULT, b"421 restarting\r\n")}
    with ScriptedServer(scripts=(died, died, died, {})) as server:
        async with pool_of(server) as pool:
            first = [email(f"No. {n}") for n in range(3)]
            await asyncio.gather(*(deliver(in_caller, pool, iter([m])) for m in first))
            last = email("last")
            await deliver(in_caller, pool, iter([last]))
    assert last.delivery.state == "sent"
    assert last.delivery.attempts == 2
    assert subjects(server)[-1] == "last"
    assert server.connections == 4


@pytest.mark.asyncio
async def test_a_session_is_replaced_once() -> None:
    no = b"421 come back tomorrow\r\n"
    scripts: tuple[Script, ...] = ({"mail": Turns(DEFAULT, no)}, {"mail": no})
    messages = [email("first"), email("second")]
    with ScriptedServer(scripts=scripts) as server:
        await delivered(server, *messages)
        assert server.connections == 2
        assert len(server.commands(b"MAIL")) == 3
    delivery = messages[1].delivery
    assert delivery.attempts == 2
    assert delivery.state == "refused"
    assert isinstance(delivery.error, errors.SenderRefused)
    assert delivery.error.smtp_code == 421
    assert subjects(server) == ["first"]


@pytest.mark.parametrize("step", [CLOSE, b"421 busy\r\n"])
@pytest.mark.asyncio
async def test_a_new_session_that_fails_is_not_replaced(step: Step) -> None:
    message = email()
    with ScriptedServer(scripts=({"mail": step}, {})) as server:
        await delivered(server, message)
    assert message.delivery.attempts == 1
    assert server.connections == 1


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
@pytest.mark.asyncio
async def test_what_the_server_may_have_heard_is_not_tried_again(
    stage: str, step: Step
) -> None:
    messages = [email("first"), email("second"), email("third")]
    with ScriptedServer(scripts=({stage: Turns(DEFAULT, step)}, {})) as server:
        batch = await delivered(server, *messages, timeout=0.3)
    assert messages[1].delivery.attempts == 1
    assert messages[1].delivery.state != "sent"
    assert subjects(server).count("second") == (stage == "body")
    # Nor does it stop the next one.
    assert messages[2].delivery.state == "sent"
    assert batch.sent == 2


@pytest.mark.asyncio
async def test_a_server_that_is_gone_meanwhile_is_told_as_that() -> None:
    messages = [email(f"No. {n}") for n in range(3)]
    died: Script = {"mail": Turns(DEFAULT, CLOSE)}
    with ScriptedServer(scripts=(died, {"greeting": b"554 no\r\n"})) as server:
        batch = await delivered(server, *messages)
    assert messages[1].delivery.state == "failed"
    assert messages[1].delivery.attempts == 2
    assert isinstance(messages[1].delivery.error, errors.GreetingRefused)
    assert batch.sent == 1
    assert server.connections == 2


# The end of a batch.


@pytest.mark.asyncio
async def test_a_connection_that_is_refused_ends_the_batch() -> None:
    messages = [email(f"No. {n}") for n in range(5)]
    with ScriptedServer() as server:
        batch = await delivered(server, *messages, port=free_port())
    assert batch.sent == 0
    assert len(batch.failures) == 1
    assert isinstance(messages[0].delivery.error, errors.ConnectionRefused)
    assert messages[0].delivery.state == "failed"
    assert messages[0].delivery.attempts == 1


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
@pytest.mark.asyncio
async def test_what_fails_before_any_message_is_tried_once(
    script: Script, kind: type[errors.SMTPError]
) -> None:
    login = {"username": "alice", "password": "secret"}
    with ScriptedServer(scripts=(script,), extensions=("AUTH PLAIN",)) as server:
        messages = [email(f"No. {n}") for n in range(5)]
        batch = await delivered(server, *messages, timeout=0.3, **login)
        assert server.connections == 1
    assert [type(error) for _, error in batch.failures] == [kind]


@pytest.mark.asyncio
async def test_a_batch_that_is_cancelled_leaves_nothing_open() -> None:
    with ScriptedServer(scripts=({"body": Turns(DEFAULT, SILENCE)},)) as server:
        async with pool_of(server) as pool:
            messages = [email("first"), email("second"), email("third")]
            sending = asyncio.create_task(deliver(in_caller, pool, iter(messages)))
            await eventually(lambda: len(server.received) == 2)
            sending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sending
            assert not pool.has_session
            await eventually(lambda: server.open_connections == 0)
    assert messages[0].delivery.state == "sent"
    assert not hasattr(messages[1], "delivery")
    assert subjects(server) == ["first", "second"]
