"""Watchdog: ranks report their progress to each other, so that none waits forever for one that has failed.

MLX waits without a limit, for a rank that never starts as for one that hangs. So every rank holds a TCP connection to
rank 0, made before MLX's own, at the address where MLX's processes meet next (`Launch`). A thread reports over it, some
times a second, how many collective operations its main thread has entered. A rank that dies, fails, leaves early, stops
reporting or falls behind ends all ranks, with an error that names it.
"""

import atexit
import contextlib
import json
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Sequence

import attrs

from mlxmm import environment
from mlxmm.distributed.launch import Launch
from mlxmm.distributed.signals import Ended
from mlxmm.errors import UserError

TICK = 0.25  # seconds between reports
GRACE = 3.0  # seconds for the main thread to end by itself, once a rank is lost
MLX_TAGS = ("[ring]", "[jaccl]", "[nccl]")  # how MLX's errors of lost connections begin


class PeerLost(SystemExit):
    """Another process has failed. The message is printed as one line, and the exit code is 1."""


@attrs.define(eq=False)
class Peer:
    """What is known of a process; `connection` is None for this process. Times are from time.monotonic."""

    rank: int
    connection: socket.socket | None = None
    count: int = 0  # collective operations it has entered
    waits: bool = False  # whether the timeout applies to ranks that keep it waiting
    left: bool = False  # has ended without an error
    moved: float = attrs.field(factory=time.monotonic)
    heard: float = attrs.field(factory=time.monotonic)
    rest: bytes = b""  # of a message that is not complete yet

    def advance(self, count: int) -> None:
        if count != self.count:
            self.count, self.moved = count, time.monotonic()

    def send(self, message: dict) -> None:
        with contextlib.suppress(OSError):  # the next `receive` finds out
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict] | None:
        """The messages received; None at the end of the connection."""
        try:
            data = self.connection.recv(1 << 16)
        except OSError:
            return None
        self.heard = time.monotonic()
        *lines, self.rest = (self.rest + data).split(b"\n")
        return [json.loads(line) for line in lines] if data else None


class Watchdog:
    """Watches the peers of this process: all other ranks on rank 0, rank 0 on the others. `limit` is in seconds."""

    def __init__(self, rank: int, peers: Sequence[Peer], limit: float):
        self.me, self.peers, self.limit = Peer(rank), list(peers), limit
        self.failure: str | None = None
        self._speaking = threading.Lock()
        threading.Thread(target=self._run, name="watch", daemon=True).start()
        atexit.register(self._leave)

    def enter_collective(self) -> None:
        """The main thread enters the next collective operation. Raises `PeerLost` if another rank has failed."""
        self.me.advance(self.me.count + 1)
        if self.failure:
            raise PeerLost(f"error: {self.failure}")

    def note(self, error: BaseException) -> None:
        """Report an error of this process to the others. Raises `PeerLost` if its cause is that another rank failed."""
        if isinstance(error, Ended) or (isinstance(error, SystemExit) and not error.code):
            return  # a signal that all ranks obey, or a normal exit
        if any(tag in str(error) for tag in MLX_TAGS) and self._verdict_comes():
            raise PeerLost(f"error: {self.failure}") from error
        if self.failure is None:
            self.failure = f"rank {self.me.rank} failed: {type(error).__name__}: {error}".splitlines()[0]
            self._tell({"failed": self.failure})

    def _verdict_comes(self) -> bool:
        """Wait a little, after MLX has lost a connection, for the report that names the failed rank."""
        deadline = time.monotonic() + 8 * TICK
        while self.failure is None and time.monotonic() < deadline:
            time.sleep(TICK / 8)
        return self.failure is not None

    def _leave(self) -> None:
        if self.failure is None and not hasattr(sys, "last_value"):  # set by an exception that nobody caught
            self._tell({"count": self.me.count, "left": True})

    def _tell(self, message: dict) -> None:
        with self._speaking:
            for peer in self.peers:
                peer.send(message)

    # ---- in the thread

    def _run(self) -> None:
        while (reason := self._listen() or self._judge()) is None:
            self._tell({"count": self.me.count, "waits": self.me.waits})
        if self.failure is not None:
            return  # the main thread is about to end with its own error
        self.failure = reason
        self._tell({"failed": reason})
        time.sleep(GRACE)
        print(f"error: {reason}", file=sys.stderr, flush=True)
        os._exit(1)  # the main thread is blocked inside MLX

    def _listen(self) -> str | None:
        """Receive messages for one tick; return the reason to end, if there is one."""
        there = {peer.connection: peer for peer in self.peers if not peer.left}
        deadline = time.monotonic() + TICK
        while (rest := deadline - time.monotonic()) > 0:
            for connection in select.select(there, [], [], rest)[0]:
                peer = there[connection]
                messages = peer.receive()
                if messages is None:
                    return f"rank {peer.rank} died"
                for message in messages:
                    if "failed" in message:
                        return message["failed"]
                    peer.advance(message["count"])
                    peer.waits = message.get("waits", False)
                    if "left" in message:
                        peer.left = True
                        del there[connection]
        return None

    def _judge(self) -> str | None:
        """The reason to end, if a rank stopped reporting, left too early, or keeps another waiting for too long."""
        now, everyone = time.monotonic(), [self.me, *self.peers]
        first = max(everyone, key=lambda peer: peer.count)
        for peer in everyone:
            if peer is not self.me and not peer.left and now - peer.heard > self.limit:
                return f"rank {peer.rank} has been silent for {self.limit:g} s"
            if peer.count < first.count and peer.left:
                return f"rank {peer.rank} ended before the others"
            if peer.count < first.count and first.waits and now - max(peer.moved, first.moved) > self.limit:
                return f"rank {peer.rank} hangs: rank {first.rank} waited {self.limit:g} s for it (MLXMM_RANK_TIMEOUT)"
        return None


# ---- the beginning


def gather(launch: Launch) -> Watchdog:
    """Connect with the other ranks. Raises `UserError` that names those that do not connect within the limit."""
    address, _, port = launch.address.rpartition(":")
    place, limit = (address.strip("[]"), int(port)), environment.rank_timeout()
    first = launch.rank == 0
    peers = _receive_others(place, launch.size, limit) if first else [_join(place, launch.rank, limit)]
    return Watchdog(launch.rank, peers, limit)


def _receive_others(place: tuple[str, int], size: int, limit: float) -> list[Peer]:
    peers, deadline = {}, time.monotonic() + limit
    try:
        with socket.create_server(place, backlog=size) as listener:
            while len(peers) < size - 1:
                listener.settimeout(max(0.01, deadline - time.monotonic()))
                peer = _greet(listener.accept()[0])
                if peer is not None:
                    peers[peer.rank] = peer
    except TimeoutError:
        missing = ", ".join(str(rank) for rank in range(1, size) if rank not in peers)
        raise _refuse(peers, f"rank {missing} did not come within {limit:g} s (MLXMM_RANK_TIMEOUT)") from None
    except UserError as error:
        raise _refuse(peers, str(error)) from None
    except OSError as error:
        raise UserError(f"rank 0 cannot listen on {place[0]}:{place[1]}: {error.strerror}") from None
    for peer in peers.values():  # only now: until here this listener held the port, which MLX needs next
        peer.send({"all": sorted(peers)})
    return list(peers.values())


def _greet(connection: socket.socket) -> Peer | None:
    """The rank that connected; None for a stranger. All ranks must have the same flags."""
    connection.settimeout(5.0)
    peer = Peer(-1, connection)
    try:
        hello = (peer.receive() or [{}])[0]
        peer.rank = hello["rank"]
    except (ValueError, KeyError, TypeError):
        connection.close()
        return None
    if hello["flags"] != sys.argv[1:]:
        peer.send({"failed": (reason := f"rank {peer.rank} came with other flags: is this port another run's?")})
        raise UserError(reason)
    return peer


def _refuse(peers: dict[int, Peer], reason: str) -> UserError:
    for peer in peers.values():
        peer.send({"failed": reason})
    return UserError(reason)


def _join(place: tuple[str, int], rank: int, limit: float) -> Peer:
    deadline = time.monotonic() + limit
    while True:
        try:
            peer = Peer(0, socket.create_connection(place, timeout=max(0.01, deadline - time.monotonic())))
            break
        except OSError:
            if time.monotonic() > deadline:
                raise UserError(f"rank 0 did not come within {limit:g} s (MLXMM_RANK_TIMEOUT)") from None
            time.sleep(TICK / 4)
    peer.send({"rank": rank, "flags": sys.argv[1:]})
    peer.connection.settimeout(limit + 5.0)  # rank 0 times out first, and knows which rank is missing
    answer = (peer.receive() or [{"failed": "rank 0 died"}])[0]
    if "failed" in answer:
        raise UserError(answer["failed"])
    peer.connection.settimeout(5.0)
    return peer
