"""Django's SMTP email backend, over the async client aiosmtplib."""

from .backend import Backend
from .delivery import Delivery
from .errors import SMTPError
from .loop import close_connections, pool_stats
from .mail import amail_admins, amail_managers, asend_mail, asend_mass_mail
from .signals import post_send, pre_send

__all__ = [
    "Backend",
    "Delivery",
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
