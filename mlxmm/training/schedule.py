"""Schedule: when a run validates, when it may stop and when it ends."""

from collections.abc import Mapping

import attrs

from mlxmm.distributed import collectives
from mlxmm.errors import UserError, warn
from mlxmm.training import batches
from mlxmm.training.progress import Progress
from mlxmm.training.trainer_config import TrainerConfig, duration


@attrs.define
class Schedule:
    """The limits of a `TrainerConfig`, held against the progress of a run.

    `batches_in_epoch` is None where the training data do not tell their length. `accumulate_grad_batches` is the
    number of micro-batches of an update now: a callback may change it between epochs. `accumulation` says in advance
    what it will be, from which epoch on.
    """

    config: TrainerConfig
    progress: Progress
    accumulate_grad_batches: int = 1
    batches_in_epoch: int | None = None
    accumulation: Mapping[int, int] = attrs.field(factory=dict)
    time_is_up: bool = False
    _warned_of_minimum: bool = attrs.field(default=False, init=False)

    def measure_epoch(self, loader) -> None:
        """Count the batches of an epoch of `loader`, which the shortest shard ends for all processes."""
        limit = self.config.overfit_batches or self.config.limit_train_batches
        total = None if loader is None else batches.count(loader, limit)
        if collectives.all_max(total is None) == [1]:
            self.batches_in_epoch = None
        else:
            self.batches_in_epoch = -collectives.all_max(-total)[0]

    @property
    def updates_in_epoch(self) -> int | None:
        """The updates of an epoch, as many batches as now make one."""
        return None if self.batches_in_epoch is None else -(-self.batches_in_epoch // self.accumulate_grad_batches)

    def accumulation_in(self, epoch: int) -> int:
        """The micro-batches of an update in this epoch."""
        begun = [start for start in self.accumulation if start <= epoch]
        return self.accumulation[max(begun)] if begun else self.config.accumulate_grad_batches

    def is_done(self, should_stop: bool) -> bool:
        """Whether training ends here: a limit is reached, or a stop was requested and is allowed."""
        return self.limit is not None or self.time_is_up or (should_stop and self._may_stop())

    @property
    def limit(self) -> str | None:
        """The limit of updates or epochs that the run has come to, as "max_steps=10"."""
        config, progress = self.config, self.progress
        if 0 <= config.max_steps <= progress.global_step:
            return f"max_steps={config.max_steps}"
        if 0 <= config.max_epochs <= progress.current_epoch:
            return f"max_epochs={config.max_epochs}"
        return None

    def _may_stop(self) -> bool:
        config, progress = self.config, self.progress
        if progress.global_step >= config.min_steps and progress.current_epoch >= config.min_epochs:
            return True
        if not self._warned_of_minimum:
            minimum = f"min_steps={config.min_steps}, min_epochs={config.min_epochs}"
            warn(f"a stop was requested; training continues until {minimum}")
        self._warned_of_minimum = True
        return False

    def is_out_of_time(self, seconds: float) -> bool:
        """Whether `max_time` is used up after so many seconds of training."""
        return self.config.max_time is not None and seconds >= duration(self.config.max_time)

    def validation_due(self, is_last: bool, should_stop: bool) -> bool:
        """Whether to validate after this update; `is_last` says that it is its epoch's last."""
        config, progress = self.config, self.progress
        ends = is_last and 0 <= config.max_epochs <= progress.current_epoch + 1
        if ends or self.is_done(should_stop):
            return True
        if (progress.current_epoch + 1) % config.check_val_every_n_epoch:
            return False
        interval = config.val_check_interval
        if isinstance(interval, int):
            return progress.global_step % interval == 0
        if self.updates_in_epoch is None or interval == 1.0:
            return is_last
        done = -(-progress.batch_idx // self.accumulate_grad_batches)
        return done % max(1, int(self.updates_in_epoch * interval)) == 0

    def check(self, val_loader) -> None:
        """Raise `UserError` where a limit leaves no batch to train on or to validate with, or for a
        `val_check_interval` that is a fraction of an epoch of unknown length."""
        if not (self.config.overfit_batches or self.config.limit_train_batches):
            raise UserError("limit_train_batches=0 leaves nothing to train on: give a number of batches, or a fraction")
        if val_loader is not None:
            batches.count(val_loader, self.config.limit_val_batches)
        interval = self.config.val_check_interval
        if self.updates_in_epoch is None and isinstance(interval, float) and interval != 1.0:
            raise UserError(
                f"val_check_interval={interval} is a fraction of an epoch, but the training data have no length: "
                "give it as a number of updates"
            )

    @property
    def known_updates(self) -> int | None:
        """How many updates the run will have; None where nothing limits them."""
        limits = [self.config.max_steps] if self.config.max_steps >= 0 else []
        num_epochs, num_batches = self.config.max_epochs, self.batches_in_epoch
        if num_batches is not None and num_epochs >= 0 and self.accumulation:
            limits.append(sum(-(-num_batches // self.accumulation_in(epoch)) for epoch in range(num_epochs)))
        elif self.updates_in_epoch is not None and num_epochs >= 0:
            limits.append(self.updates_in_epoch * num_epochs)
        return min(limits, default=None)

    @property
    def num_updates(self) -> int:
        """`known_updates`. Raises `UserError` where nothing limits them."""
        if self.known_updates is None:
            raise UserError("set max_steps: the training data do not tell how many batches they have")
        return self.known_updates
