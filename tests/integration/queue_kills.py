"""
Kills workers of django-tasks-db at random moments, and has others do the rest.

Prints how many were killed, and how many within a task. A worker is a fork, which
starts at once.
"""

import os
import signal
import sys
import time
from random import Random

import django
from django.core.management import call_command
from django.db import connections

from .queue_send import send


def main(kills: int, seconds: float) -> None:
    """Kill so many, each within so many seconds of its start."""
    django.setup()
    from django_tasks_db.models import DBTaskResult

    from django_async_smtp.tasks import abandoned

    # On a slow machine, one task may be hit every time.
    abandoned.MAX_RUNS = kills + 1  # type: ignore[misc]
    call_command("migrate", verbosity=0)
    send(kills * 14)
    random, within = Random(7), 0
    for _ in range(kills):
        worker = started()
        time.sleep(random.uniform(0, seconds))
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
        within += DBTaskResult.objects.filter(status="RUNNING").count()
        call_command("requeue_mail", minutes=0, verbosity=0, stdout=sys.stderr)
    _, status = os.waitpid(started(), 0)
    left = DBTaskResult.objects.exclude(status="SUCCESSFUL").count()
    print(f"{kills} workers killed, {within} of them within a task")
    sys.exit(bool(status) or left > 0)


def started() -> int:
    """Start a worker that ends when nothing is left; return its process."""
    connections.close_all()
    if worker := os.fork():
        return worker
    status = 1
    try:
        call_command("db_worker", batch=True, interval=0, reload=False, verbosity=0)
        status = 0
    finally:
        os._exit(status)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
