"""The loggers of a Trainer, by name or as given; and the one that every run has, of JSON lines."""

import itertools
import math
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mlxmm.distributed import collectives
from mlxmm.errors import UserError
from mlxmm.storage import json_values
from mlxmm.storage.atomic import cut_to_lines
from mlxmm.storage.disk import naming
from mlxmm.training.logger import Logger, set_aside
from mlxmm.training.logger_names import logger_names
from mlxmm.training.tensorboard_logger import TensorBoardLogger
from mlxmm.training.trackers import TrackioLogger, WandbLogger

VIEWERS: dict[str, Callable[[Path | str], Logger]] = {
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
    "trackio": TrackioLogger,
}


class JSONLLogger(Logger):
    """`metrics.jsonl` in `folder`: one object a line, {"step": 10, "epoch": 0, "train/loss": …, "time": …}.

    `time` is Unix time in seconds. Values that are not finite are written as null: JSON has no NaN.
    """

    def __init__(self, folder: Path | str):
        self.path = Path(folder) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def log_metrics(self, metrics, step, epoch):
        line = json_values.dumps({"step": step, "epoch": epoch, **metrics, "time": time.time()}) + "\n"
        cut_to_lines(self.path)  # a kill, or a full disk, may have left a part of one
        with naming(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(line)

    def position(self):
        return self.path.stat().st_size if self.path.is_file() else 0

    def begin(self):
        if self.path.is_file() and re.search(rb'"step": [1-9]', self.path.read_bytes()):  # not of a test before it
            set_aside(self.path.parent, self.path.name)

    def rewind(self, position, step):
        if self.path.is_file():
            with self.path.open("r+b") as file:
                lines = file.readlines() if position is None else []
                before = itertools.takewhile(lambda line: _step_of(line) <= step, lines)
                file.truncate(min(self.path.stat().st_size, sum(map(len, before)) if position is None else position))
            cut_to_lines(self.path)


def _step_of(line: bytes) -> float:
    """The step of a line of metrics; of a damaged one the highest, so that nothing from there on is kept."""
    try:
        return int(json_values.loads(line)["step"])
    except (ValueError, TypeError, KeyError, OverflowError):
        return math.inf


def make_loggers(logger: Logger | Sequence[Logger] | str | bool, root: Path | None) -> list[Logger]:
    """The loggers of a Trainer's `logger` argument; none on ranks other than 0, which alone writes.

    Names, as `logger_names` takes them, stand for JSON lines too, in the folder `root`.
    """
    names = logger_names(logger) if isinstance(logger, str) else None
    if logger is False or collectives.rank() > 0 or (names is not None and root is None):
        return []
    if names is not None:
        return [JSONLLogger(root), *(VIEWERS[name](root) for name in names)]
    loggers = list(logger) if isinstance(logger, list | tuple) else [logger]
    for one in loggers:
        if not isinstance(one, Logger):
            raise UserError(f"Trainer(logger=...) takes True, False, names, a mlxmm Logger or several of them: {one!r}")
    return loggers
