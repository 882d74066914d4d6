"""Checks of whole runs: one that is killed and resumed, and updates of a preset at its real size."""

import contextlib
import gc
import io
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import attrs
import mlx.core as mx
import numpy as np

from mlxmm import Callback, Qwen3Aligner, Trainer, seed_everything
from mlxmm.callbacks import FreezeSchedule
from mlxmm.compute import memory
from mlxmm.compute.deterministic import repeats_to_the_bit
from mlxmm.compute.memory import GIB
from mlxmm.modules.memory_plan import MemoryPlan
from mlxmm.recipes.parts.alignment import FLICKR30K, AlignmentConfig, plan_alignment, unfrozen_part
from tools.chaos import compare
from tools.memory_table import unloaded
from tools.proof_report import Line, judged, not_tried

ROOT = Path(__file__).parents[1]
ALIGN = "--preset tiny --max-steps 120 --unfreeze-step 10 --checkpoint-every 5 --trainer.val-check-interval 20".split()
RESUMED = "a small align_qwen3, killed and resumed, ends as one never killed"
PEAK = "the peak of memory of preset flickr30k{} is within its plan"
FITS = "the plan of preset flickr30k{} is within the working set"
QUICK_BATCH = 2
UPDATES = 3  # the first is compiled; the time of the others is told


# ---- killed and resumed


def kill_and_resume(quick: bool) -> list[Line]:
    """One whole run, and one killed after its first checkpoint; both read the same cached tower and language model."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if code := launch(folder, "whole").wait():
            return [judged(RESUMED, False, f"the run that is never killed ends with exit code {code}")]
        if not killed_after_checkpoint(launch(folder, "killed"), folder / "killed"):
            return [not_tried(RESUMED, "the run ended before it could be killed")]
        if code := launch(folder, "killed", "--resume", "last").wait():
            return [judged(RESUMED, False, f"the resumed run ends with exit code {code}")]
        with contextlib.redirect_stdout(io.StringIO()) as told:
            exact = repeats_to_the_bit(mx.default_device(), deterministic=False)
            same = compare(folder / "whole", folder / "killed", exact)
        return [judged(RESUMED, same, told.getvalue())]


def launch(folder: Path, run: str, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "recipes.align_qwen3", *ALIGN, "--run-dir", str(folder / run), *flags]
    variables = os.environ | {"MLXMM_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=folder, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def killed_after_checkpoint(process: subprocess.Popen, run: Path) -> bool:
    """Send SIGKILL once there is a checkpoint; false if the process ended before."""
    while process.poll() is None and not (run / "checkpoints/last").is_symlink():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


# ---- at its real size


class Clock(Callback):
    """The seconds of each update, for whose end the trainer has waited."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_train_batch_start(self, trainer, module, batches):
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer, module, metrics, batches):
        self.seconds.append(time.perf_counter() - self.start)


def real_size(quick: bool) -> list[Line]:
    """Updates of the preset for 16 GB on random weights; with `quick` of the same layout with narrow networks."""
    note = ", with narrow networks," if quick else ""
    if mx.default_device() == mx.cpu and not quick:
        return [not_tried(claim.format(note), "no GPU") for claim in (PEAK, FITS)]
    data = attrs.evolve(FLICKR30K.data, batch_size=QUICK_BATCH) if quick else FLICKR30K.data
    config = attrs.evolve(FLICKR30K, data=data)
    with tempfile.TemporaryDirectory() as folder:
        seed_everything(0)
        aligner = unloaded(config, Path(folder), tiny=quick)
    seconds, peak = train(config, aligner)
    return verdicts(note, plan_alignment(config, aligner, 0), seconds, peak)


def train(config: AlignmentConfig, aligner: Qwen3Aligner) -> tuple[list[float], int]:
    """The seconds of each update with all that the preset ever trains, and the peak of memory in bytes."""
    gc.collect()
    mx.clear_cache()
    mx.eval(aligner.parameters())
    mx.reset_peak_memory()
    clock, count = Clock(), config.trainer.accumulate_grad_batches
    quiet = dict.fromkeys(("enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False)
    schedule = FreezeSchedule({0: ("projector", unfrozen_part(config, aligner))}, unit="step")
    trainer = Trainer(config.trainer, max_steps=UPDATES, callbacks=[schedule, clock], logger=False, **quiet)
    batches = [aligner.collate(batch(config, seed)) for seed in range(UPDATES * count)]
    trainer.fit(aligner, train_dataloaders=batches)
    return clock.seconds, mx.get_peak_memory()


def batch(config: AlignmentConfig, seed: int) -> dict:
    rng, shape = np.random.default_rng(seed), (config.data.batch_size, config.module.max_new_tokens)
    return {
        "pixels": rng.integers(0, 256, (shape[0], 224, 224, 3), dtype=np.uint8),
        "tokens": rng.integers(0, 150_000, shape, dtype=np.int32),
        "mask": np.ones(shape, dtype=np.float32),
    }


def verdicts(note: str, plan: MemoryPlan, seconds: list[float], peak: int) -> list[Line]:
    """What MLX keeps of freed arrays does not count in its peak."""
    planned, available = plan.total - plan.kept, memory.working_set() or memory.physical_memory()
    times = ", ".join(f"{each:.2f}" for each in seconds)
    measured = f"peak {peak / GIB:.2f} GiB, planned {planned / GIB:.2f}; seconds of each update: {times}"
    return [
        judged(PEAK.format(note), peak <= planned, measured),
        judged(FITS.format(note), plan.total <= available, f"{plan.total / GIB:.1f} of {available / GIB:.1f} GiB"),
    ]
