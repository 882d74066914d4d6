"""Callbacks, one a file."""

from callbacks.batch_size_finder import BatchSizeFinder
from callbacks.freeze_schedule import FreezeSchedule
from callbacks.learning_rate_finder import LearningRateFinder
from callbacks.learning_rate_monitor import LearningRateMonitor
from callbacks.loss_spike_guard import LossSpikeError, LossSpikeGuard
from callbacks.model_checkpoint import ModelCheckpoint
from callbacks.model_summary import ModelSummary
from callbacks.sample_captions import SampleCaptions
from callbacks.synthetic_refresh import SyntheticRefresh
from callbacks.tqdm_progress_bar import TQDMProgressBar

__all__ = [
    "BatchSizeFinder",
    "FreezeSchedule",
    "LearningRateFinder",
    "LearningRateMonitor",
    "LossSpikeError",
    "LossSpikeGuard",
    "ModelCheckpoint",
    "ModelSummary",
    "SampleCaptions",
    "SyntheticRefresh",
    "TQDMProgressBar",
]
