"""
Settings of a project with a queue, for its workers and for what sends.

QUEUE_ENGINE is "db", "rq" or "celery"; SMTP_PORT and REDIS_PORT say where the servers
are, QUEUE_DATABASE where the database is; with RATE, there is a limit.
"""

import os

from django.core import mail

ENGINE = os.environ["QUEUE_ENGINE"]
SMTP = {"host": "127.0.0.1", "port": int(os.environ["SMTP_PORT"]), "timeout": 10}
REDIS = f"redis://127.0.0.1:{os.environ.get('REDIS_PORT', '0')}"

SECRET_KEY = "tests"
USE_TZ = True
INSTALLED_APPS = [
    "django.contrib.contenttypes",
    "django_async_smtp",
    "tests.integration.queue_apps.Quick",
]
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ["QUEUE_DATABASE"],
        "OPTIONS": {"timeout": 20, "transaction_mode": "IMMEDIATE"},
    },
}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DEFAULT_FROM_EMAIL = "webmaster@example.com"

CACHES = {
    "default": {
        "BACKEND": "django.core.cache.backends.redis.RedisCache",
        "LOCATION": f"{REDIS}/2",
    },
}
# Messages a second, of all workers together.
LIMIT = (
    {"rate_limit": float(os.environ["RATE"]), "rate_limit_cache": "default"}
    if "RATE" in os.environ
    else {}
)

if ENGINE == "db":
    INSTALLED_APPS += ["django_tasks_db"]
    TASKS = {"default": {"BACKEND": "django_tasks_db.DatabaseBackend"}}
elif ENGINE == "rq":
    INSTALLED_APPS += ["django_rq"]
    TASKS = {"default": {"BACKEND": "django_tasks_rq.RQBackend"}}
    RQ = {"JOB_CLASS": "django_tasks_rq.Job"}
    RQ_QUEUES = {"default": {"URL": f"{REDIS}/0"}}
elif ENGINE == "celery":
    INSTALLED_APPS += ["django_tasks_fennel"]
    TASKS = {"default": {"BACKEND": "django_tasks_fennel.CeleryBackend"}}
    CELERY_BROKER_URL = f"{REDIS}/1"
    CELERY_RESULT_BACKEND = f"{REDIS}/1"
    CELERY_IMPORTS = ["django_async_smtp.tasks.worker"]
    CELERY_TASK_ACKS_LATE = True
    CELERY_TASK_REJECT_ON_WORKER_LOST = True

if hasattr(mail, "mailers") and os.environ.get("MAIL_SETTINGS") != "email":
    MAILERS = {
        "default": {
            "BACKEND": "django_async_smtp.QueuedBackend",
            "OPTIONS": {"mailer": "smtp", "batch_size": 5},
        },
        "smtp": {"BACKEND": "django_async_smtp.Backend", "OPTIONS": SMTP | LIMIT},
    }
else:
    EMAIL_BACKEND = "django_async_smtp.QueuedBackend"
    EMAIL_HOST, EMAIL_PORT = SMTP["host"], SMTP["port"]
    EMAIL_TIMEOUT = SMTP["timeout"]
    ASYNC_SMTP = LIMIT
    ASYNC_SMTP_QUEUE = {"batch_size": 5}
