"""SMTP servers for the tests: one that works, and one that misbehaves on purpose."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import stat
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Self

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session

USERNAME = "alice"
PASSWORD = "correct horse battery"


def wait_until(is_true: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait for something to become true on another thread; fail if it does not."""
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, f"not true within {seconds} s"
        time.sleep(0.005)


def open_sockets() -> int:
    """Return how many sockets this process has open."""
    count = 0
    for name in os.listdir("/dev/fd"):  # noqa: PTH208
        with suppress(OSError):
            count += stat.S_ISSOCK(os.fstat(int(name)).st_mode)
    return count


@dataclass
class Received:
    """A message as a server got it."""

    sender: str
    recipients: list[str]
    content: bytes
    connection: int = 0
    tls: bool = False
    login: bool = False
    options: str = ""


class _Recorder:
    """aiosmtpd's hooks: takes everything, but for what the addresses ask for."""

    def __init__(self, received: list[Received]) -> None:
        self.received = received
        self.peers: list[Any] = []
        self.transports: set[Any] = set()

    async def hang_up(self) -> None:
        """End the connections now; with TLS, a server that stops leaves them open."""
        for transport in self.transports:
            transport.abort()
        for _ in range(2):  # The socket is closed one round of the loop later.
            await asyncio.sleep(0)

    async def handle_RCPT(  # noqa: N802
        self,
        server: SMTP,
        session: Session,
        envelope: Envelope,
        address: str,
        options: list[str],
    ) -> str:
        if address.startswith("nouser@"):
            return f"550 5.1.1 <{address}>: user unknown"
        if address.startswith("greylisted@"):
            return "451 4.7.1 greylisted, try again later"
        envelope.rcpt_tos.append(address)
        return "250 2.1.5 Ok"

    async def handle_DATA(  # noqa: N802
        self, server: SMTP, session: Session, envelope: Envelope
    ) -> str:
        if session.peer not in self.peers:
            self.peers.append(session.peer)
        self.transports.add(server.transport)
        content = envelope.original_content
        assert isinstance(content, bytes)
        self.received.append(
            Received(
                envelope.mail_from or "",
                list(envelope.rcpt_tos),
                content,
                connection=self.peers.index(session.peer),
                tls=_is_tls(server),
                login=bool(session.authenticated),
                options=" ".join(envelope.mail_options),
            )
        )
        if b"Subject: reject me" in content:
            return "554 5.6.0 rejected"
        return f"250 2.0.0 Ok: queued as {len(self.received):04X}"


def _is_tls(server: SMTP) -> bool:
    assert server.transport is not None
    return server.transport.get_extra_info("ssl_object") is not None


def _authenticate(
    server: SMTP, session: Session, envelope: Envelope, method: str, data: Any
) -> AuthResult:
    good = data == LoginPassword(USERNAME.encode(), PASSWORD.encode())
    return AuthResult(success=good, handled=good)


class MailServer:
    """
    A well-behaved server (aiosmtpd) on a free port, in its own thread.

    ``nouser@`` is answered 550, ``greylisted@`` 451, a subject "reject me" 554.

    :param tls: offers STARTTLS with it; with ``implicit``, speaks TLS from the start.
    :param auth: offers AUTH, and wants it.
    """

    def __init__(
        self,
        *,
        tls: ssl.SSLContext | None = None,
        implicit: bool = False,
        auth: bool = False,
        smtputf8: bool = False,
        hostname: str = "127.0.0.1",
    ) -> None:
        self.received: list[Received] = []
        self._recorder = _Recorder(self.received)
        self.host = hostname
        self.port = free_port()
        options: dict[str, Any] = {}
        if auth:
            options.update(
                authenticator=_authenticate,
                auth_required=True,
                auth_require_tls=tls is not None and not implicit,
            )
        if tls is not None and not implicit:
            options.update(tls_context=tls, require_starttls=True)
        self._controller = Controller(
            self._recorder,
            hostname="127.0.0.1",
            port=self.port,
            ssl_context=tls if implicit else None,
            enable_SMTPUTF8=smtputf8,
            data_size_limit=200 * 2**20,
            **options,
        )

    @property
    def connections(self) -> int:
        """How many connections brought a message."""
        return len(self._recorder.peers)

    def __enter__(self) -> Self:
        self._controller.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        ending = self._recorder.hang_up()
        asyncio.run_coroutine_threadsafe(ending, self._controller.loop).result()
        self._controller.stop()


def free_port() -> int:
    """Return a port of 127.0.0.1 that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


class Action:
    """Something other than a reply, at a stage of a script."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


CLOSE = Action("CLOSE")  # FIN
RESET = Action("RESET")  # RST


class Pause(Action):
    """Seconds without an answer."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"Pause({seconds})")
        self.seconds = seconds


SILENCE = Action("SILENCE")  # nothing more, until the client or the test ends
DEAF = Action("DEAF")  # as SILENCE, and it reads nothing
READ = Action("READ")  # the client's next line
DEFAULT = Action("DEFAULT")  # what a working server answers

Step = bytes | Action


class Turns(tuple[Step, ...]):
    """A step for each time that a connection gets there; DEFAULT after the last."""

    def __new__(cls, *steps: Step) -> Self:
        return super().__new__(cls, steps)


Script = dict[str, Step | Iterable[Step]]


class _Closed(Exception):
    pass


@dataclass
class ScriptedServer:
    """
    A server that does what a script says, and works where it says nothing.

    A script maps a stage to bytes to send, an Action, or several of them in order.
    Stages: greeting, ehlo, helo, starttls, tls (in place of the server's hello), auth,
    mail, rcpt, data, body (after the whole message), rset, noop, quit, and a
    recipient's address (before ``rcpt``). With a sender's address behind it
    (``data me@example.com``), a stage is that of this sender's messages. ``idle`` runs
    after the reply to a body, ``auth plain`` and the like in place of that method's
    exchange.

    :ivar scripts: the script of the first connection, of the second, and so on; the
        last one serves all further ones.
    :param packets: what goes into one packet: each of the "replies", of their "bytes",
        or all that is due "together".
    :ivar received: every message that arrived whole, whatever was answered.
    :ivar lines: the commands of all connections, in order.
    :ivar unread: what came together with the commands that met a SILENCE.
    :ivar peers: the address of each connection's client.
    """

    scripts: tuple[Script, ...] = ({},)
    tls: ssl.SSLContext | None = None
    implicit: bool = False
    extensions: tuple[str, ...] = ("SIZE 10000000", "8BITMIME")
    slow_body: float = 0.0
    packets: str = "replies"
    received: list[Received] = field(default_factory=list)
    lines: list[bytes] = field(default_factory=list)
    peers: list[tuple[str, int]] = field(default_factory=list)
    unread: list[bytes] = field(default_factory=list)
    connections: int = 0
    host: str = "127.0.0.1"

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        if self.slow_body:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        self.port: int = self._listener.getsockname()[1]
        self._stop = threading.Event()
        self._open: list[socket.socket] = []
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        # close() alone does not wake the thread that is in accept().
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in list(self._open):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    @property
    def open_connections(self) -> int:
        """How many connections the server has not seen the end of."""
        return len(self._open)

    def commands(self, verb: bytes) -> list[bytes]:
        """Return the lines that began with a verb."""
        return [line for line in self.lines if line.upper().startswith(verb)]

    def close_all(self, farewell: bytes = b"") -> None:
        """End all connections now, as a server that restarts does."""
        for sock in list(self._open):
            with suppress(OSError):
                if farewell:
                    sock.sendall(farewell)
                sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                sock, peer = self._listener.accept()
            except OSError:
                return
            with self._lock:
                number = self.connections
                self.connections += 1
                self._open.append(sock)
                self.peers.append(peer)
            threading.Thread(
                target=self._serve, args=(sock, number), daemon=True
            ).start()

    def _serve(self, sock: socket.socket, number: int) -> None:
        script = self.scripts[min(number, len(self.scripts) - 1)]
        connection = _Connection(self, sock, script, number)
        try:
            connection.run()
        except (_Closed, OSError):
            pass
        finally:
            with suppress(OSError):
                connection.sock.close()
            self._open.remove(connection.raw)
            with suppress(OSError):
                sock.close()


class _Connection:
    def __init__(
        self, server: ScriptedServer, sock: socket.socket, script: Script, number: int
    ) -> None:
        self.server = server
        self.raw = sock
        self.sock = sock
        self.script = {
            stage: (steps,)
            if isinstance(steps, bytes | Action)
            else steps
            if isinstance(steps, Turns)
            else tuple(steps)
            for stage, steps in script.items()
        }
        self.turns: Counter[str] = Counter()
        self.number = number
        self.sender = ""
        self.is_tls = False
        self.login = False
        self.buffer = b""
        self.output = b""

    def run(self) -> None:
        if self.server.implicit:
            self.start_tls()
        self.do("greeting", b"220 test ESMTP\r\n")
        options = ""
        recipients: list[str] = []
        while True:
            line = self.read_line()
            self.server.lines.append(line)
            verb, _, argument = line.decode("utf-8", "replace").partition(" ")
            match verb.upper():
                case "EHLO":
                    self.do("ehlo", self.ehlo_reply())
                case "HELO":
                    self.do("helo", b"250 test\r\n")
                case "STARTTLS":
                    if self.do("starttls", b"220 go\r\n").startswith(b"220"):
                        self.start_tls()
                case "AUTH":
                    self.authenticate(argument)
                case "MAIL":
                    path, _, options = argument.partition(" ")
                    self.sender, recipients = path[6:-1], []
                    self.do("mail", b"250 ok\r\n")
                case "RCPT":
                    address = argument[4:-1]
                    reply = self.do(address, b"") or self.do("rcpt", b"250 ok\r\n")
                    if reply.startswith(b"25"):
                        recipients.append(address)
                case "DATA" if not recipients and not self.has_step("data"):
                    self.say(b"554 5.5.1 no valid recipients\r\n")
                case "DATA":
                    if self.do("data", b"354 go\r\n").startswith(b"354"):
                        content = self.read_body()
                        self.server.received.append(
                            Received(
                                self.sender,
                                recipients,
                                content,
                                self.number,
                                self.is_tls,
                                self.login,
                                options,
                            )
                        )
                        self.do("body", b"250 ok queued\r\n")
                        self.do("idle", b"")
                case "QUIT":
                    self.do("quit", b"221 bye\r\n")
                    self.flush()
                    raise _Closed
                case _:
                    self.do(verb.lower(), b"250 ok\r\n")

    def has_step(self, stage: str) -> bool:
        return stage in self.script or f"{stage} {self.sender}" in self.script

    def do(self, stage: str, default: bytes) -> bytes:
        """Do the script's step, or the default; return the last reply sent."""
        steps = self.script.get(f"{stage} {self.sender}", self.script.get(stage))
        if steps is None:
            if default:
                self.say(default)
            return default
        if isinstance(steps, Turns):
            turn = self.turns[stage]
            self.turns[stage] += 1
            steps = steps[turn : turn + 1] or (DEFAULT,)
        sent = b""
        for step in steps:
            if step is DEFAULT:
                step = default
            if isinstance(step, bytes):
                self.say(step)
                sent = step
            elif isinstance(step, Pause):
                self.flush()
                time.sleep(step.seconds)
            elif step is READ:
                self.server.lines.append(self.read_line())
            elif step is SILENCE:
                self.server.unread.append(self.buffer)
                while True:
                    self.fill()
                    self.buffer = b""
            elif step is DEAF:
                self.flush()
                self.server._stop.wait(30)
                raise _Closed
            elif step is RESET:
                self.flush()
                self.raw.setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                )
                self.sock.close()
                raise _Closed
            else:
                self.flush()
                with suppress(OSError):
                    self.raw.shutdown(socket.SHUT_RDWR)
                raise _Closed
        return sent

    def ehlo_reply(self) -> bytes:
        extensions = list(self.server.extensions)
        if self.server.tls is not None and not self.is_tls:
            extensions.append("STARTTLS")
        lines = ["test", *extensions]
        marks = ["-"] * (len(lines) - 1) + [" "]
        return "".join(
            f"250{mark}{line}\r\n" for mark, line in zip(marks, lines, strict=True)
        ).encode()

    def start_tls(self) -> None:
        if "tls" in self.script:
            self.sock.recv(65536)
            self.do("tls", b"")
            while True:
                self.fill()
        assert self.server.tls is not None
        self.flush()
        self.sock = self.server.tls.wrap_socket(self.sock, server_side=True)
        self.server._open[self.server._open.index(self.raw)] = self.sock
        self.raw = self.sock
        self.buffer = b""
        self.is_tls = True

    def authenticate(self, argument: str) -> None:
        method, _, initial = argument.partition(" ")
        stage = f"auth {method.lower()}"
        if stage in self.script:
            self.login = self.do(stage, b"").startswith(b"235")
            return
        if method.upper() == "CRAM-MD5" and "auth" not in self.script:
            self.say(b"334 PDEyMzRAdGVzdD4=\r\n")
            self.server.lines.append(self.read_line())
        if method.upper() == "LOGIN" and "auth" not in self.script:
            for _ in range(1 if initial else 2):
                self.say(b"334 UGFzc3dvcmQ6\r\n")
                self.server.lines.append(self.read_line())
        reply = self.do("auth", b"235 welcome\r\n")
        self.login = reply.startswith(b"235")

    def say(self, data: bytes) -> None:
        """Send a reply, in the pieces that the server was told to make of it."""
        if self.server.packets == "together":
            self.output += data
        elif self.server.packets == "bytes":
            for start in range(len(data)):
                self.sock.sendall(data[start : start + 1])
        else:
            self.sock.sendall(data)

    def flush(self) -> None:
        output, self.output = self.output, b""
        if output:
            self.sock.sendall(output)

    def read_line(self) -> bytes:
        while b"\n" not in self.buffer:
            self.fill()
        line, _, self.buffer = self.buffer.partition(b"\n")
        return line.rstrip(b"\r")

    def read_body(self) -> bytes:
        end = b"\r\n.\r\n"
        # As if after a line: the dot may be the first one.
        self.buffer, start = b"\r\n" + self.buffer, 0
        while (found := self.buffer.find(end, start)) == -1:
            if self.server.slow_body:
                time.sleep(self.server.slow_body)
            start = max(0, len(self.buffer) - len(end))
            self.fill()
        content = self.buffer[: found + 2].replace(b"\r\n..", b"\r\n.")[2:]
        # What follows is the next transaction (RFC 2920).
        self.buffer = self.buffer[found + len(end) :]
        return content

    def fill(self) -> None:
        self.flush()
        data = self.sock.recv(65536)
        if not data:
            raise _Closed
        self.buffer += data


@contextmanager
def address_without_answer() -> Iterator[tuple[str, int]]:
    """Yield an address where connecting takes forever: its queue is full."""
    with socket.socket() as listener, socket.socket() as queued:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        queued.connect(listener.getsockname())
        yield listener.getsockname()


def is_listening(port: int) -> bool:
    """Whether something on 127.0.0.1 takes connections on a port."""
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True
