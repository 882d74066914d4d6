"""Where a run's time goes: seconds in each phase, without the phases inside it."""

import contextlib
import time
from collections import defaultdict
from pathlib import Path

import mlx.core as mx

from mlxmm.errors import UserError

CAPTURED = range(3, 6)  # updates: those before them compile


class Profiler:
    """`with profiler.phase("data"): …` adds up the time that passes; `profiler.table()` shows it."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)
        self._inside = [0.0]  # for each open phase, the time that phases inside it took

    def phase(self, name: str) -> "Phase":
        return Phase(self, name)

    def table(self) -> str:
        """A line for each phase, the longest first: seconds, share, calls, milliseconds a call."""
        total = sum(self.seconds.values()) or 1.0
        lines = [f"{'phase':<12}{'seconds':>10}{'share':>8}{'calls':>9}{'ms a call':>12}"]
        for name, seconds in sorted(self.seconds.items(), key=lambda item: -item[1]):
            calls = self.counts[name]
            lines.append(f"{name:<12}{seconds:>10.3f}{seconds / total:>8.1%}{calls:>9,}{1e3 * seconds / calls:>12.3f}")
        return "\n".join(lines)


class Phase:
    """The time between entering and leaving: a class costs less than half of what a generator does."""

    __slots__ = ("_name", "_profiler", "_start")

    def __init__(self, profiler: Profiler, name: str):
        self._profiler, self._name = profiler, name

    def __enter__(self) -> None:
        self._profiler._inside.append(0.0)
        self._start = time.perf_counter()

    def __exit__(self, *exception) -> None:
        profiler, elapsed = self._profiler, time.perf_counter() - self._start
        profiler.seconds[self._name] += elapsed - profiler._inside.pop()
        profiler.counts[self._name] += 1
        profiler._inside[-1] += elapsed


class MetalProfiler(Profiler):
    """Also captures a few updates for Xcode's Metal debugger, in `path` (.gputrace); wants MTL_CAPTURE_ENABLED=1.

    Raises `UserError` where there is no Metal.
    """

    def __init__(self, path: Path):
        super().__init__()
        if not mx.metal.is_available():
            raise UserError("profiler=metal wants the GPU of a Mac; profiler=simple runs anywhere")
        self._path, self._is_open = path, False

    def phase(self, name: str):
        if name == "step" and self.counts["step"] == CAPTURED.start:
            mx.metal.start_capture(str(self._path))
            self._is_open = True
        if name == "step" and self.counts["step"] == CAPTURED.stop:
            self._close()
        return super().phase(name)

    def table(self) -> str:
        self._close()
        return super().table()

    def _close(self) -> None:
        if self._is_open:
            mx.metal.stop_capture()
            self._is_open = False


def make_profiler(kind: str | None, root: Path | None) -> "Profiler | NoProfiler":
    """What a Trainer of that `profiler` setting measures with; traces go to `root`, or where the run was started."""
    if kind == "metal":
        return MetalProfiler((root or Path()) / "updates.gputrace")
    return Profiler() if kind == "simple" else NoProfiler()


class NoProfiler:
    """Measures nothing and costs next to nothing."""

    _nothing = contextlib.nullcontext()

    def phase(self, name: str):
        return self._nothing
