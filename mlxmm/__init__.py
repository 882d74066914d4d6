"""mlxmm: multimodal training on MLX."""

import os

# transformers remarks at import that torch is missing: it is not needed. Read before anything imports it.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from mlxmm import blas
from mlxmm.callback import Callback
from mlxmm.data.datamodule import DataModule
from mlxmm.loggers import JSONLLogger, TensorBoardLogger
from mlxmm.module import Module
from mlxmm.modules.caption_decoder import CaptionDecoder
from mlxmm.modules.contrastive_clip import ContrastiveCLIP
from mlxmm.modules.qwen3_aligner import Qwen3Aligner
from mlxmm.modules.zero_shot import ZeroShotClassifier
from mlxmm.randomness import seed_everything
from mlxmm.trainer import Trainer
from mlxmm.trainer_config import TrainerConfig

__all__ = [
    "Callback",
    "CaptionDecoder",
    "ContrastiveCLIP",
    "DataModule",
    "JSONLLogger",
    "Module",
    "Qwen3Aligner",
    "TensorBoardLogger",
    "Trainer",
    "TrainerConfig",
    "ZeroShotClassifier",
    "seed_everything",
]

blas.enable()
