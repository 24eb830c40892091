from __future__ import annotations

import asyncio
import contextvars
import email
import gc
import linecache
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from asgiref.sync import SyncToAsync, async_to_sync, sync_to_async
from django.contrib.contenttypes.models import ContentType
from django.core.mail import EmailMessage, send_mail
from django.http import HttpRequest, HttpResponse
from django.test import AsyncClient, Client
from django.urls import path
from django.utils import translation
from django.utils.functional import lazy
from django.utils.translation import gettext_lazy

from django_async_smtp import asend_mail, callers
from django_async_smtp.envelope import prepare
from django_async_smtp.loop import smtp_loop

from .conftest import OURS, MakeBackend, configure
from .servers import SILENCE, Received, ScriptedServer, wait_until
from .settings import USES_MAILERS

ADDRESSES = ("Body", "from@example.com", ["to@example.com"])

request_id: contextvars.ContextVar[Any] = contextvars.ContextVar("request_id")


def send(subject: str = "Hello") -> int:
    return send_mail(subject, *ADDRESSES)


async def asend(subject: str = "Hello") -> int:
    return await asend_mail(subject, *ADDRESSES)


def lazily(function: Callable[[], object]) -> str:
    """Return a subject that calls the function when the message is built."""
    subject: str = lazy(lambda: str(function()), str)()
    return subject


def raising(error: BaseException) -> str:
    """Return a subject that cannot be had."""

    def fail() -> NoReturn:
        raise error

    return lazily(fail)


def subjects(received: list[Received]) -> list[str]:
    return sorted(
        str(email.message_from_bytes(message.content)["Subject"])
        for message in received
    )


async def current_thread(*_: object) -> threading.Thread:
    return threading.current_thread()


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    """A server that, unlike aiosmtpd, does not touch the filters of warnings."""
    with ScriptedServer() as running:
        yield running


# One thread and one loop.


def test_all_callers_share_one_thread() -> None:
    def from_coroutine(_: int) -> threading.Thread:
        return asyncio.run(smtp_loop().acall(current_thread))

    def from_thread(_: int) -> threading.Thread:
        return smtp_loop().call(current_thread)

    with ThreadPoolExecutor(8) as executor:
        threads = set(executor.map(from_coroutine, range(8)))
        threads |= set(executor.map(from_thread, range(8)))
    assert threads == {from_thread(0)}
    named = [t for t in threading.enumerate() if t.name == "django-async-smtp"]
    assert threads == set(named)


def test_threads_that_come_first_at_once_start_one_loop() -> None:
    run(f"""
{preamble()}
from concurrent.futures import ThreadPoolExecutor
from django_async_smtp.loop import smtp_loop

barrier = threading.Barrier(8)

def start(_):
    barrier.wait()
    return smtp_loop()

with ThreadPoolExecutor(8) as executor:
    assert len(set(executor.map(start, range(8)))) == 1
""")


def test_importing_starts_no_thread() -> None:
    run(f"""
{preamble()}
import django_async_smtp
django_async_smtp.Backend(host="localhost")
assert threading.enumerate() == [threading.main_thread()]
""")


def test_sending_nothing_starts_no_smtp_thread() -> None:
    run(f"""
{preamble()}
from django_async_smtp import Backend

backend = Backend(host="localhost")
assert backend.send_messages([]) == asyncio.run(backend.asend_messages([])) == 0
assert "django-async-smtp" not in [thread.name for thread in threading.enumerate()]
""")


def test_a_process_that_runs_no_threads_is_told_so() -> None:
    run(f"""
{preamble(SimpleNamespace(host="localhost", port=25))}
from django_async_smtp import loop

# As in uWSGI without enable-threads.
threading.Thread.start = lambda thread: None
loop.START_TIMEOUT = 0.1
try:
    send()
except RuntimeError as error:
    assert "enable-threads" in str(error)
else:
    raise AssertionError
""")


def test_the_sync_api_on_the_smtp_thread_is_an_error_and_no_deadlock(
    server: ScriptedServer, make_backend: MakeBackend
) -> None:
    backend = make_backend(server)

    async def send_synchronously(_: object) -> int:
        return backend.send_messages([EmailMessage("Hello", *ADDRESSES)])

    with pytest.raises(RuntimeError, match="from the SMTP thread"):
        smtp_loop().call(send_synchronously)
    assert not server.received


def test_the_async_api_works_on_the_smtp_thread(
    server: ScriptedServer, make_backend: MakeBackend
) -> None:
    make_backend(server)
    assert asyncio.run_coroutine_threadsafe(asend(), smtp_loop().loop).result(10) == 1


# asgiref.


def test_work_runs_on_the_smtp_loop(
    server: ScriptedServer, make_backend: MakeBackend
) -> None:
    make_backend(server)
    assert smtp_loop().call(current_thread) is smtp_loop().thread
    assert send() == 1
    assert len(server.received) == 1


def hints() -> dict[str, object]:
    names = ("main_event_loop", "main_event_loop_pid", "task_context")
    return {name: getattr(SyncToAsync.threadlocal, name, None) for name in names}


@pytest.mark.parametrize("subject", ["Hello", raising(RuntimeError())])
def test_asgirefs_values_are_as_before_after_a_call(
    server: ScriptedServer, make_backend: MakeBackend, subject: str
) -> None:
    make_backend(server)

    def before_and_after() -> tuple[dict[str, object], dict[str, object]]:
        before = hints()
        with suppress(RuntimeError):
            send(subject)
        return before, hints()

    with ThreadPoolExecutor(1) as executor:
        before, after = executor.submit(before_and_after).result()
    assert before == after
    assert set(before.values()) == {None}

    before, after = asyncio.run(sync_to_async(before_and_after)())
    assert before == after
    assert None not in before.values()


def test_async_to_sync_in_user_code_stays_off_the_smtp_loop(
    server: ScriptedServer, make_backend: MakeBackend
) -> None:
    make_backend(server)
    threads: list[threading.Thread] = []

    def use_asgiref() -> None:
        threads.append(async_to_sync(current_thread)())

    send(lazily(use_asgiref))
    assert threads
    assert smtp_loop().thread not in threads

    async def in_view() -> None:
        await sync_to_async(send)(lazily(use_asgiref))

    asyncio.run(in_view())
    assert smtp_loop().thread not in threads


def test_async_to_sync_in_user_code_runs_on_the_loop_of_the_view(
    server: ScriptedServer, make_backend: MakeBackend
) -> None:
    make_backend(server)
    threads: list[threading.Thread] = []

    def use_asgiref() -> None:
        threads.append(async_to_sync(current_thread)())

    async def in_views() -> None:
        await sync_to_async(send)(lazily(use_asgiref))
        await asend(lazily(use_asgiref))

    asyncio.run(in_views())
    assert set(threads) == {threading.current_thread()}


# User code runs in the thread and the context of the caller.


class Watched(EmailMessage):
    """Knows the thread that built it."""

    built_in: threading.Thread

    def message(self, *args: Any, **kwargs: Any) -> Any:
        self.built_in = threading.current_thread()
        return super().message(*args, **kwargs)


def test_a_message_is_built_in_the_thread_of_a_sync_caller(
    server: ScriptedServer, make_backend: MakeBackend
) -> None:
    make_backend(server)
    threads: list[threading.Thread] = []
    subject = lazily(lambda: threads.append(threading.current_thread()))
    message = Watched(subject, *ADDRESSES)
    assert message.send() == 1
    assert {message.built_in, *threads} == {threading.current_thread()}


@pytest.mark.asyncio
async def test_a_message_is_built_in_the_thread_that_asgiref_gives_a_coroutine(
    server: ScriptedServer, make_backend: MakeBackend
) -> None:
    backend = make_backend(server)
    message = Watched("Hello", *ADDRESSES)
    assert await backend.asend_messages([message]) == 1
    assert message.built_in is await sync_to_async(threading.current_thread)()


@pytest.mark.django_db
def test_a_query_in_a_message_sees_the_open_transaction(
    server: ScriptedServer, make_backend: MakeBackend
) -> None:
    make_backend(server)
    ContentType.objects.create(app_label="shop", model="uncommitted")
    assert send(lazily(lambda: ContentType.objects.get(app_label="shop").model)) == 1
    assert subjects(server.received) == ["uncommitted"]


def test_context_variables_of_a_sync_caller_reach_its_message(
    server: ScriptedServer, make_backend: MakeBackend
) -> None:
    make_backend(server)
    request_id.set("a")
    assert send(lazily(request_id.get)) == 1
    assert subjects(server.received) == ["a"]


def test_a_context_variable_set_in_a_message_reaches_the_sync_caller(
    server: ScriptedServer, make_backend: MakeBackend
) -> None:
    make_backend(server)
    request_id.set("a")
    send(lazily(lambda: request_id.set("b")))
    assert request_id.get() == "b"


@pytest.mark.asyncio
async def test_context_variables_of_each_coroutine_reach_its_message(
    server: ScriptedServer, make_backend: MakeBackend
) -> None:
    make_backend(server)

    async def send_from_request(name: str) -> None:
        request_id.set(name)
        await asend(lazily(request_id.get))

    await asyncio.gather(send_from_request("a"), send_from_request("b"))
    assert subjects(server.received) == ["a", "b"]


@pytest.mark.parametrize("is_warm", [False, True])
def test_what_an_iterator_sets_holds_for_all_messages_of_a_coroutine(
    server: ScriptedServer, make_backend: MakeBackend, is_warm: bool
) -> None:
    def messages() -> Iterator[EmailMessage]:
        with translation.override("de"):
            for n in range(30):
                if n == 20:
                    request_id.set("a")
                yield EmailMessage(gettext_lazy("Monday"), *ADDRESSES)
        assert request_id.get() == "a"

    backend = make_backend(server)
    if is_warm:
        backend.open()
    assert asyncio.run(backend.asend_messages(messages())) == 30
    assert set(subjects(server.received)) == {"Montag"}


class Request:
    """Something that a context variable holds."""


def send_from_request() -> weakref.ref[Request]:
    request = Request()
    request_id.set(request)
    send()
    return weakref.ref(request)


async def asend_from_request() -> weakref.ref[Request]:
    request = Request()
    request_id.set(request)
    await asend()
    return weakref.ref(request)


def is_gone(request: weakref.ref[Request]) -> bool:
    gc.collect()
    return request() is None


@pytest.mark.parametrize(
    "send_from_request",
    [
        lambda: contextvars.copy_context().run(send_from_request),
        lambda: asyncio.run(asend_from_request()),
    ],
    ids=["sync", "coroutine"],
)
def test_a_pooled_connection_keeps_no_request_alive(
    server: ScriptedServer,
    make_backend: MakeBackend,
    send_from_request: Callable[[], weakref.ref[Request]],
) -> None:
    make_backend(server)
    request = send_from_request()
    wait_until(lambda: is_gone(request))
    (pool,) = smtp_loop().pools.values()
    assert pool.has_session


def test_the_smtp_thread_does_not_keep_the_request_alive_that_started_it(
    server: ScriptedServer,
) -> None:
    run(f"""
{preamble(server)}
import contextvars, gc, weakref

class Request: pass

def send_from_request():
    request = Request()
    contextvars.ContextVar("request").set(request)
    send()
    return weakref.ref(request)

request = contextvars.copy_context().run(send_from_request)
end = time.monotonic() + 10
while request() is not None:
    assert time.monotonic() < end, gc.get_referrers(request())
    gc.collect()
""")


@pytest.mark.parametrize("error", [RuntimeError("no subject"), StopIteration("none")])
def test_an_exception_of_user_code_comes_out_as_it_is(
    server: ScriptedServer, make_backend: MakeBackend, error: Exception
) -> None:
    make_backend(server)
    with pytest.raises(type(error)) as caught:
        send(raising(error))
    assert caught.value is error


def test_a_stop_iteration_outside_of_the_build_comes_out_as_it_is(
    server: ScriptedServer, make_backend: MakeBackend
) -> None:
    backend = make_backend(server)
    error = StopIteration("none")

    class WithoutRecipients(EmailMessage):
        def recipients(self) -> list[str]:
            raise error

    with pytest.raises(StopIteration) as caught:
        backend.send_messages([WithoutRecipients("Hello", *ADDRESSES)])
    assert caught.value is error


@pytest.mark.asyncio
async def test_an_exception_of_user_code_comes_out_of_a_coroutine(
    server: ScriptedServer, make_backend: MakeBackend
) -> None:
    make_backend(server)
    error = RuntimeError("no subject")
    with pytest.raises(RuntimeError) as caught:
        await asend(raising(error))
    assert caught.value is error


@pytest.mark.asyncio
async def test_a_stop_iteration_of_user_code_does_not_hang_a_coroutine(
    server: ScriptedServer, make_backend: MakeBackend
) -> None:
    make_backend(server)
    async with asyncio.timeout(2):
        # No coroutine can raise a StopIteration.
        with pytest.raises(RuntimeError, match="StopIteration"):
            await asend(raising(StopIteration("none")))


@pytest.mark.parametrize("error", [KeyboardInterrupt("^C"), SystemExit(3)])
def test_what_ends_a_program_ends_the_caller_and_not_the_smtp_loop(
    server: ScriptedServer, make_backend: MakeBackend, error: BaseException
) -> None:
    make_backend(server)
    thread = smtp_loop().thread
    with pytest.raises(type(error)) as caught:
        send(raising(error))
    assert caught.value is error
    with pytest.raises(type(error)) as caught:
        asyncio.run(asend(raising(error)))
    assert caught.value is error
    assert send() == 1
    assert smtp_loop().thread is thread


def test_a_message_may_send_mail_when_it_is_built(
    server: ScriptedServer, make_backend: MakeBackend
) -> None:
    class Sending(EmailMessage):
        def message(self, *args: Any, **kwargs: Any) -> Any:
            assert send("inner") == 1
            return super().message(*args, **kwargs)

    make_backend(server)
    assert Sending("outer", *ADDRESSES).send() == 1
    assert subjects(server.received) == ["inner", "outer"]


# Processes: they fork, end, and are interrupted.


PYTHON = [sys.executable, "-X", "dev", "-W", "error"]
# That of Django 6.1 for EMAIL_*, and that of Python 3.12 for a fork beside threads.
PYTHON += [
    "-W",
    "ignore::PendingDeprecationWarning",
    "-W",
    "ignore::DeprecationWarning",
]


def preamble(server: Any = None, **options: Any) -> str:
    """Return the beginning of a script that has a project's mail settings."""
    project = SimpleNamespace(**{"MAILERS": {}} if USES_MAILERS else {})
    if server is not None:
        options |= {"host": server.host, "port": server.port}
    configure(project, OURS, **options)
    return f"""
import asyncio, logging, os, signal, sys, threading, time, warnings
from contextlib import closing, nullcontext
from django.conf import settings
settings.configure(**{vars(project)!r})
from django.core.mail import send_mail
from django_async_smtp import asend_mail

# In dev mode it warns of everything that takes 0.1 s.
logging.getLogger("asyncio").setLevel(logging.ERROR)

def send(subject="Hello"):
    assert send_mail(subject, *{ADDRESSES!r}) == 1

async def asend(subject="Hello"):
    assert await asend_mail(subject, *{ADDRESSES!r}) == 1
"""


def run(script: str) -> None:
    """Run a script to its end, in which it must not have a word to say."""
    done = subprocess.run(
        [*PYTHON, "-c", script], capture_output=True, text=True, timeout=20, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@contextmanager
def running(script: str) -> Iterator[subprocess.Popen[str]]:
    """Run a script that waits for the end of its input; it must end well."""
    with subprocess.Popen(
        [*PYTHON, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
            _, stderr = process.communicate(timeout=20)
            assert (process.returncode, stderr) == (0, "")
        finally:
            process.kill()


@pytest.mark.parametrize("use_tls", [False, True], ids=["plaintext", "tls"])
def test_a_forked_child_sends_and_leaves_the_parents_connection_alone(
    server_tls: Any, cafile: Path, use_tls: bool
) -> None:
    options = {"use_tls": True, "ssl_cafile": str(cafile)} if use_tls else {}
    with ScriptedServer(tls=server_tls if use_tls else None) as server:
        run(f"""
{preamble(server, **options)}
import gc
send("parent")
if not (child := os.fork()):
    send("child")
    gc.collect()
    sys.exit()
assert os.waitpid(child, 0) == (child, 0)
send("parent again")
if not (child := os.fork()):
    sys.exit()
assert os.waitpid(child, 0) == (child, 0)
send("parent at last")
""")
        assert [message.connection for message in server.received] == [0, 1, 0, 0]
        assert len(server.commands(b"QUIT")) == server.connections == 2


def test_a_child_forked_while_another_thread_starts_the_loop_sends(
    server: ScriptedServer,
) -> None:
    run(f"""
{preamble(server)}
from django_async_smtp import loop
with loop._starting:
    if not (child := os.fork()):
        send()
        sys.exit()
assert os.waitpid(child, 0) == (child, 0)
""")
    assert len(server.received) == 1


@pytest.mark.parametrize("call", ["send()", "asyncio.run(asend())"])
def test_a_process_that_ends_says_quit_and_nothing_else(call: str) -> None:
    with ScriptedServer() as server:
        start = time.monotonic()
        run(f"{preamble(server)}\n{call}")
        assert time.monotonic() - start < 5
        wait_until(lambda: not server.open_connections)
        assert server.commands(b"QUIT")


def test_a_server_silent_at_quit_does_not_hold_up_the_end_of_the_process() -> None:
    with ScriptedServer(({"quit": SILENCE},)) as server:
        script = f"{preamble(server)}\nsend()\nprint('sent', flush=True)"
        with running(script) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "sent\n"
            start = time.monotonic()
            process.wait(20)
            assert time.monotonic() - start < 3
        assert server.commands(b"QUIT")


STARTS_NO_THREAD_AT_EXIT = (3, 12) <= sys.version_info < (3, 12, 2)


@pytest.mark.parametrize(
    "is_warm",
    [
        True,
        pytest.param(
            False,
            marks=pytest.mark.skipif(
                STARTS_NO_THREAD_AT_EXIT, reason="Python 3.12.2 starts threads at exit"
            ),
        ),
    ],
)
def test_an_exit_handler_can_send(server: ScriptedServer, is_warm: bool) -> None:
    run(f"""
import atexit
atexit.register(lambda: send())  # Called after the handlers that the import registers.
{preamble(server)}
atexit.register(send)
if {is_warm}:
    send()
""")
    assert len(server.received) == 2 + is_warm


# How a server's silence at a stage begins.
SEEN: dict[str, Callable[[ScriptedServer], object]] = {
    "greeting": lambda server: server.connections,
    "mail": lambda server: server.commands(b"MAIL"),
    "body": lambda server: server.received,
}

SYNC = "send()"
IN_A_COROUTINE = """
warnings.simplefilter("ignore", RuntimeWarning)
async def view(): send()
# asyncio.run() would turn the first SIGINT into a cancellation of the task.
with closing(asyncio.new_event_loop()) as callers_loop:
    callers_loop.run_until_complete(view())
"""


@pytest.mark.parametrize(
    ("call", "stage"),
    [
        (SYNC, "greeting"),
        (SYNC, "mail"),
        (SYNC, "body"),
        (IN_A_COROUTINE, "body"),
    ],
    ids=["greeting", "mail", "body", "in a coroutine"],
)
def test_a_keyboard_interrupt_ends_the_wait_and_the_connection(
    call: str, stage: str
) -> None:
    indented = "\n    ".join(call.splitlines())
    program = f"""
{preamble(server := ScriptedServer(({stage: SILENCE},)))}
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    {indented}
except KeyboardInterrupt:
    print("interrupted", flush=True)
sys.stdin.read()
"""
    with server, running(program) as process:
        wait_until(lambda: SEEN[stage](server) or process.poll() is not None)
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert process.stdout.readline() == "interrupted\n"
        assert time.monotonic() - start < 0.5
        wait_until(lambda: not server.open_connections)
        assert process.poll() is None


def test_an_interrupt_before_the_work_has_started_cancels_it(
    server: ScriptedServer, make_backend: MakeBackend
) -> None:
    make_backend(server)
    smtp, caller = smtp_loop(), threading.get_ident()
    proceed = threading.Event()

    def is_waiting() -> bool:
        stack = traceback.walk_stack(sys._current_frames()[caller])
        codes = [frame.f_code for frame, _ in stack]
        return codes[0] is callers.ThreadCaller.result.__code__

    def interrupt_when_waiting() -> None:
        wait_until(is_waiting)
        signal.pthread_kill(caller, signal.SIGINT)

    interrupting = threading.Thread(target=interrupt_when_waiting)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    smtp.loop.call_soon_threadsafe(proceed.wait, 10)
    interrupting.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            send()
    finally:
        proceed.set()
        interrupting.join()
        signal.signal(signal.SIGINT, handler)
    smtp.call(current_thread)
    assert not smtp.pools


# Coroutines.


@pytest.mark.parametrize("stage", SEEN)
@pytest.mark.asyncio
async def test_a_cancelled_coroutine_cancels_its_send(
    make_backend: MakeBackend, stage: str
) -> None:
    with ScriptedServer(({stage: SILENCE}, {})) as server:
        make_backend(server)
        sending = asyncio.create_task(asend())
        await eventually(lambda: SEEN[stage](server))
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        await eventually(lambda: not server.open_connections)
        assert await asend() == 1
        assert server.connections == 2


@pytest.mark.parametrize("stage", SEEN)
@pytest.mark.asyncio
async def test_a_timeout_around_a_send_cancels_it(
    make_backend: MakeBackend, stage: str
) -> None:
    with ScriptedServer(({stage: SILENCE}, {})) as server:
        make_backend(server)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await asend()
        await eventually(lambda: not server.open_connections)
        assert await asend() == 1


@pytest.mark.asyncio
async def test_a_send_that_is_cancelled_during_the_build_sends_nothing(
    server: ScriptedServer, make_backend: MakeBackend
) -> None:
    make_backend(server)
    building, proceed = threading.Event(), threading.Event()

    def build() -> bool:
        building.set()
        return proceed.wait(10)

    sending = asyncio.create_task(asend(lazily(build)))
    await asyncio.to_thread(building.wait, 10)
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    proceed.set()
    assert await asend("another") == 1
    assert subjects(server.received) == ["another"]


@pytest.mark.asyncio
async def test_a_coroutine_is_told_where_only_its_function_is_cancelled(
    server: ScriptedServer, make_backend: MakeBackend
) -> None:
    """As by a program that ends and cancels every task but its main one."""
    reading, proceed = threading.Event(), threading.Event()

    def messages() -> Iterator[EmailMessage]:
        for n in range(20):
            if n == 15:
                reading.set()
                proceed.wait(10)
            yield EmailMessage(f"{n}", *ADDRESSES)

    async def cancel_all_but(main: asyncio.Task[Any] | None) -> None:
        await asyncio.to_thread(reading.wait, 10)
        for task in asyncio.all_tasks() - {main, asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0)
        proceed.set()

    cancelling = asyncio.create_task(cancel_all_but(asyncio.current_task()))
    with pytest.raises(asyncio.CancelledError):
        await make_backend(server).asend_messages(messages())
    await cancelling


@pytest.mark.asyncio
async def test_a_cancelled_sync_view_leaves_its_send_alone(
    make_backend: MakeBackend,
) -> None:
    with ScriptedServer(({"body": SILENCE}, {})) as server:
        make_backend(server)
        view = asyncio.create_task(sync_to_async(send)())
        await eventually(lambda: server.received)
        view.cancel()
        with pytest.raises(asyncio.CancelledError):
            await view
        assert server.open_connections == 1
        server.close_all()
        assert await sync_to_async(send)() == 1


async def eventually(is_true: Callable[[], object]) -> None:
    """Wait as ``wait_until`` does, without blocking the loop."""
    await asyncio.to_thread(wait_until, is_true)


@pytest.mark.asyncio
async def test_many_coroutines_send_each_message_once(
    server: ScriptedServer, make_backend: MakeBackend
) -> None:
    make_backend(server)
    expected = sorted(f"message {number}" for number in range(200))
    sent = await asyncio.gather(*map(asend, expected))
    assert sent == [1] * 200
    assert subjects(server.received) == expected


def test_two_event_loops_in_two_threads_send_at_once(
    server: ScriptedServer, make_backend: MakeBackend
) -> None:
    make_backend(server)
    barrier = threading.Barrier(2)

    async def send_twenty(first: int) -> list[int]:
        barrier.wait()
        numbers = range(first, first + 20)
        return await asyncio.gather(*(asend(f"message {n:02}") for n in numbers))

    with ThreadPoolExecutor(2) as executor:
        sent = list(executor.map(lambda n: asyncio.run(send_twenty(n)), (0, 20)))
    assert sent == [[1] * 20] * 2
    assert subjects(server.received) == [f"message {n:02}" for n in range(40)]


def test_one_backend_in_many_threads_sends_each_message_once(
    server: ScriptedServer, make_backend: MakeBackend
) -> None:
    backend = make_backend(server)
    barrier = threading.Barrier(20)

    def send_one(number: int) -> int:
        barrier.wait()
        return backend.send_messages([EmailMessage(f"message {number:02}", *ADDRESSES)])

    with ThreadPoolExecutor(20) as executor:
        assert list(executor.map(send_one, range(20))) == [1] * 20
    assert subjects(server.received) == [f"message {n:02}" for n in range(20)]
    assert backend.connection is None


class Stalls:
    """Watches the running loop: how long did it not come round?"""

    def __init__(self) -> None:
        self.longest = 0.0

    async def __aenter__(self) -> Stalls:
        self._watching = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._watching.cancel()
        await asyncio.wait({self._watching})

    async def _watch(self) -> None:
        time = asyncio.get_running_loop().time
        while True:
            start = time()
            await asyncio.sleep(0.001)
            self.longest = max(self.longest, time() - start)


@pytest.mark.asyncio
async def test_nothing_blocks_the_event_loop(make_backend: MakeBackend) -> None:
    message = Watched("Hello", *ADDRESSES)
    message.attach("large.bin", bytes(5 * 2**20), "application/octet-stream")
    start = time.perf_counter()
    await asyncio.to_thread(prepare, message)
    build_time = time.perf_counter() - start

    with ScriptedServer(slow_body=0.001) as server:
        backend = make_backend(server)
        async with Stalls() as stalls:
            await backend.aopen()
            assert await backend.asend_messages([message]) == 1
            await backend.aclose()
    assert stalls.longest < build_time / 2
    loops = {threading.current_thread(), smtp_loop().thread}
    assert message.built_in not in loops


# Sync and async code within each other.


@pytest.mark.asyncio
async def test_send_mail_in_a_coroutine_sends_and_warns_once_for_each_line(
    server: ScriptedServer, make_backend: MakeBackend
) -> None:
    backend = make_backend(server)
    message = EmailMessage("Hello", *ADDRESSES)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            assert send_mail("Hello", *ADDRESSES) == 1
            assert message.send() == 1
            assert backend.send_messages([message]) == 1
    assert len(server.received) == 6
    assert {warning.filename for warning in caught} == {__file__}
    lines = [linecache.getline(__file__, warning.lineno) for warning in caught]
    calls = ["send_mail(", "message.send(", "backend.send_messages("]
    assert [call in line for call, line in zip(calls, lines, strict=True)] == [True] * 3
    assert {warning.category for warning in caught} == {RuntimeWarning}
    assert all("await asend_mail(" in str(warning.message) for warning in caught)


def test_code_without_a_module_is_warned_too(
    server: ScriptedServer, make_backend: MakeBackend
) -> None:
    make_backend(server)
    names: dict[str, Any] = {"send_mail": send_mail, "ADDRESSES": ADDRESSES}
    exec("async def view(): return send_mail('Hello', *ADDRESSES)", names)
    with pytest.warns(RuntimeWarning, match="blocks this event loop"):
        assert asyncio.run(names["view"]()) == 1


@pytest.mark.filterwarnings("ignore:Sending mail synchronously")
@pytest.mark.asyncio
async def test_send_mail_in_a_coroutine_has_the_context_of_the_coroutine(
    server: ScriptedServer, make_backend: MakeBackend
) -> None:
    make_backend(server)
    request_id.set("a")
    assert send(lazily(request_id.get)) == 1
    assert subjects(server.received) == ["a"]


@pytest.mark.filterwarnings("ignore:Sending mail synchronously")
@pytest.mark.asyncio
async def test_send_mail_in_a_coroutine_does_not_wait_for_the_loop_that_it_blocks(
    server: ScriptedServer, make_backend: MakeBackend
) -> None:
    make_backend(server)
    others = [asyncio.create_task(asend()) for _ in range(20)]
    await asyncio.wait(others, return_when=asyncio.FIRST_COMPLETED)
    assert send() == 1
    assert await asyncio.gather(*others) == [1] * 20


@pytest.mark.filterwarnings("ignore:Sending mail synchronously")
@pytest.mark.asyncio
async def test_what_ends_a_program_comes_out_of_send_mail_in_a_coroutine(
    server: ScriptedServer, make_backend: MakeBackend
) -> None:
    make_backend(server)
    with pytest.raises(KeyboardInterrupt):
        send(raising(KeyboardInterrupt()))
    assert send() == 1


def sync_view(request: HttpRequest) -> HttpResponse:
    return HttpResponse(send("from a view"))


async def async_view(request: HttpRequest) -> HttpResponse:
    return HttpResponse(await asend("from a view"))


async def blocking_view(request: HttpRequest) -> HttpResponse:
    return HttpResponse(send("from a view"))


async def sync_to_async_view(request: HttpRequest) -> HttpResponse:
    return HttpResponse(await sync_to_async(send)("from a view"))


def async_to_sync_view(request: HttpRequest) -> HttpResponse:
    return HttpResponse(async_to_sync(asend)("from a view"))


VIEWS = (sync_view, async_view, blocking_view, sync_to_async_view, async_to_sync_view)

urlpatterns: list[Any] = [path(view.__name__, view) for view in VIEWS]


def get_over_wsgi(url: str) -> Any:
    return Client().get(url)


def get_over_asgi(url: str) -> Any:
    getting: Coroutine[Any, Any, Any] = AsyncClient().get(url)
    return asyncio.run(getting)


@pytest.mark.urls(__name__)
@pytest.mark.filterwarnings("ignore:Sending mail synchronously")
@pytest.mark.parametrize("get", [get_over_wsgi, get_over_asgi])
@pytest.mark.parametrize("view", [view.__name__ for view in VIEWS])
def test_views_of_every_kind_send(
    server: ScriptedServer,
    make_backend: MakeBackend,
    view: str,
    get: Callable[[str], Any],
) -> None:
    make_backend(server)
    assert get(f"/{view}").content == b"1"
    assert subjects(server.received) == ["from a view"]
