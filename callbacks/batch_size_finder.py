"""BatchSizeFinder: the largest batch that fits a memory limit."""

from operator import attrgetter

import attrs
import mlx.core as mx
from attrs.validators import ge, in_
from mlx.utils import tree_flatten

from mlxmm.config import checked
from mlxmm.distributed import collectives
from mlxmm.errors import UserError
from mlxmm.training import batches
from mlxmm.training.callback import Callback
from mlxmm.training.trial_updates import restored_after, trial_updates


@attrs.define(field_transformer=checked)
class BatchSizeFinder(Callback):
    """Before training, tries batch sizes with real updates and sets the largest whose peak memory is within the limit.

    `memory_limit` is in bytes. A batch also does not fit if MLX refuses an allocation or the data cannot fill it.
    `mode="power"` doubles `init_val` while it fits (or halves it until it does); "binsearch" then searches between the
    last size that fits and the first that does not. `attribute` is the dotted name of the size in the datamodule:
    "batch_size", "config.batch_size"; "train.batch_size" for a loader given as `train_dataloaders`. The result is in
    `batch_size`.

    The optimizer is created again, since its schedule depends on the number of updates: put this callback before a
    LearningRateFinder. A resumed run keeps its size; there is no search then, nor with `fast_dev_run`. Raises
    `UserError` if no size fits.
    """

    memory_limit: int = attrs.field(validator=ge(1))
    mode: str = attrs.field(default="power", validator=in_(("power", "binsearch")))
    steps_per_trial: int = attrs.field(default=3, validator=ge(1))
    init_val: int = attrs.field(default=2, validator=ge(1))
    max_trials: int = attrs.field(default=25, validator=ge(1))
    attribute: str = attrs.field(default="batch_size", kw_only=True)
    batch_size: int | None = attrs.field(default=None, init=False)

    def on_fit_start(self, trainer, module):
        if trainer.global_step > 0 or trainer.config.fast_dev_run:
            return
        before = self._read(trainer.datamodule)
        try:
            self.batch_size = self._search(trainer)
        finally:
            self._set(trainer, before)
        self._set(trainer, self.batch_size)
        trainer.configure_optimizer()

    def on_load_checkpoint(self, trainer, module, checkpoint):
        if self.batch_size is not None:
            self._set(trainer, self.batch_size)

    def _search(self, trainer) -> int:
        size, best, least = self.init_val, None, None  # `least`: smallest size that does not fit
        for _ in range(self.max_trials):
            if self._fits(trainer, size):
                best = size
            else:
                least = size
            if least == 1 or (best and least and (self.mode == "power" or least - best == 1)):
                break
            size = best * 2 if least is None else (best or 0) + (least - (best or 0)) // 2
        if best is None:
            raise UserError(f"no batch of {size} or more fits memory_limit={self.memory_limit:,} bytes: raise it")
        return best

    def _fits(self, trainer, size: int) -> bool:
        self._set(trainer, size)
        first = next(batches.epoch(trainer.datamodule.train_dataloader(), 0), None)
        lengths = [len(array) for _, array in tree_flatten(first) if array.ndim] if first is not None else [0]
        fits = lengths[0] >= size and self._runs(trainer)
        return collectives.all_sum(mx.array(not fits)).item() == 0

    def _runs(self, trainer) -> bool:
        mx.clear_cache()
        mx.reset_peak_memory()
        try:
            with restored_after(trainer):
                for _ in trial_updates(trainer, self.steps_per_trial):
                    pass
        except RuntimeError as error:
            if "malloc" not in str(error) and "Insufficient Memory" not in str(error):  # of MLX, and of Metal
                raise
            return False
        return mx.get_peak_memory() <= self.memory_limit

    def _read(self, datamodule) -> int:
        try:
            return attrgetter(self.attribute)(datamodule)
        except AttributeError:
            kind = type(datamodule).__name__
            raise UserError(f"BatchSizeFinder: {kind} has no {self.attribute!r}; name its `attribute`") from None

    def _set(self, trainer, size: int) -> None:
        trainer.replace_datamodule(_replaced(trainer.datamodule, self.attribute, size))

    def state_dict(self):
        return {"batch_size": self.batch_size}

    def load_state_dict(self, state):
        self.batch_size = state["batch_size"]


def _replaced(owner, path: str, value):
    """`owner` with the dotted attribute set; frozen objects are copied."""
    name, _, rest = path.partition(".")
    if rest:
        value = _replaced(getattr(owner, name), rest, value)
    try:
        setattr(owner, name, value)
    except attrs.exceptions.FrozenInstanceError:
        return attrs.evolve(owner, **{name: value})
    except (AttributeError, TypeError, ValueError) as error:  # torch's DataLoader
        told = "give a DataModule whose train_dataloader makes a loader of its batch_size"
        raise UserError(f"BatchSizeFinder: {type(owner).__name__} cannot take another {name}: {told}") from error
    return owner
