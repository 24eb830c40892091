"""The stages, one after the other, over the steps that sending takes."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from .. import errors
from ..hints import HINTS
from ..logs import redacted
from ..opening import Address, Opening, resolve, translate, translated
from ..session import Session
from . import probes
from .findings import Finding, Obstacle, StageReport, State, advised, failed

if TYPE_CHECKING:
    from ..envelope import Envelope
    from ..options import Options

StageName = Literal[
    "dns",
    "connect",
    "greeting",
    "ehlo",
    "tls",
    "auth",
    "sender",
    "recipient",
    "message",
    "connections",
]
STAGES: Final[tuple[StageName, ...]] = get_args(StageName)

# What may fail while mail can be sent all the same.
SIDE_STAGES: Final = {"recipient", "connections"}

# How much of the whole time one wait for the server may take.
SHARE_OF_A_WAIT: Final = 1 / 3
# Seconds before the end at which nothing more is found out about a failure.
RESERVE: Final = 0.1

# In the order in which they are told.
EXTENSIONS: Final = ("pipelining", "8bitmime", "smtputf8", "chunking", "starttls")

_CONTAINER_ID: Final = re.compile(r"[0-9a-f]{12}")


async def diagnose(
    options: Options,
    *,
    until: StageName | None = None,
    senders: Mapping[str, str] | None = None,
    recipient: str | None = None,
    message: Envelope | None = None,
    connections: int = 0,
    timeout: float = 30.0,
    cert_days: int = 21,
    family: socket.AddressFamily = socket.AF_UNSPEC,
) -> AsyncGenerator[StageReport, None]:
    """
    Walk the way of a message to a server; yield what each stage found, as it ends.

    Sends no message but ``message``, and no credentials without TLS. A failure is not
    raised: the stages behind it are yielded as skipped.

    :param until: the last stage.
    :param senders: addresses for MAIL FROM: ``{name of the setting: address}``.
    :param recipient: an address for RCPT TO, followed by RSET.
    :param message: a message that is really sent.
    :param connections: how many connections to open at once.
    :param timeout: seconds for all of it.
    :param cert_days: a certificate that expires within so many days is a warning.
    :param family: use only addresses of this family.
    """
    request = _Request(
        senders=dict(senders or {}),
        recipient=recipient,
        message=message,
        connections=connections,
        cert_days=cert_days,
        family=family,
    )
    async with aclosing(_Diagnosis(options, request, timeout)) as diagnosis:
        for stage in diagnosis.plan():
            yield await diagnosis.report(stage)
            if stage == until:
                break


@dataclass(frozen=True)
class _Request:
    """See ``diagnose``."""

    senders: dict[str, str]
    recipient: str | None
    message: Envelope | None
    connections: int
    cert_days: int
    family: socket.AddressFamily


class _Diagnosis:
    """One server's; a stage is the method that has its name."""

    def __init__(self, options: Options, request: _Request, timeout: float) -> None:
        one_wait = min(options.timeout, timeout * SHARE_OF_A_WAIT)
        self._options = replace(options, timeout=one_wait)
        self._own_timeout = options.timeout
        self._request = request
        self._timeout = timeout
        self._deadline = asyncio.get_running_loop().time() + timeout
        self._lines: list[str] = []
        self._opening = Opening(self._options, self._note)
        self._reading_greeting: asyncio.Task[Any] | None = None
        self._session: Session | None = None
        self._others: list[Session] = []
        self._addresses: list[Address] = []
        # Whether a reply may still be due.
        self._is_broken_off = False
        # Why the later stages are out of reach.
        self._obstacle = ""
        # Whether that is so though none has failed.
        self._is_cut_off = False

    def plan(self) -> list[StageName]:
        """Return the stages, in the order in which the settings have them."""
        stages = [s for s in STAGES if s != "connections" or self._request.connections]
        if self._options.use_ssl:
            stages.remove("tls")
            stages.insert(stages.index("greeting"), "tls")
        return stages

    async def report(self, stage: StageName) -> StageReport:
        """Run a stage, within the time that is left."""
        # Connections of their own need no transaction to have worked.
        is_apart = stage == "connections" and self._session is not None
        if self._obstacle and not is_apart:
            state: State = "failed" if self._is_owed(stage) else "skipped"
            return StageReport(stage, (Finding(self._obstacle, state),))
        start = time.monotonic()
        found = await self._findings(stage)
        seconds = time.monotonic() - start
        findings = tuple(replace(f, text=self._harmless(f.text)) for f in found)
        report = StageReport(stage, findings, seconds, tuple(self._lines))
        self._lines.clear()
        # With the first sender's address, mail can be sent.
        is_over = findings[0].state == "failed" or stage != "sender"
        if report.state == "failed" and is_over:
            self._obstacle = f"not reached: {stage} failed"
        return report

    def _is_owed(self, stage: StageName) -> bool:
        """Whether nothing that failed excuses a stage that was asked for."""
        request = self._request
        asked: dict[str, object] = {
            "recipient": request.recipient,
            "message": request.message,
            "connections": request.connections,
        }
        return self._is_cut_off and bool(asked.get(stage))

    async def _findings(self, stage: StageName) -> list[Finding]:
        run: Callable[[], Awaitable[list[Finding]]] = getattr(self, stage)
        try:
            async with asyncio.timeout_at(self._deadline):
                return await run()
        except errors.SMTPError as error:
            return [self._failed(error)]
        except Obstacle as obstacle:
            return obstacle.findings
        except TimeoutError:
            self._is_broken_off = True
            text = f"not finished within the check's {self._timeout:g} s"
            return [self._advised(text, "failed", "check-timeout")]
        except asyncio.CancelledError:
            self._is_broken_off = True
            raise

    async def aclose(self) -> None:
        """Say QUIT where a server listens, and close."""
        try:
            await self._stop_reading()
            client = self._opening.client
            is_idle = client.is_connected and not self._is_broken_off
            if self._session is None and is_idle:
                self._session = Session(self._options, client)
            if self._session is not None:
                self._others.append(self._session)
            await asyncio.gather(*(session.quit() for session in self._others))
        finally:
            await self._opening.aclose()

    async def _stop_reading(self) -> None:
        reading = self._reading_greeting
        if reading is not None and not reading.done():
            # Not all of asyncio ends a task that is cancelled; a connection's end does.
            reading.cancel()
            self._opening.abort()
            await asyncio.wait({reading})
        if reading is not None and not reading.cancelled():
            # Whoever wanted to know about a failure does.
            reading.exception()

    async def dns(self) -> list[Finding]:
        options, family = self._options, self._request.family
        with translated("connect", options):
            try:
                async with asyncio.timeout(options.timeout):
                    found = await resolve(options)
            except TimeoutError:
                slow = f"no answer within {round(options.timeout, 1):g} s"
                raise socket.gaierror(socket.EAI_AGAIN, slow) from None
        addresses = dict.fromkeys(found)
        self._addresses = [
            address for address in addresses if family in (socket.AF_UNSPEC, address[0])
        ]
        if not self._addresses:
            text = f"{options.host} has no {_family_name(family)} address"
            raise Obstacle(self._advised(text, "failed", "no-address-of-family"))
        return [Finding(", ".join(_ip(address) for address in self._addresses))]

    async def connect(self) -> list[Finding]:
        attempts = await probes.connect_to_each(self._addresses, self._options)
        first = next((attempt for attempt in attempts if attempt.is_connected), None)
        for attempt in attempts:
            if attempt is not first:
                attempt.close()
        findings = [
            self._of_attempt(attempt, has_other=first is not None)
            for attempt in attempts
        ]
        if first is None or isinstance(first.outcome, OSError):
            raise Obstacle(*findings)
        self._opening.take(first.outcome)
        self._addresses = [first.address]
        return findings

    def _of_attempt(self, attempt: probes.Attempt, *, has_other: bool) -> Finding:
        """Return what is told of an address, where another one answers or none."""
        text, outcome = _told_of(attempt), attempt.outcome
        if not isinstance(outcome, OSError):
            return Finding(text)
        if has_other:
            return self._advised(text, "warning", "address-unreachable")
        error = translate(outcome, "connect", self._options)
        return replace(self._failed(error), text=text)

    async def greeting(self) -> list[Finding]:
        try:
            reply = await self._read_greeting()
        except errors.Disconnected as error:
            # Silence: it may wait for something else than SMTP.
            raise await self._found_out(self._what_listens(error), error) from error
        return [Finding(f"{reply.code} {reply.message}")]

    def _read_greeting(self) -> asyncio.Task[Any]:
        """Return the task that does; with ``use_ssl`` after the TLS handshake."""
        if self._reading_greeting is None:
            reading = self._opening.greeting()
            self._reading_greeting = asyncio.create_task(reading)
        return self._reading_greeting

    async def _what_listens(self, error: errors.SMTPError) -> Exception:
        """Return the error, or what was found out about the server."""
        options, address = self._options, self._addresses[0]
        tls = options.use_ssl or await probes.speaks_tls(address, options)
        line = await probes.first_line(address, options, tls=tls)
        hint_id = probes.protocol_of(line)
        if hint_id is not None:
            return Obstacle(_hinted(f"no greeting, but {line!r}", hint_id, options))
        if tls and not options.use_ssl:
            text = f"{error}; but it answers in TLS"
            return Obstacle(_hinted(text, "tls-port", options))
        return error

    async def _found_out(self, asking: Awaitable[Any], instead: Any) -> Any:
        """Return what asking the server finds out, in the time that is left."""
        try:
            async with asyncio.timeout_at(self._deadline - RESERVE):
                return await asking
        except TimeoutError:
            return instead

    async def ehlo(self) -> list[Finding]:
        await self._opening.ehlo()
        name = str(self._opening.client.local_hostname)
        said = Finding(f"as {name}")
        if not _is_full_host_name(name):
            text = f"as {name}, which is no full host name"
            said = self._advised(text, "warning", "ehlo-name-unqualified")
        return [said, Finding(self._extensions())]

    def _extensions(self) -> str:
        """Return what the server offers, as text."""
        client = self._opening.client
        if not self._opening.knows_ehlo:
            return "no extensions: the server knows HELO only"
        offered = client.esmtp_extensions
        size = offered.get("size", "")
        limit = f"SIZE {_bytes(int(size))}" if size.isdecimal() else ""
        names = [name.upper() for name in EXTENSIONS if name in offered]
        auth = " ".join(["AUTH", *client.server_auth_methods]).upper()
        missing = [
            name.upper() for name in ("pipelining", "smtputf8") if name not in offered
        ]
        parts = [*names, limit, auth if "auth" in offered else ""]
        text = ", ".join(filter(None, parts)) or "no extensions"
        return f"{text}; not {', '.join(missing)}" if missing else text

    async def tls(self) -> list[Finding]:
        options = self._options
        if not (options.use_tls or options.use_ssl):
            self._opening.require_connection("tls")
            if self._opening.client.supports_extension("starttls"):
                text = "not used, though the server offers STARTTLS"
                return [self._advised(text, "warning", "tls-not-used")]
            return [Finding("not used, nor offered", "skipped")]
        try:
            await self._secure()
        except errors.CertificateError as error:
            found = failed(error, options)
            if found.hint_id != "certificate-host-name":
                raise
            certified = probes.names_in_certificate(self._addresses[0], options)
            names = await self._found_out(certified, ())
            told = f"{found.text} It is for {_listed(names)}." if names else found.text
            raise Obstacle(replace(found, text=told)) from error
        except errors.TLSError as error:
            asking = self._what_speaks_no_tls(error)
            raise await self._found_out(asking, error) from error
        return self._of_tls()

    async def _secure(self) -> None:
        if self._options.use_tls:
            await self._opening.starttls()
            await self._opening.ehlo()
            return
        reading = self._read_greeting()
        secured = asyncio.create_task(self._opening.client.secured.wait())
        try:
            await asyncio.wait({reading, secured}, return_when="FIRST_COMPLETED")
        finally:
            secured.cancel()
            await asyncio.wait({secured})
        if reading.done() and not self._opening.client.secured.is_set():
            await reading

    async def _what_speaks_no_tls(self, error: errors.TLSError) -> Exception:
        """Return the error, or what was found out about the server."""
        options = self._options
        if not options.use_ssl:
            return error
        line = await probes.first_line(self._addresses[0], options, tls=False)
        hint_id = probes.protocol_of(line)
        if hint_id is not None:
            return Obstacle(_hinted(f"{error}; without, {line!r}", hint_id, options))
        found = failed(error, options)
        if not line.startswith("220"):
            return error
        return Obstacle(replace(found, text=f"{error}; without TLS, {line!r}"))

    def _of_tls(self) -> list[Finding]:
        secured: Any = self._opening.client.ssl_object
        findings = [Finding(f"{secured.version()}, {secured.cipher()[0]}")]
        if not self._is_verified:
            text = "not verified to be this server's certificate"
            findings += [self._advised(text, "warning", "certificate-not-verified")]
        peer = secured.getpeercert()
        if not peer:
            return findings
        certificate = probes.Certificate.of(peer)
        chain = probes.chain_length(secured)
        of = f", the first of {chain} certificates" if chain else ""
        text = f"for {_listed(certificate.names)}, issued by {certificate.issuer}{of}"
        days = int(certificate.seconds_left // 86400)
        left = Finding(f"{_count(days, 'day')} left")
        if days < self._request.cert_days:
            left = self._advised(left.text, "warning", "certificate-expires-soon")
        return [*findings, Finding(text), left]

    @property
    def _is_verified(self) -> bool:
        """Whether it is known who is at the other end of TLS."""
        context = self._options.ssl_context
        return (
            context is not None
            and context.verify_mode == ssl.CERT_REQUIRED
            and context.check_hostname
        )

    async def auth(self) -> list[Finding]:
        options, client = self._options, self._opening.client
        self._opening.require_connection("auth")
        offered = " ".join(client.server_auth_methods).upper() or "nothing"
        if not options.uses_login:
            self._make_session()
            return [Finding(f"no user name is set (offered: {offered})", "skipped")]
        if not (options.use_tls or options.use_ssl):
            return self._not_tried("without TLS", offered, "login-not-tried")
        if not self._is_verified:
            why = "without a verified certificate"
            return self._not_tried(why, offered, "login-not-tried-unverified")
        await self._opening.log_in()
        self._make_session()
        method = self._opening.auth_method.upper() or "an earlier AUTH"
        return [Finding(f"logged in with {method} (offered: {offered})")]

    def _not_tried(self, why: str, offered: str, hint_id: str) -> list[Finding]:
        """Report a login that is not tried; what was asked for behind it has failed."""
        self._obstacle = "not reached: not logged in"
        self._is_cut_off = True
        text = f"not tried {why} (offered: {offered})"
        return [self._advised(text, "warning", hint_id)]

    def _make_session(self) -> None:
        self._opening.require_connection("auth")
        client = self._opening.client
        self._session = Session(self._options, client, self._note)

    def _ready(self) -> Session:
        if self._session is None or not self._session.is_clean:
            text = "not reached: the connection has ended"
            raise Obstacle(Finding(text, "failed"))
        return self._session

    async def sender(self) -> list[Finding]:
        senders = self._request.senders.items()
        findings = [await self._of_sender(name, address) for name, address in senders]
        return findings or [Finding("no address to try", "skipped")]

    async def _of_sender(self, setting: str, address: str) -> Finding:
        found = await self._rehearsed(address)
        hint = found.hint.replace("DEFAULT_FROM_EMAIL", setting)
        return replace(found, text=f"{setting} {address}: {found.text}", hint=hint)

    async def recipient(self) -> list[Finding]:
        request = self._request
        if request.recipient is None or not request.senders:
            return [Finding("no recipient to try", "skipped")]
        sender = next(iter(request.senders.values()))
        found = await self._rehearsed(sender, request.recipient)
        return [replace(found, text=f"{request.recipient}: {found.text}")]

    async def _rehearsed(self, sender: str, recipient: str | None = None) -> Finding:
        try:
            reply = await self._ready().rehearse(sender, recipient)
        except errors.SMTPError as error:
            return self._failed(error)
        except Obstacle as obstacle:
            return obstacle.findings[0]
        except ValueError as error:
            if f"{sender}{recipient}".isascii():
                return Finding(str(error), "failed")
            return self._advised(str(error), "failed", "smtputf8-needed")
        return Finding(_told(reply))

    async def message(self) -> list[Finding]:
        envelope = self._request.message
        if envelope is None:
            return [Finding("none was sent", "skipped")]
        session = self._ready()
        # A server may take its time to look at a message; it is not sent again.
        left = self._deadline - asyncio.get_running_loop().time()
        patience = max(min(self._own_timeout, left - RESERVE), self._options.timeout)
        self._options = replace(self._options, timeout=patience)
        session.options = self._options
        receipt = await session.send(envelope)
        return [Finding(f"sent: {_told(receipt.reply)}")]

    async def connections(self) -> list[Finding]:
        """Open more beside the one that is there."""
        options, wanted = self._options, self._request.connections
        here = [self._session] if self._session and self._session.is_clean else []
        opening = [self._open_another() for _ in range(wanted - len(here))]
        outcomes = await asyncio.gather(*opening, return_exceptions=True)
        failures = [o for o in outcomes if isinstance(o, BaseException)]
        count = len(self._others) + len(here)
        text = f"{count} of {wanted} opened at once"
        enough = self._enough(count)
        if not failures:
            return [Finding(text), *enough]
        first = failures[0]
        if not isinstance(first, errors.SMTPError):
            raise first
        state: State = "warning" if count >= options.max_connections else "failed"
        why = f"{text}; then: {first}"
        if isinstance(first, errors.ResponseError | errors.Disconnected) and not (
            isinstance(first, TimeoutError)
        ):
            found = self._advised(why, state, "fewer-connections-allowed")
        else:
            found = replace(self._failed(first), text=why, state=state)
        return [found, *(replace(one, state=state) for one in enough)]

    def _enough(self, count: int) -> list[Finding]:
        """Return for how many processes connections are enough."""
        options, each = self._options, self._options.max_connections
        if not options.is_ours or count < each:
            return []
        processes = _count(count // each, "process")
        setting = options.setting("max_connections")
        return [Finding(f"{setting} = {each}: enough for {processes}")]

    async def _open_another(self) -> None:
        opened = await Session.open(self._options, self._addresses)
        self._others.append(opened)

    def _note(self, side: str, line: str) -> None:
        self._lines.append(f"{side}: {self._harmless(line)}")

    def _harmless(self, text: str) -> str:
        """Return a server's words without the password, and what steers a terminal."""
        text = redacted(text, (self._options.password,))
        return "".join(c if c.isprintable() else " " for c in text)

    def _failed(self, error: errors.SMTPError) -> Finding:
        """Return the finding of an error, which says where the check cut a wait."""
        found = failed(error, self._options)
        is_cut = self._options.timeout < self._own_timeout
        if not (is_cut and isinstance(error, errors.ReplyTimeout)):
            return found
        waited = f"{round(self._options.timeout, 1):g} s"
        hint = f"The check waited {waited}; --timeout makes it longer. {found.hint}"
        return replace(found, text=f"{found.text} ({waited})", hint=hint)

    def _advised(self, text: str, state: State, hint_id: str) -> Finding:
        return advised(text, state, hint_id, self._options)


def _is_full_host_name(name: str) -> bool:
    first, _, domain = name.strip(".").partition(".")
    is_placeholder = domain == "localdomain" or _CONTAINER_ID.fullmatch(first)
    return bool(domain) and not is_placeholder


def _hinted(text: str, hint_id: str, options: Options) -> Finding:
    """Return the finding of a failure with a hint of the table."""
    hint = next(hint for hint in HINTS if hint.id == hint_id)
    return Finding(text, "failed", hint.id, hint.explain(options))


def _told(reply: Any) -> str:
    return f"{reply.code} {reply.text.decode('utf-8', 'replace')}".strip()


def _told_of(attempt: probes.Attempt) -> str:
    where = f"{_ip(attempt.address)} ({_family_name(attempt.address[0])})"
    took = f"{attempt.seconds * 1000:.0f} ms"
    if not isinstance(attempt.outcome, OSError):
        return f"{where} in {took}"
    return f"{where}: {attempt.outcome.strerror or attempt.outcome} ({took})"


def _count(number: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"


def _ip(address: Address) -> str:
    return str(address[4][0])


def _family_name(family: Any) -> str:
    return {socket.AF_INET: "IPv4", socket.AF_INET6: "IPv6"}.get(family, str(family))


def _listed(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _bytes(size: int) -> str:
    if not size:
        return "without a limit"
    return f"{size / 2**20:.0f} MB" if size >= 2**20 else f"{size} B"
