"""Mail through real task queues, with real workers: a database, Redis, Celery."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.servers import (
    DEFAULT,
    SILENCE,
    Pause,
    Received,
    ScriptedServer,
    Turns,
    free_port,
    is_listening,
    wait_until,
)

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.queue_engines, pytest.mark.timeout(120)]


def need(*modules: str, program: str | None = None) -> None:
    """Skip the test where something is missing, but fail it with CI=true."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if program is not None and shutil.which(program) is None:
        missing.append(program)
    if not missing:
        return
    why = f"not installed: {', '.join(missing)}"
    if os.environ.get("CI") == "true":
        pytest.fail(why)
    pytest.skip(why)


class Project:
    """The project with a queue: what sends, and its workers, in processes."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._processes = ExitStack()
        self._environment = {
            **{name: os.environ[name] for name in os.environ if "DJANGO" not in name},
            "DJANGO_SETTINGS_MODULE": "tests.integration.queue_project",
            **environment,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
        }

    def run(self, *arguments: str) -> str:
        """Run a module to its end; return what it printed."""
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def send(self, *arguments: str) -> None:
        """Queue messages."""
        self.run("tests.integration.queue_send", *arguments)

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a worker; it is ended with the test."""
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            env=self._environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._processes.callback(end, process)
        return process

    def close(self) -> None:
        """End the workers."""
        self._processes.close()


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process, gently at first."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


MakeProject = Callable[..., Project]


@pytest.fixture
def make_project(tmp_path: Path) -> Iterator[MakeProject]:
    """Make projects whose workers end with the test."""
    with ExitStack() as stack:

        def make(
            engine: str, server: Any, redis_port: int = 0, **environment: str
        ) -> Project:
            environment |= {
                "QUEUE_ENGINE": engine,
                "QUEUE_DATABASE": str(tmp_path / "queue.sqlite3"),
                "SMTP_PORT": str(server.port),
                "REDIS_PORT": str(redis_port),
            }
            project = Project(environment)
            stack.callback(project.close)
            return project

        yield make


@contextmanager
def redis(folder: Path) -> Iterator[int]:
    """Run a Redis that keeps nothing, and provide its port."""
    port = free_port()
    options = f"--port {port} --bind 127.0.0.1 --appendonly no --dir {folder}"
    with subprocess.Popen(
        ["redis-server", *options.split(), "--save", ""],
        stdout=subprocess.DEVNULL,
    ) as process:
        try:
            wait_until(lambda: is_listening(port), 10)
            yield port
        finally:
            process.terminate()


@pytest.fixture
def redis_port(tmp_path: Path) -> Iterator[int]:
    """The port of a Redis."""
    need(program="redis-server")
    with redis(tmp_path) as port:
        yield port


def arrived(received: list[Received]) -> Counter[bytes]:
    """Return how often each message arrived, by its Message-ID."""
    found: Counter[bytes] = Counter()
    for message in list(received):
        match = re.search(rb"^Message-ID: (\S+)\r$", message.content, re.M)
        assert match is not None
        found[match[1]] += 1
    return found


LATER = "later@example.com"
# Takes this recipient at the second time, on whichever connection.
GREYLISTING: Any = ({LATER: Turns(b"451 4.7.1 try again later\r\n")}, {})


@contextmanager
def greylisting() -> Iterator[ScriptedServer]:
    """Run a server that puts one recipient off."""
    with ScriptedServer(GREYLISTING) as server:
        yield server


def sends_all(project: Project, server: ScriptedServer) -> None:
    """Check that workers send what is queued, each once, and what was put off."""
    project.send("1", LATER)
    wait_until(lambda: server.commands(b"RCPT"), 30)
    project.send("20")
    wait_until(lambda: len(server.received) == 21, 30)
    assert set(arrived(server.received).values()) == {1}
    assert [m.recipients for m in server.received].count([LATER]) == 1


def test_a_database(make_project: MakeProject) -> None:
    need("django_tasks_db")
    with greylisting() as server:
        project = make_project("db", server)
        project.run("django", "migrate", "--verbosity=0")
        project.start("django", "db_worker", "--interval=0.1", "--no-startup-delay")
        sends_all(project, server)


def test_a_worker_that_is_asked_to_end_ends_its_task(
    make_project: MakeProject,
) -> None:
    need("django_tasks_db")
    with ScriptedServer(({"body": [Pause(0.2), DEFAULT]},)) as server:
        project = make_project("db", server)
        project.run("django", "migrate", "--verbosity=0")
        project.send("5")
        worker = project.start("django", "db_worker", "--no-startup-delay")
        wait_until(lambda: server.received, 30)
        worker.terminate()
        assert worker.wait(30) == 0
        assert list(arrived(server.received).values()) == [1] * 5


def test_redis_and_two_workers(make_project: MakeProject, redis_port: int) -> None:
    need("django_tasks_rq")
    with greylisting() as server:
        project = make_project("rq", server, redis_port)
        for _ in range(2):
            project.start("django", "rqworker", "--with-scheduler")
        sends_all(project, server)


def test_a_worker_of_redis_is_killed_and_nothing_is_lost(
    make_project: MakeProject, redis_port: int
) -> None:
    need("django_tasks_rq")
    with ScriptedServer(({"body": SILENCE}, {})) as server:
        project = make_project("rq", server, redis_port)
        worker = project.start("django", "rqworker")
        project.send("3")
        # It runs a task in a process of its own.
        wait_until(lambda: server.received, 30)
        [horse] = children(worker.pid)
        os.kill(horse, signal.SIGKILL)
        wait_until(lambda: not children(worker.pid), 30)
        wait_until(lambda: project.run("django", "requeue_mail").startswith("1 "), 30)
        wait_until(lambda: len(arrived(server.received)) == 3, 30)


GIVEN_UP = """
import django_rq
from rq.registry import FailedJobRegistry
queue = django_rq.get_queue("default")
jobs = map(queue.fetch_job, FailedJobRegistry(queue=queue).get_job_ids())
print([job.meta.get("django_async_smtp_given_up") for job in jobs])
"""


def test_a_task_that_kills_each_worker_of_redis_is_given_up(
    make_project: MakeProject, redis_port: int
) -> None:
    need("django_tasks_rq")

    def is_requeued() -> bool:
        return project.run("django", "requeue_mail").startswith("1 ")

    def is_given_up() -> bool:
        assert not is_requeued()
        return "[True]" in project.run("django", "shell", "--command", GIVEN_UP)

    with ScriptedServer(({"body": SILENCE},)) as server:
        project = make_project("rq", server, redis_port)
        worker = project.start("django", "rqworker")
        project.send("1")
        for runs in range(1, 6):
            wait_until(partial(has_received, server, runs), 30)
            [horse] = children(worker.pid)
            os.kill(horse, signal.SIGKILL)
            wait_until(lambda: not children(worker.pid), 30)
            wait_until(is_requeued if runs < 5 else is_given_up, 30)


def has_received(server: ScriptedServer, count: int) -> bool:
    """Whether so many messages came."""
    return len(server.received) == count


# A task of a database that was begun a minute ago, and how often it was.
BEGUN = """
from datetime import timedelta
from django.utils import timezone
from django_tasks_db.models import DBTaskResult
begun = timezone.now() - timedelta(minutes=1)
for runs, task in enumerate(DBTaskResult.objects.order_by("enqueued_at"), 4):
    task.worker_ids, task.started_at, task.status = ["a"] * runs, begun, "RUNNING"
    task.save()
"""
STATES = """
from django_tasks_db.models import DBTaskResult
print(sorted(DBTaskResult.objects.values_list("status", flat=True)))
"""


def test_a_task_that_kills_each_worker_of_a_database_is_given_up(
    make_project: MakeProject,
) -> None:
    need("django_tasks_db")
    with ScriptedServer() as server:
        project = make_project("db", server)
        project.run("django", "migrate", "--verbosity=0")
        project.send("10")
        project.run("django", "shell", "--verbosity=0", "--command", BEGUN)
        assert project.run("django", "requeue_mail").startswith("0 ")
        assert project.run("django", "requeue_mail", "--minutes=0.5").startswith("1 ")
        states = project.run("django", "shell", "--verbosity=0", "--command", STATES)
        assert states.strip() == "['FAILED', 'READY']"


def test_a_rate_limit_holds_for_all_workers(
    make_project: MakeProject, redis_port: int
) -> None:
    need("django_tasks_rq")
    rate = 20
    with ScriptedServer() as server:
        project = make_project("rq", server, redis_port, RATE=str(rate))
        project.send("40")
        for _ in range(2):
            project.start("django", "rqworker")
        wait_until(lambda: server.received, 30)
        start = time.monotonic()
        wait_until(lambda: len(server.received) == 40, 30)
    # Each task is sent by a process of its own.
    assert time.monotonic() - start >= 35 / rate


def test_celery(make_project: MakeProject, redis_port: int) -> None:
    need("celery", "django_tasks_fennel")
    with ScriptedServer() as server:
        project = make_project("celery", server, redis_port)
        project.start(
            *("celery", "-A", "django_tasks_fennel.app", "worker"),
            *("--pool=prefork", "--concurrency=2", "--loglevel=WARNING"),
        )
        project.send("20")
        wait_until(lambda: len(server.received) == 20, 30)
        assert set(arrived(server.received).values()) == {1}


def test_a_worker_of_celery_is_killed_and_nothing_is_lost(
    make_project: MakeProject, redis_port: int
) -> None:
    need("celery", "django_tasks_fennel")
    with ScriptedServer(({"body": SILENCE}, {})) as server:
        project = make_project("celery", server, redis_port)
        worker = project.start(
            *("celery", "-A", "django_tasks_fennel.app", "worker"),
            *("--pool=prefork", "--concurrency=1", "--loglevel=WARNING"),
        )
        project.send("3")
        wait_until(lambda: server.received, 30)
        [child] = children(worker.pid)
        os.kill(child, signal.SIGKILL)
        wait_until(lambda: len(arrived(server.received)) == 3, 30)


def children(pid: int) -> list[int]:
    """Return the processes that one has started."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def test_workers_of_a_database_are_killed_and_nothing_is_lost(
    make_project: MakeProject, capsys: pytest.CaptureFixture[str]
) -> None:
    need("django_tasks_db")
    kills = 50
    with ScriptedServer(({"body": [Pause(0.005), DEFAULT]},)) as server:
        project = make_project("db", server)
        told = project.run("tests.integration.queue_kills", str(kills), "0.25")
        found = arrived(server.received)
    twice = sum(count > 1 for count in found.values())
    with capsys.disabled():
        print(f"\n{told.strip()}: of {len(found)} messages, {twice} were sent twice")
    assert len(found) == kills * 14
    # Those of one task at most, for each that was killed.
    assert sum(found.values()) - len(found) <= kills * 5
