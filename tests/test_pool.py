from __future__ import annotations

import asyncio
import contextvars
import gc
import itertools
import random
import ssl
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from django_async_smtp import errors, pool_stats
from django_async_smtp.delivery import Courier
from django_async_smtp.envelope import Envelope
from django_async_smtp.errors import PoolTimeout, SMTPError
from django_async_smtp.options import Options, Route
from django_async_smtp.pool import Counts, Pool
from django_async_smtp.session import QUIT_TIMEOUT, Session

from .conftest import MakeBackend, default_backend, emails, options_for
from .faults import FaultyServer
from .servers import (
    CLOSE,
    DEFAULT,
    READ,
    RESET,
    SILENCE,
    Script,
    ScriptedServer,
    Step,
    free_port,
    open_sockets,
    wait_until,
)

MAX_CONNECTIONS = Options(host="", port=0).max_connections
HELLO = Envelope("from@example.com", ("to@example.com",), b"Subject: Hi\r\n\r\nHi\r\n")


async def eventually(is_true: Callable[[], object]) -> None:
    """Do as ``wait_until``, while the loop goes on."""
    await asyncio.to_thread(wait_until, is_true)


def idle(count: int) -> dict[str, int]:
    """Return the state of a pool with idle sessions only."""
    return {"in_use": 0, "idle": count, "waiting": 0}


EMPTY = idle(0)
ONE_IN_USE = {"in_use": 1, "idle": 0, "waiting": 0}


@asynccontextmanager
async def pool_of(server: ScriptedServer, **options: Any) -> AsyncIterator[Pool]:
    """Yield a pool, and check that at its end nothing is left."""
    before = open_sockets()
    pool = Pool(options_for(server, **options), Counts())
    yield pool
    pool.stop_keeping()
    await pool.closed()
    assert pool.state() == EMPTY
    assert pool.is_unused
    assert pool.counts.closed.total() == pool.counts.opened
    await eventually(lambda: server.open_connections == 0)
    await eventually(lambda: open_sockets() <= before)


async def all_sessions(pool: Pool) -> list[Session]:
    """Take as many sessions as the pool gives."""
    return [await pool.acquire() for _ in range(pool.options.max_connections)]


async def waiters_for(pool: Pool, count: int) -> list[asyncio.Task[Session]]:
    """Let tasks wait for a session."""
    tasks = [asyncio.create_task(pool.acquire()) for _ in range(count)]
    await asyncio.sleep(0)
    assert pool.state()["waiting"] == count
    return tasks


def release_all(pool: Pool, sessions: list[Session]) -> None:
    for session in sessions:
        pool.release(session)


# How many.


@pytest.mark.asyncio
async def test_sessions_are_never_more_than_the_limit() -> None:
    with ScriptedServer() as server:
        async with pool_of(server) as pool:
            in_use: set[Session] = set()
            most = 0

            async def send() -> None:
                nonlocal most
                session = await pool.acquire()
                assert session not in in_use
                in_use.add(session)
                most = max(most, len(in_use), server.open_connections)
                await session.send(HELLO)
                in_use.remove(session)
                pool.release(session)

            await asyncio.gather(*(send() for _ in range(50)))
            assert most == MAX_CONNECTIONS
            assert pool.state() == idle(MAX_CONNECTIONS)
    assert len(server.received) == 50
    assert server.connections == MAX_CONNECTIONS
    assert len(server.commands(b"QUIT")) == MAX_CONNECTIONS


@pytest.mark.asyncio
async def test_the_session_that_was_used_last_is_used_next() -> None:
    with ScriptedServer() as server:
        async with pool_of(server) as pool:
            assert not pool.has_session
            first, second = await pool.acquire(), await pool.acquire()
            assert pool.has_session
            assert first is not second
            assert not first.is_used
            release_all(pool, [first, second])
            assert pool.has_session
            assert await pool.acquire() is second
            assert second.is_used
            assert await pool.acquire() is first
            release_all(pool, [first, second])
    assert server.connections == 2


@pytest.mark.asyncio
async def test_a_fresh_session_is_a_new_connection() -> None:
    with ScriptedServer() as server:
        async with pool_of(server) as pool:
            release_all(pool, [await pool.acquire(), await pool.acquire()])
            session = await pool.acquire(fresh=True)
            assert not session.is_used
            assert pool.state() == ONE_IN_USE
            await pool.closed()
            assert len(server.commands(b"QUIT")) == 2
            assert pool.counts.closed == {"ended by server": 2}
            pool.release(session)
    assert server.connections == 3


# Waiting.


@pytest.mark.asyncio
async def test_waiters_are_served_in_order() -> None:
    with ScriptedServer() as server:
        async with pool_of(server) as pool:
            sessions = await all_sessions(pool)
            waiters = await waiters_for(pool, 4)
            for waiter in waiters:
                session = sessions.pop(0)
                pool.release(session)
                assert await waiter is session
                sessions.append(session)
            release_all(pool, sessions)
    assert server.connections == MAX_CONNECTIONS


@pytest.mark.asyncio
async def test_nobody_overtakes_a_waiter() -> None:
    with ScriptedServer() as server:
        async with pool_of(server) as pool:
            sessions = await all_sessions(pool)
            (waiter,) = await waiters_for(pool, 1)
            pool.release(sessions[0])
            late = asyncio.create_task(pool.acquire())
            assert await waiter is sessions[0]
            assert not late.done()
            pool.release(sessions[0])
            assert await late is sessions[0]
            release_all(pool, sessions)


@pytest.mark.asyncio
async def test_the_place_of_a_broken_session_goes_to_a_waiter() -> None:
    with ScriptedServer() as server:
        async with pool_of(server) as pool:
            sessions = await all_sessions(pool)
            (waiter,) = await waiters_for(pool, 1)
            broken = sessions.pop()
            broken.abort()
            pool.release(broken)
            sessions.append(await waiter)
            assert sessions[-1] is not broken
            assert server.connections == MAX_CONNECTIONS + 1
            release_all(pool, sessions)


@pytest.mark.asyncio
async def test_a_failure_to_connect_lets_the_next_waiter_try() -> None:
    scripts: list[Script] = [{"greeting": b"554 no\r\n"}] * MAX_CONNECTIONS
    with ScriptedServer(scripts=(*scripts, {})) as server:
        async with pool_of(server) as pool:
            results = await asyncio.gather(
                *(pool.acquire() for _ in range(MAX_CONNECTIONS + 3)),
                return_exceptions=True,
            )
            sessions = [found for found in results if isinstance(found, Session)]
            refusals = [
                found for found in results if isinstance(found, errors.GreetingRefused)
            ]
            assert len(sessions) == 3
            assert len(refusals) == MAX_CONNECTIONS
            release_all(pool, sessions)


@pytest.mark.asyncio
async def test_a_wait_ends_with_the_timeout() -> None:
    with ScriptedServer() as server:
        async with pool_of(server, timeout=0.1) as pool:
            sessions = await all_sessions(pool)
            with pytest.raises(
                PoolTimeout, match=f"no connection to 127.0.0.1:{server.port} came free"
            ) as caught:
                await pool.acquire()
            assert f"within 0.1 s: all {MAX_CONNECTIONS} are in use" in str(
                caught.value
            )
            assert caught.value.stage == "connect"
            assert caught.value.temporary
            assert isinstance(caught.value, TimeoutError)
            release_all(pool, sessions)
            assert pool.state() == idle(MAX_CONNECTIONS)


@pytest.mark.asyncio
async def test_a_waiter_that_was_cancelled_is_not_served() -> None:
    with ScriptedServer() as server:
        async with pool_of(server) as pool:
            sessions = await all_sessions(pool)
            first, second, third = await waiters_for(pool, 3)
            second.cancel()
            release_all(pool, sessions[:2])
            assert await first is sessions[0]
            assert await third is sessions[1]
            with pytest.raises(asyncio.CancelledError):
                await second
            release_all(pool, sessions)


@pytest.mark.parametrize("is_clean", [True, False])
@pytest.mark.asyncio
async def test_what_a_waiter_got_in_the_moment_of_its_end_goes_to_the_next(
    is_clean: bool,
) -> None:
    with ScriptedServer() as server:
        async with pool_of(server) as pool:
            sessions = await all_sessions(pool)
            first, second = await waiters_for(pool, 2)
            session = sessions.pop()
            if not is_clean:
                session.abort()
            pool.release(session)
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            assert (await second is session) is is_clean
            release_all(pool, [*sessions, await second])
            assert pool.state() == idle(MAX_CONNECTIONS)


@pytest.mark.parametrize("is_clean", [True, False])
@pytest.mark.parametrize("release_after", [0.04, 0.06])
@pytest.mark.asyncio
async def test_a_release_in_the_moment_of_a_timeout_is_not_lost(
    release_after: float, is_clean: bool
) -> None:
    with ScriptedServer() as server:
        async with pool_of(server, timeout=0.05) as pool:
            sessions = await all_sessions(pool)
            (waiter,) = await waiters_for(pool, 1)
            session = sessions.pop()
            if not is_clean:
                session.abort()
            asyncio.get_running_loop().call_later(release_after, pool.release, session)
            # Both are due when the loop goes on.
            time.sleep(0.1)  # noqa: ASYNC251
            with pytest.raises(PoolTimeout):
                await waiter
            release_all(pool, sessions)
            assert pool.state() == idle(MAX_CONNECTIONS - (not is_clean))


# Cancelled, or failed, on the way.


@pytest.mark.asyncio
async def test_nothing_is_left_where_connecting_was_cancelled() -> None:
    with ScriptedServer(scripts=({"greeting": SILENCE}, {})) as server:
        async with pool_of(server) as pool:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(pool.acquire(), 0.1)
            assert pool.state() == EMPTY
            assert pool.is_unused
            await eventually(lambda: server.open_connections == 0)
            pool.release(await pool.acquire())


@pytest.mark.asyncio
async def test_nothing_is_left_whenever_connecting_is_cancelled() -> None:
    with ScriptedServer() as server:
        async with pool_of(server) as pool:
            for steps in range(0, 400, 7):
                acquiring = asyncio.create_task(pool.acquire())
                for _ in range(steps):
                    await asyncio.sleep(0)
                acquiring.cancel()
                with suppress(asyncio.CancelledError):
                    session = await acquiring
                    session.abort()
                    pool.release(session)
                assert pool.state() == EMPTY


@pytest.mark.asyncio
async def test_nothing_is_left_of_a_session_that_its_caller_did_not_wait_for() -> None:
    with ScriptedServer() as server:
        async with pool_of(server) as pool:
            acquiring = asyncio.create_task(pool.acquire())
            await asyncio.sleep(0)
            (opening,) = (
                task
                for task in asyncio.all_tasks()
                if getattr(task.get_coro(), "__qualname__", "") == "Session.open"
            )
            while not opening.done():  # noqa: ASYNC110
                await asyncio.sleep(0)
            assert not acquiring.done()
            acquiring.cancel()
            await asyncio.wait([acquiring])
            assert acquiring.cancelled()
            assert pool.state() == EMPTY
            assert pool.counts.opened == pool.counts.errors == 0
            await eventually(lambda: server.open_connections == 0)


@pytest.mark.asyncio
async def test_nothing_is_left_where_connecting_failed() -> None:
    with ScriptedServer() as server:
        async with pool_of(server, port=free_port()) as pool:
            with pytest.raises(errors.ConnectionRefused):
                await pool.acquire()
            assert pool.state() == EMPTY
            assert pool.is_unused
            assert not pool.has_session


@pytest.mark.asyncio
async def test_nothing_is_lost_whatever_its_users_do() -> None:
    chance = random.Random(1)
    steps: list[Step] = [CLOSE, RESET, b"421 bye\r\n", b"what?\r\n", *[DEFAULT] * 8]
    scripts = tuple[Script, ...](
        {chance.choice(["greeting", "mail", "body", "idle"]): chance.choice(steps)}
        for _ in range(300)
    )
    with ScriptedServer(scripts=scripts) as server:
        async with pool_of(server, timeout=1) as pool:
            in_use = 0

            async def use(patience: float) -> None:
                nonlocal in_use
                async with asyncio.timeout(patience):
                    session = await pool.acquire()
                    in_use += 1
                    assert in_use <= MAX_CONNECTIONS
                    try:
                        await session.send(HELLO)
                    finally:
                        in_use -= 1
                        pool.release(session)

            uses = [use(chance.choice([0, 0.001, 0.01, 1])) for _ in range(300)]
            for result in await asyncio.gather(*uses, return_exceptions=True):
                assert result is None or isinstance(result, SMTPError | TimeoutError)
            assert pool.state() == idle(pool.state()["idle"])
            assert " 0 connecting" in repr(pool)
            sessions = await asyncio.gather(
                *(pool.acquire() for _ in range(MAX_CONNECTIONS)),
                return_exceptions=True,
            )
            for session in sessions:
                if isinstance(session, Session):
                    pool.release(session)


# Idle sessions.

ENDS: list[tuple[Step, ...]] = [
    (CLOSE,),
    (RESET,),
    (b"421 4.4.2 idle for too long\r\n", CLOSE),
    (b"421 4.4.2 idle for too long\r\n", RESET),
    (b"421 4.4.2 idle for too long\r\n",),
    (b"421-4.4.2 idle\r\n",),
]


@pytest.mark.parametrize("uses_tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("end", ENDS, ids=repr)
@pytest.mark.asyncio
async def test_an_idle_session_that_the_server_ended_is_not_used(
    end: tuple[Step, ...],
    uses_tls: bool,
    server_tls: ssl.SSLContext,
    client_tls: ssl.SSLContext,
) -> None:
    tls: dict[str, Any] = {"use_tls": True, "ssl_context": client_tls}
    with ScriptedServer(
        scripts=({"idle": end}, {}), tls=server_tls if uses_tls else None
    ) as server:
        async with pool_of(server, **(tls if uses_tls else {})) as pool:
            session = await pool.acquire()
            await session.send(HELLO)
            pool.release(session)
            await eventually(lambda: pool.state() == EMPTY)
            assert not pool.has_session
            assert pool.is_unused
            another = await pool.acquire()
            assert another is not session
            await another.send(HELLO)
            pool.release(another)
    assert [message.connection for message in server.received] == [0, 1]


@pytest.mark.asyncio
async def test_the_end_of_one_idle_session_is_not_that_of_the_others() -> None:
    with ScriptedServer(scripts=({"idle": CLOSE}, {})) as server:
        async with pool_of(server) as pool:
            first = await pool.acquire()
            second = await pool.acquire()
            await first.send(HELLO)
            release_all(pool, [first, second])
            await eventually(lambda: pool.state() == idle(1))
            assert not pool.is_unused
            assert await pool.acquire() is second
            pool.release(second)


@pytest.mark.asyncio
async def test_a_session_that_the_server_ended_in_use_does_not_become_idle() -> None:
    with ScriptedServer() as server:
        async with pool_of(server) as pool:
            session = await pool.acquire()
            server.close_all()
            await eventually(lambda: not session.is_clean)
            pool.release(session)
            assert pool.counts.closed == {"ended by server": 1}
            assert pool.state() == EMPTY
            assert pool.is_unused


@pytest.mark.asyncio
async def test_an_idle_session_says_quit_after_a_while() -> None:
    with ScriptedServer() as server:
        async with pool_of(server, idle_timeout=0.1) as pool:
            first, second = await pool.acquire(), await pool.acquire()
            release_all(pool, [first, second])
            assert await pool.acquire() is second
            await eventually(lambda: server.commands(b"QUIT"))
            assert not first.is_clean
            # The second was idle as long ago, but is in use.
            assert second.is_clean
            assert pool.state() == ONE_IN_USE
            pool.release(second)
            await eventually(lambda: pool.is_unused)
            assert pool.counts.closed == {"idle": 2}
            assert len(server.commands(b"QUIT")) == 2


# Releasing.


@pytest.mark.parametrize("step", [SILENCE, b"what?\r\n", b"421 bye\r\n"])
@pytest.mark.asyncio
async def test_a_session_that_is_not_clean_is_closed(step: Step) -> None:
    with ScriptedServer(scripts=({"mail": step},)) as server:
        async with pool_of(server, timeout=0.2) as pool:
            session = await pool.acquire()
            with pytest.raises(SMTPError):
                await session.send(HELLO)
            pool.release(session)
            assert pool.state() == EMPTY
            assert pool.is_unused
            await eventually(lambda: server.open_connections == 0)


@pytest.mark.asyncio
async def test_a_session_whose_message_was_refused_is_kept() -> None:
    with ScriptedServer(scripts=({"rcpt": b"550 no\r\n"},)) as server:
        async with pool_of(server) as pool:
            session = await pool.acquire()
            with pytest.raises(errors.RecipientsRefused):
                await session.send(HELLO)
            pool.release(session)
            assert await pool.acquire() is session
            pool.release(session)


@pytest.mark.asyncio
async def test_a_session_with_a_reply_due_is_not_used_again() -> None:
    with ScriptedServer(scripts=({"rcpt": ()}, {})) as server:
        async with pool_of(server) as pool:
            session = await pool.acquire()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(session.send(HELLO), 0.1)
            pool.release(session)
            another = await pool.acquire()
            await another.send(HELLO)
            pool.release(another)
    assert [message.connection for message in server.received] == [1]


@pytest.mark.asyncio
async def test_a_pool_that_stops_keeping_ends_every_session() -> None:
    with ScriptedServer() as server:
        async with pool_of(server) as pool:
            sessions = [await pool.acquire() for _ in range(3)]
            pool.release(sessions.pop())
            pool.stop_keeping()
            await pool.closed()
            assert len(server.commands(b"QUIT")) == 1
            assert not pool.is_unused
            await sessions[0].send(HELLO)
            release_all(pool, sessions)
            assert pool.state() == EMPTY
            await pool.closed()
            assert pool.is_unused
            assert pool.counts.closed == {"asked": 3}
            assert len(server.commands(b"QUIT")) == 3


@pytest.mark.asyncio
async def test_a_pool_that_stops_keeping_still_serves_its_waiters() -> None:
    with ScriptedServer() as server:
        async with pool_of(server) as pool:
            sessions = await all_sessions(pool)
            (waiter,) = await waiters_for(pool, 1)
            pool.stop_keeping()
            release_all(pool, sessions)
            session = await waiter
            await session.send(HELLO)
            pool.release(session)
            assert pool.state() == EMPTY


@pytest.mark.asyncio
async def test_closing_does_not_wait_for_a_silent_server() -> None:
    with ScriptedServer(scripts=({"quit": SILENCE},)) as server:
        async with pool_of(server) as pool:
            release_all(pool, await all_sessions(pool))
            pool.stop_keeping()
            start = time.monotonic()
            await pool.closed()
            assert time.monotonic() - start < QUIT_TIMEOUT + 0.5


@pytest.mark.asyncio
async def test_a_pooled_session_keeps_nobodys_context_alive() -> None:
    class Request:
        pass

    current: contextvars.ContextVar[Request] = contextvars.ContextVar("current")

    async def view(pool: Pool) -> weakref.ref[Request]:
        request = Request()
        current.set(request)
        pool.release(await pool.acquire())
        return weakref.ref(request)

    with ScriptedServer() as server:
        async with pool_of(server) as pool:
            request = await asyncio.create_task(view(pool))
            # The loop lets go of the finished task.
            await asyncio.sleep(0)
            gc.collect()
            assert request() is None
            assert pool.has_session


# Replacing sessions.


@pytest.mark.asyncio
async def test_a_session_is_replaced_after_its_last_message() -> None:
    with ScriptedServer() as server:
        async with pool_of(server, max_messages=3, max_connections=1) as pool:
            for _ in range(7):
                session = await pool.acquire()
                await session.send(HELLO)
                pool.release(session)
            assert pool.counts.closed == {"messages": 2}
            assert pool.counts.opened == 3
            assert len(server.commands(b"QUIT")) == 2
    assert [message.connection for message in server.received] == [0, 0, 0, 1, 1, 1, 2]


@pytest.mark.asyncio
async def test_a_session_that_took_its_last_message_does_not_become_idle() -> None:
    with ScriptedServer() as server:
        async with pool_of(server, max_messages=1) as pool:
            session = await pool.acquire()
            await session.send(HELLO)
            pool.release(session)
            assert pool.state() == EMPTY
            assert pool.counts.closed == {"messages": 1}
            await pool.closed()
            assert len(server.commands(b"QUIT")) == 1


@pytest.mark.asyncio
async def test_lifetimes_differ_and_are_at_most_max_age() -> None:
    now = asyncio.get_running_loop().time
    with ScriptedServer() as server:
        async with pool_of(server, max_age=1000) as pool:
            start = now()
            sessions = await all_sessions(pool)
            ends = [session.end_of_life for session in sessions]
            assert max(ends) - min(ends) > 1
            assert all(start + 900 <= end <= now() + 1000 for end in ends)
            release_all(pool, sessions)


@pytest.mark.parametrize("where", ["idle", "in use"])
@pytest.mark.asyncio
async def test_an_old_session_is_replaced(where: str) -> None:
    loop = asyncio.get_running_loop()
    with ScriptedServer() as server:
        async with pool_of(server, max_age=0.2) as pool:
            session = await pool.acquire()
            if where == "idle":
                pool.release(session)
                assert pool.state() == idle(1)
            await asyncio.sleep(session.end_of_life - loop.time())
            if where == "in use":
                pool.release(session)
            another = await pool.acquire()
            assert another is not session
            assert pool.counts.closed == {"age": 1}
            await pool.closed()
            assert len(server.commands(b"QUIT")) == 1
            await another.send(HELLO)
            pool.release(another)


@pytest.mark.asyncio
async def test_without_idle_timeout_only_a_waiter_gets_a_released_session() -> None:
    with ScriptedServer() as server:
        async with pool_of(server, idle_timeout=0.0, max_connections=1) as pool:
            session = await pool.acquire()
            (waiter,) = await waiters_for(pool, 1)
            pool.release(session)
            assert await waiter is session
            pool.release(session)
            assert pool.state() == EMPTY
            assert pool.counts.closed == {"idle": 1}
            await pool.closed()
            assert len(server.commands(b"QUIT")) == 1


def test_without_idle_timeout_connections_end_with_the_call(
    make_backend: MakeBackend,
) -> None:
    with ScriptedServer() as server:
        backend = make_backend(server, idle_timeout=0)
        for calls in (1, 2):
            assert backend.send_messages(emails(20)) == 20
            wait_until(lambda: server.open_connections == 0)
            assert server.connections == len(server.commands(b"QUIT"))
            assert server.connections <= calls * MAX_CONNECTIONS


# Asking first.


@pytest.mark.asyncio
async def test_a_session_that_was_idle_for_long_is_asked_before_use() -> None:
    with ScriptedServer() as server:
        async with pool_of(server, ping_after=0.0) as pool:
            session = await pool.acquire()
            assert not server.commands(b"NOOP")
            pool.release(session)
            assert await pool.acquire() is session
            assert len(server.commands(b"NOOP")) == 1
            await session.send(HELLO)
            pool.release(session)


@pytest.mark.asyncio
async def test_a_session_that_was_used_lately_is_not_asked() -> None:
    with ScriptedServer() as server:
        async with pool_of(server, ping_after=60.0) as pool:
            session = await pool.acquire()
            pool.release(session)
            assert await pool.acquire() is session
            pool.release(session)
    assert not server.commands(b"NOOP")


DEAD: list[Step | tuple[Step, ...]] = [
    b"421 4.4.2 idle for too long\r\n",
    b"250 ok\r\n421 4.4.2 idle for too long\r\n",
    b"what?\r\n",
    b"502 5.5.1 what is a NOOP?\r\n",
    CLOSE,
    RESET,
    SILENCE,
]


@pytest.mark.parametrize("answer", DEAD, ids=repr)
@pytest.mark.asyncio
async def test_a_session_that_does_not_answer_is_replaced(answer: Step) -> None:
    with ScriptedServer(scripts=({"noop": answer}, {})) as server:
        async with pool_of(server, ping_after=0.0, timeout=0.3) as pool:
            session = await pool.acquire()
            pool.release(session)
            another = await pool.acquire()
            assert another is not session
            assert pool.counts.closed == {"ended by server": 1}
            assert pool.state() == ONE_IN_USE
            await another.send(HELLO)
            pool.release(another)


@pytest.mark.parametrize("answer", DEAD, ids=repr)
def test_a_message_goes_out_once_where_the_idle_connection_does_not_answer(
    make_backend: MakeBackend, answer: Step
) -> None:
    with ScriptedServer(scripts=({"noop": answer}, {})) as server:
        backend = make_backend(server, ping_after=0, timeout=1, max_connections=1)
        assert backend.send_messages(emails(1)) == 1
        assert server.connections == 2
        assert [message.connection for message in server.received] == [1]
        assert not server.lines[server.lines.index(b"NOOP") + 1].startswith(b"MAIL")


@pytest.mark.asyncio
async def test_a_server_that_never_answers_noop_still_gets_the_messages() -> None:
    with ScriptedServer(scripts=({"noop": b"502 no\r\n"},)) as server:
        async with pool_of(server, ping_after=0.0, max_connections=1) as pool:
            for _ in range(3):
                session = await pool.acquire()
                await session.send(HELLO)
                pool.release(session)
    assert len(server.received) == server.connections == 3


# The rate.


@pytest.mark.parametrize(
    "options",
    [{}, {"max_messages": 1}, {"max_connections": 1}, {"max_connections": 20}],
    ids=repr,
)
def test_the_rate_limit_is_for_all_connections_together(
    make_backend: MakeBackend, options: dict[str, int]
) -> None:
    with ScriptedServer() as server:
        backend = make_backend(server, rate_limit=50, **options)
        start = time.monotonic()
        assert backend.send_messages(emails(10)) == 10
        assert backend.send_messages(emails(11)) == 11
        assert time.monotonic() - start >= 20 / 50
    assert server.connections <= options.get("max_connections", 21)


def test_the_rate_limit_is_for_all_threads_together(make_backend: MakeBackend) -> None:
    with ScriptedServer() as server:
        make_backend(server, rate_limit=50)
        start = time.monotonic()
        in_threads(10, lambda n: default_backend().send_messages(emails(2)))
        assert time.monotonic() - start >= 19 / 50
        assert len(server.received) == 20


@pytest.mark.asyncio
async def test_a_turn_later_than_the_timeout_is_refused() -> None:
    with ScriptedServer() as server:
        async with pool_of(server, rate_limit=2.5, timeout=0.3) as pool:
            await pool.turn()
            start = time.monotonic()
            with pytest.raises(PoolTimeout, match=r"rate_limit lets 2\.5 a second"):
                await pool.turn()
            assert time.monotonic() - start < 0.1


def test_a_message_whose_turn_is_too_late_fails_with_the_rate_limit(
    make_backend: MakeBackend,
) -> None:
    with ScriptedServer() as server:
        backend = make_backend(server, rate_limit=0.1, timeout=1)
        with pytest.raises(PoolTimeout, match="rate_limit") as caught:
            backend.send_messages(emails(3))
        assert caught.value.sent == 1
        assert len(server.received) == 1
        assert pool_states() == [idle(pool_states()[0]["idle"])]


# The limit, as the server sees it.


def in_threads(count: int, work: Callable[[int], object]) -> None:
    """Run the work in as many threads, all at once; raise what one raised."""
    failures: list[BaseException] = []

    def run(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def no_fault(stage: str) -> None:
    """Choose no fault, for a ``FaultyServer`` that works."""


def pool_states() -> list[dict[str, int]]:
    return [
        {name: stats[name] for name in EMPTY}
        for stats in pool_stats().values()
        if stats["in_use"] or stats["idle"] or stats["waiting"]
    ]


def check_each_arrived_once(server: FaultyServer, count: int) -> None:
    assert len(server.arrived) == count
    assert set(server.arrived.values()) == {1}


@pytest.mark.parametrize("connections", [1, 5])
def test_threads_share_the_connections(
    make_backend: MakeBackend, connections: int
) -> None:
    with FaultyServer(no_fault) as server:
        make_backend(server, max_connections=connections, timeout=30)
        messages = emails(200)

        def work(number: int) -> None:
            mine = messages[number * 4 : number * 4 + 4]
            assert default_backend().send_messages(mine[:1]) == 1
            assert default_backend().send_messages(mine[1:]) == 3

        in_threads(50, work)
        check_each_arrived_once(server, 200)
        assert server.most_open == connections


@pytest.mark.asyncio
async def test_a_thousand_coroutines_share_the_connections(
    make_backend: MakeBackend,
) -> None:
    with FaultyServer(no_fault) as server:
        backend = make_backend(server, timeout=30)
        sent = await asyncio.gather(
            *(backend.asend_messages([message]) for message in emails(1000))
        )
        assert sent == [1] * 1000
        check_each_arrived_once(server, 1000)
        assert server.most_open == MAX_CONNECTIONS


def test_connections_that_are_replaced_stay_within_the_limit(
    make_backend: MakeBackend,
) -> None:
    with FaultyServer(no_fault) as server:
        backend = make_backend(server, max_connections=3, max_messages=2)
        assert backend.send_messages(emails(60)) == 60
        check_each_arrived_once(server, 60)
        assert server.most_open == 3


# A server's own limit.


class LimitedServer(FaultyServer):
    """
    A server that works, for so many connections at a time.

    :ivar refused: how many it refused.
    """

    def __init__(self, limit: int, refusal: bytes, stage: str = "greeting") -> None:
        super().__init__(no_fault, reply_delay=0.001)
        self.refused = 0
        self._limit = limit
        self._refusal = refusal
        self._stage = stage

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if self._open < self._limit:
            await super()._serve(reader, writer)
            return
        self.refused += 1
        if self._stage == "ehlo":
            writer.write(b"220 limited ESMTP\r\n")
            await reader.readline()
        writer.write(self._refusal)
        if self._stage == "ehlo":
            # Once more for HELO.
            await reader.readline()
            writer.write(self._refusal)
        writer.close()


@pytest.mark.parametrize("stage", ["greeting", "ehlo"])
@pytest.mark.parametrize("code", [421, 432, 454])
def test_a_batch_goes_out_over_the_connections_that_the_server_allows(
    make_backend: MakeBackend, code: int, stage: str
) -> None:
    refusal = f"{code} 4.7.0 too many connections\r\n".encode()
    with LimitedServer(2, refusal, stage) as server:
        backend = make_backend(server, timeout=10)
        assert backend.send_messages(emails(60)) == 60
        assert server.most_open == 2
        assert 1 <= server.refused <= MAX_CONNECTIONS - 1
        # It remembers.
        refused = server.refused
        assert backend.send_messages(emails(60)) == 60
        assert server.refused == refused
        assert set(server.arrived.values()) == {2}


def test_threads_share_the_connections_that_the_server_allows(
    make_backend: MakeBackend,
) -> None:
    with LimitedServer(2, b"421 4.7.0 too many connections\r\n") as server:
        make_backend(server, timeout=10)
        messages = emails(60)
        in_threads(20, lambda n: default_backend().send_messages(messages[n::20]))
        check_each_arrived_once(server, 60)
        assert server.most_open == 2


def test_replacing_connections_does_not_lower_the_limit_that_the_server_allows(
    make_backend: MakeBackend,
) -> None:
    with LimitedServer(2, b"421 4.7.0 too many connections\r\n") as server:
        backend = make_backend(server, timeout=10, max_messages=3)
        assert backend.send_messages(emails(60)) == 60
        check_each_arrived_once(server, 60)
        assert server.refused <= MAX_CONNECTIONS - 1


@pytest.mark.asyncio
async def test_a_session_that_says_quit_counts_for_the_limit_of_the_server() -> None:
    refusal: Script = {"greeting": (b"421 4.7.0 too many\r\n", CLOSE)}
    with ScriptedServer(scripts=({"quit": SILENCE}, refusal, {})) as server:
        async with pool_of(server, max_messages=1) as pool:
            session = await pool.acquire()
            await session.send(HELLO)
            pool.release(session)
            await eventually(lambda: server.commands(b"QUIT"))
            session = await pool.acquire()
            await session.send(HELLO)
            pool.release(session)
    assert [message.connection for message in server.received] == [0, 2]


@pytest.mark.asyncio
async def test_a_refused_connection_leads_to_the_session_that_came_free() -> None:
    with ScriptedServer(scripts=({}, {"greeting": SILENCE})) as server:
        async with pool_of(server, timeout=5) as pool:
            session = await pool.acquire()
            acquiring = asyncio.create_task(pool.acquire())
            await eventually(lambda: server.connections == 2)
            pool.release(session)
            assert pool.state() == {"in_use": 1, "idle": 1, "waiting": 0}
            server._open[1].sendall(b"421 4.7.0 too many connections\r\n")
            async with asyncio.timeout(2):
                assert await acquiring is session
            pool.release(session)


@pytest.mark.asyncio
async def test_who_was_refused_a_connection_keeps_the_turn() -> None:
    refusal: Script = {"greeting": b"421 4.7.0 too many connections\r\n"}
    with ScriptedServer(scripts=({}, {}, refusal)) as server:
        async with pool_of(server, max_connections=2) as pool:
            broken, session = await pool.acquire(), await pool.acquire()
            first, second = await waiters_for(pool, 2)
            broken.abort()
            pool.release(broken)
            await eventually(
                lambda: server.connections == 3 and pool.state()["waiting"] == 2
            )
            pool.release(session)
            assert await first is session
            assert not second.done()
            pool.release(session)
            assert await second is session
            pool.release(session)


@pytest.mark.asyncio
async def test_connections_that_succeed_after_a_refusal_raise_the_limit() -> None:
    with LimitedServer(2, b"421 4.7.0 too many connections\r\n") as server:
        pool = Pool(Options(host=server.host, port=server.port), Counts())
        waiters = [asyncio.create_task(pool.acquire()) for _ in range(4)]
        sessions, waiting = await asyncio.wait(waiters, timeout=0.5)
        assert len(sessions) == 2
        assert server.refused == 2
        for waiter in waiting:
            waiter.cancel()
        await asyncio.wait(waiting)
        for session in sessions:
            session.result().abort()
            pool.release(session.result())
        await eventually(lambda: server._open == 0)
        async with asyncio.timeout(5):
            release_all(pool, [await pool.acquire(), await pool.acquire()])
        assert server.refused == 2
        pool.stop_keeping()
        await pool.closed()


@pytest.mark.asyncio
async def test_a_refusal_while_nothing_is_open_is_an_error() -> None:
    with ScriptedServer(scripts=({"greeting": b"421 4.7.0 no\r\n"},)) as server:
        async with pool_of(server) as pool:
            with pytest.raises(errors.GreetingRefused):
                await pool.acquire()
            assert pool.counts.errors == 1
            results = await asyncio.gather(
                *(pool.acquire() for _ in range(20)), return_exceptions=True
            )
            assert {type(result) for result in results} == {errors.GreetingRefused}
            assert pool.state() == EMPTY


# Cancelled at every await.


@pytest.mark.asyncio
async def test_nothing_is_left_wherever_sending_is_cancelled() -> None:
    to_two = Envelope("from@example.com", ("to@x.com", "no@x.com"), HELLO.content)
    options = {"ping_after": 0.0, "max_messages": 2, "rate_limit": 2000.0}
    with ScriptedServer(scripts=({"no@x.com": b"550 no\r\n"},)) as server:
        async with pool_of(server, max_connections=2, **options) as pool:

            async def send(envelope: Envelope, count: int) -> None:
                courier = Courier(Route(servers=(pool.options,)), [pool])
                for _ in range(count):
                    delivery = await courier.deliver(envelope)
                    assert delivery.state == "sent"
                    assert len(delivery.refused) == len(envelope.recipients) - 1

            for steps in itertools.count():
                sending = asyncio.create_task(send(HELLO, 3))
                for _ in range(steps):
                    await asyncio.sleep(0)
                is_done = sending.done()
                sending.cancel()
                with suppress(asyncio.CancelledError):
                    await sending
                assert pool.state() == idle(pool.state()["idle"])
                # The right answers: none is left over from before.
                await send(to_two, 1)
                if is_done:
                    break
            assert steps > 30


@pytest.mark.parametrize(
    "stage",
    ["greeting", "ehlo", "noop", "mail", "rcpt", "data", "body", "rset", "quit"],
)
@pytest.mark.asyncio
async def test_a_call_cancelled_at_any_stage_leaves_nothing(
    make_backend: MakeBackend, stage: str
) -> None:
    before = open_sockets()
    first: Script = {stage: SILENCE}
    if stage == "rset":
        first["mail"] = b"550 no\r\n"
    if stage == "quit":
        # The second message waits until the first one's connection is closed.
        first["quit"] = SILENCE
    verb = {"greeting": b"", "body": b"DATA"}.get(stage, stage.upper().encode())
    with ScriptedServer(scripts=(first, {})) as server:
        options = {"max_connections": 1, "max_messages": 1, "idle_timeout": 20}
        backend = make_backend(server, ping_after=0, **options)
        sending = asyncio.create_task(backend.asend_messages(emails(2)))
        await eventually(
            lambda: server.commands(verb) if verb else server.connections == 1
        )
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        await eventually(lambda: not pool_states())
        await eventually(lambda: server.open_connections == 0)
        assert await backend.asend_messages(emails(1)) == 1
        assert server.received[-1].connection == 1
        await eventually(lambda: server.open_connections == 0)
    await eventually(lambda: open_sockets() <= before)


@pytest.mark.asyncio
async def test_who_waits_for_a_turn_or_a_session_can_be_cancelled() -> None:
    with ScriptedServer() as server:
        async with pool_of(server, rate_limit=1.0, max_connections=1) as pool:
            session = await pool.acquire()
            await pool.turn()
            waiting = [
                asyncio.create_task(pool.turn()),
                asyncio.create_task(pool.acquire()),
                asyncio.create_task(pool.acquire(fresh=True)),
            ]
            await asyncio.sleep(0)
            assert pool.state() == {"in_use": 1, "idle": 0, "waiting": 2}
            for task in waiting:
                task.cancel()
            await asyncio.wait(waiting)
            assert pool.state() == ONE_IN_USE
            pool.release(session)


@pytest.mark.asyncio
async def test_closing_goes_on_where_the_wait_for_it_is_cancelled() -> None:
    with ScriptedServer(scripts=({"quit": (READ,)},)) as server:
        async with pool_of(server) as pool:
            release_all(pool, await all_sessions(pool))
            pool.close_idle()
            closing = asyncio.create_task(pool.closed())
            await eventually(lambda: len(server.commands(b"QUIT")) == MAX_CONNECTIONS)
            closing.cancel()
            await asyncio.wait([closing])
            assert f"{MAX_CONNECTIONS} closing" in repr(pool)
            server.close_all()
            await pool.closed()
            assert pool.is_unused
