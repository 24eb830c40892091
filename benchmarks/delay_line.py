"""
A TCP proxy that adds a round trip without limiting bandwidth.

    python -m benchmarks.delay_line PORT MILLISECONDS

It leads to PORT of 127.0.0.1, prints its own port, and ends with its standard input.

A chunk from either side is handed on half a round trip after it came, in order, with
any number of them on their way: pipelined commands stay pipelined. Connecting costs
what it costs on a long line, although the kernel completes it at once here: the server
hears of the client one and a half round trips after its first packet, and what the
client says is counted from one round trip on.

No loss, no congestion window. It waits with select(2), whose microseconds epoll_wait(2)
does not have.
"""

from __future__ import annotations

import select
import socket
import sys
from collections import deque
from contextlib import suppress
from time import monotonic
from typing import Any, Final

HOST: Final = "127.0.0.1"


class Direction:
    """What is on its way from one socket to another."""

    def __init__(self, source: socket.socket, half: float, earliest: float) -> None:
        self.source = source
        self.target: socket.socket | None = None
        self.chunks: deque[tuple[float, bytes]] = deque()
        self.has_ended = False
        self._half = half
        self._earliest = earliest

    def receive(self) -> None:
        """Take what the source says; nothing stands for its end."""
        try:
            data = self.source.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self.has_ended = not data
        self.chunks.append((max(monotonic(), self._earliest) + self._half, data))

    def deliver(self, now: float) -> None:
        """Hand on what is due, and can be written."""
        while self.target is not None and self.chunks and self.chunks[0][0] <= now:
            due, data = self.chunks.popleft()
            try:
                sent = self.target.send(data) if data else 0
            except BlockingIOError:
                sent = 0
            except OSError:
                continue  # The target is gone; its own end says so.
            if sent < len(data):
                self.chunks.appendleft((due, data[sent:]))
                return
            if not data:
                with suppress(OSError):
                    self.target.shutdown(socket.SHUT_WR)

    @property
    def is_over(self) -> bool:
        """Whether the source's end, too, was handed on."""
        return self.has_ended and not self.chunks

    def is_due(self, now: float) -> bool:
        """Whether the next chunk has only the target to wait for."""
        return bool(self.chunks) and self.chunks[0][0] <= now


class Line:
    """One client's connection, and the one to the server that it gets."""

    def __init__(self, client: socket.socket, port: int, round_trip: float) -> None:
        now = monotonic()
        self.connects_at = now + 1.5 * round_trip
        self._port = port
        self._half = round_trip / 2
        without_delay(client)
        self.directions = [Direction(client, self._half, now + round_trip)]

    def connect(self, now: float) -> None:
        """Connect to the server when it is time."""
        if len(self.directions) > 1 or now < self.connects_at:
            return
        forth = self.directions[0]
        try:
            server = socket.create_connection((HOST, self._port))
        except OSError:
            forth.has_ended = True
            forth.chunks.clear()
            return
        without_delay(server)
        back = Direction(server, self._half, now)
        forth.target, back.target = server, forth.source
        self.directions.append(back)

    def wakes_at(self, now: float) -> list[float]:
        """The times at which something is to be done."""
        waiting = [d.chunks[0][0] for d in self.directions if d.chunks]
        times = [time for time in waiting if time > now]
        return times if len(self.directions) > 1 else [*times, self.connects_at]

    @property
    def is_over(self) -> bool:
        """Whether both sides have ended."""
        return all(direction.is_over for direction in self.directions)

    def close(self) -> None:
        """Close both connections."""
        for direction in self.directions:
            direction.source.close()


def without_delay(sock: socket.socket) -> None:
    """Have the kernel send at once what it is given, and never wait for it."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setblocking(False)


def serve(listener: socket.socket, port: int, round_trip: float) -> None:
    """Carry connections to a port until standard input ends."""
    lines: list[Line] = []
    always: list[Any] = [listener, sys.stdin]
    while True:
        now = monotonic()
        directions = [direction for line in lines for direction in line.directions]
        reading: dict[Any, Direction] = {
            d.source: d for d in directions if not d.has_ended
        }
        writing = [d.target for d in directions if d.target and d.is_due(now)]
        wakes_at = min(
            (at for line in lines for at in line.wakes_at(now)), default=None
        )
        readable, _, _ = select.select(
            [*always, *reading],
            writing,
            [],
            None if wakes_at is None else max(0.0, wakes_at - now),
        )
        for source in readable:
            if source is sys.stdin:
                return
            if source is listener:
                lines.append(Line(listener.accept()[0], port, round_trip))
            else:
                reading[source].receive()
        now = monotonic()
        for line in lines:
            line.connect(now)
            for direction in line.directions:
                direction.deliver(now)
        for line in [line for line in lines if line.is_over]:
            lines.remove(line)
            line.close()


def main(port: int, milliseconds: float) -> None:
    with socket.create_server((HOST, 0), backlog=1024) as listener:
        print(listener.getsockname()[1], flush=True)
        serve(listener, port, milliseconds / 1000)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
