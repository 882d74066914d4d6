"""Messages between ranks: lines of JSON, of bounded size, with known fields. What is anything else is refused."""

import contextlib
import json
import socket
import time

import attrs

MAX_LINE = 1 << 14  # bytes
MAX_REASON = 1_000  # characters of an error that is told: JSON makes at most twelve bytes of each
KINDS = {
    "count": int,  # collective operations entered
    "waits": bool,  # whether the timeout applies to ranks that keep this one waiting
    "left": bool,  # ended without an error
    "failed": str,  # why all ranks end
    "rank": int,
    "pid": int,
    "flags": str,  # SHA-256 of the command line
    "challenge": str,  # a random text
    "proof": str,  # see meeting.py
}


class BadMessage(ValueError):
    """What came is no message."""


def parse(line: bytes) -> dict:
    """The message in a line. Raises `BadMessage`."""
    try:
        message = json.loads(line) if len(line) <= MAX_LINE else None
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict) or any(KINDS.get(name) is not type(value) for name, value in message.items()):
        raise BadMessage(f"sent what is no message: {line[:40]!r}")
    return message


@attrs.define(eq=False)
class Peer:
    """What is known of a process; `connection` is None for this process. Times are from time.monotonic."""

    rank: int
    connection: socket.socket | None = None
    pid: int | None = None
    count: int = 0  # collective operations it has entered
    waits: bool = False  # whether the timeout applies to ranks that keep it waiting
    left: bool = False  # has ended without an error
    moved: float = attrs.field(factory=time.monotonic)
    heard: float = attrs.field(factory=time.monotonic)
    rest: bytes = b""  # of a message that is not complete yet

    def advance(self, count: int) -> None:
        if count != self.count:
            self.count, self.moved = count, time.monotonic()

    def note(self, report: dict) -> None:
        """Take over what the peer reports of itself."""
        self.advance(report.get("count", self.count))
        self.waits, self.left = report.get("waits", False), report.get("left", False)

    def is_local(self) -> bool:
        """Whether the peer is a process of this machine."""
        try:
            return self.connection.getpeername()[0] == self.connection.getsockname()[0]
        except OSError:
            return False

    def send(self, message: dict) -> None:
        with contextlib.suppress(OSError):  # the next `receive` finds out
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict] | None:
        """The messages received; None at the end of the connection. Raises `BadMessage`."""
        try:
            data = self.connection.recv(1 << 16)
        except OSError:
            return None
        self.heard = time.monotonic()
        *lines, self.rest = (self.rest + data).split(b"\n")
        if len(self.rest) > MAX_LINE:
            raise BadMessage(f"sent more than {MAX_LINE} bytes without an end of line")
        return list(map(parse, lines)) if data else None
