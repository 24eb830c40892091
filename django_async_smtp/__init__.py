"""Django's SMTP email backend, over the async client aiosmtplib."""

from typing import TYPE_CHECKING, Any

from .backend import Backend
from .delivery import Delivery
from .errors import SMTPError
from .loop import close_connections, pool_stats
from .mail import amail_admins, amail_managers, asend_mail, asend_mass_mail
from .signals import post_send, pre_send

if TYPE_CHECKING:
    from .tasks import QueuedBackend

__all__ = [
    "Backend",
    "Delivery",
    "QueuedBackend",
    "SMTPError",
    "amail_admins",
    "amail_managers",
    "asend_mail",
    "asend_mass_mail",
    "close_connections",
    "pool_stats",
    "post_send",
    "pre_send",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Few use it, and it takes longer to import than the rest.
    if name == "QueuedBackend":
        from .tasks import QueuedBackend

        return QueuedBackend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
