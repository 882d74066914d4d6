"""Loggers: metrics as JSON lines, and TensorBoard's event files."""

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mlxmm.distributed import collectives
from mlxmm.errors import UserError
from mlxmm.training import lightning_words


class Logger:
    """What a `Trainer` writes to. `metrics` maps names to Python floats."""

    def __new__(cls, *args, **settings):
        lightning_words.refuse_arguments(cls.__name__, cls.__init__, settings, lightning_words.CONSTRUCTORS)
        return super().__new__(cls)

    def __init__(self) -> None:
        """Takes nothing: `object` would take anything, because of `__new__`."""

    def log_metrics(self, metrics: dict[str, float], step: int, epoch: int) -> None:
        """Write scalars; `step` counts updates."""

    def log_hyperparams(self, params: dict) -> None:
        """Write the settings of a run, a nested dict."""

    def log_images(self, name: str, images: np.ndarray, step: int) -> None:
        """Write images (N, H, W, 3), uint8."""

    def log_text(self, name: str, text: str, step: int) -> None:
        """Write Markdown."""

    def flush(self) -> None:
        """Write everything to disk: a checkpoint is about to be saved."""

    def finalize(self, status: str) -> None:
        """The run has ended; `status` is "success" or "failed"."""

    def position(self) -> int:
        """The size of the logger's file, in bytes."""
        return 0

    def rewind(self, position: int, step: int) -> None:
        """Discard what was written after `position`, at which `step` updates were done: a run resumes there."""


class JSONLLogger(Logger):
    """`metrics.jsonl` in `folder`: one object a line, {"step": 10, "epoch": 0, "train/loss": …, "time": …}.

    `time` is Unix time in seconds. Values that are not finite are written as null: JSON has no NaN.
    """

    def __init__(self, folder: Path | str):
        self.path = Path(folder) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def log_metrics(self, metrics, step, epoch):
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, "epoch": epoch, **finite, "time": time.time()}) + "\n")

    def position(self):
        return self.path.stat().st_size if self.path.exists() else 0

    def rewind(self, position, step):
        if self.path.exists():
            os.truncate(self.path, min(position, self.path.stat().st_size))


class TensorBoardLogger(Logger):
    """TensorBoard's event files in `folder`: scalars, images, text, hyper-parameters."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self._writer = None
        self._purge_step = None

    @property
    def writer(self):
        """The tensorboardX writer, created at the first write, so that no empty file is left."""
        if self._writer is None:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(self.folder), purge_step=self._purge_step)
        return self._writer

    def log_metrics(self, metrics, step, epoch):
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.add_scalar("epoch", epoch, step)

    def log_hyperparams(self, params):
        from tensorboardX.summary import hparams

        # `add_hparams` would open a second run beside this one.
        for summary in hparams(dict(_flatten(params)), {}):
            self.writer.file_writer.add_summary(summary)

    def log_images(self, name, images, step):
        self.writer.add_images(name, images, step, dataformats="NHWC")

    def log_text(self, name, text, step):
        self.writer.add_text(name, text, step)

    def flush(self):
        if self._writer is not None:
            self._writer.flush()

    def finalize(self, status):
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def rewind(self, position, step):
        self._purge_step = step + 1  # from this step on, TensorBoard hides what older files hold


def _flatten(params: dict, prefix: str = "") -> Iterator[tuple[str, bool | float | str]]:
    """Dotted names, and values of types that TensorBoard's table of hyper-parameters shows."""
    for name, value in params.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value if isinstance(value, bool | int | float | str) else str(value)


def make_loggers(logger: Logger | Sequence[Logger] | bool, root: Path | None) -> list[Logger]:
    """The loggers of a Trainer's `logger` argument; none on ranks other than 0, which alone writes."""
    if logger is False or collectives.rank() > 0 or (logger is True and root is None):
        return []
    if logger is True:
        return [JSONLLogger(root), TensorBoardLogger(root)]
    loggers = list(logger) if isinstance(logger, list | tuple) else [logger]
    for one in loggers:
        if not isinstance(one, Logger):
            raise UserError(f"Trainer(logger=...) takes True, False, a mlxmm Logger or several of them: {one!r}")
    return loggers
