"""What a stage reports, and the advice on what no error stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, get_args

from ..hints import Hint, hint_for

if TYPE_CHECKING:
    from ..errors import SMTPError
    from ..options import Options

State = Literal["ok", "skipped", "warning", "failed"]
# From good to bad.
STATES: Final[tuple[State, ...]] = get_args(State)


@dataclass(frozen=True)
class Finding:
    """
    One thing that a stage saw.

    :ivar text: for people; without credentials.
    :ivar hint_id: stable, for programs; empty where there is nothing to do.
    :ivar hint: the cause and what to do, in the names of the project's settings.
    """

    text: str
    state: State = "ok"
    hint_id: str = ""
    hint: str = ""


@dataclass(frozen=True)
class StageReport:
    """
    What a stage found.

    :ivar seconds: how long it took.
    :ivar transcript: the lines of the SMTP dialogue, ``"C: …"`` and ``"S: …"``, without
        credentials and message.
    """

    stage: str
    findings: tuple[Finding, ...]
    seconds: float = 0.0
    transcript: tuple[str, ...] = ()

    @property
    def state(self) -> State:
        """The worst state of its findings."""
        return max((f.state for f in self.findings), key=STATES.index, default="ok")


class Obstacle(Exception):
    """A stage failed, and no error that sending raises stands for it."""

    def __init__(self, *findings: Finding) -> None:
        super().__init__()
        self.findings = list(findings)


def failed(error: SMTPError, options: Options) -> Finding:
    """Return the finding that an error makes, with the hint of the table."""
    hint = hint_for(error, options)
    if hint is None:
        return Finding(str(error), "failed")
    return Finding(str(error), "failed", hint.id, hint.explain(options))


def advised(text: str, state: State, hint_id: str, options: Options) -> Finding:
    """Return a finding with one of the hints below."""
    return Finding(text, state, hint_id, ADVICE[hint_id].explain(options))


_ADVICE: Final = (
    Hint(
        id="check-timeout",
        cause="The whole check has a time limit.",
        advice="Raise it with --timeout to see how long the server takes.",
    ),
    Hint(
        id="no-address-of-family",
        cause="The name has only addresses of the other kind.",
        advice="Leave -4 and -6 away, or check the DNS records of {host}.",
    ),
    Hint(
        id="address-unreachable",
        cause="This address does not answer, another one does: connections take "
        "longer, and fail where only this one is tried.",
        advice="Mend this machine's route to it (IPv6, often), or remove it from DNS.",
    ),
    Hint(
        id="ehlo-name-unqualified",
        cause="Some servers refuse mail from a client whose name in EHLO is not a full "
        "host name, or take it for spam.",
        advice="Set {local_hostname} to this machine's full name in DNS.",
    ),
    Hint(
        id="tls-not-used",
        cause="Mail goes over the network in clear, though the server offers STARTTLS.",
        advice="Set {use_tls} to True.",
    ),
    Hint(
        id="certificate-not-verified",
        cause="The ssl_context in use accepts certificates of others, so anybody in "
        "between can read and change the mail.",
        advice="Override ssl_context with one that verifies; {ssl_cafile} names a "
        "private authority.",
    ),
    Hint(
        id="certificate-expires-soon",
        cause="No mail is sent from the day on which the certificate expires.",
        advice="Whoever runs the server must renew it; --cert-days sets when to warn.",
    ),
    Hint(
        id="login-not-tried",
        cause="The settings send {username} and {password} in clear, and a check does "
        "not.",
        advice="Set {use_tls} (port 587) or {use_ssl} (port 465).",
    ),
    Hint(
        id="login-not-tried-unverified",
        cause="The ssl_context in use accepts certificates of others, and a check "
        "sends no password over such a connection.",
        advice="Override ssl_context with one that verifies certificate and host "
        "name; {ssl_cafile} names a private authority.",
    ),
    Hint(
        id="fewer-connections-allowed",
        cause="The server allows fewer connections at once than were opened.",
        advice="Keep {max_connections} times the number of processes below that.",
    ),
    Hint(
        id="smtputf8-needed",
        cause="The server takes addresses in ASCII only.",
        advice="Use such an address, or a server that offers SMTPUTF8.",
    ),
)
ADVICE: Final = {hint.id: hint for hint in _ADVICE}
