"""
The example's WSGI application, loaded by a process that has already sent mail.

So that workers are forked from a process with an idle connection.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "example_project"))
os.environ["DJANGO_SETTINGS_MODULE"] = "example.settings"

from django.core.mail import send_mail
from django.db import connections
from example.wsgi import application

send_mail("From the master", "Body", None, ["to@example.com"])
# Its record of that: SQLite's connections must not go through a fork.
connections.close_all()

__all__ = ["application"]
