"""``manage.py smtpcheck``: arguments, printing and exit status of a diagnosis."""

from __future__ import annotations

import asyncio
import json
import math
import os
import socket
import sys
import textwrap
import time
from argparse import ArgumentTypeError
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import asdict
from typing import Any, Final, Protocol

from django.conf import settings
from django.core.checks import ERROR, CheckMessage
from django.core.mail import EmailMessage
from django.core.management.base import BaseCommand, CommandError, CommandParser

from django_async_smtp import __version__, checks
from django_async_smtp.diagnosis import (
    SIDE_STAGES,
    STAGES,
    STATES,
    Finding,
    StageReport,
    State,
    diagnose,
)
from django_async_smtp.envelope import Envelope, mailbox, prepare
from django_async_smtp.options import Options

# The exit status where a stage fails. 2 is what shells use for themselves.
EXIT_STATUS: Final[dict[str, int]] = {
    "settings": 1,
    **{stage: status for status, stage in enumerate(STAGES, 3)},
}

# As shells have it for SIGPIPE and SIGINT.
PIPE_CLOSED: Final = 141
INTERRUPTED: Final = 130

# Seconds.
SLOW_NAME: Final = 1.0

WIDTH: Final = 80
NAME_WIDTH: Final = 12
# Sign and name.
HEAD_WIDTH: Final = 4 + NAME_WIDTH
TIME_WIDTH: Final = 9
BAR_WIDTH: Final = 10
# So much time fills the bar.
BAR_SECONDS: Final = 1.0

SIGNS: Final = {"ok": "✓", "skipped": "–", "warning": "!", "failed": "✗"}  # noqa: RUF001
ASCII_SIGNS: Final = {"ok": "+", "skipped": "-", "warning": "!", "failed": "x"}
EIGHTHS: Final = " ▏▎▍▌▋▊▉█"


class Command(BaseCommand):
    """See ``help``."""

    help = (
        "Check the SMTP settings stage by stage, and say what to do. Sends nothing "
        "unless asked to."
    )
    # Broken settings are what it is for.
    requires_system_checks: list[str] = []  # noqa: RUF012

    def add_arguments(self, parser: CommandParser) -> None:
        which = parser.add_mutually_exclusive_group()
        which.add_argument("--using", metavar="ALIAS", help="the mailer to check")
        which.add_argument("--all", action="store_true", help="check all mailers")
        parser.add_argument(
            "--until", choices=list(EXIT_STATUS), help="the last stage to run"
        )
        parser.add_argument(
            "--to",
            metavar="ADDRESS",
            type=_address,
            help="ask whether the server takes mail for it; nothing is sent",
        )
        parser.add_argument(
            "--send", action="store_true", help="send a real message to --to"
        )
        parser.add_argument(
            "--connections",
            metavar="N",
            type=_count,
            default=0,
            help="open N connections at once",
        )
        parser.add_argument(
            "--timeout",
            metavar="S",
            type=_seconds,
            default=30.0,
            help="seconds for each server, all stages together (30)",
        )
        parser.add_argument(
            "--cert-days",
            metavar="N",
            type=int,
            default=21,
            help="warn of a certificate that expires within N days (21)",
        )
        parser.add_argument("--format", choices=["text", "json"], default="text")
        parser.add_argument(
            "--transcript",
            action="store_true",
            help="show the SMTP dialogue, without credentials and message",
        )
        family = parser.add_mutually_exclusive_group()
        for flag, constant in (("-4", socket.AF_INET), ("-6", socket.AF_INET6)):
            family.add_argument(
                flag,
                dest="family",
                action="store_const",
                const=constant,
                default=socket.AF_UNSPEC,
                help=f"use IPv{flag[1]} alone",
            )
        parser.add_argument(
            "--fail-on-warning",
            action="store_true",
            help="let warnings decide the exit status, too",
        )

    def run_from_argv(self, argv: list[str]) -> None:
        try:
            super().run_from_argv(argv)
        except SystemExit as stop:
            # argparse's status for wrong usage.
            sys.exit(1 if stop.code == 2 else stop.code)
        except BrokenPipeError:
            # Whoever read has seen enough. Python would complain once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(PIPE_CLOSED)
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)

    def handle(self, *args: Any, **options: Any) -> None:
        """
        Check, print, and end with the status of the worst that was found.

        :raises CommandError: wrong usage.
        :raises SystemExit: a stage failed.
        """
        _refuse_contradictions(options)
        output: _Output = _JSON(self) if options["format"] == "json" else _Text(self)
        worst = _Worst(count_warnings=options["fail_on_warning"])
        for alias in self._chosen(options):
            mailer, first = _of_settings(alias, options["until"])
            asyncio.run(_check(mailer, first, options, output, worst))
        output.close(worst.exit_status)
        if worst.exit_status:
            sys.exit(worst.exit_status)

    def _chosen(self, options: dict[str, Any]) -> list[str]:
        aliases = checks.aliases()
        if options["all"]:
            return aliases
        alias = options["using"] or checks.DEFAULT_ALIAS
        if alias not in aliases:
            known = ", ".join(aliases) or "none"
            raise CommandError(f"There is no mailer {alias!r}. Known: {known}.")
        return [alias]


async def _check(
    mailer: checks.Mailer,
    first: StageReport,
    options: dict[str, Any],
    output: _Output,
    worst: _Worst,
) -> None:
    """Check each server of a mailer, and print what is found as it is found."""
    servers = mailer.servers if first.state != "skipped" else ()
    for server in servers or (None,):
        output.begin(mailer, server)
        # The settings are those of all servers.
        if server is None or server is servers[0]:
            output.stage(first, options["transcript"])
            worst.note(first)
        if server is not None and options["until"] != "settings":
            async with aclosing(_stages(mailer, server, options)) as reports:
                async for report in reports:
                    output.stage(report, options["transcript"])
                    worst.note(report)
        elif first.state == "failed":
            for report in _out_of_reach(options["until"]):
                output.stage(report, options["transcript"])
        output.end()


def _out_of_reach(until: str | None) -> list[StageReport]:
    """Return the stages behind settings that cannot be used."""
    why = Finding("not reached: settings failed", "skipped")
    names: list[str] = [stage for stage in STAGES if stage != "connections"]
    if until == "settings":
        names = []
    elif until in names:
        names = names[: names.index(until) + 1]
    return [StageReport(name, (why,)) for name in names]


def _stages(
    mailer: checks.Mailer, server: Options, options: dict[str, Any]
) -> AsyncGenerator[StageReport, None]:
    return diagnose(
        server,
        until=options["until"],
        senders=_senders(),
        recipient=options["to"],
        message=_message(mailer, server, options) if options["send"] else None,
        connections=options["connections"],
        timeout=options["timeout"],
        cert_days=options["cert_days"],
        family=options["family"],
    )


def _refuse_contradictions(options: dict[str, Any]) -> None:
    """:raises CommandError: what is asked for comes behind the last stage to run."""
    if options["send"] and not options["to"]:
        raise CommandError("--send needs --to ADDRESS.")
    last = EXIT_STATUS[options["until"] or STAGES[-1]]
    for option, stage in (
        ("to", "recipient"),
        ("send", "message"),
        ("connections", "connections"),
    ):
        if options[option] and last < EXIT_STATUS[stage]:
            raise CommandError(f"--{option} needs --until {stage}, or a later stage.")


def _of_settings(alias: str, until: str | None) -> tuple[checks.Mailer, StageReport]:
    """Return a mailer, and what the system checks say of it, as a stage."""
    start = time.monotonic()
    mailer = checks.mailer(alias, to_send=until != "settings")
    found = tuple(map(_finding, checks.problems(mailer)))
    seconds = time.monotonic() - start
    if mailer.servers and seconds > SLOW_NAME:
        found = (*found, _of_slow_name(mailer, seconds))
    if not found and not mailer.servers:
        text = f"{mailer.path} does not send over SMTP: there is nothing to check"
        if mailer.queue is not None:
            sender = mailer.queue.mailer
            text = f"{mailer.path} queues mail for {sender!r}: check --using {sender}"
        return mailer, StageReport("settings", (Finding(text, "skipped"),))
    if mailer.servers:
        found = (Finding(mailer.path), *found)
    return mailer, StageReport("settings", found, seconds)


def _of_slow_name(mailer: checks.Mailer, seconds: float) -> Finding:
    """Tell of the one thing in the settings that asks the resolver, as sending does."""
    setting = mailer.setting("local_hostname")
    return Finding(
        f"this machine's own name was looked up for {seconds:.1f} s",
        "warning",
        "slow-own-name",
        f"Every process waits for that before its first mail. Set {setting}, or mend "
        "this machine's resolver (/etc/hosts).",
    )


def _finding(problem: CheckMessage) -> Finding:
    state: State = "failed" if problem.level >= ERROR else "warning"
    return Finding(problem.msg, state, problem.id or "", problem.hint or "")


def _senders() -> dict[str, str]:
    """Return the addresses that the project sends from, by setting."""
    found: dict[str, str] = {}
    for name in ("DEFAULT_FROM_EMAIL", "SERVER_EMAIL"):
        value = getattr(settings, name)
        with suppress(ValueError):
            # Django takes the first one where the second is empty.
            if value and (address := mailbox(value)) not in found.values():
                found[name] = address
    return found


def _message(
    mailer: checks.Mailer, server: Options, options: dict[str, Any]
) -> Envelope | None:
    """Return the test message; None where DEFAULT_FROM_EMAIL is no address."""
    if not settings.DEFAULT_FROM_EMAIL:
        return None
    text = (
        f"This is a test message of manage.py smtpcheck.\n\n"
        f"Mailer: {mailer.alias}\nServer: {server.server}\n"
    )
    message = EmailMessage("smtpcheck: mail works", text, to=[options["to"]])
    try:
        return prepare(message)
    except ValueError:
        # The settings stage has said so.
        return None


class _Worst:
    """The exit status: that of the earliest stage that failed."""

    def __init__(self, *, count_warnings: bool) -> None:
        self._counted: dict[str, list[int]] = {"failed": []}
        if count_warnings:
            self._counted["warning"] = []

    def note(self, report: StageReport) -> None:
        """Count a stage."""
        if report.state in self._counted:
            self._counted[report.state].append(EXIT_STATUS[report.stage])

    @property
    def exit_status(self) -> int:
        """0: fine. Failures count before warnings."""
        return next((min(found) for found in self._counted.values() if found), 0)


class _Output(Protocol):
    """Where the reports go, in the order of the calls."""

    def begin(self, mailer: checks.Mailer, server: Options | None) -> None:
        """A server's check begins; None: the mailer has none."""

    def stage(self, report: StageReport, transcript: bool) -> None:
        """A stage has ended."""

    def end(self) -> None:
        """A server's check has ended."""

    def close(self, exit_status: int) -> None:
        """All has ended."""


class _JSON:
    """One object at the end; see smtpcheck.schema.json."""

    def __init__(self, command: Command) -> None:
        self._command = command
        self._results: list[dict[str, Any]] = []

    def begin(self, mailer: checks.Mailer, server: Options | None) -> None:
        self._results.append(
            {
                "mailer": mailer.alias,
                "backend": mailer.path,
                "server": server.server if server is not None else None,
                "state": "ok",
                "stages": [],
            }
        )

    def stage(self, report: StageReport, transcript: bool) -> None:
        stage = {
            "name": report.stage,
            "state": report.state,
            "seconds": round(report.seconds, 6),
            "findings": [asdict(finding) for finding in report.findings],
            "hint_ids": [f.hint_id for f in report.findings if f.hint_id],
        }
        if transcript:
            stage["transcript"] = list(report.transcript)
        self._results[-1]["stages"].append(stage)

    def end(self) -> None:
        states = [stage["state"] for stage in self._results[-1]["stages"]]
        self._results[-1]["state"] = _overall(states)

    def close(self, exit_status: int) -> None:
        report = {
            "version": __version__,
            "exit_status": exit_status,
            "results": self._results,
        }
        self._command.stdout.write(json.dumps(report, indent=2))


class _Text:
    """A line a stage, as it ends."""

    def __init__(self, command: Command) -> None:
        self._out = command.stdout
        self._encoding = getattr(command.stdout, "encoding", None) or "utf-8"
        style = command.style
        self._styles: dict[str, Callable[[str], str]] = {
            "ok": style.SUCCESS,
            "skipped": str,
            "warning": style.WARNING,
            "failed": style.ERROR,
        }
        self._hint_style: Callable[[str], str] = style.MIGRATE_LABEL
        self._is_unicode = self._can_show("".join(SIGNS.values()) + EIGHTHS + "→")
        self._signs = SIGNS if self._is_unicode else ASCII_SIGNS
        self._arrow = "→" if self._is_unicode else "->"
        self._reports: list[StageReport] = []
        self._is_fallback = False

    def begin(self, mailer: checks.Mailer, server: Options | None) -> None:
        title = mailer.alias
        self._is_fallback = server is not None and server.is_fallback
        if self._is_fallback:
            title += ", a fallback"
        if server is not None:
            title += f": {server.server}, {_security(server)}"
        self._reports = []
        self._paragraph(title, str)

    def stage(self, report: StageReport, transcript: bool) -> None:
        self._reports.append(report)
        indent = " " * HEAD_WIDTH
        for number, finding in enumerate(report.findings):
            if number:
                self._paragraph(finding.text, str, indent)
            else:
                self._first_finding(report, indent)
            later = report.findings[number + 1 :]
            if finding.hint not in [other.hint for other in later]:
                lead = f"{indent}{self._arrow} "
                self._paragraph(finding.hint, self._hint_style, lead)
        for line in report.transcript if transcript else ():
            self._paragraph(line, str, " " * 6)

    def _first_finding(self, report: StageReport, indent: str) -> None:
        """Write the line of a stage: sign, name, finding, time and bar."""
        head = f"  {self._signs[report.state]} {report.stage:<{NAME_WIDTH}}"
        took = self._took(report)
        margin = TIME_WIDTH + BAR_WIDTH if took else 0
        text = self._printable(report.findings[0].text)
        first, *others = _wrapped(text, WIDTH - HEAD_WIDTH, margin)
        shown = f"{first:<{WIDTH - HEAD_WIDTH - margin}}{took}"
        self._write(f"{self._styles[report.state](head)}{shown}".rstrip())
        for line in others:
            self._write(indent + line)

    def end(self) -> None:
        states = [report.state for report in self._reports]
        overall = _overall(states)
        self._paragraph(self._verdict(overall), self._styles[overall])

    def close(self, exit_status: int) -> None:
        if exit_status:
            self._write(f"Exit status {exit_status}.")

    def _verdict(self, overall: str) -> str:
        failed = [r.stage for r in self._reports if r.state == "failed"]
        warned = [r.stage for r in self._reports if r.state == "warning"]
        passed = sum(report.state == "ok" for report in self._reports)
        if overall == "skipped":
            return "Nothing to check."
        parts = [f"{passed} passed"]
        if warned:
            parts.append(f"{len(warned)} with a warning: {', '.join(warned)}")
        if failed:
            parts.append(f"{', '.join(failed)} failed")
        verdict = f"{'; '.join(parts)}."
        if any(map(_stops_mail, self._reports)):
            by_it = " by this fallback" if self._is_fallback else ""
            return f"Mail cannot be sent{by_it}: {verdict}"
        return verdict if failed or warned else f"No problem found: {verdict}"

    def _paragraph(
        self, text: str, style: Callable[[str], str], lead: str = ""
    ) -> None:
        """Write a text as lines; ``lead`` begins the first, spaces the others."""
        width = WIDTH - len(lead)
        lines = textwrap.wrap(self._printable(text), width, break_on_hyphens=False)
        for line in lines:
            self._write(style(lead + line))
            lead = " " * len(lead)

    def _took(self, report: StageReport) -> str:
        if report.state == "skipped":
            return ""
        seconds = report.seconds
        time = f"{seconds * 1000:.0f} ms" if seconds < 100 else f"{seconds:.0f} s"
        return f"{time:>{TIME_WIDTH - 1}} {self._bar(seconds)}"

    def _bar(self, seconds: float) -> str:
        filled = min(seconds / BAR_SECONDS, 1.0) * BAR_WIDTH
        if not self._is_unicode:
            return "#" * round(filled)
        whole = int(filled)
        return "█" * whole + EIGHTHS[int((filled - whole) * 8)].strip()

    def _printable(self, text: str) -> str:
        """Return a server's words so that a terminal only shows them."""
        shown = "".join(c if c.isprintable() else " " for c in text)
        return shown.encode(self._encoding, "backslashreplace").decode(self._encoding)

    def _can_show(self, text: str) -> bool:
        try:
            text.encode(self._encoding)
        except UnicodeEncodeError:
            return False
        return True

    def _write(self, line: str) -> None:
        self._out.write(line)
        self._out.flush()


def _wrapped(text: str, width: int, first_margin: int) -> list[str]:
    """Return a text's lines, the first one with room left behind it."""
    # The room is taken as an indentation, and given back.
    room = " " * first_margin
    lines = textwrap.wrap(text, width, initial_indent=room, break_on_hyphens=False)
    return [line.removeprefix(room) for line in lines] or [""]


def _stops_mail(report: StageReport) -> bool:
    """Whether no mail can be sent because of what a stage found."""
    # Mail goes out from the first sender's address.
    is_other_sender = report.stage == "sender" and report.findings[0].state == "ok"
    is_side = report.stage in SIDE_STAGES or is_other_sender
    return report.state == "failed" and not is_side


def _overall(states: Sequence[str]) -> State:
    """Return the worst state; what was skipped does not count beside others."""
    ran = [state for state in STATES if state in states and state != "skipped"]
    return ran[-1] if ran else "skipped"


def _security(server: Options) -> str:
    kind = "TLS" if server.use_ssl else "STARTTLS" if server.use_tls else "no TLS"
    return f"{kind}, {'a login' if server.uses_login else 'no login'}"


def _address(text: str) -> str:
    try:
        return mailbox(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds
