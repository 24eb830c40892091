from __future__ import annotations

import asyncio
import contextvars
import gc
import random
import ssl
import time
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from django_async_smtp import errors, pool
from django_async_smtp.envelope import Envelope
from django_async_smtp.errors import PoolTimeout, SMTPError
from django_async_smtp.pool import MAX_CONNECTIONS, Pool
from django_async_smtp.session import QUIT_TIMEOUT, Session

from .conftest import options_for
from .servers import (
    CLOSE,
    DEFAULT,
    RESET,
    SILENCE,
    Script,
    ScriptedServer,
    Step,
    free_port,
    open_sockets,
    wait_until,
)

HELLO = Envelope("from@example.com", ("to@example.com",), b"Subject: Hi\r\n\r\nHi\r\n")


async def eventually(is_true: Callable[[], object]) -> None:
    """Do as ``wait_until``, while the loop goes on."""
    await asyncio.to_thread(wait_until, is_true)


class WatchedPool(Pool):
    """A pool that counts how often it was empty."""

    def __init__(self, server: ScriptedServer, **options: Any) -> None:
        self.times_empty = 0
        super().__init__(options_for(server, **options), self._count)

    def _count(self) -> None:
        self.times_empty += 1

    @property
    def state(self) -> str:
        return repr(self).partition(": ")[2].rstrip(">")


IDLE = "0 in use, {} idle, 0 connecting, 0 waiting"
EMPTY = IDLE.format(0)


@asynccontextmanager
async def pool_of(server: ScriptedServer, **options: Any) -> AsyncIterator[WatchedPool]:
    """Yield a pool, and check that at its end nothing is left."""
    before = open_sockets()
    watched = WatchedPool(server, **options)
    yield watched
    watched.stop_keeping()
    await watched.closed()
    assert watched.state == EMPTY
    await eventually(lambda: server.open_connections == 0)
    await eventually(lambda: open_sockets() <= before)


async def all_sessions(pool: Pool) -> list[Session]:
    """Take as many sessions as the pool gives."""
    return [await pool.acquire() for _ in range(MAX_CONNECTIONS)]


async def waiters_for(watched: WatchedPool, count: int) -> list[asyncio.Task[Session]]:
    """Let tasks wait for a session."""
    tasks = [asyncio.create_task(watched.acquire()) for _ in range(count)]
    await asyncio.sleep(0)
    assert f" {count} waiting" in watched.state
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
            assert pool.state == IDLE.format(MAX_CONNECTIONS)
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
            assert not first.was_idle
            release_all(pool, [first, second])
            assert pool.has_session
            assert await pool.acquire() is second
            assert second.was_idle
            assert await pool.acquire() is first
            release_all(pool, [first, second])
    assert server.connections == 2


@pytest.mark.asyncio
async def test_a_fresh_session_is_a_new_connection() -> None:
    with ScriptedServer() as server:
        async with pool_of(server) as pool:
            release_all(pool, [await pool.acquire(), await pool.acquire()])
            session = await pool.acquire(fresh=True)
            assert not session.was_idle
            assert pool.state == "1 in use, 0 idle, 0 connecting, 0 waiting"
            await pool.closed()
            assert len(server.commands(b"QUIT")) == 2
            assert pool.times_empty == 0
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
            assert pool.state == IDLE.format(MAX_CONNECTIONS)


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
            assert pool.state == IDLE.format(MAX_CONNECTIONS)


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
            assert pool.state == IDLE.format(MAX_CONNECTIONS - (not is_clean))


# Cancelled, or failed, on the way.


@pytest.mark.asyncio
async def test_nothing_is_left_where_connecting_was_cancelled() -> None:
    with ScriptedServer(scripts=({"greeting": SILENCE}, {})) as server:
        async with pool_of(server) as pool:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(pool.acquire(), 0.1)
            assert pool.state == EMPTY
            assert pool.times_empty == 1
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
                assert pool.state == EMPTY


@pytest.mark.asyncio
async def test_a_session_that_is_ready_too_late_is_closed() -> None:
    with ScriptedServer() as server:
        async with pool_of(server) as pool:
            acquiring = asyncio.create_task(pool.acquire())
            await asyncio.sleep(0)
            (opening,) = asyncio.all_tasks() - {asyncio.current_task(), acquiring}
            while not opening.done():  # noqa: ASYNC110
                await asyncio.sleep(0)
            assert not acquiring.done()
            acquiring.cancel()
            with pytest.raises(asyncio.CancelledError):
                await acquiring
            assert pool.state == EMPTY
            assert pool.times_empty == 1


@pytest.mark.asyncio
async def test_nothing_is_left_where_connecting_failed() -> None:
    with ScriptedServer() as server:
        async with pool_of(server, port=free_port()) as pool:
            with pytest.raises(errors.ConnectionRefused):
                await pool.acquire()
            assert pool.state == EMPTY
            assert pool.times_empty == 1
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
            assert " 0 in use" in repr(pool)
            assert " 0 connecting, 0 waiting" in repr(pool)
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
            await eventually(lambda: pool.state == EMPTY)
            assert not pool.has_session
            assert pool.times_empty == 1
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
            await eventually(lambda: pool.state == IDLE.format(1))
            assert pool.times_empty == 0
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
            assert pool.state == EMPTY
            assert pool.times_empty == 1


@pytest.mark.asyncio
async def test_an_idle_session_that_is_closing_is_not_used() -> None:
    with ScriptedServer() as server:
        async with pool_of(server) as pool:
            session = await pool.acquire()
            pool.release(session)
            # The pool is told in the loop's next turn.
            session.abort()
            another = await pool.acquire()
            assert another is not session
            assert another.is_clean
            pool.release(another)


@pytest.mark.asyncio
async def test_an_idle_session_says_quit_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pool, "IDLE_TIMEOUT", 0.1)
    with ScriptedServer() as server:
        async with pool_of(server) as watched:
            first, second = await watched.acquire(), await watched.acquire()
            release_all(watched, [first, second])
            assert await watched.acquire() is second
            await eventually(lambda: server.commands(b"QUIT"))
            assert not first.is_clean
            # The second was idle as long ago, but is in use.
            assert second.is_clean
            assert watched.state == "1 in use, 0 idle, 0 connecting, 0 waiting"
            watched.release(second)
            await eventually(lambda: watched.times_empty == 1)
            await watched.closed()
            assert len(server.commands(b"QUIT")) == 2


@pytest.mark.asyncio
async def test_an_idle_session_that_was_used_gets_its_whole_time_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with ScriptedServer() as server:
        async with pool_of(server) as watched:
            first, second = await watched.acquire(), await watched.acquire()
            monkeypatch.setattr(pool, "IDLE_TIMEOUT", 0.05)
            watched.release(first)
            assert await watched.acquire() is first
            watched.release(second)
            monkeypatch.setattr(pool, "IDLE_TIMEOUT", 30)
            watched.release(first)
            await eventually(lambda: server.commands(b"QUIT"))
            assert watched.state == IDLE.format(1)
            assert await watched.acquire() is first
            watched.release(first)


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
            assert pool.state == EMPTY
            assert pool.times_empty == 1
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
            idle = sessions.pop()
            pool.release(idle)
            pool.stop_keeping()
            await pool.closed()
            assert len(server.commands(b"QUIT")) == 1
            assert pool.times_empty == 0
            await sessions[0].send(HELLO)
            release_all(pool, sessions)
            assert pool.state == EMPTY
            assert pool.times_empty == 1
            await pool.closed()
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
            assert pool.times_empty == 1


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
