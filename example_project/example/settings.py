"""Settings as a project would write them, for the Django that is installed."""

import os

import django

SECRET_KEY = os.environ.get("SECRET_KEY", "for-the-example-only")
DEBUG = os.environ.get("DEBUG") == "1"
ALLOWED_HOSTS = ["localhost", "127.0.0.1", "testserver"]
ROOT_URLCONF = "example.urls"
INSTALLED_APPS = ["django_async_smtp"]
USE_TZ = True

DEFAULT_FROM_EMAIL = "Example <hello@example.com>"
# Of mail to admins; Django's own default is root@localhost.
SERVER_EMAIL = "hello@example.com"

HOST = os.environ.get("SMTP_HOST", "localhost")
PORT = int(os.environ.get("SMTP_PORT", "587"))
USER = os.environ.get("SMTP_USER", "")
PASSWORD = os.environ.get("SMTP_PASSWORD", "")
CA_FILE = os.environ.get("SMTP_CA_FILE")

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
            },
        },
    }
else:
    EMAIL_BACKEND = "django_async_smtp.Backend"
    EMAIL_HOST = HOST
    EMAIL_PORT = PORT
    EMAIL_HOST_USER = USER
    EMAIL_HOST_PASSWORD = PASSWORD
    EMAIL_USE_TLS = True
    EMAIL_TIMEOUT = 10
    # What Django has no setting for.
    ASYNC_SMTP = {"ssl_cafile": CA_FILE}
