"""Where the time of a run goes: seconds in each phase, phases nested inside it not counted."""

import contextlib
import time
from collections import defaultdict
from pathlib import Path

import mlx.core as mx

from mlxmm.errors import UserError

CAPTURED = range(3, 6)  # updates to capture: earlier ones compile


class Profiler:
    """`with profiler.phase("data"): …` measures the time in the block; `profiler.table()` shows the totals."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)
        self._inside = [0.0]  # for each open phase, the time spent in phases nested inside it

    def phase(self, name: str) -> "Phase":
        return Phase(self, name)

    def table(self) -> str:
        """One line per phase, longest first: seconds, share, calls, milliseconds per call."""
        total = sum(self.seconds.values()) or 1.0
        lines = [f"{'phase':<12}{'seconds':>10}{'share':>8}{'calls':>9}{'ms a call':>12}"]
        for name, seconds in sorted(self.seconds.items(), key=lambda item: -item[1]):
            calls = self.counts[name]
            lines.append(f"{name:<12}{seconds:>10.3f}{seconds / total:>8.1%}{calls:>9,}{1e3 * seconds / calls:>12.3f}")
        return "\n".join(lines)


class Phase:
    """Times a block. A class: a generator-based context manager costs more than twice as much per update."""

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
    """Also captures a few updates for Xcode's Metal debugger, in `path` (.gputrace); needs MTL_CAPTURE_ENABLED=1.

    Raises `UserError` where there is no Metal.
    """

    def __init__(self, path: Path):
        super().__init__()
        if not mx.metal.is_available():
            raise UserError("profiler=metal needs the GPU of a Mac; profiler=simple runs anywhere")
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
    """The profiler of a Trainer with this `profiler` setting; traces go to `root`, or to the working directory."""
    if kind == "metal":
        return MetalProfiler((root or Path()) / "updates.gputrace")
    return Profiler() if kind == "simple" else NoProfiler()


class NoProfiler:
    """Measures nothing, at almost no cost."""

    _nothing = contextlib.nullcontext()

    def phase(self, name: str):
        return self._nothing
