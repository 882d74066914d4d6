"""One side of a row in a process of its own: `python -m tools.bench.child SIDE CASE`, both as the driver writes them.

It answers in lines of JSON: once when it is ready, then once for each line that it reads.
"""

import importlib.util
import json
import os
import resource
import sys
import time
from pathlib import Path

import attrs


class CannotRun(Exception):
    """Why a side cannot run here."""


@attrs.frozen(kw_only=True)
class Case:
    """What both sides are told: where files go, sizes, threads, and MLX's device (cpu, metal or cuda)."""

    folder: Path = attrs.field(converter=Path)
    device: str
    threads: int
    quick: bool
    options: dict


def clocks() -> dict[str, float]:
    """Seconds of the CPU, child processes that have ended included, and of the clock."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"cpu": time.process_time() + ended.ru_utime + ended.ru_stime, "wall": time.perf_counter()}


def since(before: dict[str, float]) -> dict[str, float]:
    """The seconds since `before` was read."""
    return {name: now - before[name] for name, now in clocks().items()}


def clocked(function, *args) -> tuple:
    """What `function` returns, and the seconds that it took."""
    before = clocks()
    result = function(*args)
    return result, since(before)


def peak_mb() -> float:
    """The most memory that this process has held."""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    status = Path("/proc/self/status").read_text()  # Linux's ru_maxrss begins with what the parent held
    return int(status.split("VmHWM:")[1].split()[0]) / 1e3


def use_threads(count: int) -> None:
    """Give torch, where it is installed, `count` threads; the BLAS of MLX reads the environment."""
    if importlib.util.find_spec("torch"):
        import torch

        torch.set_num_threads(count)


def serve(side: str, case: Case, answer) -> None:
    module, function = side.split(":")
    try:
        turn = getattr(importlib.import_module(f"tools.bench.{module}"), function)(case)
    except (CannotRun, ModuleNotFoundError) as error:
        return answer({"cannot": str(error)})
    answer(turn())  # the first one compiles and fills caches
    for _ in sys.stdin:
        measured, seconds = clocked(turn)
        answer(seconds | measured)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not an answer
    side, case = sys.argv[1], Case(**json.loads(sys.argv[2]))

    def answer(values: dict) -> None:
        print(json.dumps(values), file=answers, flush=True)

    if case.options.pop("is_peer"):
        use_threads(case.threads)
    serve(side, case, answer)


if __name__ == "__main__":
    main()
