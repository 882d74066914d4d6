"""The loggers, where Lightning has them: `from mlxmm.loggers import TensorBoardLogger`."""

from mlxmm.training import lightning_words, unknown_names
from mlxmm.training.loggers import JSONLLogger, TensorBoardLogger, TrackioLogger, WandbLogger

__all__ = ["JSONLLogger", "TensorBoardLogger", "TrackioLogger", "WandbLogger"]


def __getattr__(name: str):
    """For names that are not there, what to write instead."""
    raise unknown_names.missing_in("mlxmm.loggers", name, lightning_words.PACKAGE, __all__)
