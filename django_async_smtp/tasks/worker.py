"""What a worker does: sends the messages of a task, and queues again what failed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from random import SystemRandom
from typing import Any, Final

from .. import errors
from ..backend import Backend
from ..callers import as_in_a_plain_thread
from ..delivery import MAYBE_DELIVERED, Delivery, is_before_mail
from ..logs import log, quiet
from ..mailing import log_fields, log_refused, masked_delivery
from ..signals import post_send
from . import engine
from .payload import Packed, Payload, PayloadError, QueuedMessage, unpacked
from .sending import send, sender

# Seconds before the second attempt, the third and so on; the last one serves all
# further ones. In all, about an hour.
BACKOFF: Final = (60, 240, 900, 2400)
# A pause is made longer by up to this part, so that what failed together does not
# come back together.
JITTER: Final = 0.2

# Neither the one that a project may seed, nor the same in every forked worker.
_random = SystemRandom()


@dataclass(frozen=True)
class Verdict:
    """
    What is to be done about a message.

    :ivar delivery: what became of it in all attempts.
    :ivar again: the recipients to whom it is to be sent again.
    :ivar is_free: whether that is no attempt of its own: it was not tried.
    """

    message: QueuedMessage
    delivery: Delivery
    again: Sequence[str]
    is_free: bool


@engine.task
def send_queued(payload: Mapping[str, Any]) -> dict[str, int]:
    """
    Send the messages of a task.

    :returns: how many were ``sent``, ``failed`` for good, and are queued ``again``;
        nothing where mail of a log handler was broken off.
    :raises PayloadError: the task cannot be read; none of it was sent.
    :raises NotQueued: what failed could not be queued again.
    """
    is_quiet = isinstance(payload, Mapping) and payload.get("quiet") is True
    try:
        with _as_quiet_as(is_quiet):
            # Engines with coroutines may call it beside a running loop.
            return as_in_a_plain_thread(_work, payload)
    except Exception:
        if not is_quiet:
            raise
        # Engines log what a task raises; the handler would mail that, and so on.
        return {}


@contextmanager
def _as_quiet_as(is_quiet: bool) -> Iterator[None]:
    token = quiet.set(quiet.get() or is_quiet)
    try:
        yield
    finally:
        quiet.reset(token)


def _work(payload: Mapping[str, Any]) -> dict[str, int]:
    try:
        job, messages = unpacked(payload)
    except PayloadError as error:
        log(logging.ERROR, "Queued mail not sent: %s", error)
        raise
    backend = None
    try:
        backend = sender(job.queue.mailer)
        send(messages, backend)
    except BaseException as error:
        # Settings that cannot be used, or the worker's end or time limit.
        _settle(job, messages, type(backend or Backend), error)
        raise
    return _settle(job, messages, type(backend))


def _settle(
    job: Payload,
    messages: Sequence[QueuedMessage],
    sent_by: type[Any],
    broken_off: BaseException | None = None,
) -> dict[str, int]:
    """Queue again what is to be sent again, and tell what became of the others."""
    has_progress = any(map(_was_tried, messages))
    verdicts = [
        _verdict(job, message, broken_off, has_progress) for message in messages
    ]
    again = [verdict for verdict in verdicts if verdict.again]
    final = [verdict for verdict in verdicts if not verdict.again]
    try:
        # First: where the worker is killed meanwhile, all is sent again.
        if again:
            _queue_again(job, again)
    finally:
        for verdict in final:
            _tell(job, verdict, sent_by)
    sent = sum(verdict.delivery.state == "sent" for verdict in final)
    return {"sent": sent, "failed": len(final) - sent, "again": len(again)}


def _was_tried(message: QueuedMessage) -> bool:
    delivery = message.delivery
    return delivery is not None and not isinstance(delivery.error, errors.PoolTimeout)


def _verdict(
    job: Payload,
    message: QueuedMessage,
    broken_off: BaseException | None,
    has_progress: bool,
) -> Verdict:
    last = message.delivery
    if last is None:
        error = broken_off if isinstance(broken_off, Exception) else None
        state: Any = "not_sent" if broken_off is None else "failed"
        last = Delivery(state=state, error=error)
        again, is_free = message.recipients(), has_progress
    else:
        again = _to_try_again(job, message, last)
        # Where nothing can wait, it must end.
        is_free = (
            isinstance(last.error, errors.PoolTimeout)
            and engine.task_backend(job.queue).supports_defer
        )
    if job.attempt >= job.queue.max_attempts and not is_free:
        again = []
    return Verdict(message, _joined(message, last), again, is_free)


def _to_try_again(job: Payload, message: QueuedMessage, last: Delivery) -> list[str]:
    """Return the recipients for whom another attempt may help."""
    if last.refused:
        return [
            address
            for address, (code, text) in last.refused.items()
            if code < 500
            and (job.queue.resend_unknown or not text.endswith(MAYBE_DELIVERED))
        ]
    if last.state == "unknown":
        helps = job.queue.resend_unknown
    else:
        # What fails before MAIL says nothing of the message: a password that is
        # changed, a certificate that is renewed.
        helps = is_before_mail(last.error) or getattr(last.error, "temporary", False)
    return message.recipients() if helps else []


def _joined(message: QueuedMessage, last: Delivery) -> Delivery:
    """Return what became of a message in all attempts."""
    earlier = message.earlier
    accepted = earlier.accepted + last.accepted
    refused = last.refused
    if earlier.accepted and last.error is not None and not refused:
        # Nobody else is left.
        text = str(last.error) + MAYBE_DELIVERED * (last.state == "unknown")
        no = (getattr(last.error, "smtp_code", 0), text)
        refused = dict.fromkeys(message.recipients(), no)
    before = {a: no for a, no in earlier.refused.items() if a not in last.accepted}
    return replace(
        last,
        state="sent" if accepted else last.state,
        accepted=accepted,
        refused=before | refused,
        reply="; ".join(filter(None, (earlier.reply, last.reply))),
        attempts=earlier.attempts + last.attempts,
        seconds=earlier.seconds + last.seconds,
        error=None if accepted else last.error,
    )


def _queue_again(job: Payload, again: Sequence[Verdict]) -> None:
    """
    Queue what is to be sent again.

    :raises NotQueued: the engine did not take it.
    """
    attempt = job.attempt + (not all(verdict.is_free for verdict in again))
    pause = BACKOFF[min(job.attempt, len(BACKOFF)) - 1] * _random.uniform(1, 1 + JITTER)
    messages = [_packed_again(verdict) for verdict in again]
    payload = replace(job, messages=messages, attempt=attempt).as_json()
    try:
        task = engine.made_for(send_queued, job.queue)
        task = engine.later(task, job.queue, pause)
        _log_retry(job, again, None if task.run_after is None else pause)
        task.enqueue(payload)
    except Exception as error:
        failure = engine.not_queued(job.queue, error)
        message = "%d messages that failed are lost, for they were not queued again: %s"
        log(logging.ERROR, message, len(again), failure, **log_fields(failure))
        # Engines keep the traceback: no words of theirs, which may hold the task.
        raise failure from None


def _packed_again(verdict: Verdict) -> Packed:
    """Return a message for those who have not got it."""
    told = asdict(replace(verdict.delivery, error=None))
    refused = {a: no for a, no in told["refused"].items() if a not in verdict.again}
    return replace(
        verdict.message.packed,
        recipients=list(verdict.again),
        earlier={**told, "refused": refused, "error": None},
    )


def _tell(job: Payload, verdict: Verdict, sent_by: type[Any]) -> None:
    """Log what became of a message, and signal it."""
    message, delivery = verdict.message, verdict.delivery
    message.delivery = delivery
    if delivery.state == "sent":
        if delivery.refused:
            is_given_up = any(code < 500 for code, _ in delivery.refused.values())
            level = logging.ERROR if is_given_up else logging.WARNING
            log_refused(delivery, level, message_id=message.message_id)
    else:
        _log_failure(job, delivery, message.message_id)
    if post_send.has_listeners(sent_by) and not quiet.get():
        post_send.send_robust(
            sent_by, message=message, delivery=delivery, alias=job.queue.mailer
        )


def _log_retry(job: Payload, again: Sequence[Verdict], pause: float | None) -> None:
    first = again[0]
    refused = {a: no for a, no in first.delivery.refused.items() if a in first.again}
    delivery = replace(first.delivery, refused=refused)
    log(
        logging.WARNING,
        "%d of %d queued messages to be sent again %s, after attempt %d of %d: %s",
        len(again),
        len(job.messages),
        "at once" if pause is None else f"in {pause:.0f} s",
        job.attempt,
        job.queue.max_attempts,
        _reason(delivery),
        delivery=masked_delivery(delivery),
        message_ids=[verdict.message.message_id for verdict in again],
    )


def _log_failure(job: Payload, delivery: Delivery, message_id: str) -> None:
    error = delivery.error
    log(
        logging.ERROR,
        "Queued mail not sent, in attempt %d of %d: %s",
        job.attempt,
        job.queue.max_attempts,
        _reason(delivery),
        **(log_fields(error) if isinstance(error, errors.SMTPError) else {}),
        delivery=masked_delivery(delivery),
        message_id=message_id,
    )


def _reason(delivery: Delivery) -> str:
    """Return why a message was not sent, or not to all."""
    error = delivery.error
    if isinstance(error, errors.SMTPError):
        hint = f" [{error.hint}]" if error.hint else ""
        if delivery.state == "unknown":
            hint = f"{hint} It may have been delivered, and is not sent again."
        return f"{error}{hint}"
    if delivery.refused:
        return "; ".join(f"{a}: {c} {t}" for a, (c, t) in delivery.refused.items())
    if error is None and delivery.state == "not_sent":
        return "the task took too long"
    # Of others, nobody knows what it tells.
    return type(error).__name__ if error is not None else "the worker was stopped"
