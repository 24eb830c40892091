"""
A process that queues mail and has workers send it, as it is told.

    python -m benchmarks.queue database '{"host": "127.0.0.1", "port": 2525}' FOLDER

It answers lines as sender.py does. The engine is a ``database`` (SQLite, in the
folder), or ``redis``, on a server of its own. Workers are forks, so their start costs
next to nothing; those of Redis keep their connections (RQ's SimpleWorker).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, sleep
from typing import Any, Final

import django
from django.conf import settings
from django.core import mail
from django.core.mail import send_mail
from django.core.management import call_command
from django.db import connections

from .lab import wait_for
from .sender import OURS, arguments, messages, new_backend, seconds_for
from .server import HOST

QUEUED: Final = "django_async_smtp.QueuedBackend"


def configure(engine: str, options: dict[str, Any], folder: Path) -> None:
    """Set the project's mail and task settings."""
    lite = {"timeout": 60, "transaction_mode": "IMMEDIATE"}
    lite["init_command"] = "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL"
    common: dict[str, Any] = {
        "USE_TZ": True,
        "DATABASES": {
            "default": {
                "ENGINE": "django.db.backends.sqlite3",
                "NAME": folder / "queue.sqlite3",
                "OPTIONS": lite if django.VERSION >= (5, 1) else {},
            }
        },
    }
    if engine == "database":
        common["INSTALLED_APPS"] = ["django_tasks_db"]
        common["TASKS"] = {"default": {"BACKEND": "django_tasks_db.DatabaseBackend"}}
    else:
        common["INSTALLED_APPS"] = ["django_rq"]
        common["TASKS"] = {"default": {"BACKEND": "django_tasks_rq.RQBackend"}}
        common["RQ"] = {"JOB_CLASS": "django_tasks_rq.Job"}
        url = f"redis://{HOST}:{redis(folder)}"
        common["RQ_QUEUES"] = {"default": {"URL": url}}
    if hasattr(mail, "mailers"):
        queue = {"BACKEND": QUEUED, "OPTIONS": {"mailer": "smtp"}}
        smtp = {"BACKEND": OURS, "OPTIONS": options}
        settings.configure(**common, MAILERS={"default": queue, "smtp": smtp})
    else:
        settings.configure(
            **common,
            EMAIL_BACKEND=QUEUED,
            EMAIL_HOST=options["host"],
            EMAIL_PORT=options["port"],
        )
    django.setup()
    call_command("migrate", verbosity=0)


def redis(folder: Path) -> int:
    """Start a Redis that ends with this process; return its port."""
    with socket.create_server((HOST, 0)) as sock:
        port: int = sock.getsockname()[1]
    options = f"--port {port} --bind {HOST} --dir {folder} --appendonly no"
    command = ["redis-server", *options.split(), "--save", ""]
    servers.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
    wait_for(port)
    return port


servers: Final[list[subprocess.Popen[bytes]]] = []


def why_no_redis() -> str | None:
    """Return what keeps Redis from being run, if anything does."""
    return None if shutil.which("redis-server") else "redis-server is not installed"


def one_by_one(count: int) -> float:
    """A `send_mail()` for each; the seconds until the last is queued."""

    def send() -> None:
        for number in range(count):
            assert send_mail(*arguments(number)) == 1

    seconds = seconds_for(send)
    drain(1)
    return seconds


def workers(count: int, number: int) -> float:
    """The seconds in which so many workers send what was queued in one call."""
    assert new_backend().send_messages(messages(count)) == count
    return drain(number)


def drain(number: int) -> float:
    """Have so many workers send what is queued; return the seconds."""
    connections.close_all()
    start = perf_counter()
    forks = [fork() for _ in range(number)]
    while not is_done():
        sleep(0.01)
    seconds = perf_counter() - start
    for pid in forks:
        # One of Redis takes a second to see that nothing is left.
        _, status = os.waitpid(pid, 0)
        assert status == 0, status
    return seconds


def is_done() -> bool:
    """Whether all tasks have been run."""
    if "django_rq" not in settings.INSTALLED_APPS:
        from django_tasks_db.models import DBTaskResult

        return not DBTaskResult.objects.filter(status__in=["READY", "RUNNING"]).exists()
    import django_rq
    from rq.registry import StartedJobRegistry

    queue = django_rq.get_queue("default")
    return not (queue.count or StartedJobRegistry(queue=queue).get_job_count())


def fork() -> int:
    """Start a worker that ends when nothing is left; return its process."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        if "django_rq" in settings.INSTALLED_APPS:
            _work_on_redis()
        else:
            call_command("db_worker", batch=True, interval=0, reload=False, verbosity=0)
        status = 0
    finally:
        os._exit(status)


def _work_on_redis() -> None:
    import django_rq
    from django_tasks_rq import Job
    from rq.worker import SimpleWorker

    queue = django_rq.get_queue("default", job_class=Job)
    SimpleWorker([queue], connection=queue.connection, job_class=Job).work(burst=True)


JOBS: Final[dict[str, Callable[..., Any]]] = {
    job.__name__: job for job in (one_by_one, workers)
}


def main(engine: str, options: dict[str, Any], folder: Path) -> None:
    logging.disable()
    try:
        configure(engine, options, folder)
        print("ready", flush=True)
        for line in sys.stdin:
            name, *rest = json.loads(line)
            print(json.dumps(JOBS[name](*rest)), flush=True)
    finally:
        for server in servers:
            server.terminate()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3]))
