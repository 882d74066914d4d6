"""What can be read of a Trainer: counters, limits, and parts of the run."""

import time

from mlxmm.distributed import collectives
from mlxmm.errors import UserError
from mlxmm.training import batches, lightning_words, unknown_names
from mlxmm.training.callback import Callback
from mlxmm.training.logger import Logger
from mlxmm.training.model_checkpoint import ModelCheckpoint
from mlxmm.training.monitors import Metrics
from mlxmm.training.trainer_config import TrainerConfig


class TrainerProperties:
    """The read-only part of a `Trainer`."""

    callbacks: list[Callback]
    loggers: list[Logger]

    def __getattr__(self, name: str):
        config = {setting: f"write trainer.config.{setting}" for setting in TrainerConfig.__annotations__}
        for limit in ("max_epochs", "max_steps"):
            config[limit] += "; for a schedule, trainer.estimated_stepping_batches, as schedules count updates"
        raise unknown_names.missing("Trainer", name, lightning_words.TRAINER | config)

    def __reduce_ex__(self, protocol):
        raise UserError("a Trainer cannot be copied or pickled: copy its module, and make another Trainer")

    @property
    def global_step(self) -> int:
        """Optimizer updates, and nothing else."""
        return self.progress.global_step

    @property
    def current_epoch(self) -> int:
        """The epoch that is trained, from 0."""
        return self.progress.current_epoch

    @property
    def batch_idx(self) -> int:
        """The micro-batches of this epoch that are done."""
        return self.progress.batch_idx

    @property
    def accumulate_grad_batches(self) -> int:
        """The micro-batches of an update now."""
        return self.schedule.accumulate_grad_batches

    @property
    def logged_metrics(self) -> dict[str, float]:
        """What was logged since the newest update."""
        newest = (name for name in self.callback_metrics if self.logged_at.get(name) == self.global_step)
        return Metrics({name: self.callback_metrics[name] for name in newest})

    @property
    def enable_validation(self) -> bool:
        """Whether there is anything to validate on."""
        loader, limit = self.datamodule.val_dataloader(), self.config.limit_val_batches
        return bool(self.config.overfit_batches) or (loader is not None and batches.count(loader, limit) != 0)

    @property
    def is_global_zero(self) -> bool:
        """Whether this process is the one that writes."""
        return collectives.rank() == 0

    @property
    def training_seconds(self) -> float:
        """How long this run has been in training, the time before a resume included."""
        return self.progress.seconds + (time.perf_counter() - self._started if self.state == "running" else 0.0)

    @property
    def num_compiled_variants(self) -> int:
        """For how many batch shapes steps are compiled now: at most `max_compiled_variants` of each kind."""
        return self.compiler.num_variants

    @property
    def estimated_stepping_batches(self) -> int:
        """How many updates the run will have. Raises `UserError` where nothing limits them."""
        return self.schedule.num_updates

    @property
    def wants_default_loggers(self) -> bool:
        """Whether JSON lines, and what `config.logger` names, are written into the run's folder."""
        return isinstance(self._logger, str)

    @property
    def logger(self) -> Logger | None:
        """The first of the loggers."""
        return next(iter(self.loggers), None)

    @property
    def checkpoint_callback(self) -> ModelCheckpoint | None:
        """The first of the callbacks that is a `ModelCheckpoint`."""
        return next((callback for callback in self.callbacks if isinstance(callback, ModelCheckpoint)), None)
