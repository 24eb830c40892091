"""
What causes a failure, and what to do about it: a table.

The first row that matches counts, so what a provider says stands above what a reply
code says, and both above what the kind of error says.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

from . import errors
from .errors import SMTPError, Stage

if TYPE_CHECKING:
    from .options import Options

Condition = Callable[[SMTPError, "Options"], bool]

_ENHANCED_CODE = re.compile(r"[245]\.\d{1,3}\.\d{1,3}\b")

OPENING: Final[tuple[Stage, ...]] = ("greeting", "ehlo", "auth")
TRANSACTION: Final[tuple[Stage, ...]] = ("mail", "rcpt", "data", "body")


@dataclass(frozen=True, kw_only=True)
class Hint:
    """
    A row: what must match, all that is given of it, and what it means then.

    ``cause`` and ``advice`` name an option as ``{use_tls}``, which becomes the name of
    the project's own setting, and the server as ``{server}``.

    :ivar id: stable, for monitoring.
    :ivar stages: where it happens; empty: anywhere.
    :ivar error: the error's class.
    :ivar codes: reply codes (RFC 5321 section 4.2).
    :ivar enhanced: enhanced status codes (RFC 3463).
    :ivar text: a regular expression found in the error's message, whatever the case.
    :ivar when: what else must be true.
    """

    id: str
    stages: tuple[Stage, ...] = ()
    error: type[SMTPError] = SMTPError
    codes: tuple[int, ...] = ()
    enhanced: tuple[str, ...] = ()
    text: str = ""
    when: Condition | None = None
    cause: str
    advice: str

    def matches(self, error: SMTPError, options: Options) -> bool:
        """Whether it is about this error."""
        code, enhanced = _reply(error)
        return (
            isinstance(error, self.error)
            and (not self.stages or error.stage in self.stages)
            and (not self.codes or code in self.codes)
            and (not self.enhanced or enhanced in self.enhanced)
            and (not self.text or bool(re.search(self.text, error.message, re.I)))
            and (self.when is None or self.when(error, options))
        )

    def explain(self, options: Options) -> str:
        """Return the cause and the advice, in the names of the settings in use."""
        names = {name: options.setting(name) for name in _NAMED}
        text = f"{self.cause} {self.advice}"
        return text.format(server=options.server, **names)


def hint_for(error: SMTPError, options: Options) -> Hint | None:
    """Return the first hint that matches an error."""
    return next((hint for hint in HINTS if hint.matches(error, options)), None)


def explained(error: SMTPError, options: Options) -> SMTPError:
    """Return the error, with its hint."""
    hint = hint_for(error, options)
    if hint is not None:
        error.add_hint(hint.explain(options))
    return error


def is_this_machine(host: str) -> bool:
    """Whether a host name or address is this machine's own, whatever the network."""
    host = host.strip("[]").lower().rstrip(".")
    return (
        host in {"localhost", "::1", "ip6-localhost"}
        or host.endswith(".localhost")
        or re.fullmatch(r"127(\.\d+){3}", host) is not None
    )


def is_in_container() -> bool:
    """Whether this process runs in a container (Docker, Podman, Kubernetes)."""
    return "KUBERNETES_SERVICE_HOST" in os.environ or any(
        Path(mark).exists() for mark in ("/.dockerenv", "/run/.containerenv")
    )


def _reply(error: SMTPError) -> tuple[int, str]:
    """Return the reply code and the enhanced code of an error; 0 and "": none."""
    code, text = 0, b""
    if isinstance(error, errors.ResponseError):
        code, text = error.smtp_code, cast("bytes", error.smtp_error)
    elif isinstance(error, errors.RecipientsRefused):
        code, text = next(iter(error.recipients.values()))
    enhanced = _ENHANCED_CODE.match(text.decode("ascii", "replace"))
    return code, enhanced[0] if enhanced else ""


def _is_temporary(error: SMTPError, options: Options) -> bool:
    return error.temporary


def _is_localhost_in_container(error: SMTPError, options: Options) -> bool:
    return is_this_machine(options.host) and is_in_container()


def _is_port_often_blocked(error: SMTPError, options: Options) -> bool:
    return options.port in {25, 465, 587}


def _is_smtps_port_without_tls(error: SMTPError, options: Options) -> bool:
    return options.port == 465 and not options.use_ssl


def _is_tls_from_the_start(error: SMTPError, options: Options) -> bool:
    return options.use_ssl


def _has_no_tls(error: SMTPError, options: Options) -> bool:
    return not (options.use_tls or options.use_ssl)


_NAMED: Final = (
    "host",
    "port",
    "username",
    "password",
    "use_tls",
    "use_ssl",
    "timeout",
    "ssl_certfile",
    "ssl_cafile",
    "local_hostname",
    "source_address",
    "max_connections",
    "idle_timeout",
    "rate_limit",
)

HINTS: Final = (
    # No connection.
    Hint(
        id="localhost-in-container",
        error=errors.ConnectionRefused,
        when=_is_localhost_in_container,
        cause="Inside a container, localhost is the container itself.",
        advice="Set {host} to the name of the mail server or of its container, unless "
        "a server should listen at {server}.",
    ),
    Hint(
        id="connection-refused",
        error=errors.ConnectionRefused,
        cause="No server listens at {server}.",
        advice="Check {host} and {port}: 587 with {use_tls}, 465 with {use_ssl}; "
        "and whether the mail server runs.",
    ),
    Hint(
        id="connection-forbidden",
        error=errors.ConnectionForbidden,
        cause="A firewall on this machine, or SELinux, forbids the connection.",
        advice="For SELinux: setsebool -P httpd_can_network_connect on.",
    ),
    Hint(
        id="resolver-failure",
        error=errors.UnknownHost,
        when=_is_temporary,
        cause="This machine's DNS resolver gave no answer.",
        advice="Check its network and resolver (/etc/resolv.conf), then try again; "
        "the name in {host} may be right.",
    ),
    Hint(
        id="unknown-host",
        error=errors.UnknownHost,
        cause="The name in {host} has no address.",
        advice="Check its spelling, and this machine's DNS.",
    ),
    Hint(
        id="rate-limit",
        error=errors.RateLimited,
        cause="{rate_limit} would have let the message go only after {timeout}.",
        advice="Raise {rate_limit} or {timeout}, or send fewer messages at once.",
    ),
    Hint(
        id="connections-in-use",
        error=errors.PoolTimeout,
        cause="More messages are sent at once than {max_connections} connections take.",
        advice="Raise {max_connections} as far as the server allows, or send less.",
    ),
    Hint(
        id="port-blocked",
        error=errors.ConnectTimeout,
        when=_is_port_often_blocked,
        cause="Nothing answers: many hosting providers block ports 25, 465 and 587.",
        advice="Ask yours to open it, or set {port} to 2525 if the mail provider "
        "listens there, too.",
    ),
    Hint(
        id="connect-timeout",
        error=errors.ConnectTimeout,
        cause="Nothing answers: a firewall drops the packets, or the host is down.",
        advice="Check {host} and {port}, and the firewalls in between.",
    ),
    Hint(
        id="unreachable",
        stages=("connect",),
        text=r"unreachable|no route to host|cannot assign requested address",
        cause="This machine has no route to the server's address.",
        advice="Check its network, and IPv6 where the address is one; "
        "{source_address} must be an address of this machine.",
    ),
    Hint(
        id="connect-failed",
        stages=("connect",),
        cause="The server cannot be reached.",
        advice="Check {host} and {port}, and whether a firewall blocks them.",
    ),
    # TLS.
    Hint(
        id="wrong-version-number",
        stages=("tls",),
        text=r"wrong.version.number|record.layer.failure|packet.length.too.long",
        when=_is_tls_from_the_start,
        cause="This port does not speak TLS from the start.",
        advice="Set {use_tls} instead of {use_ssl} (the port is then mostly 587), or "
        "{port} to 465.",
    ),
    Hint(
        id="starttls-not-offered",
        stages=("tls",),
        error=errors.NotSupported,
        cause="The server does not offer STARTTLS on this port, or a firewall in "
        "between hides it.",
        advice="Set {port} to 587; or {use_ssl} instead of {use_tls} if the port "
        "speaks TLS from the start (465); no TLS only for a server on this machine.",
    ),
    Hint(
        id="starttls-refused",
        stages=("tls",),
        error=errors.ResponseError,
        cause="The server offers STARTTLS and then refuses it.",
        advice="Its own certificate may be missing: its log tells. Until that is "
        "mended, try {use_ssl} with {port} 465.",
    ),
    Hint(
        id="certificate-expired",
        error=errors.CertificateError,
        text="has expired",
        cause="The server's certificate, or one of its issuers', has expired.",
        advice="The server must get a new one; if it has, check this machine's clock.",
    ),
    Hint(
        id="certificate-not-yet-valid",
        error=errors.CertificateError,
        text="not yet valid",
        cause="The server's certificate is valid only from a later date on.",
        advice="Check the clock of this machine, then the certificate.",
    ),
    Hint(
        id="certificate-host-name",
        error=errors.CertificateError,
        text="mismatch|is not valid for|doesn't match",
        cause="The server's certificate is for another name than {host}.",
        advice="Set {host} to a name in the certificate, not to an IP address or an "
        "alias.",
    ),
    Hint(
        id="certificate-private-ca",
        error=errors.CertificateError,
        text="self.signed certificate in certificate chain",
        cause="The certificate was issued by a private authority that is not trusted "
        "here.",
        advice="Set {ssl_cafile} to that authority's certificate, in PEM.",
    ),
    Hint(
        id="certificate-self-signed",
        error=errors.CertificateError,
        text="self.signed certificate",
        cause="The server's certificate is signed by itself alone.",
        advice="Set {ssl_cafile} to that certificate, in PEM, if the server is yours; "
        "else check {host}.",
    ),
    Hint(
        id="certificate-unknown-issuer",
        error=errors.CertificateError,
        text="unable to (get|verify)",
        cause="The certificate's issuer is unknown here: a private authority, or the "
        "server does not send its intermediate certificate.",
        advice="Set {ssl_cafile} to the authority's certificate, in PEM; for a public "
        "one update this machine's CA certificates.",
    ),
    Hint(
        id="certificate-invalid",
        error=errors.CertificateError,
        cause="The server's certificate cannot be trusted.",
        advice="Compare {host} with the server's documentation; {ssl_cafile} names a "
        "private authority.",
    ),
    Hint(
        id="client-certificate",
        text="certificate.required|alert (bad|unknown|no) certificate|alert unknown ca",
        cause="The server wants a client certificate, or does not accept this one.",
        advice="Set {ssl_certfile} to one that it knows.",
    ),
    Hint(
        id="tls-version",
        stages=("tls",),
        text="unsupported.protocol|protocol.version|handshake.failure|key.too.small",
        cause="The server has no TLS version or cipher that this machine allows: "
        "OpenSSL's default is TLS 1.2 or later.",
        advice="The server must be updated; its documentation may name another {host}.",
    ),
    Hint(
        id="tls-timeout",
        error=errors.TLSTimeout,
        cause="The TLS handshake got no answer: mostly, the port does not speak TLS "
        "from the start.",
        advice="Set {use_tls} for port 587, {use_ssl} for port 465.",
    ),
    Hint(
        id="tls-failed",
        error=errors.TLSError,
        cause="The TLS handshake failed.",
        advice="Check {port} and the kind of TLS: {use_tls} (STARTTLS) for 587 and 25, "
        "{use_ssl} for 465.",
    ),
    # What listens there.
    Hint(
        id="tls-port",
        stages=("greeting",),
        error=errors.Disconnected,
        when=_is_smtps_port_without_tls,
        cause="The port speaks TLS from the start, and so waits for this side.",
        advice="Set {use_ssl} instead of {use_tls}, or {port} to 587.",
    ),
    Hint(
        id="http-server",
        stages=("greeting",),
        text=r"HTTP/\d|<html",
        cause="A web server (HTTP) answers at {server}, not a mail server.",
        advice="Check {host} and {port}: 587 with {use_tls}, 465 with {use_ssl}.",
    ),
    Hint(
        id="ssh-server",
        stages=("greeting",),
        text=r"SSH-\d",
        cause="An SSH server answers at {server}, not a mail server.",
        advice="Check {host} and {port}: 587 with {use_tls}, 465 with {use_ssl}.",
    ),
    Hint(
        id="imap-server",
        stages=("greeting",),
        text=r"\* (OK|PREAUTH|BYE)\b",
        cause="An IMAP server answers at {server}: mail is read there, not sent.",
        advice="Set {port} to 587 with {use_tls}, or 465 with {use_ssl}.",
    ),
    Hint(
        id="pop3-server",
        stages=("greeting",),
        text=r"\+OK",
        cause="A POP3 server answers at {server}: mail is fetched there, not sent.",
        advice="Set {port} to 587 with {use_tls}, or 465 with {use_ssl}.",
    ),
    Hint(
        id="no-smtp-server",
        stages=("greeting",),
        codes=(-1,),
        cause="What answers at {server} is no mail server.",
        advice="Check {host} and {port}: 587 with {use_tls}, 465 with {use_ssl}.",
    ),
    Hint(
        id="greeting-timeout",
        stages=("greeting",),
        error=errors.ReplyTimeout,
        cause="The server is connected and silent: it is overloaded, or the port "
        "speaks TLS from the start, or is no mail server's.",
        advice="Check {port}: 465 needs {use_ssl}. If the server is slow, raise "
        "{timeout}.",
    ),
    # Limits.
    Hint(
        id="too-many-connections",
        stages=(*OPENING, "mail"),
        codes=(421, 432, 450, 451, 452, 454),
        text=r"connections?\b.*(limit|exceed|many|max)|(many|limit|max|concurrent).*"
        r"connections?|4\.3\.2\b",
        cause="The server allows this machine no more connections at once.",
        advice="Lower {max_connections}: it counts for each process. See smtpcheck "
        "--connections.",
    ),
    Hint(
        id="too-many-connections",
        codes=(432,),
        cause="The server allows this account no more connections at once.",
        advice="Lower {max_connections}: it counts for each process. See smtpcheck "
        "--connections.",
    ),
    Hint(
        id="login-rate",
        stages=("auth",),
        codes=(421, 450, 451, 454),
        text="too many|rate|throttl|limit",
        cause="The server limits how often this account logs in.",
        advice="Wait; then raise {idle_timeout}, so that connections are used longer.",
    ),
    Hint(
        id="sending-rate",
        codes=(421, 450, 451, 452, 454),
        text=r"throttl|\brate\b|too (many|fast)|quota|(sending|hourly|daily) limit|"
        r"4\.7\.28\b",
        cause="More messages were sent than the server allows in this time.",
        advice="Set {rate_limit} to what the provider allows, divided by the number "
        "of processes.",
    ),
    Hint(
        id="idle-connection",
        codes=(421, 451),
        enhanced=("4.4.2",),
        cause="The server ended a connection that was idle for too long.",
        advice="Lower {idle_timeout} below the server's own limit.",
    ),
    Hint(
        id="server-busy",
        codes=(421,),
        cause="The server is busy, is being restarted, or limits this client.",
        advice="Try again later; its text says more.",
    ),
    Hint(
        id="address-blocked",
        text=r"block.?list|black.?list|spamhaus|\brbl\b|dnsbl|reputation|"
        r"access denied|your ip|client host .*(blocked|rejected)",
        codes=(450, 451, 521, 550, 553, 554, 571),
        cause="The server refuses this machine's address: it is on a block list, or "
        "not allowed there.",
        advice="Send through the relay of your provider ({host}), or ask the server's "
        "operator to allow the address.",
    ),
    # The login.
    Hint(
        id="auth-needs-tls",
        stages=("auth",),
        error=errors.NotSupported,
        text="AUTH is not offered",
        when=_has_no_tls,
        cause="The server offers no login without TLS.",
        advice="Set {use_tls} (port 587), or {use_ssl} (port 465).",
    ),
    Hint(
        id="auth-not-offered",
        stages=("auth",),
        error=errors.NotSupported,
        text="AUTH is not offered",
        cause="The server offers no login on this port.",
        advice="Set {port} to 587; or empty {username} and {password} if it lets "
        "this machine send without.",
    ),
    Hint(
        id="no-auth-method-in-common",
        stages=("auth",),
        error=errors.NotSupported,
        cause="The server and this client know no login method in common.",
        advice="A server that offers XOAUTH2 alone takes no password: use its relay "
        "or API key product. Else PLAIN or LOGIN must be turned on there.",
    ),
    Hint(
        id="microsoft-basic-auth-off",
        enhanced=("5.7.139", "5.7.30", "5.7.57"),
        cause="Microsoft 365 does not take passwords for this mailbox: basic "
        "authentication is off.",
        advice="Turn SMTP AUTH on for it, while that exists; or use OAuth, or another "
        "relay as {host} (Azure Communication Services, High Volume Email).",
    ),
    Hint(
        id="gmail-app-password",
        stages=("auth",),
        text=r"5\.7\.9\b|application-specific|gsmtp|google|badcredentials",
        cause="Google does not take the account's own password.",
        advice="Set {password} to an app password (it needs 2-step verification), and "
        "{username} to the whole address.",
    ),
    Hint(
        id="auth-needs-tls",
        codes=(530, 538),
        text=r"starttls|tls|encrypt|ssl|5\.7\.11\b",
        cause="The server wants TLS first.",
        advice="Set {use_tls} (port 587), or {use_ssl} (port 465).",
    ),
    Hint(
        id="login-temporary-failure",
        stages=("auth",),
        codes=(421, 432, 450, 451, 454),
        cause="The server could not check the login just now.",
        advice="Try again later; {username} and {password} may be right.",
    ),
    Hint(
        id="credentials-refused",
        error=errors.AuthenticationRefused,
        cause="The server refused {username} and {password}.",
        advice="Many providers want a password made for this application, or an API "
        "key, instead of the account's own; some want the whole address as "
        "{username}.",
    ),
    # The transaction.
    Hint(
        id="login-first",
        stages=TRANSACTION,
        codes=(530, 550, 553, 554),
        text=r"authenticat|authoriz|log ?in\b|530 5\.7\.[01]\b|not logged",
        when=lambda error, options: not options.uses_login,
        cause="The server wants a login before it takes mail.",
        advice="Set {username} and {password}.",
    ),
    Hint(
        id="ehlo-name",
        stages=("ehlo", "mail", "rcpt"),
        text=r"\b(helo|ehlo)\b.*(name|host|qualified|invalid|reject|syntax|fqdn)|"
        r"fully.qualified",
        cause="The server does not accept the name that this machine says in EHLO.",
        advice="Set {local_hostname} to its full name in DNS.",
    ),
    Hint(
        id="ehlo-name",
        stages=("ehlo",),
        error=errors.HeloRefused,
        cause="The server refused EHLO, mostly because of the name in it.",
        advice="Set {local_hostname} to this machine's full name in DNS.",
    ),
    Hint(
        id="from-is-not-the-mailbox",
        enhanced=("5.7.60", "5.2.252"),
        cause="The account that logs in may not send as this From address.",
        advice="Set DEFAULT_FROM_EMAIL to the address of {username}, or give that "
        "account the right to send as it.",
    ),
    Hint(
        id="ses-not-verified",
        stages=TRANSACTION,
        text=r"address(es)? (is|are) not verified|not verified.*region",
        cause="Amazon SES does not know an address: the sandbox wants those of senders "
        "and recipients verified, in the region of {host}.",
        advice="Verify the address or domain of DEFAULT_FROM_EMAIL in that region, and "
        "ask for production access.",
    ),
    Hint(
        id="sender-identity-not-verified",
        stages=TRANSACTION,
        text="sender identity",
        cause="The provider (SendGrid) sends only for verified sender identities.",
        advice="Set DEFAULT_FROM_EMAIL to a verified one, or verify this one.",
    ),
    Hint(
        id="sender-is-not-yours",
        stages=("mail", "rcpt"),
        text="not owned|not allowed to send|sender.*(mismatch|not match|not permitted)|"
        "send as",
        cause="The account that logs in may not send as this address.",
        advice="Set DEFAULT_FROM_EMAIL to an address of the account of {username}.",
    ),
    Hint(
        id="sender-syntax",
        stages=("mail",),
        codes=(501, 553, 555),
        cause="The sender is no full address: a user name, perhaps.",
        advice="Set DEFAULT_FROM_EMAIL to an address with a domain that exists.",
    ),
    Hint(
        id="message-too-large",
        codes=(552, 523, 534),
        enhanced=("5.3.4", "5.2.3", "5.3.0"),
        cause="The message is larger than the server allows (SIZE in its EHLO).",
        advice="Send links instead of attachments, or ask for a higher limit.",
    ),
    Hint(
        id="mailbox-full",
        stages=TRANSACTION,
        enhanced=("5.2.2", "4.2.2"),
        cause="The recipient's mailbox is full.",
        advice="Only the recipient can mend that.",
    ),
    Hint(
        id="message-too-large",
        stages=TRANSACTION,
        codes=(552,),
        cause="The message is larger than the server allows (SIZE in its EHLO), or the "
        "mailbox has no room for it.",
        advice="Send links instead of attachments, or ask for a higher limit.",
    ),
    Hint(
        id="relaying-denied",
        stages=("mail", "rcpt"),
        text=r"relay",
        cause="The server sends to its own domains only, for this client.",
        advice="Log in ({username}, {password}) at its submission port (587), or have "
        "this machine's address allowed to relay.",
    ),
    Hint(
        id="unknown-recipient",
        stages=("rcpt", "data", "body"),
        text=r"5\.1\.[1-3]\b|(user|recipient|mailbox|address).*(unknown|not found|"
        r"unavailable|does not exist|rejected)|unknown (user|recipient)|no such (user|"
        r"recipient|mailbox)",
        codes=(550, 551, 553, 554),
        cause="The recipient does not exist there.",
        advice="Check the address; go on sending to it harms the sender's reputation.",
    ),
    Hint(
        id="greylisting",
        stages=TRANSACTION,
        codes=(450, 451),
        text=r"gr[ae]y.?list|postpon|defer|try again|4\.7\.1\b|later",
        cause="The server puts first messages of an unknown sender off (greylisting).",
        advice="Try again in some minutes: the retries option or a queue does.",
    ),
    Hint(
        id="too-many-recipients",
        stages=("rcpt",),
        codes=(452,),
        cause="The server takes fewer recipients in one message.",
        advice="Nothing to do: the others get it in a further transaction.",
    ),
    Hint(
        id="not-authenticated-domain",
        stages=("data", "body"),
        text=r"\b(spf|dkim|dmarc)\b|5\.7\.26\b",
        cause="The domain of the From address does not vouch for this server.",
        advice="Publish SPF and DKIM records for the domain of DEFAULT_FROM_EMAIL as "
        "the provider of {host} says.",
    ),
    Hint(
        id="content-refused",
        stages=("data", "body"),
        codes=(550, 552, 554, 571),
        text=r"spam|virus|content|policy|5\.7\.1\b",
        cause="The server takes the message for spam, or its policy forbids it.",
        advice="Its text tells more; check links, attachments and the From address.",
    ),
    Hint(
        id="sender-refused",
        error=errors.SenderRefused,
        cause="The server is not willing to send for this address.",
        advice="Check DEFAULT_FROM_EMAIL and from_email: mostly the address must "
        "belong to the account of {username}.",
    ),
    # The connection.
    Hint(
        id="server-refuses-client",
        stages=("greeting",),
        error=errors.ResponseError,
        cause="The server does not want connections from this machine.",
        advice="Its text tells why; a provider's relay takes its customers' logins "
        "at {port} 587.",
    ),
    Hint(
        id="connection-closed",
        stages=("greeting",),
        error=errors.Disconnected,
        cause="The server closed the connection without a word: it does not want this "
        "machine's address, or the port speaks TLS from the start.",
        advice="Check {port}: 465 needs {use_ssl}; the server's log tells more.",
    ),
    Hint(
        id="reply-timeout",
        error=errors.ReplyTimeout,
        cause="The server was silent for too long.",
        advice="It is overloaded, or the network drops the connection; raise "
        "{timeout} if it is just slow.",
    ),
    Hint(
        id="connection-closed",
        error=errors.Disconnected,
        cause="The server closed the connection.",
        advice="Its log tells why.",
    ),
)
