"""Mailers that fail, each in its own way, for the pages to show how that looks."""

from __future__ import annotations

import os
from typing import Any, Final

# Where nothing listens.
UNUSED_PORT: Final = 1


def broken_mailers(**working: Any) -> dict[str, dict[str, Any]]:
    """
    Return the options of each, by alias; none but under serve.py.

    :param working: the options that work, of which each changes one.
    """
    if "EXPIRED_PORT" not in os.environ:
        return {}
    options = {**working, "use_tls": True, "timeout": 5}
    return {
        "wrong-password": {**options, "password": "not-the-password"},
        "wrong-port": {**options, "port": UNUSED_PORT},
        "expired-certificate": {**options, "port": int(os.environ["EXPIRED_PORT"])},
        "refused-sender": {**options, "username": os.environ["NEWSLETTER_USER"]},
    }
