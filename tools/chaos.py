"""Kill runs at random moments, resume them, and compare their ends with that of a run never killed.

    python tools/chaos.py --kills 5                   one run of align_qwen3, killed again and again
    python tools/chaos.py --kills 5 --while-saving    the same, each time while a checkpoint is half written
    python tools/chaos.py --kills 9 --refresh         one run of train_captioner that rewrites its captions before each
                                                      epoch: killed in turn while it trains, while it writes captions,
                                                      and while it takes them
    python tools/chaos.py --tiny --kills 50           so many small runs, each killed once and resumed

Prints a line for each kill, and exits with 1 unless weights, metrics and what else is left are the same: to the bit on
a CPU, and on a GPU with --deterministic; on a GPU without, within TOLERANCE.
"""

import argparse
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import mlx.core as mx

from mlxmm.compute.deterministic import repeats_to_the_bit
from mlxmm.storage import checkpoint
from mlxmm.training.logger import repeatable

ALIGN = """
    --preset tiny
    --batch-size 32 --data.shapes.num-train 640 --data.shapes.num-val 64 --data.shapes.num-test 32
    --max-steps 600 --trainer.val-check-interval 30 --trainer.log-every-n-steps 5
    --unfreeze-step 50 --checkpoint-every 5
""".split()
ALIGN_MOMENTS = 3.0, 7.0  # seconds after a start at which it may be killed: the run takes several times as long
REFRESH = """
    --preset tiny
    --batch-size 32 --data.shapes.num-train 320 --data.shapes.num-val 64 --data.shapes.num-test 32
    --max-steps 300 --trainer.val-check-interval 30 --trainer.log-every-n-steps 5 --checkpoint-every 7
    --refresh.captioner.model itself --refresh.captioner.batch-size 32
""".split()
REFRESH_MOMENTS = 0.2, 2.0  # seconds after it began training
# What is in the run's folder at a moment within a refresh.
WHILE_SAVING, WHILE_WRITING = "checkpoints/.tmp-*step=*", "refresh/version-*/*.sqlite-wal"
WHILE_SWAPPING = "refresh/version-*/.tmp-*complete.json", "refresh/.tmp-*schedule.json"
TINY_UPDATES = 600
TOLERANCE = 0.05  # relative, and absolute near 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--while-saving", action="store_true")
    parser.add_argument("--refresh", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--deterministic", action="store_true", help="train with --trainer.deterministic")
    parser.add_argument("--fit", type=Path, help=argparse.SUPPRESS)  # one tiny run, in a process of its own
    arguments = parser.parse_args()
    if arguments.fit:
        return fit_tiny(arguments.fit, arguments.deterministic)
    random.seed(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.refresh:
            same = one_run_of_refreshes(Path(folder), arguments.kills, arguments.deterministic)
        else:
            many = many_small_runs if arguments.tiny else one_run_many_kills
            same = many(Path(folder), arguments.kills, arguments.while_saving, arguments.deterministic)
    sys.exit(0 if same else 1)


# ---- one run of the recipe, killed again and again


def one_run_many_kills(folder: Path, kills: int, while_saving: bool, deterministic: bool) -> bool:
    flags = ["--trainer.deterministic"] if deterministic else []
    assert launch_align(folder / "whole", folder, *flags).wait() == 0, "the run that is never killed fails by itself"
    # A cache of its own: the killed run trains its tower and language model again, and is killed there too.
    for i in range(kills):
        process = launch_align(folder / "killed", folder / "other", *flags, resume=True)
        kill(process, folder / "killed", i, random.uniform(*ALIGN_MOMENTS), WHILE_SAVING if while_saving else None)
    assert launch_align(folder / "killed", folder / "other", *flags, resume=True).wait() == 0
    return compare(folder / "whole", folder / "killed", repeats_to_the_bit(mx.default_device(), deterministic))


def launch_align(run: Path, cache: Path, *flags: str, resume: bool = False) -> subprocess.Popen:
    return launch("align_qwen3", run, cache, *ALIGN, *flags, resume=resume)


def launch(recipe: str, run: Path, cache: Path, *flags: str, resume: bool) -> subprocess.Popen:
    command = [sys.executable, "-m", f"recipes.{recipe}", *flags, "--run-dir", str(run)]
    command += ["--resume", "last"] if resume and run.exists() else []
    environment = os.environ | {"MLXMM_CACHE": str(cache / "cache")}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


# ---- one run that rewrites its captions


def one_run_of_refreshes(folder: Path, kills: int, deterministic: bool) -> bool:
    """The module in training writes, so that captions do not depend on time, and metrics can be compared."""
    flags = [*REFRESH, *(["--trainer.deterministic"] if deterministic else [])]
    start = lambda run, resume: launch("train_captioner", folder / run, folder, *flags, resume=resume)
    assert start("whole", False).wait() == 0, "the run that is never killed fails by itself"
    moments = {
        "training": None,
        "writing": WHILE_WRITING,
        "completing": WHILE_SWAPPING[0],
        "swapping": WHILE_SWAPPING[1],
    }
    log = folder / "killed/metrics.jsonl"  # which a resumed run cuts to where its checkpoint was
    for i in range(kills):
        name, pattern = list(moments.items())[i % len(moments)]
        began, process = time.time(), start("killed", True)
        wait_for_change(log, began, process)
        print(f"{name}: ", end="")
        kill(process, folder / "killed", i, random.uniform(*REFRESH_MOMENTS), pattern)
    assert start("killed", True).wait() == 0, "the resumed run fails"
    exact = repeats_to_the_bit(mx.default_device(), deterministic)
    return compare(folder / "whole", folder / "killed", exact) and same_captions(folder / "whole", folder / "killed")


def wait_for_change(path: Path, since: float, process: subprocess.Popen) -> None:
    """Return once a file has changed since that time, or the process has ended."""
    while process.poll() is None and not (path.exists() and path.stat().st_mtime > since):
        time.sleep(0.0005)


def same_captions(whole: Path, killed: Path) -> bool:
    """Whether both runs wrote the same versions, and trained the same epochs on them."""
    files = lambda run: {path.relative_to(run): path.read_bytes() for path in (run / "refresh").rglob("*.json")}
    same = files(whole) == files(killed)
    print(f"{len(files(whole)) - 1} refreshes: {'the same' if same else 'DIFFERENT'}")
    return same


# ---- many small runs, each killed once


def many_small_runs(folder: Path, kills: int, while_saving: bool, deterministic: bool) -> bool:
    flags = ["--deterministic"] if deterministic else []
    launch_tiny(folder / "first", *flags).wait()  # compiles kernels, which later runs find
    process = launch_tiny(folder / "whole", *flags)
    start = time.perf_counter()
    assert process.wait() == 0, "the run that is never killed fails by itself"
    seconds = time.perf_counter() - start
    exact, same = repeats_to_the_bit(mx.default_device(), deterministic), []
    for i in range(kills):
        run = folder / str(i)
        moment = random.uniform(0, 0.7 * seconds), WHILE_SAVING if while_saving else None
        kill(launch_tiny(run, *flags), run, i, *moment)
        assert launch_tiny(run, *flags).wait() == 0, "the resumed run fails"
        same.append(compare(folder / "whole", run, exact))
    print(f"{sum(same)} of {kills} endings the same {how_exact(exact)}")
    return all(same)


def launch_tiny(run: Path, *flags: str) -> subprocess.Popen:
    """Start, or resume, a tiny run; returns once it is about to train."""
    command = [sys.executable, __file__, "--fit", str(run), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"OPENBLAS_NUM_THREADS": "1"})
    process.stdout.readline()
    return process


def fit_tiny(run: Path, deterministic: bool) -> None:
    """Train a small network with dropout on shuffled rows, with a checkpoint every five updates."""
    import mlx.nn as nn
    import numpy as np

    from mlxmm import Module, Trainer
    from mlxmm.callbacks import ModelCheckpoint
    from mlxmm.data.loader import Loader
    from mlxmm.optimizers import OptimizerConfig
    from mlxmm.storage.runs import TrainingRunConfig, open_run

    class Tiny(Module):
        def __init__(self):
            super().__init__()
            mx.random.seed(0)
            self.one, self.dropout, self.two = nn.Linear(16, 32), nn.Dropout(0.2), nn.Linear(32, 1)

        def training_step(self, batch):
            guess = self.two(self.dropout(mx.maximum(self.one(batch["x"]), 0)))
            return {"loss": mx.square(guess[:, 0] - batch["y"]).mean()}

        def configure_optimizers(self):
            return OptimizerConfig().build(TINY_UPDATES)

    rng = np.random.default_rng(0)
    rows = [{"x": x, "y": x.sum()} for x in rng.normal(size=(200, 16)).astype(np.float32)]
    data = Loader(rows=rows, transform=lambda row, rng: row, batch_size=8, shuffle=True, drop_last=True)
    config = TrainingRunConfig(run_dir=run, resume="last" if run.exists() else None)
    with open_run(config, "chaos") as opened:
        trainer = Trainer(
            max_steps=TINY_UPDATES,
            deterministic=deterministic,
            default_root_dir=opened.folder,
            log_every_n_steps=5,
            val_check_interval=20,
            callbacks=[ModelCheckpoint(every_n_train_steps=5, monitor="val/loss", save_top_k=2)],
        )
        print("training", flush=True)
        trainer.fit(Tiny(), train_dataloaders=data, val_dataloaders=data, ckpt_path=opened.ckpt_path)


# ---- killing and comparing


def kill(process: subprocess.Popen, run: Path, i: int, after: float, pattern: str | None) -> None:
    """Send SIGKILL `after` so many seconds; with a `pattern`, once a file of such a name is in the run's folder."""
    deadline, checkpoints = time.perf_counter() + after, run / "checkpoints"
    while process.poll() is None:
        late = time.perf_counter() > deadline
        if late and (pattern is None or next(run.glob(pattern), None)):
            break
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    code = process.wait()
    assert code == -signal.SIGKILL, f"the run ended by itself ({code}) before it was killed"
    last = checkpoints / "last"
    reached = last.resolve().name if last.is_symlink() else "before any checkpoint"
    print(
        f"kill {i + 1}: exit code {code}, {reached}, half written {len(list(checkpoints.glob('.tmp-*')))}", flush=True
    )


def compare(whole: Path, killed: Path, exact: bool) -> bool:
    """Whether weights, moments, metrics, summary and files agree, and nothing temporary is left."""
    same = {name: agree(arrays(whole, name), arrays(killed, name), exact) for name in ("weights", "optimizer")} | {
        "metrics": agree(rows(whole), rows(killed), exact),
        "summary": agree(summary(whole), summary(killed), exact),
        "last and best": named(whole, exact) == named(killed, exact),
        "nothing left over": not list(killed.rglob(".tmp-*")),
    }
    if not all(same.values()):
        print("\n".join(f"{name:<20}{'same' if good else 'DIFFERENT'}" for name, good in same.items()))
    else:
        print(f"same {how_exact(exact)}: {', '.join(same)}")
    return all(same.values())


def how_exact(exact: bool) -> str:
    return "to the bit" if exact else f"within {TOLERANCE:g}"


def agree(one, other, exact: bool) -> bool:
    """Whether two trees of arrays and JSON values are equal; if not `exact`, numbers need only be close."""
    if isinstance(one, mx.array):
        equal = mx.array_equal if exact else partial(mx.allclose, rtol=TOLERANCE, atol=TOLERANCE)
        return one.shape == other.shape and equal(one, other).item()
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(agree(one[key], other[key], exact) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(agree(*pair, exact) for pair in zip(one, other))
    if isinstance(one, float) and isinstance(other, float) and not exact:
        return math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return one == other


def arrays(run: Path, name: str) -> dict[str, mx.array]:
    return checkpoint.load(run / "checkpoints/last")[name]


def rows(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in repeatable(json.loads(line)).items() if k != "time"} for line in lines]


def named(run: Path, exact: bool) -> dict[str, str]:
    """What `last` names, and `best` if `exact`: else either of two that nearly tie may be best. (Other checkpoints stay
    where a run was resumed from them.)"""
    names = ("last", "best") if exact else ("last",)
    return {name: (run / "checkpoints" / name).resolve().name for name in names}


def summary(run: Path) -> dict | None:
    path = run / "summary.json"
    return json.loads(path.read_text()) | {"seconds": 0} if path.exists() else None


if __name__ == "__main__":
    main()
