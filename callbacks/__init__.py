"""Callbacks, one a file."""

from callbacks.freeze_schedule import FreezeSchedule
from callbacks.learning_rate_monitor import LearningRateMonitor
from callbacks.model_checkpoint import ModelCheckpoint
from callbacks.model_summary import ModelSummary
from callbacks.sample_captions import SampleCaptions
from callbacks.synthetic_refresh import SyntheticRefresh
from callbacks.tqdm_progress_bar import TQDMProgressBar

__all__ = [
    "FreezeSchedule",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "ModelSummary",
    "SampleCaptions",
    "SyntheticRefresh",
    "TQDMProgressBar",
]
