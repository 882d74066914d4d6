"""The callbacks of a Trainer that nobody has to ask for: Lightning's defaults."""

from collections.abc import Sequence

from mlxmm.training.callback import Callback
from mlxmm.training.model_checkpoint import ModelCheckpoint
from mlxmm.training.model_summary import ModelSummary
from mlxmm.training.tqdm_progress_bar import TQDMProgressBar
from mlxmm.training.trainer_config import TrainerConfig


def with_defaults(callbacks: Sequence[Callback], config: TrainerConfig) -> list[Callback]:
    """`callbacks`, and a summary, a bar and checkpoints where they are enabled and none of that kind was given."""
    wanted: list[tuple[bool, type[Callback]]] = [
        (config.enable_model_summary, ModelSummary),
        (config.enable_progress_bar, TQDMProgressBar),
        (config.enable_checkpointing, ModelCheckpoint),
    ]
    missing = [kind for is_on, kind in wanted if is_on and not any(isinstance(given, kind) for given in callbacks)]
    return [*callbacks, *(kind() for kind in missing)]
