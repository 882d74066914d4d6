"""Seconds and memory by phase: of a program that says which phase it is in."""

import contextlib
import functools
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import mlx.core as mx

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux only


@attrs.define
class Phase:
    """What a phase took, all its stretches together; the peaks are the highest of them, in bytes."""

    seconds: float = 0.0
    mlx_peak: int = 0
    resident_peak: int = 0


class Phases:
    """A stack of phases. The innermost one is measured; the one around it goes on when it ends."""

    def __init__(self, first: str, elapsed: float = 0.0):
        """`elapsed` are the seconds that the first phase has had already."""
        self.records: dict[str, Phase] = {}
        self._stack, self._since = [first], time.perf_counter() - elapsed

    def switch(self, name: str) -> None:
        """End the innermost phase; `name` takes its place."""
        self.end_stretch()
        self._stack[-1] = name

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within the block, `name` is the innermost phase."""
        self.end_stretch()
        self._stack.append(name)
        try:
            yield
        finally:
            self.end_stretch()
            self._stack.pop()

    def timed(self, name: str, function: Callable) -> Callable:
        """`function`, whose calls are a phase."""

        @functools.wraps(function)
        def call(*arguments, **options):
            with self.phase(name):
                return function(*arguments, **options)

        return call

    def timed_aside(self, name: str, function: Callable) -> Callable:
        """`function`, called in another thread: its seconds count beside those of the phases, memory is not told."""

        @functools.wraps(function)
        def call(*arguments, **options):
            start = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.records.setdefault(name, Phase()).seconds += time.perf_counter() - start

        return call

    def end_stretch(self) -> None:
        """Add what was measured since the last call to the innermost phase."""
        now, record = time.perf_counter(), self.records.setdefault(self._stack[-1], Phase())
        record.seconds += now - self._since
        record.mlx_peak = max(record.mlx_peak, mx.get_peak_memory(), mx.get_active_memory())
        record.resident_peak = max(record.resident_peak, resident_peak())
        mx.reset_peak_memory()
        reset_resident_peak()
        self._since = now


def resident_peak() -> int:
    """The largest resident set, in bytes: since the last reset on Linux, elsewhere since the start."""
    if STATUS.exists():
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def reset_resident_peak() -> None:
    with contextlib.suppress(OSError):  # no Linux, or not allowed: peaks are then those since the start
        CLEAR.write_text("5")
