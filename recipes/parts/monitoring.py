"""What the recipes that train log, so that a run can be looked at while it goes on and afterwards."""

from collections.abc import Mapping

import numpy as np
from PIL import Image

from mlxmm import Callback, Trainer, TrainerConfig
from mlxmm.callbacks import (
    DeviceStatsMonitor,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    ThroughputMonitor,
    TQDMProgressBar,
)
from mlxmm.data.overview import FEW, too_few
from mlxmm.data.sources.rows import is_stream
from mlxmm.storage.runs import Run
from mlxmm.terminal import counted
from mlxmm.training.logger import repeatable


def monitors(title: str) -> list[Callback]:
    """A summary, a bar of this title, the learning rate, speed and memory."""
    bar = TQDMProgressBar(name=title)
    return [ModelSummary(), LearningRateMonitor(), ThroughputMonitor(), DeviceStatsMonitor(), bar]


def checkpoints(config: TrainerConfig, **settings) -> list[Callback]:
    """A ModelCheckpoint with these settings, if there are to be checkpoints."""
    return [ModelCheckpoint(**settings)] if config.enable_checkpointing else []


def newest(trainer: Trainer) -> dict[str, float]:
    """The newest value of each metric that is not of time or memory. "train/loss" has that of "train/loss_epoch"."""
    metrics = repeatable(trainer.callback_metrics)
    return {name: metrics[name] for name in metrics if name.removesuffix("_epoch") not in metrics.keys() - {name}}


def log_results(trainer: Trainer, metrics: Mapping, samples: Image.Image | None = None) -> None:
    """Log what a test gave under the last update: numbers as "test/…", but not what chance gives, and samples."""
    for logger in trainer.loggers if samples else ():
        logger.log_images("test/samples", np.asarray(samples)[None], trainer.global_step)
    names = [name for name in metrics if not name.endswith("_chance")]
    trainer.log({f"test/{name.removeprefix('test/')}": metrics[name] for name in names})


def report_split(split: str, rows, run: Run) -> None:
    """Print what is evaluated on, and a warning where it has few pictures."""
    if is_stream(rows):
        return
    run.print(f"evaluating on {split}, {counted(len(rows), 'picture')}")
    if len(rows) < FEW:
        run.print(f"warning: {too_few(split, len(rows))}")
