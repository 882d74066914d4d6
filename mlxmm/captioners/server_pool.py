"""Which of several servers is asked next: the least busy of those that answer.

A circuit breaker for each: a server that fails several times in a row is down. It gets one request on trial after each
pause, and work again as soon as it answers.
"""

import math
import threading
import time
from collections.abc import Sequence

import attrs

from mlxmm.captioners.caption_writer import WriterFailed
from mlxmm.captioners.chat_server import ChatServer, RequestFailed

TICK = 0.05  # seconds between looks for a server that is free
MAX_BACKOFF = 30.0  # seconds


@attrs.define(eq=False)
class Place:
    """A server with what is known of it. Times are from time.monotonic."""

    server: ChatServer
    busy: int = 0  # requests that it has
    failures: int = 0  # in a row
    closed_until: float = 0.0
    down_since: float | None = None
    reason: str = ""  # of its last failure


@attrs.frozen(kw_only=True)
class PoolLimits:
    """Bounds of a `ServerPool`."""

    concurrency: int  # requests at once to each server
    max_failures: int  # in a row, before a server is down
    pause: float  # seconds between requests on trial
    max_retry_after: float  # most seconds to wait because a server says so
    max_down: float  # seconds that all servers may be down


class ServerPool:
    """Hands out servers to threads."""

    def __init__(self, servers: Sequence[ChatServer], limits: PoolLimits):
        self.places, self.limits = [Place(server) for server in servers], limits
        self._changed = threading.Condition()

    def acquire(self) -> tuple[Place, bool]:
        """Wait for a server; also whether this request is on trial. Raises `WriterFailed` if all are down for long."""
        with self._changed:
            while True:
                now = time.monotonic()
                self._require_one_up(now)
                if free := [place for place in self.places if self._takes_work(place, now)]:
                    place = min(free, key=lambda place: place.busy)
                    place.busy += 1
                    return place, place.down_since is not None
                self._changed.wait(TICK)

    def release(self, place: Place, failure: RequestFailed | None = None) -> None:
        """Give a server back, with what its request came to."""
        with self._changed:
            place.busy -= 1
            now = time.monotonic()
            if failure is not None and failure.server:
                self._note_failure(place, failure, now)
            else:  # it answered
                place.failures, place.down_since = 0, None
            if failure is not None and failure.retry_after:
                wait = min(failure.retry_after, self.limits.max_retry_after)
                place.closed_until = max(place.closed_until, now + wait)
            self._changed.notify_all()

    def _note_failure(self, place: Place, failure: RequestFailed, now: float) -> None:
        place.failures, place.reason = place.failures + 1, str(failure)
        if not failure.image and not failure.retry_after:  # too many requests, and it does not say until when
            place.closed_until = now + backoff(place.failures)
        if place.failures < self.limits.max_failures and not failure.unusable:
            return
        place.closed_until = max(place.closed_until, now + self.limits.pause)
        if place.down_since is None:  # the time for which it asked to be left alone does not count
            told = min(failure.retry_after or 0.0, self.limits.max_retry_after)
            place.down_since = -math.inf if failure.unusable else now + told

    def _takes_work(self, place: Place, now: float) -> bool:
        most = self.limits.concurrency if place.down_since is None else 1
        return now >= place.closed_until and place.busy < most

    def _require_one_up(self, now: float) -> None:
        """A server that is unusable does not come back by waiting."""
        since = [place.down_since for place in self.places]
        if all(moment is not None and now - moment > self.limits.max_down for moment in since):
            reasons = "; ".join(f"{place.server.url}: {place.reason}" for place in self.places)
            raise WriterFailed(f"no server gives captions: {reasons}")


def backoff(attempts: int, first: float = 0.5) -> float:
    """Seconds to wait after so many attempts failed, at least one: `first`, doubled each time."""
    return min(first * 2 ** (attempts - 1), MAX_BACKOFF)
