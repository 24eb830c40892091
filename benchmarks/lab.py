"""Servers, delay lines and senders, each in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, Final, Self

from .measure import Comparison, in_turn
from .sender import BODY, DJANGOS, OURS, SENDER, SUBJECT
from .server import HOST, PASSWORD, USERNAME

ROOT: Final = Path(__file__).parent.parent
NODEMAILER: Final = Path(__file__).parent / "peers" / "nodemailer_pool.js"


class Process:
    """A program that says when it is ready, and ends with its standard input."""

    def __init__(self, *command: str, env: dict[str, str] | None = None) -> None:
        self._command = " ".join(command)
        self._popen = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | (env or {}),
        )

    @cached_property
    def first_line(self) -> str:
        """What it says when it is ready; others can start before it is asked for."""
        return self._read()

    def ask(self, line: str) -> str:
        """Give it a line, and return the line that it answers."""
        assert self.first_line
        assert self._popen.stdin
        self._popen.stdin.write(f"{line}\n")
        self._popen.stdin.flush()
        return self._read()

    def end(self) -> None:
        with suppress(subprocess.TimeoutExpired):
            self._popen.communicate(timeout=10)
        self._popen.kill()
        self._popen.wait()

    def _read(self) -> str:
        assert self._popen.stdout
        line = self._popen.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._command} ended with {self._popen.wait()}")
        return line.strip()


class Sender:
    """
    A process that sends mail; see sender.py for its jobs.

    :param most: the count that no job exceeds.
    """

    def __init__(self, process: Process, most: int) -> None:
        self._process = process
        self._most = most

    def do(self, job: str, count: int, *more: int) -> float:
        """Return what the job measured."""
        answer = self._process.ask(json.dumps([job, min(count, self._most), *more]))
        return float(answer)

    def rate(self, job: str, count: int, *more: int) -> Callable[[], float]:
        """Return what runs a job that measures seconds, and gives the messages/s."""
        return lambda: min(count, self._most) / self.do(job, count, *more)


class Lab:
    """
    Where one case is measured; all its processes end with it.

    :param is_tiny: one round of at most 2 messages, to see that everything runs.
    """

    def __init__(self, *, is_tiny: bool = False) -> None:
        self._is_tiny = is_tiny
        self._most = 2 if is_tiny else sys.maxsize
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    def sink(self) -> int:
        """
        Start a server without TLS; return its port.

        Postfix's smtp-sink where it is installed, or else the one in server.py.
        aiosmtpd would be the bottleneck, and offers no PIPELINING.
        """
        program = smtp_sink()
        if program is None:
            return self._serve()
        with socket.create_server((HOST, 0)) as sock:
            port: int = sock.getsockname()[1]
        user = ["-u", "nobody"] if os.geteuid() == 0 else []
        sink = subprocess.Popen([program, "-a", *user, f"{HOST}:{port}", "1024"])
        self._stack.callback(sink.wait)
        self._stack.callback(sink.terminate)
        wait_for(port)
        return port

    def private_server(self, *, pipelining: bool) -> tuple[int, dict[str, Any]]:
        """Start one with STARTTLS and a login; return its port, and the options."""
        more = [] if pipelining else ["--no-pipelining"]
        port = self._serve("--private", str(self._folder), *more)
        login = {"username": USERNAME, "password": PASSWORD}
        return port, {"use_tls": True, **login}

    def delayed(self, port: int, milliseconds: float) -> int:
        """Return a port that leads to another one over a long line."""
        if not milliseconds:
            return port
        if self._is_tiny:
            milliseconds = 1
        return int(self._start("delay_line", str(port), str(milliseconds)).first_line)

    def senders(self, port: int, **options: Any) -> tuple[Sender, Sender]:
        """Return one with Django's backend, and one with ours."""
        # Both start before one is waited for.
        django = self._sender(DJANGOS, port, options)
        return self._warm(django, 3), self.sender(OURS, port, **options)

    def sender(self, backend: str, port: int, **options: Any) -> Sender:
        """Return one with a backend."""
        return self._warm(self._sender(backend, port, options), 3)

    def queue(self, engine: str, port: int) -> Sender:
        """Return one that queues, with workers; see queue.py for its jobs."""
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        given = json.dumps({"host": HOST, "port": port})
        process = self._start("queue", engine, given, str(folder))
        sender = Sender(process, self._most)
        sender.do("one_by_one", 3)
        return sender

    def nodemailer(self, port: int, connections: int) -> Sender | None:
        """Return one with nodemailer's pool, if it is installed."""
        if why := why_no_nodemailer():
            print(f"SKIPPED: nodemailer: {why}", file=sys.stderr)
            return None
        script = ["node", str(NODEMAILER), str(port), str(connections)]
        process = Process(*script, SENDER, SUBJECT, BODY)
        self._stack.callback(process.end)
        # Many: it is compiled while it runs.
        return self._warm(Sender(process, self._most), 200)

    def compare(
        self,
        case: str,
        against: str,
        theirs: Callable[[], float],
        ours: Callable[[], float],
        *,
        repeats: int,
        at_least: float,
    ) -> Comparison:
        """Measure two rates in turn."""
        their_rates, our_rates = self.in_turn(repeats, theirs, ours)
        return Comparison(case, against, their_rates, our_rates, at_least)

    def in_turn(
        self, repeats: int, *runs: Callable[[], float]
    ) -> list[tuple[float, ...]]:
        """Return what each run gave, over all rounds; they take turns in each."""
        return in_turn(1 if self._is_tiny else repeats, *runs)

    def some(self, values: Sequence[int]) -> Sequence[int]:
        """Return the values of x for a chart; but for a tiny run, all of them."""
        return values[1:2] if self._is_tiny else values

    def medians(
        self, rates: dict[str, Callable[[], float]], *, repeats: int
    ) -> dict[str, float]:
        """Measure several rates in turn; return the median of each."""
        runs = self.in_turn(repeats, *rates.values())
        return dict(zip(rates, map(median, runs), strict=True))

    def _serve(self, *arguments: str) -> int:
        return int(self._start("server", *arguments).first_line)

    def _start(
        self, module: str, *arguments: str, env: dict[str, str] | None = None
    ) -> Process:
        command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
        process = Process(*command, env=env)
        self._stack.callback(process.end)
        return process

    def _sender(self, backend: str, port: int, options: dict[str, Any]) -> Sender:
        given = json.dumps({"host": HOST, "port": port, **options})
        trusted = {"SSL_CERT_FILE": str(self._bundle())} if "use_tls" in options else {}
        process = self._start("sender", backend, given, env=trusted)
        return Sender(process, self._most)

    def _warm(self, sender: Sender, count: int) -> Sender:
        sender.do("batch", count)
        return sender

    def _bundle(self) -> Path:
        """Write what a system trusts, with the server's authority, into one file."""
        bundle = self._folder / "bundle.pem"
        system = ssl.get_default_verify_paths().cafile
        if system is None:
            print("No CA bundle found: Django's TLS costs more in truth.")
        parts = [Path(system).read_bytes()] if system else []
        bundle.write_bytes(b"\n".join([*parts, (self._folder / "ca.pem").read_bytes()]))
        return bundle


def smtp_sink() -> str | None:
    """Return the path of Postfix's server for benchmarks; None if not installed."""
    # Not always on the PATH of a user.
    return shutil.which("smtp-sink", path=f"{os.environ.get('PATH')}:/usr/sbin")


def why_no_nodemailer() -> str | None:
    """Return what keeps it from being run, if anything does."""
    if shutil.which("node") is None:
        return "node is not installed"
    package = NODEMAILER.parent / "node_modules" / "nodemailer"
    return None if package.exists() else "run npm install in benchmarks/peers"


def wait_for(port: int) -> None:
    """Wait until something listens on a port."""
    end = time.monotonic() + 10
    while True:
        try:
            socket.create_connection((HOST, port)).close()
        except OSError:
            assert time.monotonic() < end, f"nothing listens on {port}"
            time.sleep(0.01)
        else:
            return
