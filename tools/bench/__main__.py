"""mlxmm beside what people would use instead, in one table and one JSON file.

    python -m tools.bench --peers .venv-bench/bin/python    # `make bench`
    python -m tools.bench --quick --rows "CLIP step, small" --peers .venv-bench/bin/python

Each side of a row is a process of its own, on the same shapes, data and seed. After a first turn, which compiles, they
take turns, so that both feel whatever else the machine does; medians count. "times faster" is the peer's time over
ours, by the CPU's seconds (on a GPU, by the clock), unless the row says otherwise. Losses and tokens of the first turn
are compared, too: "same" is the fraction that agrees to a thousandth.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np

from tools.bench.rows import ROWS, Row

PACKAGES = ("mlx", "mlx-lm", "numpy", "torch", "transformers", "lightning")
ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-3  # relative


class SideFailed(Exception):
    """Why a side gives no numbers."""


class Side:
    """One side of a row: a process that takes turns."""

    def __init__(self, python: str, side: str, case: dict, *, is_peer: bool):
        self.log = Path(case["folder"]) / f"{'peer' if is_peer else 'mlxmm'}.log"
        case = case | {"options": case["options"] | {"is_peer": is_peer}}
        threads = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(case["threads"]))
        environment = os.environ | threads | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment |= {"MLXMM_CACHE": str(Path(case["folder"]) / "cache")}
        command = [python, "-m", "tools.bench.child", side, json.dumps(case)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log.open("w")}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, bufsize=1, **pipes)
        self.first = self._answer()

    def _answer(self) -> dict:
        if not (line := self.process.stdout.readline()):
            raise SideFailed(f"failed: {why(self.log.read_text().splitlines())}")
        if reason := (answer := json.loads(line)).get("cannot"):
            raise SideFailed(reason)
        return answer

    def turn(self) -> dict:
        """The numbers of one more turn."""
        print(file=self.process.stdin, flush=True)
        return self._answer()

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def why(lines: list[str]) -> str:
    """The exception that ended a process, of what it wrote; notes may come after it."""
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
    return (errors or lines or ["no message"])[-1]


def measure(row: Row, threads: int, args, device: str) -> dict:
    """Both sides' numbers: lists by their names, and what of the first turn agrees."""
    sides = []
    with tempfile.TemporaryDirectory() as folder:
        case = {"folder": folder, "device": device, "threads": threads, "quick": args.quick, "options": row.options}
        try:
            if row.cpu_only and device != "cpu":
                raise SideFailed(f"is for a CPU, and MLX computes on {device}")
            if row.needs and not args.peers:
                raise SideFailed(f"needs --peers, a Python with {', '.join(row.needs)}")
            sides.append(Side(sys.executable, row.ours, case, is_peer=False))
            sides.append(Side(args.peers if row.needs else sys.executable, row.theirs, case, is_peer=True))
            turns = [[side.turn() for side in sides] for _ in range(args.repeats)]
        except SideFailed as error:
            return {"cannot": str(error)}
        finally:
            for side in sides:
                side.end()
    ours, theirs = ({name: [turn[name] for turn in side] for name in side[0]} for side in zip(*turns))
    return {"ours": ours, "theirs": theirs, "same": agreement(*(side.first.get("check") for side in sides))}


def agreement(ours: list | None, theirs: list | None) -> float | None:
    """The fraction of two lists of numbers that agrees; None where a side gives none."""
    if ours is None or theirs is None:
        return None
    if len(ours) != len(theirs):
        return 0.0
    return float(np.isclose(ours, theirs, rtol=TOLERANCE).mean())


def summary(row: Row, threads: int, measured: dict, device: str) -> dict:
    """A row of the table, with all that was measured."""
    line = {"row": row.name, "peer": row.peer, "threads": threads, "goal": row.goal, "aim": row.aim} | measured
    if "cannot" in measured:
        return line
    clock = "wall" if row.clock == "cpu" and device != "cpu" else row.clock
    medians = {name: {k: statistics.median(v) for k, v in measured[name].items() if k != "check"} for name in SIDES}
    names = dict.fromkeys((clock, "cpu", "wall", *row.also))
    ratios = {name: medians["theirs"][name] / max(medians["ours"][name], 1e-9) for name in names}
    return line | {"clock": clock, "medians": medians, "times": ratios}


SIDES = ("ours", "theirs")
HEADING = ("row", "against", "threads", "clock", "mlxmm", "peer", "times faster", "by wall", "goal (aim)", "same")


def cells(line: dict) -> list[tuple]:
    """The lines of the table for one row: its clock, then other numbers."""
    start = (line["row"], line["peer"], line["threads"])
    if "cannot" in line:
        return [(*start, "", "", "", line["cannot"], "", "", "")]
    goal = f"{line['goal']:g}" + (f" ({line['aim']:g})" if line["aim"] else "")
    same = "" if line["same"] is None else f"{line['same']:.0%}"
    lines = []
    for name in dict.fromkeys((line["clock"], *(set(line["times"]) - {"cpu", "wall"}))):
        ours, theirs = (line["medians"][side][name] for side in SIDES)
        unit, scale = ("ms", 1e3) if name in ("cpu", "wall") else (name, 1)
        figures = (f"{scale * ours:,.1f}", f"{scale * theirs:,.1f}", f"{line['times'][name]:.2f}")
        clock = f"{name} ms" if unit == "ms" else name
        lines.append((*start, clock, *figures, f"{line['times']['wall']:.2f}", goal, same))
        goal = same = ""
    return lines


def table(lines: list[dict], head: dict) -> str:
    """The table as Markdown."""
    rows = [HEADING, ("---",) * len(HEADING), *(row for line in lines for row in cells(line))]
    versions = ", ".join(f"{name} {version}" for name, version in head["versions"].items())
    title = f"{head['device']} ({head['machine']}, {head['cores']} cores); {versions}"
    return "\n".join([title, "", *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def device_name() -> str:
    """Where MLX computes: cpu, metal or cuda."""
    if mx.default_device() == mx.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def versions(python: str | None) -> dict[str, str]:
    """The versions of both environments' packages."""
    code = f"""import importlib.metadata as m, json
found = {{d.metadata["Name"]: d.version for d in m.distributions()}}
print(json.dumps({{name: found[name] for name in {PACKAGES!r} if name in found}}))"""
    found = {}
    for one in filter(None, (python, sys.executable)):
        found |= json.loads(subprocess.run([one, "-c", code], capture_output=True, text=True, check=True).stdout)
    return {name: found[name] for name in PACKAGES if name in found}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help="a Python with torch, transformers and lightning beside mlxmm's own packages")
    parser.add_argument("--quick", action="store_true", help="smaller sizes, three turns, one thread")
    parser.add_argument("--rows", nargs="+", default=[], help="parts of the names of the rows to measure; default: all")
    parser.add_argument("--threads", nargs="+", type=int, help="default: 1 and 2")
    parser.add_argument("--repeats", type=int, help="turns of each side; default: 5")
    parser.add_argument("--output", type=Path, default=Path("runs/bench.json"), help="the file of all numbers")
    args = parser.parse_args()
    args.threads = args.threads or ([1] if args.quick else [1, 2])
    args.repeats = args.repeats or (3 if args.quick else 5)
    if args.peers and not Path(args.peers).exists():
        parser.error(f"--peers {args.peers} is not there: `make bench` makes one")
    return args


def main() -> None:
    args, device, lines = parse(), device_name(), []
    chosen = [row for row in ROWS if not args.rows or any(part in row.name for part in args.rows)]
    head = {"device": device, "machine": platform.machine(), "cores": os.cpu_count(), "versions": versions(args.peers)}
    for row in chosen:
        for threads in args.threads:
            lines.append(summary(row, threads, measure(row, threads, args, device), device))
            for one in cells(lines[-1]):
                print("  ".join(map(str, one)), file=sys.stderr, flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(head | {"load": os.getloadavg(), "rows": lines}, indent=1) + "\n")
    print(table(lines, head))


if __name__ == "__main__":
    main()
