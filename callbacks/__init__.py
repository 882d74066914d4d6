"""Callbacks, one per file: `from mlxmm.callbacks import ModelCheckpoint`.

Those that every Trainer has, a summary, a bar and checkpoints, are in `mlxmm/training/`.
"""

from mlxmm import checkout

if __name__ == "callbacks":  # in a checkout
    checkout.share_modules("callbacks")

from mlxmm.training import lightning_words, unknown_names
from mlxmm.training.model_checkpoint import ModelCheckpoint
from mlxmm.training.model_summary import ModelSummary
from mlxmm.training.tqdm_progress_bar import TQDMProgressBar

from .batch_size_finder import BatchSizeFinder
from .cached_features import CachedFeatures
from .cached_pixels import CachedPixels
from .device_stats_monitor import DeviceStatsMonitor
from .early_stopping import EarlyStopping
from .ema_weight_averaging import EMAWeightAveraging
from .embedding_projector import EmbeddingProjector
from .freeze_schedule import FreezeSchedule
from .gradient_accumulation_scheduler import GradientAccumulationScheduler
from .gradient_histograms import GradientHistograms
from .lambda_callback import LambdaCallback
from .learning_rate_finder import LearningRateFinder
from .learning_rate_monitor import LearningRateMonitor
from .linear_probe import LinearProbe
from .loss_spike_guard import LossSpikeError, LossSpikeGuard
from .on_exception_checkpoint import OnExceptionCheckpoint
from .retrieval_evaluation import RetrievalEvaluation
from .sample_captions import SampleCaptions
from .similarity_matrix import SimilarityMatrix
from .synthetic_refresh import SyntheticRefresh
from .throughput_monitor import ThroughputMonitor
from .timer import Timer
from .weight_histograms import WeightHistograms
from .zero_shot_evaluation import ZeroShotEvaluation

__all__ = [
    "BatchSizeFinder",
    "CachedFeatures",
    "CachedPixels",
    "DeviceStatsMonitor",
    "EMAWeightAveraging",
    "EarlyStopping",
    "EmbeddingProjector",
    "FreezeSchedule",
    "GradientAccumulationScheduler",
    "GradientHistograms",
    "LambdaCallback",
    "LearningRateFinder",
    "LearningRateMonitor",
    "LinearProbe",
    "LossSpikeError",
    "LossSpikeGuard",
    "ModelCheckpoint",
    "ModelSummary",
    "OnExceptionCheckpoint",
    "RetrievalEvaluation",
    "SampleCaptions",
    "SimilarityMatrix",
    "SyntheticRefresh",
    "TQDMProgressBar",
    "ThroughputMonitor",
    "Timer",
    "WeightHistograms",
    "ZeroShotEvaluation",
]


def __getattr__(name: str):
    """For names that are not there, what to write instead."""
    raise unknown_names.missing_in("mlxmm.callbacks", name, lightning_words.CALLBACKS, __all__)
