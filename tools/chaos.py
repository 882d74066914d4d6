"""Kill a run at random moments, resume it each time, and compare its end with that of a run never killed.

    python tools/chaos.py --kills 5
    python tools/chaos.py --kills 5 --while-saving    (waits for a checkpoint that is half written)

Prints a line for each kill, and exits with 1 unless weights and metrics are the same to the bit.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx

FLAGS = """
    --data.batch-size 32 --data.shapes.num-train 640 --data.shapes.num-val 64 --data.shapes.num-test 32
    --tower.trainer.max-steps 40 --language-model.trainer.max-steps 20
    --trainer.max-steps 600 --trainer.val-check-interval 30 --trainer.log-every-n-steps 5
    --open-step 50 --checkpoint-every 5
""".split()
MOMENTS = 3.0, 7.0  # seconds after a start at which it may be killed: the run takes several times as long


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--while-saving", action="store_true")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        assert launch(folder / "whole", folder).wait() == 0, "the run that is never killed fails by itself"
        # A cache of its own: the killed run trains its tower and language model again, and is killed there too.
        for i in range(arguments.kills):
            kill_once(folder, i, arguments.while_saving)
        assert launch(folder / "killed", folder / "other", resume=True).wait() == 0
        same = compare(folder / "whole", folder / "killed")
    sys.exit(0 if same else 1)


def launch(run: Path, cache: Path, *, resume: bool = False) -> subprocess.Popen:
    command = [sys.executable, "-m", "recipes.align_qwen3", *FLAGS, "--run-dir", str(run)]
    command += ["--resume", "last"] if resume and run.exists() else []
    environment = os.environ | {"MLXMM_CACHE": str(cache / "cache")}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


def kill_once(folder: Path, i: int, while_saving: bool) -> None:
    process = launch(folder / "killed", folder / "other", resume=True)
    deadline = time.perf_counter() + random.uniform(*MOMENTS)
    checkpoints = folder / "killed" / "checkpoints"
    while process.poll() is None:
        half_written = list(checkpoints.glob(".tmp-*step=*"))
        if (while_saving and half_written and time.perf_counter() > deadline) or (
            not while_saving and time.perf_counter() > deadline
        ):
            break
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    code = process.wait()
    assert code == -signal.SIGKILL, f"the run ended by itself ({code}) before it was killed"
    last = (checkpoints / "last").resolve().name if checkpoints.exists() else "before any checkpoint"
    print(f"kill {i + 1}: exit code {code}, last {last}, half written {len(list(checkpoints.glob('.tmp-*')))}")


def compare(whole: Path, killed: Path) -> bool:
    """Whether weights, metrics and summary are equal, and nothing temporary is left."""
    weights = [mx.load(str(run / "checkpoints/last/weights.safetensors")) for run in (whole, killed)]
    same = {
        "weights": weights[0].keys() == weights[1].keys()
        and all(mx.array_equal(array, weights[1][name]).item() for name, array in weights[0].items()),
        "metrics": rows(whole) == rows(killed),
        "summary": summary(whole) == summary(killed),
        "nothing left over": not list(killed.rglob(".tmp-*")),
    }
    for name, good in same.items():
        print(f"{name:<20}{'same' if good else 'DIFFERENT'}")
    return all(same.values())


def rows(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines]


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text()) | {"seconds": 0}


if __name__ == "__main__":
    main()
