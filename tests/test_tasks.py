"""What QueuedBackend puts into tasks, and when."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from django.core.exceptions import ImproperlyConfigured
from django.core.mail import EmailMessage, send_mail
from django.core.management import CommandError, call_command
from django.db import connection, transaction

import django_async_smtp
from django_async_smtp import asend_mail
from django_async_smtp.errors import NotQueued
from django_async_smtp.signals import post_send, pre_send
from django_async_smtp.tasks import engine
from django_async_smtp.tasks.options import QUEUE, QueueOptions

from .conftest import (
    OURS,
    QUEUED,
    configure_queue,
    default_backend,
    email,
    emails,
    states,
    subjects,
)
from .engines import (
    IMMEDIATE,
    Down,
    Keeping,
    nothing_enqueued,
    payloads,
    tasks_of,
    work,
)
from .servers import MailServer
from .settings import USES_MAILERS

MakeQueue = Callable[..., Any]
Send = Callable[[Any, Iterable[Any]], int]

email_settings = pytest.mark.skipif(USES_MAILERS, reason="EMAIL_* only")
mailers = pytest.mark.skipif(not USES_MAILERS, reason="MAILERS only")


@pytest.fixture(autouse=True)
def _keeping(settings: Any) -> Iterator[None]:
    """Keep what is enqueued."""
    settings.TASKS = tasks_of(Keeping)
    with nothing_enqueued():
        yield


@pytest.fixture
def make_queue(settings: Any, server: MailServer) -> MakeQueue:
    """Set a queue for the server up, and return its backend."""

    def make(*, fail_silently: bool = False, **options: Any) -> Any:
        smtp = {"host": server.host, "port": server.port}
        configure_queue(settings, smtp, **options)
        backend = default_backend()
        backend.fail_silently = fail_silently
        return backend

    return make


def _send(backend: Any, messages: Iterable[Any]) -> int:
    count: int = backend.send_messages(messages)
    return count


def _asend(backend: Any, messages: Iterable[Any]) -> int:
    count: int = asyncio.run(backend.asend_messages(messages))
    return count


@pytest.fixture(params=[_send, _asend], ids=["sync", "async"])
def send(request: pytest.FixtureRequest) -> Send:
    """Both ways to send."""
    way: Send = request.param
    return way


FIXED = {"Message-ID": "<1@example.com>", "Date": "Thu, 01 Jan 2026 00:00:00 -0000"}


def sizes() -> list[int]:
    """Return how many messages each task holds."""
    return [len(payload["messages"]) for payload in payloads()]


def errors_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "django_async_smtp" and record.levelno >= logging.ERROR
    ]


def test_a_message_is_queued_and_nothing_is_sent(
    server: MailServer, make_queue: MakeQueue, send: Send
) -> None:
    message = email()
    assert send(make_queue(), [message]) == 1
    [task] = Keeping.enqueued
    assert (message.delivery.state, message.delivery.task_id) == ("queued", task.id)
    assert server.received == []


def test_a_worker_sends_what_was_queued(
    server: MailServer, make_queue: MakeQueue, send: Send
) -> None:
    message = EmailMessage("Grüße", "Körper", "A <a@example.com>", ["b@example.com"])
    message.bcc = ["c@example.com"]
    message.attach("a.bin", b"\0\1\2")
    send(make_queue(), [message])
    [payload] = payloads()
    assert work(payload) == {"sent": 1, "failed": 0, "again": 0}
    [received] = server.received
    assert received.sender == "a@example.com"
    assert received.recipients == ["b@example.com", "c@example.com"]
    assert b"Bcc" not in received.content


def test_the_message_is_the_same_each_time(
    server: MailServer, make_queue: MakeQueue
) -> None:
    make_queue().send_messages([email()])
    [payload] = payloads()
    work(payload)
    work(payload)
    first, second = server.received
    assert first.content == second.content
    assert b"\r\nMessage-ID: <" in first.content
    assert b"\r\nDate: " in first.content


def test_a_task_holds_json(make_queue: MakeQueue) -> None:
    make_queue(max_attempts=3).send_messages([email()])
    [payload] = payloads()
    assert json.loads(json.dumps(payload)) == payload
    assert payload["version"] == 1
    assert payload["attempt"] == 1
    assert payload["queue"]["max_attempts"] == 3
    assert payload["queue"]["mailer"] == ("smtp" if USES_MAILERS else None)


def test_it_works_as_the_projects_backend(
    server: MailServer, make_queue: MakeQueue, settings: Any
) -> None:
    make_queue()
    settings.TASKS = tasks_of(IMMEDIATE)
    assert send_mail("1", "Body", "a@example.com", ["b@example.com"]) == 1
    assert asyncio.run(asend_mail("2", "Body", "a@example.com", ["b@example.com"])) == 1
    assert subjects(server) == ["1", "2"]


def test_a_call_is_cut_into_tasks_of_batch_size(
    make_queue: MakeQueue, send: Send
) -> None:
    messages = emails(25)
    assert send(make_queue(), messages) == 25
    assert sizes() == [10, 10, 5]
    assert len({message.delivery.task_id for message in messages}) == 3


def test_a_generator_may_be_given(make_queue: MakeQueue, send: Send) -> None:
    assert send(make_queue(batch_size=2), (email() for _ in range(5))) == 5
    assert sizes() == [2, 2, 1]


def test_nothing_is_queued_of_nothing(make_queue: MakeQueue, send: Send) -> None:
    assert send(make_queue(), []) == 0
    assert send(make_queue(), [email(to=[])]) == 0
    assert payloads() == []


def test_a_task_holds_no_more_than_max_size(make_queue: MakeQueue, send: Send) -> None:
    messages = []
    for _ in range(4):
        message = email()
        message.attach("a.bin", os.urandom(3000))
        messages.append(message)
    assert send(make_queue(max_size=12_000), messages) == 4
    assert sizes() == [2, 2]
    assert all(len(json.dumps(payload)) <= 12_000 for payload in payloads())


@pytest.mark.parametrize("count", [1, 3])
def test_max_size_is_what_the_task_takes(make_queue: MakeQueue, count: int) -> None:
    messages = [
        EmailMessage("1", "é", "a@example.com", ["é@example.com"], headers=FIXED)
        for _ in range(count)
    ]
    make_queue().send_messages(messages)
    size = len(json.dumps(payloads()[0]))
    # It holds max_size, too.
    options = {"max_size": size - len("5000000") + len(f"{size}")}
    Keeping.enqueued.clear()
    make_queue(**options).send_messages(messages)
    assert [len(json.dumps(payload)) for payload in payloads()] == [options["max_size"]]
    options["max_size"] -= 1
    Keeping.enqueued.clear()
    if count > 1:
        make_queue(**options).send_messages(messages)
        assert sizes() == [count - 1, 1]
    else:
        with pytest.raises(NotQueued, match=f"takes {options['max_size'] + 1} bytes"):
            make_queue(**options).send_messages(messages)


def too_large() -> Any:
    message = email("large")
    message.attach("a.bin", os.urandom(20_000))
    return message


def test_a_message_that_is_larger_is_an_error(
    server: MailServer, make_queue: MakeQueue, send: Send
) -> None:
    messages = [email(), too_large(), email()]
    with pytest.raises(NotQueued, match=r"takes \d+ bytes .* max_size is 9000") as why:
        send(make_queue(max_size=9000), messages)
    assert states(messages) == ["queued", "failed", "queued"]
    assert (why.value.stage, why.value.temporary, why.value.sent) == ("queue", False, 2)
    assert server.received == []


def test_a_message_that_is_larger_may_be_sent_directly(
    server: MailServer, make_queue: MakeQueue, send: Send
) -> None:
    messages = [email(), too_large()]
    assert send(make_queue(max_size=9000, oversize="direct"), messages) == 2
    assert states(messages) == ["queued", "sent"]
    assert subjects(server) == ["large"]


def test_what_is_sent_directly_may_fail(
    server: MailServer, make_queue: MakeQueue, send: Send
) -> None:
    message = too_large()
    message.to = ["nouser@example.com"]
    with pytest.raises(django_async_smtp.SMTPError, match="user unknown"):
        send(make_queue(max_size=9000, oversize="direct"), [message])


@pytest.mark.parametrize("fail_silently", [False, True])
def test_errors_of_a_message_are_raised_at_once(
    make_queue: MakeQueue, send: Send, fail_silently: bool
) -> None:
    messages = [email(), email(to=["not an address"]), email("two\nlines"), email()]
    with pytest.raises(ValueError, match="Invalid address") as why:
        send(make_queue(fail_silently=fail_silently), messages)
    assert states(messages) == ["queued", "failed", "failed", "queued"]
    failures: Any = why.value
    assert [message for message, _ in failures.failures] == messages[1:3]
    assert sizes() == [2]


def test_what_an_iterator_gave_before_it_broke_is_queued(
    make_queue: MakeQueue, send: Send
) -> None:
    def broken() -> Iterator[Any]:
        yield from emails(3)
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        send(make_queue(), broken())
    assert sizes() == [3]


def test_what_failed_is_logged_where_something_else_is_raised(
    make_queue: MakeQueue, send: Send, caplog: pytest.LogCaptureFixture
) -> None:
    class Stopped(BaseException):
        pass

    def broken() -> Iterator[Any]:
        yield from emails(20)
        yield too_large()
        raise Stopped

    with pytest.raises(Stopped):
        send(make_queue(max_size=9000, batch_size=1), broken())
    [text] = errors_in(caplog)
    assert "max_size is 9000" in text


def test_an_engine_that_is_down_is_an_error(
    make_queue: MakeQueue, send: Send, settings: Any
) -> None:
    backend = make_queue(batch_size=2)
    settings.TASKS = tasks_of(Down)
    messages = emails(5)
    with pytest.raises(NotQueued) as why:
        send(backend, messages)
    assert str(why.value) == 'TASKS["default"] did not take the mail: ConnectionError'
    assert isinstance(why.value.__cause__, ConnectionError)
    assert (why.value.stage, why.value.temporary) == ("queue", True)
    assert states(messages) == ["not_sent"] * 5
    assert len(why.value.failures) == 5


def test_an_engine_that_is_down_is_logged_where_it_fails_silently(
    make_queue: MakeQueue,
    send: Send,
    settings: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = make_queue(fail_silently=True)
    settings.TASKS = tasks_of(Down)
    messages = emails(3)
    assert send(backend, messages) == 0
    [text] = errors_in(caplog)
    assert "3 more messages not sent" in text
    assert "did not take the mail: ConnectionError" in text
    assert "s3cr3t" not in caplog.text
    assert states(messages) == ["not_sent"] * 3


def test_pre_send_comes_at_queueing_and_post_send_from_the_worker(
    make_queue: MakeQueue,
) -> None:
    calls: list[tuple[Any, ...]] = []

    def receiver(**kwargs: Any) -> None:
        delivery, alias = kwargs["delivery"], kwargs["alias"]
        calls.append((kwargs["sender"].__name__, kwargs["message"], delivery, alias))

    message = email()
    aliases = ("default", "smtp") if USES_MAILERS else (None, None)
    pre_send.connect(receiver)
    post_send.connect(receiver)
    try:
        make_queue().send_messages([message])
        assert calls == [("QueuedBackend", message, None, aliases[0])]
        work(payloads()[0])
    finally:
        pre_send.disconnect(receiver)
        post_send.disconnect(receiver)
    [(sender, sent, delivery, alias)] = calls[1:]
    assert (sender, alias) == ("Backend", aliases[1])
    assert delivery.state == "sent"
    assert (sent.subject, sent.from_email) == ("Hello", "from@example.com")
    assert sent.to == sent.recipients() == ["to@example.com"]
    assert sent.delivery == delivery
    assert sent.message()["Message-ID"] == sent.message_id
    assert sent.message().get_content().strip() == "Body"


# Transactions.


@pytest.mark.django_db(transaction=True)
def test_a_commit_queues(make_queue: MakeQueue) -> None:
    backend, messages = make_queue(batch_size=2), emails(3)
    with transaction.atomic():
        assert backend.send_messages(messages) == 3
        assert payloads() == []
        assert states(messages) == ["queued"] * 3
        assert messages[0].delivery.task_id == ""
    assert sizes() == [2, 1]
    assert messages[0].delivery.task_id == Keeping.enqueued[0].id


@pytest.mark.django_db(transaction=True)
def test_a_rollback_queues_nothing(make_queue: MakeQueue) -> None:
    with transaction.atomic():
        make_queue().send_messages([email()])
        transaction.set_rollback(True)
    assert payloads() == []


@pytest.mark.django_db(transaction=True)
def test_a_coroutine_within_a_transaction_waits_for_its_commit(
    make_queue: MakeQueue,
) -> None:
    backend = make_queue()
    with transaction.atomic():
        assert async_to_sync(backend.asend_messages)([email()]) == 1
        assert payloads() == []
    assert sizes() == [1]


@pytest.mark.django_db(transaction=True)
def test_on_commit_may_be_off(make_queue: MakeQueue) -> None:
    with transaction.atomic():
        make_queue(on_commit=False).send_messages([email()])
        assert sizes() == [1]


@pytest.mark.django_db(transaction=True)
def test_without_a_transaction_it_is_queued_at_once(make_queue: MakeQueue) -> None:
    connection.set_autocommit(False)
    try:
        make_queue().send_messages([email()])
        assert sizes() == [1]
    finally:
        connection.set_autocommit(True)


@pytest.mark.django_db(transaction=True)
def test_what_fails_after_the_commit_is_logged_and_told(
    make_queue: MakeQueue, settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    told = []

    def receiver(message: Any, delivery: Any, **kwargs: Any) -> None:
        told.append((message, delivery.state))

    backend, messages = make_queue(batch_size=1), emails(2)
    settings.TASKS = tasks_of(Down)
    after = []
    post_send.connect(receiver)
    try:
        with transaction.atomic():
            backend.send_messages(messages)
            transaction.on_commit(lambda: after.append(True))
    finally:
        post_send.disconnect(receiver)
    assert states(messages) == ["failed"] * 2
    assert told == [(message, "failed") for message in messages]
    assert len(errors_in(caplog)) == 2
    assert "after the commit" in errors_in(caplog)[0]
    assert "s3cr3t" not in caplog.text
    # Django calls no further callback where one raises.
    assert after == [True]


@pytest.mark.django_db(transaction=True)
def test_what_fails_silently_after_the_commit_is_logged_once(
    make_queue: MakeQueue, settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    backend = make_queue(fail_silently=True)
    settings.TASKS = tasks_of(Down)
    with transaction.atomic():
        backend.send_messages([email()])
    assert len(errors_in(caplog)) == 1


@pytest.mark.django_db(transaction=True)
def test_a_mailer_that_is_unusable_after_the_commit_is_logged(
    make_queue: MakeQueue, settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    backend, message = make_queue(max_size=9000, oversize="direct"), too_large()
    with transaction.atomic():
        backend.send_messages([message])
        configure_queue(settings, {"host": "a.example", "port": "many"})
    assert states([message]) == ["failed"]
    [text] = errors_in(caplog)
    assert text.startswith("1 messages lost after the commit")


@pytest.mark.django_db(transaction=True)
def test_what_is_too_large_is_sent_after_the_commit(
    server: MailServer, make_queue: MakeQueue, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = too_large(), too_large()
    bad.to = ["nouser@example.com"]
    with transaction.atomic():
        backend = make_queue(max_size=9000, oversize="direct")
        assert backend.send_messages([good, bad]) == 2
        assert server.received == []
    assert states([good, bad]) == ["sent", "refused"]
    [text] = errors_in(caplog)
    assert "after the commit" in text


@pytest.mark.django_db(transaction=True)
def test_mail_of_a_log_handler_does_not_wait_for_a_commit(
    make_queue: MakeQueue,
) -> None:
    class Mailing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            make_queue().send_messages([email(record.getMessage())])

    logger = logging.getLogger("tests.mailing")
    logger.addHandler(handler := Mailing())
    try:
        with transaction.atomic():
            logger.error("lost?")
            transaction.set_rollback(True)
    finally:
        logger.removeHandler(handler)
    [payload] = payloads()
    assert payload["quiet"] is True


# Coroutines.


def test_a_sync_call_within_a_running_loop_works(make_queue: MakeQueue) -> None:
    backend = make_queue()

    async def view() -> int:
        count: int = backend.send_messages([email()])
        return count

    assert asyncio.run(view()) == 1
    assert sizes() == [1]


def test_messages_are_built_in_the_thread_for_user_code(make_queue: MakeQueue) -> None:
    class Message(EmailMessage):
        def message(self, *args: Any, **kwargs: Any) -> Any:
            with pytest.raises(RuntimeError):
                asyncio.get_running_loop()
            return super().message(*args, **kwargs)

    async def view() -> int:
        backend = await sync_to_async(make_queue)()
        await backend.aopen()
        await backend.aclose()
        async with backend:
            message = Message("1", "Body", "a@example.com", ["b@example.com"])
            count: int = await backend.asend_messages([message])
        return count

    assert asyncio.run(view()) == 1


# Settings.

OF_QUEUE = {field: getattr(QueueOptions(), field) for field in QUEUE}


def name_of(option: str) -> str:
    if USES_MAILERS:
        return f"The {option!r} option"
    return f"ASYNC_SMTP_QUEUE[{option!r}]"


def test_the_options_are_those_of_the_settings(make_queue: MakeQueue) -> None:
    given: dict[str, Any] = {
        "task_backend": "mail",
        "queue_name": "mail",
        "priority": 5,
        "batch_size": 3,
        "max_size": 10_000,
        "oversize": "direct",
        "on_commit": False,
        "max_attempts": 2,
        "resend_unknown": True,
    }
    queue = make_queue(**given).queue
    assert {name: getattr(queue, name) for name in given} == given
    assert set(given) | {"mailer"} == set(QUEUE) == set(OF_QUEUE)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("task_backend", 1),
        ("queue_name", b"mail"),
        ("priority", 101),
        ("priority", True),
        ("batch_size", 0),
        ("batch_size", "10"),
        ("max_size", -1),
        ("oversize", "drop"),
        ("on_commit", 1),
        ("max_attempts", 0),
        ("resend_unknown", "no"),
    ],
)
def test_an_unusable_option_is_named(
    make_queue: MakeQueue, option: str, value: object
) -> None:
    with pytest.raises(ImproperlyConfigured, match=re.escape(name_of(option))):
        make_queue(**{option: value})


def test_an_unknown_option_is_named(make_queue: MakeQueue) -> None:
    with pytest.raises(ImproperlyConfigured, match="batchsize"):
        make_queue(batchsize=5)


@email_settings
def test_arguments_win_over_settings(make_queue: MakeQueue) -> None:
    make_queue(batch_size=3, max_attempts=3)
    backend = django_async_smtp.QueuedBackend(batch_size=4)
    assert (backend.queue.batch_size, backend.queue.max_attempts) == (4, 3)


@email_settings
def test_a_mailer_needs_mailers(make_queue: MakeQueue) -> None:
    with pytest.raises(ImproperlyConfigured, match="needs MAILERS"):
        make_queue(mailer="smtp")


@mailers
@pytest.mark.parametrize(
    ("mailer", "problem"),
    [
        (None, "must name the mailer"),
        ("default", "names this mailer itself"),
        ("missing", "must be a key of MAILERS"),
    ],
)
def test_an_unusable_mailer_is_an_error(
    make_queue: MakeQueue, mailer: str | None, problem: str
) -> None:
    with pytest.raises(ImproperlyConfigured, match=problem):
        make_queue(mailer=mailer)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"task_backend": "missing"}, "missing"),
        ({"queue_name": "missing"}, "missing"),
    ],
)
@pytest.mark.parametrize("fail_silently", [False, True])
def test_a_task_queue_that_cannot_be_used_is_an_error(
    make_queue: MakeQueue, options: Any, problem: str, fail_silently: bool
) -> None:
    backend = make_queue(fail_silently=fail_silently, **options)
    with pytest.raises(ImproperlyConfigured, match=f"TASKS.*{problem}"):
        backend.send_messages([email()])


def test_a_login_of_send_mail_is_refused(make_queue: MakeQueue) -> None:
    make_queue()
    with pytest.raises(ImproperlyConfigured, match="no password goes into a task"):
        django_async_smtp.QueuedBackend(username="a", password="s3cr3t")


@mailers
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::PendingDeprecationWarning")
def test_a_login_of_send_mail_is_refused_under_mailers(make_queue: MakeQueue) -> None:
    make_queue()
    to = ["b@example.com"]
    with pytest.raises(ImproperlyConfigured, match="no password goes into a task"):
        send_mail("1", "Body", "a@example.com", to, auth_user="a", auth_password="b")


def test_a_project_need_not_have_default_tasks() -> None:
    """The task is made when its module is imported, in a process of its own."""
    tasks = {"mail": tasks_of(IMMEDIATE, QUEUES=["mail"])["default"]}
    code = f"""
from django.conf import settings
settings.configure(TASKS={tasks!r}, USE_TZ=True)
from django_async_smtp.tasks.worker import send_queued
print(send_queued.backend, send_queued.queue_name)
"""
    assert run(code) == "mail mail"


def test_an_engine_with_tasks_of_its_own_has_one_whichever_is_the_first() -> None:
    """Celery's workers drop what they do not know."""
    pytest.importorskip("django_tasks_fennel")
    celery = {"BACKEND": "django_tasks_fennel.CeleryBackend"}
    broken = {"BACKEND": "missing.Backend"}
    tasks = {"broken": broken, "mail": celery, **tasks_of(IMMEDIATE)}
    code = f"""
import os
os.environ["DJANGO_SETTINGS_MODULE"] = "none"
from django.conf import settings
settings.configure(TASKS={tasks!r}, INSTALLED_APPS=["django_tasks_fennel"], USE_TZ=True)
import django
django.setup()
from django_async_smtp.tasks.worker import send_queued
from celery import current_app
print(send_queued.backend, [name for name in current_app.tasks if "smtp" in name])
"""
    name = "django_tasks:django_async_smtp.tasks.worker.send_queued"
    assert run(code) == f"default ['{name}']"


def test_the_tasks_name_stays() -> None:
    """Tasks in queues have it."""
    from django_async_smtp.tasks.worker import send_queued

    assert send_queued.module_path == "django_async_smtp.tasks.worker.send_queued"


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_package_needs_no_library_of_tasks() -> None:
    code = f"""
import sys
sys.modules["django.tasks"] = sys.modules["django_tasks"] = None
import django_async_smtp
assert "django_async_smtp.tasks" not in sys.modules
from django.conf import settings
settings.configure()
try:
    django_async_smtp.QueuedBackend(alias=None)
except Exception as error:
    print(type(error).__mro__[-4].__name__, error)
try:
    django_async_smtp.Missing
except AttributeError:
    print({OURS!r}, {QUEUED!r})
"""
    assert "pip install django-tasks" in run(code)


def test_the_library_is_djangos_own_where_there_is_one() -> None:
    import django

    own = "django.tasks" if django.VERSION >= (6, 0) else "django_tasks"
    assert engine.library().__name__ == own


def test_requeue_mail_is_for_engines_that_need_it() -> None:
    with pytest.raises(CommandError, match="Keeping is not known to leave tasks"):
        call_command("requeue_mail")
    with pytest.raises(CommandError, match="missing"):
        call_command("requeue_mail", task_backend="missing")
