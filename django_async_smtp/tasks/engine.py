"""Django Tasks: ``django.tasks`` (Django 6.0), or ``django_tasks`` on Django 5.2."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from importlib import import_module
from typing import Any, Final

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.utils import timezone

from .. import options as opts
from ..errors import NotQueued
from .options import QueueOptions

DEFAULT: Final = "default"


# The libraries, in the order of preference.
LIBRARIES: Final = ("django.tasks", "django_tasks")


def library(alias: str | None = None) -> Any:
    """
    Return the library.

    :param alias: the mailer that needs it.
    :raises ImproperlyConfigured: there is none (``InvalidMailer`` under MAILERS).
    """
    for name in LIBRARIES:
        with suppress(ImportError):
            return import_module(name)
    problem = (
        "QueuedBackend needs Django Tasks: Django 6.0 or later, or the package "
        "django-tasks (pip install django-tasks)."
    )
    raise opts.setting_error(problem, problem, alias)


def _task_errors() -> tuple[type[Exception], ...]:
    """Return what libraries raise for a task: an engine may be made for the other."""
    found: list[type[Exception]] = [ImproperlyConfigured]
    for name in LIBRARIES:
        with suppress(ImportError):
            found.append(import_module(f"{name}.exceptions").TaskException)
    return tuple(found)


def check(queue: QueueOptions) -> None:
    """
    Check that mail could be queued.

    :raises ImproperlyConfigured: it could not.
    """
    from .worker import send_queued

    made_for(send_queued, queue)


def is_immediate(queue: QueueOptions) -> bool:
    """Whether the task backend runs a task when it is enqueued."""
    try:
        backend = task_backend(queue)
    except ImproperlyConfigured:
        return False
    return any(cls.__name__ == "ImmediateBackend" for cls in type(backend).__mro__)


def task_backend(queue: QueueOptions) -> Any:
    """
    Return the task backend of a queue.

    :raises ImproperlyConfigured: TASKS has none of this name, or it cannot be made.
    """
    return library().task_backends[queue.task_backend]


def place(queue: QueueOptions) -> str:
    """Return how errors and logs name a queue."""
    return f'TASKS["{queue.task_backend}"]'


def made_for(task: Any, queue: QueueOptions, alias: str | None = None) -> Any:
    """
    Return the task as it is enqueued.

    :param alias: the mailer whose queue it is.
    :raises ImproperlyConfigured: the task backend, the queue or the priority cannot
        be used (``InvalidMailer`` under MAILERS).
    """
    try:
        return task.using(
            backend=queue.task_backend,
            queue_name=queue.queue_name,
            priority=queue.priority,
        )
    except _task_errors() as error:
        problem = f"{place(queue)} cannot be used: {error}"
        raise opts.setting_error(problem, problem, alias) from error


def later(task: Any, queue: QueueOptions, seconds: float) -> Any:
    """Return the task to be run after some seconds; at once where it cannot wait."""
    if not task_backend(queue).supports_defer:
        return task
    return task.using(run_after=timezone.now() + timedelta(seconds=seconds))


def not_queued(queue: QueueOptions, error: Exception) -> NotQueued:
    """Return the error for what the engine raised: it may hold connection strings."""
    made = NotQueued(
        f"{place(queue)} did not take the mail: {type(error).__name__}",
        stage="queue",
        server=place(queue),
        temporary=True,
    )
    made.add_hint("Is what the task backend keeps its tasks in running, and set up?")
    return made


def task(function: Callable[..., Any]) -> Any:
    """
    Make a function a task, which workers find by its module and name.

    Where it is enqueued is said then; here, it need only be possible: a project may
    have neither a task backend nor a queue of the name ``default``.
    """
    known = getattr(settings, "TASKS", None) or {DEFAULT: {}}
    first, *others = sorted(known, key=lambda alias: alias != DEFAULT)
    made = _task_of(first, function)
    for alias in others:
        # Celery's has tasks of its own, which it makes known to its workers. What is
        # wrong with one is said where it is used.
        with suppress(Exception):
            _task_of(alias, function)
    return made


def _task_of(alias: str, function: Callable[..., Any]) -> Any:
    queues = library().task_backends[alias].queues
    queue = DEFAULT if not queues or DEFAULT in queues else min(queues)
    return library().task(backend=alias, queue_name=queue)(function)
