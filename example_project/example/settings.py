"""Settings as a project would write them, for the Django that is installed."""

import os
from pathlib import Path

import django

from .broken_mailers import broken_mailers

SECRET_KEY = os.environ.get("SECRET_KEY", "for-the-example-only")
DEBUG = os.environ.get("DEBUG") == "1"
ALLOWED_HOSTS = ["localhost", "127.0.0.1", "testserver"]
ROOT_URLCONF = "example.urls"
STATIC_URL = "static/"
USE_TZ = True
TIME_ZONE = "UTC"

INSTALLED_APPS = [
    # System checks, and manage.py smtpcheck.
    "django_async_smtp",
    "example",
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.messages",
    "django.contrib.sessions",
    "django.contrib.staticfiles",
]

MIDDLEWARE = [
    "example.middleware.content_security_policy",
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
]

TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    },
]

DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ.get("DATABASE", Path(__file__).parents[1] / "db.sqlite3"),
        # Pages are read while a receiver of signals writes.
        "OPTIONS": {
            "transaction_mode": "IMMEDIATE",
            "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL",
        },
    },
}

# Of an attachment. Larger uploads wait on the disk, not in memory, to be refused.
ATTACHMENT_LIMIT = 2**20
FILE_UPLOAD_MAX_MEMORY_SIZE = ATTACHMENT_LIMIT

DEFAULT_FROM_EMAIL = "Example <hello@example.com>"
# Of mail to admins; Django's own default is root@localhost.
SERVER_EMAIL = "hello@example.com"

HOST = os.environ.get("SMTP_HOST", "localhost")
PORT = int(os.environ.get("SMTP_PORT", "587"))
USER = os.environ.get("SMTP_USER", "")
PASSWORD = os.environ.get("SMTP_PASSWORD", "")
CA_FILE = os.environ.get("SMTP_CA_FILE")
# Said in EHLO; this machine's own name where it is None.
OWN_NAME = os.environ.get("SMTP_LOCAL_HOSTNAME")

# "db": a worker of django-tasks-db sends the mail.
QUEUE = os.environ.get("QUEUE", "")
if QUEUE == "db":
    INSTALLED_APPS += ["django_tasks_db"]
    TASKS = {"default": {"BACKEND": "django_tasks_db.DatabaseBackend"}}

# What the page "Settings" shows of failures; nothing to copy.
BROKEN_MAILERS = broken_mailers(
    host=HOST,
    port=PORT,
    username=USER,
    password=PASSWORD,
    ssl_cafile=CA_FILE,
    local_hostname=OWN_NAME,
)

if django.VERSION >= (6, 1):
    MAILERS = {
        "default": {
            "BACKEND": "django_async_smtp.Backend",
            "OPTIONS": {
                "host": HOST,
                "port": PORT,
                "username": USER,
                "password": PASSWORD,
                "use_tls": True,
                "timeout": 10,
                "ssl_cafile": CA_FILE,
                "local_hostname": OWN_NAME,
            },
        },
    }
    if QUEUE:
        MAILERS["smtp"] = MAILERS["default"]
        MAILERS["default"] = {
            "BACKEND": "django_async_smtp.QueuedBackend",
            "OPTIONS": {"mailer": "smtp"},
        }
    MAILERS |= {
        broken: {"BACKEND": "django_async_smtp.Backend", "OPTIONS": options}
        for broken, options in BROKEN_MAILERS.items()
    }
else:
    EMAIL_BACKEND = f"django_async_smtp.{'Queued' if QUEUE else ''}Backend"
    EMAIL_HOST = HOST
    EMAIL_PORT = PORT
    EMAIL_HOST_USER = USER
    EMAIL_HOST_PASSWORD = PASSWORD
    EMAIL_USE_TLS = True
    EMAIL_TIMEOUT = 10
    # What Django has no setting for.
    ASYNC_SMTP = {"ssl_cafile": CA_FILE, "local_hostname": OWN_NAME}

# What fail_silently swallows, and recipients that were refused among others. What is
# raised is not logged as well.
LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"line": {"format": "%(asctime)s %(levelname)s %(message)s"}},
    "handlers": {"console": {"class": "logging.StreamHandler", "formatter": "line"}},
    "loggers": {
        "django_async_smtp": {"handlers": ["console"], "level": "WARNING"},
        "django.request": {"handlers": ["console"], "level": "ERROR"},
    },
}
