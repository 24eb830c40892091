"""The settings of a queue: OPTIONS of MAILERS, or ``ASYNC_SMTP_QUEUE``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from django.conf import settings

from .. import options as opts

GROUP: Final = "ASYNC_SMTP_QUEUE"

Oversize = Literal["error", "direct"]


@dataclass(frozen=True, kw_only=True)
class QueueOptions:
    """
    What is queued where, and how the worker sends it.

    :ivar mailer: the key of MAILERS that the worker sends through; None with EMAIL_*.
    :ivar task_backend: the key of TASKS.
    :ivar queue_name: the queue of that task backend.
    :ivar priority: from -100 to 100, where the task backend knows priorities.
    :ivar batch_size: how many messages of one call share a task.
    :ivar max_size: bytes that a task may hold.
    :ivar oversize: what becomes of a message that is larger: an ``error``, or it is
        sent ``direct``, at once.
    :ivar on_commit: whether what is sent within a transaction is queued on its commit.
    :ivar max_attempts: how often a message is tried, over about an hour for 5.
    :ivar resend_unknown: whether to send again what may have been delivered.
    """

    mailer: str | None = None
    task_backend: str = "default"
    queue_name: str = "default"
    priority: int = 0
    batch_size: int = 10
    max_size: int = 5_000_000
    oversize: Oversize = "error"
    on_commit: bool = True
    max_attempts: int = 5
    resend_unknown: bool = False


def queue_options(given: Mapping[str, Any], alias: str | None) -> QueueOptions:
    """
    Return the options of a queue, checked.

    :param given: a value, or None for that of the settings, of each key of ``QUEUE``.
    :param alias: the mailer that they come from, or None for ``ASYNC_SMTP_QUEUE``.
    :raises OptionError: one cannot be used; ``InvalidMailer`` where there is an alias.
    """
    in_settings = alias is None and not opts.uses_mailers()
    values = opts.from_dict(GROUP, QUEUE) if in_settings else {}
    values |= {name: value for name, value in given.items() if value is not None}
    for name, value in values.items():
        opts.check_type(name, value, alias, QUEUE, GROUP)
    found = QueueOptions(**{k: v for k, v in values.items() if v is not None})
    _check_mailer(found.mailer, alias, in_settings=in_settings)
    return found


def _check_mailer(mailer: str | None, alias: str | None, *, in_settings: bool) -> None:
    problem = ""
    if in_settings:
        if mailer is not None:
            problem = "needs MAILERS: with EMAIL_*, the worker sends as these say."
    elif mailer is None:
        problem = "must name the mailer that the worker sends through."
    elif mailer == alias:
        problem = "names this mailer itself: the worker would queue what it is to send."
    elif mailer not in settings.MAILERS:
        problem = "must be a key of MAILERS."
    if problem:
        raise opts.unusable(alias, "mailer", problem, GROUP)


def _is_priority(value: Any) -> bool:
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return is_number and -100 <= value <= 100


def _is_oversize(value: object) -> bool:
    return value in ("error", "direct")


QUEUE: Final[dict[str, opts.Check]] = {
    "mailer": ("a string", opts.is_text),
    "task_backend": ("a string", opts.is_text),
    "queue_name": ("a string", opts.is_text),
    "priority": ("a whole number from -100 to 100", _is_priority),
    "batch_size": ("a number of messages, 1 or more", opts.is_count),
    "max_size": ("a number of bytes, 1 or more", opts.is_count),
    "oversize": ('"error" or "direct"', _is_oversize),
    "on_commit": ("True or False", opts.is_bool),
    "max_attempts": ("a number of attempts, 1 or more", opts.is_count),
    "resend_unknown": ("True or False", opts.is_bool),
}
