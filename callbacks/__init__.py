"""Callbacks, one a file."""

from callbacks.freeze_schedule import FreezeSchedule
from callbacks.learning_rate_monitor import LearningRateMonitor
from callbacks.linear_probe import LinearProbe
from callbacks.model_checkpoint import ModelCheckpoint
from callbacks.model_summary import ModelSummary
from callbacks.retrieval_evaluation import RetrievalEvaluation
from callbacks.sample_captions import SampleCaptions
from callbacks.synthetic_refresh import SyntheticRefresh
from callbacks.tqdm_progress_bar import TQDMProgressBar
from callbacks.zero_shot_evaluation import ZeroShotEvaluation

__all__ = [
    "FreezeSchedule",
    "LearningRateMonitor",
    "LinearProbe",
    "ModelCheckpoint",
    "ModelSummary",
    "RetrievalEvaluation",
    "SampleCaptions",
    "SyntheticRefresh",
    "TQDMProgressBar",
    "ZeroShotEvaluation",
]
