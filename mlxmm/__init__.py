"""mlxmm: multimodal training on MLX."""

import importlib

from mlxmm import commands, terminal

if commands.is_recipe():
    terminal.end_at_signals()

from mlxmm import backends, environment, version

environment.quiet_libraries()  # before anything imports it
backends.require_backend()

from mlxmm.compute import linux_blas, linux_malloc
from mlxmm.evaluation.zero_shot import ZeroShotClassifier
from mlxmm.modules.caption_decoder import CaptionDecoder
from mlxmm.modules.contrastive_clip import ContrastiveCLIP
from mlxmm.modules.qwen3_aligner import Qwen3Aligner
from mlxmm.training import lightning_words, unknown_names
from mlxmm.training.callback import Callback
from mlxmm.training.datamodule import DataModule
from mlxmm.training.loggers import JSONLLogger, TensorBoardLogger, TrackioLogger, WandbLogger
from mlxmm.training.module import Module
from mlxmm.training.randomness import seed_everything
from mlxmm.training.trainer import Trainer
from mlxmm.training.trainer_config import TrainerConfig

__all__ = [
    "Callback",
    "CaptionDecoder",
    "ContrastiveCLIP",
    "DataModule",
    "JSONLLogger",
    "Module",
    "Qwen3Aligner",
    "TensorBoardLogger",
    "TrackioLogger",
    "Trainer",
    "TrainerConfig",
    "WandbLogger",
    "ZeroShotClassifier",
    "seed_everything",
]

if environment.uses_linux_blas():
    linux_blas.enable()
if environment.uses_linux_functions():
    linux_malloc.enable()


def __getattr__(name: str):
    """`__version__` and rooms of names, read when they are asked for; for other names, what to import instead."""
    if name == "__version__":
        return version.installed_version()
    if name in ("callbacks", "loggers"):
        return importlib.import_module(f"mlxmm.{name}")
    raise unknown_names.missing_in("mlxmm", name, lightning_words.PACKAGE, __all__)
