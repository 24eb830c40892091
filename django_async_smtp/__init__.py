"""Django's SMTP email backend, over the async client aiosmtplib."""

from .backend import Backend
from .delivery import Delivery
from .errors import SMTPError
from .mail import amail_admins, amail_managers, asend_mail, asend_mass_mail

__all__ = [
    "Backend",
    "Delivery",
    "SMTPError",
    "amail_admins",
    "amail_managers",
    "asend_mail",
    "asend_mass_mail",
]

__version__ = "0.1.0"
