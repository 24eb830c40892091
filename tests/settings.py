"""
Settings for the tests.

MAIL_SETTINGS picks the generation of the mail settings: "email" for EMAIL_*,
"mailers" for MAILERS, the default where Django knows it.
"""

import os

from django.core import mail

USES_MAILERS = hasattr(mail, "mailers") and os.environ.get("MAIL_SETTINGS") != "email"

SECRET_KEY = "tests"
USE_TZ = True
ROOT_URLCONF = "tests.urls"
INSTALLED_APPS = ["django.contrib.contenttypes", "django_async_smtp"]
DATABASES = {
    "default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"},
}
DEFAULT_FROM_EMAIL = "webmaster@example.com"

if USES_MAILERS:
    MAILERS = {"default": {"BACKEND": "django_async_smtp.Backend"}}
else:
    EMAIL_BACKEND = "django_async_smtp.Backend"
