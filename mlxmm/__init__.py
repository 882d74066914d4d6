"""mlxmm: multimodal training on MLX."""

import os

# transformers remarks at import that torch is missing: it is not needed. Read before anything imports it.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from mlxmm import blas  # noqa: E402
from mlxmm.callback import Callback  # noqa: E402
from mlxmm.data.datamodule import DataModule  # noqa: E402
from mlxmm.loggers import JSONLLogger, TensorBoardLogger  # noqa: E402
from mlxmm.module import Module  # noqa: E402
from mlxmm.modules.contrastive_clip import ContrastiveCLIP  # noqa: E402
from mlxmm.modules.qwen3_aligner import Qwen3Aligner  # noqa: E402
from mlxmm.modules.zero_shot import ZeroShotClassifier  # noqa: E402
from mlxmm.trainer import Trainer, TrainerConfig  # noqa: E402

__all__ = [
    "Callback",
    "ContrastiveCLIP",
    "DataModule",
    "JSONLLogger",
    "Module",
    "Qwen3Aligner",
    "TensorBoardLogger",
    "Trainer",
    "TrainerConfig",
    "ZeroShotClassifier",
]

blas.enable()
