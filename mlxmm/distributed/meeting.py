"""How ranks meet: each of them connects to rank 0, at the address where MLX's processes meet next (`Launch`).

    rank 0  {"challenge": A}
    rank r  {"rank": r, "pid": …, "flags": …, "challenge": B, "proof": …}
    rank 0  {"pid": …, "proof": …}, once all are there

A proof is an HMAC of the message and the other's challenge, with a secret that only this user's processes can read. So
whoever else reaches the port, whatever they send and however slowly, neither joins a start nor ends it.
"""

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import socket
import sys
import tempfile
import time
from multiprocessing.connection import wait
from pathlib import Path

import attrs

from mlxmm import environment
from mlxmm.distributed.launch import Launch
from mlxmm.distributed.messages import BadMessage, Peer
from mlxmm.errors import UserError

TURN_SECONDS = 0.25
HELLO_SECONDS = 5.0  # for a hello, however slowly it comes
MAX_GUESTS = 64  # connections without a hello yet; if more come, the oldest is closed
MIN_SECRET = 16  # characters


def meet(launch: Launch, limit: float) -> list[Peer]:
    """All other ranks on rank 0, rank 0 on the others. Raises `UserError` that names those that do not come within
    `limit` seconds, or an address that is none."""
    address, _, port = launch.address.rpartition(":")
    if not (port.isascii() and port.isdecimal() and int(port) < 2**16):
        raise UserError(f"{launch.address} is no address of rank 0: a port is wanted, as 192.168.1.2:5000")
    place, secret = (address.strip("[]"), int(port)), shared_secret()
    if launch.rank:
        return [_join(place, launch.rank, secret, limit)]
    return _Reception(launch.size, secret, limit).receive(place)


def shared_secret() -> bytes:
    """MLXMM_RANK_SECRET, or that in the cache, which this user alone can read. Raises `UserError`."""
    path = environment.cache_root() / "rank-secret"
    try:
        secret = environment.rank_secret() or _kept_secret(path)
    except (OSError, ValueError) as error:
        raise UserError(f"the ranks' secret in {path}: {error}; or set MLXMM_RANK_SECRET") from None
    if len(secret) < MIN_SECRET:
        raise UserError(f"the ranks' secret is too short: delete {path}, or set a longer MLXMM_RANK_SECRET")
    return secret.encode()


def _kept_secret(path: Path) -> str:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent) as file:  # readable by this user alone
            file.write(secrets.token_hex(32))
            file.flush()
            with contextlib.suppress(FileExistsError):  # another rank was faster
                os.link(file.name, path)
    return path.read_text()


def _flags() -> str:
    """What all ranks of a run have in common."""
    return hashlib.sha256(json.dumps(sys.argv[1:]).encode()).hexdigest()


def _proved(message: dict, secret: bytes, challenge: str) -> dict:
    text = json.dumps([challenge, message], sort_keys=True)
    return message | {"proof": hmac.new(secret, text.encode(), "sha256").hexdigest()}


def _is_proved(message: dict, secret: bytes, challenge: str) -> bool:
    facts = {name: value for name, value in message.items() if name != "proof"}
    expected = _proved(facts, secret, challenge)["proof"]
    return hmac.compare_digest(expected.encode(), message.get("proof", "").encode())


@attrs.define
class _Guest:
    """A connection that has not said yet who it is."""

    peer: Peer
    challenge: str
    until: float


class _Reception:
    """Rank 0's: the ranks that are there, and guests."""

    def __init__(self, size: int, secret: bytes, limit: float):
        self.size, self.secret, self.limit = size, secret, limit
        self.peers: dict[int, Peer] = {}
        self.challenges: dict[int, str] = {}  # that each rank has set
        self.guests: dict[socket.socket, _Guest] = {}
        self.refused: list[str] = []  # why

    def receive(self, place: tuple[str, int]) -> list[Peer]:
        try:
            with socket.create_server(place, backlog=self.size + MAX_GUESTS) as listener:
                listener.setblocking(False)
                self._wait_for_all(listener)
        except OSError as error:
            raise UserError(f"rank 0 cannot listen on {place[0]}:{place[1]}: {error.strerror}") from None
        finally:
            for connection in self.guests:
                connection.close()
        for rank, peer in self.peers.items():  # only now: until here this listener held the port, which MLX needs next
            peer.send(_proved({"pid": os.getpid()}, self.secret, self.challenges[rank]))
        return list(self.peers.values())

    def _wait_for_all(self, listener: socket.socket) -> None:
        deadline = time.monotonic() + self.limit
        while len(self.peers) < self.size - 1:
            for connection in wait([listener, *self.guests], TURN_SECONDS):
                self._welcome(listener) if connection is listener else self._hear(self.guests[connection])
            now = time.monotonic()
            for guest in [guest for guest in self.guests.values() if now > guest.until]:
                self._refuse(guest, f"said no hello for {HELLO_SECONDS:g} s")
            if now > deadline:
                self._end()

    def _end(self) -> None:
        missing = ", ".join(str(rank) for rank in range(1, self.size) if rank not in self.peers)
        reason = f"rank {missing} did not come within {self.limit:g} s (MLXMM_RANK_TIMEOUT)"
        if self.refused:
            reason += f"; {len(self.refused)} connections were refused, the last because it {self.refused[-1]}"
        for peer in self.peers.values():
            peer.send({"failed": reason})
        raise UserError(reason)

    def _welcome(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError:  # it is gone already
            return
        connection.settimeout(HELLO_SECONDS)
        if len(self.guests) >= MAX_GUESTS:
            self._refuse(next(iter(self.guests.values())), "said no hello before many others came")
        guest = _Guest(Peer(-1, connection), secrets.token_hex(16), time.monotonic() + HELLO_SECONDS)
        self.guests[connection] = guest
        guest.peer.send({"challenge": guest.challenge})

    def _hear(self, guest: _Guest) -> None:
        try:
            messages = guest.peer.receive()
        except BadMessage as error:
            return self._refuse(guest, str(error))
        if messages is None:
            return self._refuse(guest, "left without a hello")
        if not messages:
            return None  # the rest of the line is on its way
        if len(messages) > 1 or not _is_proved(messages[0], self.secret, guest.challenge):
            return self._refuse(guest, "has another secret (MLXMM_CACHE, MLXMM_RANK_SECRET)")
        return self._take(guest, messages[0])

    def _take(self, guest: _Guest, hello: dict) -> None:
        """Hello is of this user: it may still be of another run."""
        rank = hello.get("rank", -1)
        if hello.get("flags") != _flags():
            self._refuse(guest, f"is rank {rank} with other flags: is this port another run's?")
        elif rank not in range(1, self.size) or rank in self.peers or not {"pid", "challenge"} <= hello.keys():
            self._refuse(guest, f"is a second rank {rank}, or one too many: is this port another run's?")
        else:
            guest.peer.rank, guest.peer.pid = rank, hello["pid"]
            self.peers[rank], self.challenges[rank] = guest.peer, hello["challenge"]
            del self.guests[guest.peer.connection]

    def _refuse(self, guest: _Guest, reason: str) -> None:
        """Send away one guest: no stranger ends a start."""
        self.refused.append(reason)
        guest.peer.send({"failed": f"rank 0 refused this process, which {reason}"})
        del self.guests[guest.peer.connection]
        guest.peer.connection.close()


def _join(place: tuple[str, int], rank: int, secret: bytes, limit: float) -> Peer:
    """Rank 0, once it has proved that it is."""
    deadline = time.monotonic() + limit
    while True:
        try:
            peer = Peer(0, socket.create_connection(place, timeout=max(0.01, deadline - time.monotonic())))
            greeting = _answer(peer, limit)
            break
        except (OSError, BadMessage):
            if time.monotonic() > deadline:
                raise UserError(f"rank 0 did not come within {limit:g} s (MLXMM_RANK_TIMEOUT)") from None
            time.sleep(TURN_SECONDS / 4)
    own = secrets.token_hex(16)
    hello = {"rank": rank, "pid": os.getpid(), "flags": _flags(), "challenge": own}
    peer.send(_proved(hello, secret, greeting.get("challenge", "")))
    try:
        answer = _answer(peer, limit + HELLO_SECONDS)  # rank 0 times out first, and knows which rank is missing
    except (OSError, BadMessage):
        answer = {"failed": "rank 0 died"}
    if "failed" in answer:
        raise UserError(answer["failed"])
    if not _is_proved(answer, secret, own):
        raise UserError(f"who answers at {place[0]}:{place[1]} is not rank 0: it has another secret")
    peer.pid = answer.get("pid")
    peer.connection.settimeout(HELLO_SECONDS)
    return peer


def _answer(peer: Peer, limit: float) -> dict:
    """The next message. Raises `BadMessage`, or `OSError` where none comes within `limit` seconds."""
    deadline = time.monotonic() + limit
    while True:
        peer.connection.settimeout(max(0.01, deadline - time.monotonic()))
        messages = peer.receive()
        if messages is None or time.monotonic() > deadline:
            raise OSError("no answer")
        if messages:
            return messages[0]
