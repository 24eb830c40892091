"""Tasks whose worker was killed: some engines leave them where they are, for ever."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

from django.core.exceptions import ImproperlyConfigured
from django.utils import timezone

from . import engine
from .worker import send_queued

# How RQ says that a job has lost its worker; what the task itself raised stays failed.
RQ_REASONS: Final = (
    "AbandonedJobError",
    "Work-horse terminated unexpectedly",
    "intermediate queue",
)


def requeue(alias: str, minutes: float) -> int:
    """
    Have the tasks with mail run again whose worker was killed.

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

    found: int = DBTaskResult.objects.filter(
        backend_name=backend.alias,
        task_path=send_queued.module_path,
        status=TaskResultStatus.RUNNING,
        started_at__lte=timezone.now() - timedelta(minutes=minutes),
    ).update(status=TaskResultStatus.READY)
    return found


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
            if job is not None and _is_abandoned(job):
                failed.requeue(job)
                count += 1
    return count


def _is_abandoned(job: Any) -> bool:
    result = job.latest_result()
    why = (result.exc_string if result is not None else job.exc_info) or ""
    is_ours = job.func_name == send_queued.module_path
    return is_ours and any(reason in why for reason in RQ_REASONS)


# The task backends that need it.
ENGINES: Final[dict[str, Callable[[Any, float], int]]] = {
    "django_tasks_db.backend.DatabaseBackend": _of_database,
    "django_tasks_rq.backend.RQBackend": _of_rq,
}
