"""Tasks whose worker was killed: some engines leave them where they are, for ever."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

from django.core.exceptions import ImproperlyConfigured
from django.utils import timezone

from ..logs import log
from . import engine
from .worker import send_queued

# How often a task is begun, at most: what kills each worker, such as by the memory that
# it takes, must end, and not send the messages before it for ever.
MAX_RUNS: Final = 5
# How RQ says that a job has lost its worker; what the task itself raised stays failed.
RQ_REASONS: Final = (
    "AbandonedJobError",
    "Work-horse terminated unexpectedly",
    "intermediate queue",
)

# In the meta of a job of RQ.
GIVEN_UP: Final = "django_async_smtp_given_up"


def requeue(alias: str, minutes: float) -> int:
    """
    Have the tasks with mail run again whose worker was killed; at most ``MAX_RUNS``
    times in all: then they are given up, and logged.

    :param alias: the key of TASKS.
    :param minutes: how long ago a task must have been started, where the engine does
        not know that its worker is gone.
    :returns: how many.
    :raises ImproperlyConfigured: the engine is not one of those that need it.
    """
    backend = engine.library().task_backends[alias]
    for cls in type(backend).__mro__:
        path = f"{cls.__module__}.{cls.__qualname__}"
        if path in ENGINES:
            return ENGINES[path](backend, minutes)
    raise ImproperlyConfigured(
        f'TASKS["{alias}"]: {type(backend).__qualname__} is not known to leave '
        "tasks behind; its documentation says what becomes of those of a killed worker."
    )


def _of_database(backend: Any, minutes: float) -> int:
    """django-tasks-db: such a task is RUNNING for ever."""
    from django_tasks_db.compat import TaskResultStatus
    from django_tasks_db.models import DBTaskResult

    left = DBTaskResult.objects.filter(
        backend_name=backend.alias,
        task_path=send_queued.module_path,
        status=TaskResultStatus.RUNNING,
        started_at__lte=timezone.now() - timedelta(minutes=minutes),
    )
    runs = {pk: len(ids) for pk, ids in left.values_list("pk", "worker_ids")}
    again = [pk for pk in runs if runs[pk] < MAX_RUNS]
    count: int = left.filter(pk__in=again).update(status=TaskResultStatus.READY)
    for pk in runs.keys() - set(again):
        if left.filter(pk=pk).update(
            status=TaskResultStatus.FAILED, finished_at=timezone.now()
        ):
            _log_given_up(pk)
    return count


def _of_rq(backend: Any, minutes: float) -> int:
    """django-tasks-rq: RQ notes within minutes that a worker is gone, and gives up."""
    import django_rq
    from django_tasks_rq.backend import Job
    from rq.registry import FailedJobRegistry, StartedJobRegistry

    count = 0
    for name in backend.queues:
        queue = django_rq.get_queue(name, job_class=Job)
        StartedJobRegistry(queue=queue).cleanup()
        failed = FailedJobRegistry(queue=queue)
        for job_id in failed.get_job_ids():
            job = queue.fetch_job(job_id)
            if job is None or job.func_name != send_queued.module_path:
                continue
            # The latest first.
            losses = [_is_loss(result) for result in job.results()]
            if not losses or not losses[0] or GIVEN_UP in job.meta:
                continue
            if losses.count(True) < MAX_RUNS:
                failed.requeue(job)
                count += 1
                continue
            job.meta[GIVEN_UP] = True
            job.save_meta()  # type: ignore[no-untyped-call]
            _log_given_up(job_id)
    return count


def _is_loss(result: Any) -> bool:
    """Whether a job ended by losing its worker."""
    return any(reason in (result.exc_string or "") for reason in RQ_REASONS)


def _log_given_up(task_id: object) -> None:
    message = (
        "Task %s with queued mail is given up: its worker was killed %d times. Some of "
        "its messages may have been sent."
    )
    log(logging.ERROR, message, task_id, MAX_RUNS)


# The task backends that need it.
ENGINES: Final[dict[str, Callable[[Any, float], int]]] = {
    "django_tasks_db.backend.DatabaseBackend": _of_database,
    "django_tasks_rq.backend.RQBackend": _of_rq,
}
