"""Train for long in one process, and look at what it holds: memory, threads and open files stay as they are.

    python -m tools.soak                                       50,000 updates, 500 fits, 100 resumes
    python -m tools.soak --updates 20000 --fits 200 --resumes 50

Prints what the process holds after the first fifth of each part and at its end, and how much memory each update, fit or
resume has added in between. Exits with 1 unless that is flat: at most `MOST` bytes each, and FEW threads and files, as
those of a log that has just been closed end a little later, beside the SLACK by which allocators settle.

MLX's CPU backend keeps a thread of the system, of 16 KiB, for each Python thread that ever computed or wrote an array;
neither its end nor `mx.clear_streams()` frees it (0.32). So a process must compute in few threads that stay:

    import os, threading, mlx.core as mx
    for _ in range(500):
        thread = threading.Thread(target=lambda: mx.eval(mx.array([1.0]) + 1))
        thread.start(), thread.join()
    print(len(os.listdir("/proc/self/task")))  # 503
"""

import argparse
import ctypes
import gc
import os
import sys
import tempfile
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

MOST = {"updates": 16, "fits": 2 * 2**10, "resumes": 8 * 2**10}  # bytes that each may add
SLACK = 2**20  # bytes: in the first hundred fits the heap grows by as much, and then no more
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
    """What this process holds: bytes of memory, and numbers of threads, of MLX too, and open files."""

    resident: int
    mlx_active: int
    mlx_cache: int
    threads: int
    files: int

    @classmethod
    def now(cls) -> "Held":
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what is free and not handed back yet
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        files = len(os.listdir("/proc/self/fd"))
        threads = len(os.listdir("/proc/self/task"))
        return cls(resident, mx.get_active_memory(), mx.get_cache_memory(), threads, files)

    def __str__(self) -> str:
        memory = f"{self.resident / 2**20:.1f} MiB resident, {self.mlx_active / 2**10:.1f} KiB active in MLX"
        return f"{memory}, {self.mlx_cache / 2**10:.1f} KiB cached, {self.threads} threads, {self.files} files"

    def grown(self, first: "Held") -> int:
        """Bytes by which it is more than `first`."""
        return self.resident - first.resident

    def is_flat(self, first: "Held", most: float) -> bool:
        """Whether it is at most `most` bytes more than `first`."""
        grown = max(self.grown(first), self.mlx_active + self.mlx_cache - first.mlx_active - first.mlx_cache)
        return grown <= most and max(self.threads - first.threads, self.files - first.files) <= FEW


class Look(Callback):
    """Looks at what is held after a fifth of the updates, and at the last one."""

    def __init__(self, num: int):
        self.num, self.held = num, []

    def on_train_batch_end(self, trainer, module, metrics, batches):
        if trainer.global_step in (self.num // 5, self.num):
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
        if i + 1 in (num // 5, num):
            held.append(Held.now())
    return held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=50_000)
    parser.add_argument("--fits", type=int, default=500)
    parser.add_argument("--resumes", type=int, default=100)
    args = parser.parse_args()
    parts = {"updates": (updates, args.updates), "fits": (fits, args.fits), "resumes": (resumes, args.resumes)}
    sys.exit(not all([is_flat(name, *part) for name, part in parts.items()]))


def is_flat(name: str, part: Callable[[Path, int], list[Held]], num: int) -> bool:
    """Run a part, and print what was held."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        first, last = part(Path(folder), num)
    between = num - num // 5
    flat = last.is_flat(first, SLACK + MOST[name] * between)
    seconds, each = time.perf_counter() - start, last.grown(first) / between
    told = f"{num:,} {name} in {seconds:.0f} s: {'flat' if flat else 'NOT FLAT'}, {each:,.0f} bytes each"
    print(told, f"  first {first}", f"  last  {last}", sep="\n", flush=True)
    return flat


if __name__ == "__main__":
    main()
