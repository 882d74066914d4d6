"""Train for long in one process, and look at what it holds: memory, threads and open files stay as they are.

    python -m tools.soak                                       50,000 updates, 500 fits, 100 resumes
    python -m tools.soak --updates 20000 --fits 200 --resumes 50

Prints what the process holds after the first tenth of each part and at its end. Exits with 1 unless that is flat:
within SLACK of memory and FEW threads and files, as those of a log that has just been closed end a little later.
"""

import argparse
import gc
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import attrs
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mlxmm import Callback, Module, Trainer
from mlxmm.callbacks import ModelCheckpoint

SLACK = 16 * 2**20  # bytes: of Python's own allocator, which gives pages back late
FEW = 4


class Regression(Module):
    """Two layers; a loss of a batch of 4."""

    def __init__(self):
        super().__init__()
        mx.random.seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 1))

    def training_step(self, batch):
        loss = mx.square(self.layers(batch["x"])[:, 0] - batch["y"]).mean()
        return {"loss": loss, "weight": mx.array(4.0)}

    validation_step = training_step

    def configure_optimizers(self):
        return optim.AdamW(1e-3)


def batches(num: int) -> list[dict]:
    rng = np.random.default_rng(0)
    arrays = lambda *shape: rng.normal(size=shape).astype(np.float32)
    return [{"x": arrays(4, 4), "y": arrays(4)} for _ in range(num)]


@attrs.frozen
class Held:
    """What this process holds: bytes of memory, and numbers of threads and open files."""

    resident: int
    mlx_active: int
    mlx_cache: int
    threads: int
    files: int

    @classmethod
    def now(cls) -> "Held":
        gc.collect()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        files = len(os.listdir("/proc/self/fd"))
        return cls(resident, mx.get_active_memory(), mx.get_cache_memory(), threading.active_count(), files)

    def __str__(self) -> str:
        memory = f"{self.resident / 2**20:.1f} MiB resident, {self.mlx_active / 2**10:.1f} KiB active in MLX"
        return f"{memory}, {self.mlx_cache / 2**10:.1f} KiB cached, {self.threads} threads, {self.files} files"

    def is_flat(self, first: "Held") -> bool:
        """Whether it is no more than `first`, apart from slack."""
        grown = self.resident - first.resident, self.mlx_active + self.mlx_cache - first.mlx_active - first.mlx_cache
        return max(grown) <= SLACK and max(self.threads - first.threads, self.files - first.files) <= FEW


class Look(Callback):
    """Looks at what is held after a tenth of the updates, and at the last one."""

    def __init__(self, num: int):
        self.num, self.held = num, []

    def on_train_batch_end(self, trainer, module, metrics, batches):
        if trainer.global_step in (self.num // 10, self.num):
            self.held.append(Held.now())


def trainer(folder: Path, max_steps: int, *callbacks: Callback, **settings) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    callbacks = [*callbacks, ModelCheckpoint(every_n_train_steps=settings.pop("every", 2), monitor="val/loss")]
    return Trainer(default_root_dir=folder, max_steps=max_steps, callbacks=callbacks, **quiet, **settings)


def updates(folder: Path, num: int) -> list[Held]:
    """One run of many updates, with validations, logs and checkpoints."""
    look = Look(num)
    run = trainer(folder, num, look, every=500, val_check_interval=250, log_every_n_steps=10)
    run.fit(Regression(), batches(50), batches(4))
    return look.held


def fits(folder: Path, num: int) -> list[Held]:
    """Many runs, one after the other, each in a folder of its own."""
    each = lambda i: trainer(folder / str(i), 4, val_check_interval=2).fit(Regression(), batches(4), batches(2))
    return after_each(num, each)


def resumes(folder: Path, num: int) -> list[Held]:
    """One run that is resumed again and again, for two updates each time."""
    go_on = lambda i: {"ckpt_path": "last"} if i else {}
    each = lambda i: trainer(folder, 2 * i + 2, val_check_interval=2).fit(
        Regression(), batches(4), batches(2), **go_on(i)
    )
    return after_each(num, each)


def after_each(num: int, act: Callable[[int], None]) -> list[Held]:
    held = []
    for i in range(num):
        act(i)
        if i + 1 in (num // 10, num):
            held.append(Held.now())
    return held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=50_000)
    parser.add_argument("--fits", type=int, default=500)
    parser.add_argument("--resumes", type=int, default=100)
    args = parser.parse_args()
    flat = []
    for name, part in {"resumes": resumes, "fits": fits, "updates": updates}.items():
        num, start = getattr(args, name), time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            first, last = part(Path(folder), num)
        flat.append(last.is_flat(first))
        verdict = "flat" if flat[-1] else "NOT FLAT"
        print(
            f"{num:,} {name} in {time.perf_counter() - start:.0f} s: {verdict}\n  first {first}\n  last  {last}",
            flush=True,
        )
    sys.exit(not all(flat))


if __name__ == "__main__":
    main()
