"""The forms, which refuse what a mail or a race must not have."""

from __future__ import annotations

import mimetypes
from typing import Any, Final

from django import forms
from django.conf import settings
from django.core.exceptions import ValidationError
from django.core.mail import EmailMessage
from django.core.validators import validate_email
from django.template.defaultfilters import filesizeformat

from .mailers import aliases, backend, through

MOST_RECIPIENTS: Final = 10
SUBJECT_LENGTH: Final = 200
TEXT_LENGTH: Final = 10_000


class OneLineField(forms.CharField):
    """Refuses line breaks, at the ends too, where Django would strip them."""

    def to_python(self, value: Any) -> Any:
        if len(f"{value or ''}.".splitlines()) > 1:
            raise ValidationError(
                "Line breaks (CR or LF) are not allowed here: a header is one line.",
                code="line_break",
            )
        return super().to_python(value)


class AddressesField(OneLineField):
    """Addresses with commas between; cleaned, a list."""

    def to_python(self, value: Any) -> Any:
        text = super().to_python(value)
        return [address.strip() for address in text.split(",") if address.strip()]

    def validate(self, value: Any) -> None:
        super().validate(value)
        if len(value) > MOST_RECIPIENTS:
            raise ValidationError(f"At most {MOST_RECIPIENTS} addresses.")
        for address in value:
            try:
                validate_email(address)
            except ValidationError:
                raise ValidationError(
                    "“%(address)s” is not an email address, such as ada@example.org.",
                    params={"address": address},
                ) from None

    def run_validators(self, value: Any) -> None:
        """Validate the text, not the list."""
        super().run_validators(", ".join(value))


class AttachmentField(forms.FileField):
    """Refuses a file above the limit, and names the limit."""

    def clean(self, data: Any, initial: Any = None) -> Any:
        limit = settings.ATTACHMENT_LIMIT
        if data and data.size > limit:
            raise ValidationError(
                "This file has %(size)s; the limit is %(limit)s.",
                params={
                    "size": filesizeformat(data.size),
                    "limit": filesizeformat(limit),
                },
            )
        return super().clean(data, initial)


def _mailers() -> list[tuple[str, str]]:
    return [(alias, alias) for alias in aliases()]


class ContactForm(forms.Form):
    """A message to send, and the mailer that it takes."""

    to = AddressesField(
        max_length=1000,
        initial="ada@example.org",
        help_text="One address, or several with commas. The embedded server refuses "
        "nobody@example.org.",
        widget=forms.TextInput(attrs={"autocomplete": "email", "inputmode": "email"}),
    )
    subject = OneLineField(max_length=SUBJECT_LENGTH)
    text = forms.CharField(
        max_length=TEXT_LENGTH, widget=forms.Textarea(attrs={"rows": 5})
    )
    attachment = AttachmentField(
        required=False,
        help_text=f"Up to {filesizeformat(settings.ATTACHMENT_LIMIT)}.",
    )
    mailer = forms.ChoiceField(
        required=False,
        choices=_mailers,
        help_text="The others fail, each in its own way.",
    )

    def clean_mailer(self) -> str:
        """Return the first where none was chosen."""
        return self.cleaned_data["mailer"] or aliases()[0]

    def using(self) -> dict[str, Any]:
        """Return the argument that makes ``send_mail()`` take the mailer."""
        return through(self.cleaned_data["mailer"])

    def backend(self) -> Any:
        """Return a new backend of the mailer."""
        return backend(self.cleaned_data["mailer"])

    def email(self) -> EmailMessage:
        """Return the message with its attachment, for which send_mail() has no way."""
        mail = self.cleaned_data
        message = EmailMessage(mail["subject"], mail["text"], None, mail["to"])
        file = mail["attachment"]
        # Its name tells the type, not the sender; a mail within the mail stays a file.
        kind, _ = mimetypes.guess_type(file.name)
        if kind is None or kind.startswith(("message/", "multipart/")):
            kind = "application/octet-stream"
        message.attach(file.name, file.read(), kind)
        return message


class RaceForm(forms.Form):
    """How many messages, and how far away the server is."""

    messages = forms.IntegerField(
        min_value=10,
        max_value=500,
        initial=200,
        help_text="10 to 500 for each.",
    )
    round_trip = forms.IntegerField(
        min_value=0,
        max_value=100,
        initial=20,
        help_text="0 to 100 ms: 0 is this machine, 20 another town, 100 another "
        "continent.",
        widget=forms.NumberInput(attrs={"type": "range", "step": "5"}),
    )
