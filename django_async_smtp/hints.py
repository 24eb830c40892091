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

_ENHANCED_CODE = re.compile(r"#?([245]\.\d{1,3}\.\d{1,3})\b")
_ADDRESS = re.compile(r"\S*@\S*")

# Enough of a reply to match: patterns take their time on longer ones.
_LENGTH: Final = 1000

TRANSACTION: Final[tuple[Stage, ...]] = ("mail", "rcpt", "data", "body")
# 421 stands for itself.
TEMPORARY: Final = tuple(range(422, 500))


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
    :ivar text: a regular expression found in what was said (``words``), whatever the
        case.
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
            and (not self.text or bool(re.search(self.text, words(error), re.I)))
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


def words(error: SMTPError) -> str:
    """
    Return what the server said, its reply code first, or what the system said.

    Without what this side said, and without addresses: a host or a recipient may be
    named "relay".
    """
    before, _, after = error.message.partition(error.server)
    said = (after or before).lstrip(": ")[:_LENGTH]
    return " ".join(_ADDRESS.sub("", said).split())


def _reply(error: SMTPError) -> tuple[int, str]:
    """Return the reply code and the enhanced code of an error; 0 and "": none."""
    code, text = 0, b""
    if isinstance(error, errors.ResponseError):
        code, text = error.smtp_code, cast("bytes", error.smtp_error)
    elif isinstance(error, errors.RecipientsRefused):
        code, text = next(iter(error.recipients.values()))
    enhanced = _ENHANCED_CODE.match(text.decode("ascii", "replace"))
    return code, enhanced[1] if enhanced else ""


def _is_temporary(error: SMTPError, options: Options) -> bool:
    return error.temporary


def _is_final(error: SMTPError, options: Options) -> bool:
    return not error.temporary


def _maybe_delivered(error: SMTPError, options: Options) -> bool:
    return error.maybe_delivered


def _is_localhost_in_container(error: SMTPError, options: Options) -> bool:
    return is_this_machine(options.host) and is_in_container()


def _is_localhost(error: SMTPError, options: Options) -> bool:
    return is_this_machine(options.host)


def _has_source_address(error: SMTPError, options: Options) -> bool:
    return options.source_address is not None


def _is_port_often_blocked(error: SMTPError, options: Options) -> bool:
    return options.port in {25, 465, 587}


def _is_smtps_port_without_tls(error: SMTPError, options: Options) -> bool:
    return options.port == 465 and not options.use_ssl


def _is_tls_from_the_start(error: SMTPError, options: Options) -> bool:
    return options.use_ssl


def _starts_in_plaintext(error: SMTPError, options: Options) -> bool:
    return not options.use_ssl


def _has_no_tls(error: SMTPError, options: Options) -> bool:
    return not (options.use_tls or options.use_ssl)


def _has_login(error: SMTPError, options: Options) -> bool:
    return options.uses_login


def _has_no_login(error: SMTPError, options: Options) -> bool:
    return not options.uses_login


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
    "retries",
)

# Of two rows: with a login, other settings may mend it than without.
_NO_RELAYING: Final = (
    r"\brelay(ing)?\b.*\b(denied|prohibited|permitted|allowed|rejected)|"
    r"\b(not|unable|cannot|can't|denied|prohibited|for)\b.*\brelay|rcpthosts"
)
_OWN_DOMAINS_ONLY: Final = "The server sends to its own domains only, for this client."

HINTS: Final = (
    # No answer to the whole message.
    Hint(
        id="maybe-delivered",
        when=_maybe_delivered,
        cause="The message went out whole, but the server's answer to it was lost.",
        advice="It may have arrived: find out before you send it again.",
    ),
    # No connection.
    Hint(
        id="localhost-in-container",
        error=errors.ConnectionRefused,
        when=_is_localhost_in_container,
        cause="Inside a container, localhost is the container itself.",
        advice="Set {host} to the name of the mail server or of its container; if a "
        "server should listen in this one, check {port}.",
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
        id="source-address",
        stages=("connect",),
        when=_has_source_address,
        text="assign requested address|address family|address already in use",
        cause="{source_address} cannot be used to connect to this server.",
        advice="It must be an address of this machine, of the same kind (IPv4 or IPv6) "
        'as the server\'s, and its port mostly 0: ("192.0.2.1", 0).',
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
        "listens there, too. If {host} is in your own network, check its firewall.",
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
        text="unreachable|no route to host",
        cause="This machine has no route to the server's address.",
        advice="Check {host}, this machine's network, and IPv6 where the address is "
        "one.",
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
        text="wrong.version.number|record.layer.failure|packet.length.too.long",
        when=_is_tls_from_the_start,
        cause="This port does not speak TLS from the start.",
        advice="Set {use_tls} instead of {use_ssl} (the port is then mostly 587), or "
        "{port} to 465.",
    ),
    Hint(
        id="starttls-not-offered",
        stages=("tls",),
        error=errors.NotSupported,
        when=_is_localhost,
        cause="The mail server on this machine does not offer STARTTLS.",
        advice="It needs none for what stays on this machine: set {use_tls} to False.",
    ),
    Hint(
        id="starttls-not-offered",
        stages=("tls",),
        error=errors.NotSupported,
        cause="The server does not offer STARTTLS on this port, or a firewall in "
        "between hides it.",
        advice="Set {port} to 587; or {use_ssl} instead of {use_tls}, and {port} to "
        "465.",
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
        text="(host ?name|ip address) mismatch|doesn't match",
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
        text="unable to (get (local )?issuer|verify)",
        cause="The certificate's issuer is unknown here: a private authority, or the "
        "server does not send its intermediate certificate.",
        advice="Set {ssl_cafile} to the authority's certificate, in PEM; for a public "
        "one update this machine's CA certificates.",
    ),
    Hint(
        id="certificate-against-rfc-5280",
        error=errors.CertificateError,
        text="key identifier|basic constraints|key ?usage|(subject|issuer).* empty",
        cause="The certificate, or its authority's, breaks RFC 5280, on which Python "
        "insists from 3.13 on.",
        advice="Both must be issued anew, with all extensions that the error asks for.",
    ),
    Hint(
        id="certificate-invalid",
        error=errors.CertificateError,
        cause="The server's certificate cannot be trusted.",
        advice="Check that {host} is the right server; if so, it needs another "
        "certificate.",
    ),
    Hint(
        id="client-certificate",
        error=errors.TLSError,
        text=r"certificate.required|alert.(bad|no|unsupported).certificate|"
        r"alert.certificate.(unknown|expired|revoked)|alert.unknown.ca",
        cause="The server wants a client certificate, or does not accept this one.",
        advice="Set {ssl_certfile} to one that it knows.",
    ),
    Hint(
        id="tls-version",
        stages=("tls",),
        text="unsupported.protocol|protocol.version|key.too.(small|weak)|legacy",
        cause="The server's TLS is older than this machine allows: Python wants TLS "
        "1.2 or later.",
        advice="The server must be updated; its documentation may name another {host}.",
    ),
    Hint(
        id="tls-version",
        stages=("tls",),
        text="handshake.failure",
        cause="The server has no TLS version or cipher that this machine allows, or it "
        "wants a client certificate.",
        advice="The server must be updated, or {ssl_certfile} set to a certificate "
        "that it knows.",
    ),
    Hint(
        id="tls-timeout",
        error=errors.TLSTimeout,
        when=_is_tls_from_the_start,
        cause="The TLS handshake got no answer: mostly, the port does not speak TLS "
        "from the start.",
        advice="Set {port} to 465; or {use_tls} instead of {use_ssl}, and {port} to "
        "587.",
    ),
    Hint(
        id="tls-timeout",
        error=errors.TLSTimeout,
        cause="The server agreed to STARTTLS and was silent then: it is overloaded, "
        "or a firewall in between disturbs TLS.",
        advice="Try {use_ssl} instead of {use_tls}, and {port} 465.",
    ),
    Hint(
        id="tls-failed",
        stages=("tls",),
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
        cause="This port speaks TLS from the start: the server waits for this side.",
        advice="Set {use_ssl}, and not {use_tls}; or {port} to 587.",
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
        codes=(-1, 200, 201),
        cause="What answers at {server} is no mail server.",
        advice="Check {host} and {port}: 587 with {use_tls}, 465 with {use_ssl}.",
    ),
    Hint(
        # An FTP server's greeting is 220, too.
        id="no-smtp-server",
        stages=("ehlo",),
        codes=(500, 502, 530),
        cause="What answers at {server} knows neither EHLO nor HELO: it is no mail "
        "server, an FTP server perhaps.",
        advice="Check {host} and {port}: 587 with {use_tls}, 465 with {use_ssl}.",
    ),
    Hint(
        id="no-smtp-server",
        stages=("greeting",),
        # Not the server's words, but what this side calls a line without an end.
        text=r"^500 Line too long\.$",
        cause="What answers at {server} goes on without an end of line: it is no mail "
        "server.",
        advice="Check {host} and {port}: 587 with {use_tls}, 465 with {use_ssl}.",
    ),
    Hint(
        id="no-smtp-reply",
        codes=(-1,),
        cause="The server's answer is no SMTP: a proxy or firewall in between "
        "disturbs, or the server is broken.",
        advice="Check {host} and {port}; with TLS ({use_tls} or {use_ssl}) nothing in "
        "between can disturb.",
    ),
    # Sizes and limits.
    Hint(
        id="message-too-large",
        enhanced=("5.3.4", "5.2.3"),
        cause="The message is larger than the server allows (SIZE in its EHLO).",
        advice="Send links instead of attachments, or ask for a higher limit.",
    ),
    Hint(
        id="mailbox-full",
        stages=("rcpt", "data", "body"),
        text=r"[45]\.2\.2\b|over ?quota|mailbox\b.*\b(full|quota)",
        cause="The recipient's mailbox is full.",
        advice="Only the recipient can mend that.",
    ),
    Hint(
        id="mailbox-busy",
        stages=("rcpt",),
        text="user you are trying to contact is receiving",
        cause="The recipient's mailbox gets too much mail just now.",
        advice="Try again later: {retries} or a queue does.",
    ),
    Hint(
        id="too-many-connections",
        text=r"too many (\S+ ){0,3}(connections|sessions)\b|"
        r"\bconnections? (\S+ ){0,4}(limit|exceed|max)|thread limit|"
        r"\b(max\w*|limit) (\S+ ){0,4}connections|"
        r"(concurrent|simultaneous|parallel) (\S+ )?(connections|sessions)",
        cause="The server allows this machine, or account, no more connections at "
        "once.",
        advice="Lower {max_connections}: it counts for each process. See smtpcheck "
        "--connections.",
    ),
    Hint(
        id="too-many-connections",
        codes=(432,),
        enhanced=("", "4.3.2"),
        cause="The server allows this account no more connections at once.",
        advice="Lower {max_connections}: it counts for each process. See smtpcheck "
        "--connections.",
    ),
    Hint(
        id="sending-quota",
        text=r"credits exceeded|messaging limits|5\.4\.5\b|per (hour|day|month)\b|"
        r"(send|sending|daily|hourly|monthly|message|e-?mail) "
        r"((message|sending|send) )?(limit|quota)",
        cause="The account has sent as much as the provider allows it for the hour, "
        "the day or the month.",
        advice="Wait, send less, or ask the provider for a higher limit.",
    ),
    Hint(
        id="login-rate",
        stages=("auth",),
        codes=(421, *TEMPORARY),
        text=r"too many|\brate\b|throttl|limit",
        cause="The server limits how often this account logs in.",
        advice="Wait, and check {password}: failed logins count, too. Then raise "
        "{idle_timeout}, so that connections are used longer.",
    ),
    Hint(
        id="sending-rate",
        text=r"throttl|\brate(.?limit\w*)?\b|too (fast|quickly)|slow down|"
        r"too (many|much) (e-?)?(mails?|messages)\b(?! (in|on|per|for) )|"
        r"per (second|minute)\b|too many recipients from|unexpected volume",
        cause="More messages were sent than the server allows in this time.",
        advice="Set {rate_limit} to what the provider allows, divided by the number "
        "of processes.",
    ),
    Hint(
        id="idle-connection",
        codes=(421, 451),
        text=r"4\.4\.2\b|(command|data|idle) time-?out|inactiv|"
        r"time-?out (waiting|exceeded|- closing)",
        cause="The server waited too long for this side: the connection was idle, or "
        "the network is slow.",
        advice="Lower {idle_timeout} below the server's own limit.",
    ),
    Hint(
        id="server-storage",
        enhanced=("4.3.1",),
        cause="The server has too little space or memory left to take mail.",
        advice="Only its operator can mend that; {retries} helps over a short time.",
    ),
    # Who this side is.
    Hint(
        id="ehlo-name",
        stages=("ehlo", "mail", "rcpt"),
        codes=(421, 450, 501, 504, 550, 553, 554),
        text=r"\b(helo|ehlo)\b(?!(/ehlo)? first)",
        cause="The server does not accept the name that this machine says in EHLO.",
        advice="Set {local_hostname} to its full name in DNS.",
    ),
    Hint(
        id="ehlo-name",
        stages=("ehlo",),
        codes=(501, 504),
        cause="The server refused EHLO, mostly because of the name in it.",
        advice="Set {local_hostname} to this machine's full name in DNS.",
    ),
    Hint(
        id="not-authenticated-domain",
        stages=TRANSACTION,
        text=r"\b(open)?spf\b|\b(dkim|dmarc)\b|5\.7\.(2[0-46]|509)\b",
        cause="The domain of the From address does not vouch for this server.",
        advice="Publish SPF and DKIM records for the domain of DEFAULT_FROM_EMAIL as "
        "the provider of {host} says.",
    ),
    Hint(
        id="reverse-dns",
        text=r"\bptr\b|reverse.?(dns|host ?name|lookup)|\brdns\b|cannot find your|"
        r"[45]\.7\.25\b",
        cause="The address of this machine has no name in DNS (PTR record), or one "
        "that does not lead back to it.",
        advice="Have your hosting provider set it, or send through a provider's relay "
        "(its name in {host}).",
    ),
    # TLS and the login first.
    Hint(
        id="auth-needs-tls",
        stages=("auth",),
        error=errors.NotSupported,
        text="AUTH is not offered",
        when=_has_no_tls,
        cause="The server offers no login, at least not without TLS.",
        advice="Set {use_tls} (port 587), or {use_ssl} (port 465); or empty {username} "
        "and {password} if it lets this machine send without.",
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
        id="auth-needs-tls",
        text=r"^5(23|30|38) .*(starttls|\btls|encrypt|\bssl|5\.7\.1[01]\b)|"
        r"\bstarttls (is )?required",
        cause="The server wants TLS first.",
        advice="Set {use_tls} (port 587), or {use_ssl} (port 465).",
    ),
    Hint(
        id="login-first",
        stages=TRANSACTION,
        codes=(530,),
        when=_has_no_login,
        cause="The server wants a login before it takes mail.",
        advice="Set both {username} and {password}.",
    ),
    Hint(
        # "Access denied" is what Postfix says on its submission port.
        id="login-first",
        stages=("mail", "rcpt"),
        codes=(503, 505, 550, 551, 553, 554),
        text=r"\bauthenticat|\bauth\b|\blog(ged)?.?in\b|"
        r"unauthenticated senders|^554 .*(host|recipient address) rejected: access",
        when=_has_no_login,
        cause="The server wants a login before it takes mail.",
        advice="Set both {username} and {password}.",
    ),
    # Who is kept out.
    Hint(
        id="greylisting",
        stages=TRANSACTION,
        codes=(421, *TEMPORARY),
        text=r"gr[ae]y.?list|postgrey|^45. 4\.7\.1 (please )?try again( later)?\W*$",
        cause="The server puts first messages of an unknown sender off (greylisting).",
        advice="Try again in some minutes: {retries} or a queue does.",
    ),
    Hint(
        id="address-blocked",
        stages=("greeting", "ehlo", "auth", "mail", "rcpt"),
        text=r"(block|black|deny).?list|spamhaus|\brbl\b|dnsbl|reputation|your ip\b|"
        r"\b(ip|host|client)\b.*\b(blocked|banned|listed|rejected)|(banned|unauthorized).*\bip\b",
        codes=(421, 450, 451, 521, 525, 550, 553, 554, 571),
        cause="The server refuses this machine's address: it is on a block list, or "
        "not allowed there.",
        advice="Send through a provider's relay (its name in {host}), or ask the "
        "server's operator to allow the address.",
    ),
    Hint(
        id="account-blocked",
        stages=("auth", "mail", "data", "body"),
        text=r"bad outbound sender|unusual sending|sending (is )?paused|525 5\.7\.13\b|"
        r"account\b.*\b(suspended|disabled|blocked|locked)",
        codes=(525, 535, 550, 553, 554),
        cause="The provider stopped this account from sending.",
        advice="Only the provider can mend that; its text, or its console, tells why.",
    ),
    # The login.
    Hint(
        id="no-auth-method-in-common",
        stages=("auth",),
        error=errors.NotSupported,
        cause="The server and this client know no login method in common.",
        advice="This client knows PLAIN, LOGIN and CRAM-MD5: turn one on at the "
        "server. If it offers only XOAUTH2, it takes no passwords: set {host} to "
        "another relay.",
    ),
    Hint(
        id="no-auth-method-in-common",
        stages=("auth",),
        codes=(500, 502, 504),
        cause="The server does not know the login methods that it offers.",
        advice="Set {port} to 587 with {use_tls}: mail servers log in on other ports "
        "than they take mail from each other.",
    ),
    Hint(
        id="microsoft-basic-auth-off",
        text=r"5\.7\.30\b|basic authentication is",
        cause="Microsoft takes no passwords for this account: basic authentication is "
        "off.",
        advice="It wants OAuth, which this backend does not know: set {host} to "
        "another relay (Azure Communication Services, High Volume Email).",
    ),
    Hint(
        id="microsoft-basic-auth-off",
        text=r"5\.7\.139\b(?!.*credentials were incorrect)",
        cause="Microsoft 365 takes no password for this mailbox: basic authentication "
        "(SMTP AUTH) is off for it, or a security policy forbids it.",
        advice="Have SMTP AUTH turned on for the mailbox. Where only OAuth is allowed, "
        "set {host} to another relay (Azure Communication Services).",
    ),
    Hint(
        id="gmail-app-password",
        stages=("auth",),
        codes=(534, 535),
        text="application-specific|gsmtp|google|badcredentials",
        cause="Google does not take the account's own password, or this one is wrong.",
        advice="Set {password} to an app password (it needs 2-step verification), and "
        "{username} to the whole address.",
    ),
    Hint(
        # In these capitals it is Amazon's; others write it, too.
        id="ses-credentials",
        stages=("auth",),
        codes=(535,),
        text="(?-i:Authentication Credentials Invalid)",
        cause="Amazon SES refused {username} and {password}: they are neither AWS "
        "access keys nor valid in other regions.",
        advice='Create them with "Create SMTP credentials" in the SES console, in the '
        "region of {host}.",
    ),
    Hint(
        id="sendgrid-api-key",
        stages=("auth",),
        codes=(535,),
        text="authorization grant is invalid|bad username / password",
        cause="SendGrid refused {username} and {password}.",
        advice='Set {username} to the word "apikey" and {password} to an API key that '
        "may send mail.",
    ),
    Hint(
        id="login-temporary-failure",
        stages=("auth",),
        codes=(421, *TEMPORARY),
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
    # The sender.
    Hint(
        id="from-is-not-the-mailbox",
        text=r"5\.7\.60\b|5\.2\.252\b|SendAsDenied",
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
        text=r"sender (identity|signature)|sender\b.*\bnot (verified|validated)",
        cause="The provider (SendGrid, for one) sends only from addresses that were "
        "verified there.",
        advice="Set DEFAULT_FROM_EMAIL to such a sender identity, or verify this one.",
    ),
    Hint(
        id="sender-is-not-yours",
        stages=TRANSACTION,
        text=r"not owned by|not allowed to send|send as\b|disallowed as\b|"
        r"sender\b.*\b(mismatch|not match|not (permitted|allowed))|"
        r"from\b.*\bmust (be (the )?same|equal|match)|not local sender",
        codes=(501, 550, 551, 553, 554),
        cause="The account that logs in may not send as this address.",
        advice="Set DEFAULT_FROM_EMAIL to an address of the account of {username}.",
    ),
    Hint(
        id="sender-domain",
        stages=("mail", "rcpt"),
        text=r"[45]\.1\.8\b.*\bdomain|sender\b.*\bdomain\b.*\bnot (exist|found)|"
        r"sender address rejected: (domain|need fully)|domain of sender",
        cause="The domain of the sender's address has no entry in DNS.",
        advice="Set DEFAULT_FROM_EMAIL to an address whose domain exists; Django's own "
        "default is at localhost.",
    ),
    Hint(
        id="sender-syntax",
        stages=("mail",),
        codes=(501, 553, 555),
        text=r"5\.1\.[37]\b|syntax|valid|malformed|domain name",
        cause="The sender is no full address: a user name, perhaps.",
        advice="Set DEFAULT_FROM_EMAIL to an address with a domain that exists.",
    ),
    Hint(
        id="sender-refused",
        stages=("rcpt",),
        text=r"sender (address )?(rejected|denied|refused|verif)",
        when=_is_final,
        cause="The server is not willing to send for this address.",
        advice="Check DEFAULT_FROM_EMAIL and from_email: mostly the address must "
        "belong to the account of {username}.",
    ),
    # The recipient.
    Hint(
        id="relaying-denied",
        stages=("mail", "rcpt"),
        text=_NO_RELAYING,
        when=_has_login,
        cause=_OWN_DOMAINS_ONLY,
        advice="Check that {host} and {port} (587) are what the provider documents for "
        "sending, and that {username} may send from DEFAULT_FROM_EMAIL.",
    ),
    Hint(
        id="relaying-denied",
        stages=("mail", "rcpt"),
        text=_NO_RELAYING,
        cause=_OWN_DOMAINS_ONLY,
        advice="Log in ({username}, {password}) at its submission port (587), or have "
        "this machine's address allowed to relay.",
    ),
    Hint(
        id="unknown-recipient",
        stages=("rcpt", "data", "body"),
        text=r"5\.1\.([1-36]|10)\b|5\.4\.1\b.*\brecipient|no such|unrout\w+ address|"
        r"(user|recipient|mailbox|account)\b.*\b(unknown|unavailable|disabled|invalid|"
        r"not? (found|exist|known|available)|doesn't exist|not a valid)|"
        r"\b(unknown|invalid) (\w+ )?(user|recipient|mailbox)",
        codes=(550, 551, 553, 554),
        cause="The recipient does not exist there.",
        advice="Check the address; go on sending to it harms the sender's reputation.",
    ),
    Hint(
        id="recipient-domain",
        stages=("rcpt",),
        enhanced=("4.1.1", "4.1.2"),
        cause="The server cannot find the recipient or its domain just now.",
        advice="Check the address. If it is right, DNS fails: try again later.",
    ),
    Hint(
        id="too-many-recipients",
        stages=("rcpt", "data", "body"),
        text=r"too many recipients|[45]\.5\.3\b",
        cause="The server takes no more recipients, in one message or for the moment.",
        advice="Try again later, with fewer recipients in a message.",
    ),
    # What the server thinks of it.
    Hint(
        id="content-refused",
        stages=("data", "body"),
        codes=(541, 550, 552, 554, 571),
        text=r"spam|virus|malware|phish|content|policy|attachment|security|"
        r"(block|black|deny).?list|[su]r[bi]+l\b|reputation|5\.7\.[01]\b",
        cause="The server takes the message for spam, or its policy forbids it.",
        advice="Its text tells more; check links, attachments and the From address.",
    ),
    Hint(
        id="message-too-large",
        stages=("mail", "data", "body"),
        codes=(552,),
        cause="The message is larger than the server allows (SIZE in its EHLO), or "
        "there is no room for it.",
        advice="Send links instead of attachments, or ask for a higher limit.",
    ),
    Hint(
        id="sender-refused",
        error=errors.SenderRefused,
        codes=(501, 550, 551, 553, 554, 571),
        cause="The server is not willing to send for this address.",
        advice="Check DEFAULT_FROM_EMAIL and from_email: mostly the address must "
        "belong to the account of {username}.",
    ),
    # The server.
    Hint(
        id="server-busy",
        codes=(421,),
        cause="The server is busy, is being restarted, or limits this client.",
        advice="Try again later; its text says more.",
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
        id="temporary-failure",
        codes=TEMPORARY,
        cause="The server cannot take this just now, or wants to see it tried again.",
        advice="Try again later: {retries} or a queue does. Its text says more.",
    ),
    Hint(
        id="server-refuses-client",
        stages=("greeting",),
        error=errors.ResponseError,
        cause="The server does not want connections from this machine.",
        advice="Its text tells why; a provider's relay takes its customers' logins "
        "at {port} 587.",
    ),
    # The connection.
    Hint(
        id="greeting-timeout",
        stages=("greeting",),
        error=errors.ReplyTimeout,
        when=_starts_in_plaintext,
        cause="The server is connected and silent: it is overloaded, or the port "
        "speaks TLS from the start, or is no mail server's.",
        advice="Check {port}: 465 needs {use_ssl}. If the server is slow, raise "
        "{timeout}.",
    ),
    Hint(
        id="connection-closed",
        stages=("greeting",),
        error=errors.Disconnected,
        when=_starts_in_plaintext,
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
