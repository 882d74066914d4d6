"""Watchdog: ranks report their progress to each other, so that none waits forever for one that has failed.

MLX waits without a limit, for a rank that never starts as for one that hangs. So every rank holds a TCP connection to
rank 0, made before MLX's own, at the address where MLX's processes meet next (`Launch`). A thread reports over it, some
times a second, how many collective operations its main thread has entered. A rank that dies, fails, leaves early, stops
reporting or falls behind ends all ranks, with an error that names it. One that has stopped altogether (SIGSTOP) is
killed: `mlx.launch` would wait for it.
"""

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import wait

from mlxmm import environment
from mlxmm.distributed import meeting
from mlxmm.distributed.launch import Launch
from mlxmm.distributed.messages import MAX_REASON, BadMessage, Peer
from mlxmm.distributed.signals import Ended
from mlxmm.escaping import visible
from mlxmm.terminal import end_at_once

TICK = 0.25  # seconds between reports
STOPPED = 8 * TICK  # seconds without a report after which a lost rank is taken for stopped
GRACE = 3.0  # seconds for the main thread to end by itself, once a rank is lost
MLX_TAGS = ("[ring]", "[jaccl]", "[nccl]")  # how MLX's errors of lost connections begin


class PeerLost(SystemExit):
    """Another process has failed. The message is printed as one line, and the exit code is 1."""


class Watchdog:
    """Watches the peers of this process: all other ranks on rank 0, rank 0 on the others. `limit` is in seconds."""

    def __init__(self, rank: int, peers: Sequence[Peer], limit: float):
        self.me, self.peers, self.limit = Peer(rank), list(peers), limit
        self.failure: str | None = None
        self._launcher = os.getppid()
        self._is_ending = False  # by a signal, which all ranks obey
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
        self._is_ending = isinstance(error, Ended)
        if self._is_ending or (isinstance(error, SystemExit) and not error.code):
            return  # a signal that all ranks obey, or a normal exit
        if any(tag in str(error) for tag in MLX_TAGS) and self._verdict_comes():
            raise PeerLost(f"error: {self.failure}") from error
        if self.failure is None:
            told = f"rank {self.me.rank} failed: {type(error).__name__}: {error}".splitlines()[0]
            self.failure = visible(told)[:MAX_REASON]
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
        reason = self._watch()
        if self.failure is not None:
            return  # the main thread is about to end with its own error
        self.failure = visible(reason)
        self._tell({"failed": reason})
        time.sleep(GRACE)
        end_at_once(f"error: {self.failure}", 1)  # the main thread is blocked inside MLX

    def _watch(self) -> str:
        """Report and listen until there is a reason to end."""
        try:
            while (reason := self._listen() or self._judge()) is None:
                self._heed_launcher()
                self._tell({"count": self.me.count, "waits": self.me.waits})
        except Exception as error:  # without this thread, a lost rank would go unnoticed
            return f"the watchdog of rank {self.me.rank} failed: {type(error).__name__}: {error}"[:MAX_REASON]
        return reason

    def _heed_launcher(self) -> None:
        """Ask this rank to end, once, if its launcher is gone, however that ended: nobody reads what it prints.

        Not if it ends already, because another rank was asked first: after `fit` a signal would kill it."""
        if os.getppid() != self._launcher and not self._is_ending:
            self._launcher = os.getppid()
            os.kill(os.getpid(), signal.SIGTERM)  # SIGHUP may be ignored: `nohup mlx.launch`

    def _kill(self, peer: Peer) -> None:
        """Kill a lost peer of this machine that does not report any more: it would not end by itself."""
        if peer.pid and time.monotonic() - peer.heard > STOPPED and peer.is_local():
            with contextlib.suppress(OSError):  # it has ended after all
                os.kill(peer.pid, signal.SIGKILL)

    def _listen(self) -> str | None:
        """Receive messages for one tick; return the reason to end, if there is one."""
        there = {peer.connection: peer for peer in self.peers if not peer.left}
        deadline = time.monotonic() + TICK
        while (rest := deadline - time.monotonic()) > 0:
            for connection in wait(list(there), rest):
                peer = there[connection]
                try:
                    messages = peer.receive()
                except BadMessage as error:
                    return f"rank {peer.rank} {error}"
                if messages is None:
                    return f"rank {peer.rank} died"
                for message in messages:
                    if "failed" in message:
                        return message["failed"]
                    peer.note(message)
                if peer.left:
                    del there[connection]
        return None

    def _judge(self) -> str | None:
        """The reason to end, if a rank stopped reporting, left too early, or keeps another waiting for too long."""
        now, everyone = time.monotonic(), [self.me, *self.peers]
        first = max(everyone, key=lambda peer: peer.count)
        for peer in everyone:
            silent = peer is not self.me and not peer.left and now - peer.heard > self.limit
            late = peer.count < first.count and first.waits and now - max(peer.moved, first.moved) > self.limit
            if silent or late:
                self._kill(peer)
            if silent:
                return f"rank {peer.rank} has been silent for {self.limit:g} s"
            if peer.count < first.count and peer.left:
                return f"rank {peer.rank} ended before the others"
            if late:
                return f"rank {peer.rank} hangs: rank {first.rank} waited {self.limit:g} s for it (MLXMM_RANK_TIMEOUT)"
        return None


def gather(launch: Launch) -> Watchdog:
    """Connect with the other ranks. Raises `UserError` that names those that do not connect within the limit."""
    limit = environment.rank_timeout()
    return Watchdog(launch.rank, meeting.meet(launch, limit), limit)
