"""Callbacks, one a file."""

from callbacks.batch_size_finder import BatchSizeFinder
from callbacks.cached_features import CachedFeatures
from callbacks.device_stats_monitor import DeviceStatsMonitor
from callbacks.early_stopping import EarlyStopping
from callbacks.ema_weight_averaging import EMAWeightAveraging
from callbacks.freeze_schedule import FreezeSchedule
from callbacks.gradient_accumulation_scheduler import GradientAccumulationScheduler
from callbacks.lambda_callback import LambdaCallback
from callbacks.learning_rate_finder import LearningRateFinder
from callbacks.learning_rate_monitor import LearningRateMonitor
from callbacks.linear_probe import LinearProbe
from callbacks.loss_spike_guard import LossSpikeError, LossSpikeGuard
from callbacks.model_checkpoint import ModelCheckpoint
from callbacks.model_summary import ModelSummary
from callbacks.on_exception_checkpoint import OnExceptionCheckpoint
from callbacks.retrieval_evaluation import RetrievalEvaluation
from callbacks.sample_captions import SampleCaptions
from callbacks.synthetic_refresh import SyntheticRefresh
from callbacks.throughput_monitor import ThroughputMonitor
from callbacks.timer import Timer
from callbacks.tqdm_progress_bar import TQDMProgressBar
from callbacks.zero_shot_evaluation import ZeroShotEvaluation

__all__ = [
    "BatchSizeFinder",
    "CachedFeatures",
    "DeviceStatsMonitor",
    "EMAWeightAveraging",
    "EarlyStopping",
    "FreezeSchedule",
    "GradientAccumulationScheduler",
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
    "SyntheticRefresh",
    "TQDMProgressBar",
    "ThroughputMonitor",
    "Timer",
    "ZeroShotEvaluation",
]
