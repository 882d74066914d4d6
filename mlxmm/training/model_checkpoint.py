"""ModelCheckpoint: saves checkpoints of a run, and keeps the newest and the best."""

import functools
import math
import shutil
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import attrs
from attrs.converters import optional as optional_converter
from attrs.validators import ge, in_, optional

from mlxmm.commands import is_recipe
from mlxmm.config import checked
from mlxmm.distributed import collectives
from mlxmm.distributed.signals import Interrupted
from mlxmm.errors import UserError, warn
from mlxmm.storage import checkpoint
from mlxmm.storage.atomic import remove_leftovers
from mlxmm.storage.checkpoint import by_step
from mlxmm.storage.checkpoint_folder import go_back, name_checkpoint, newest_state
from mlxmm.storage.disk import is_of_the_machine
from mlxmm.storage.frozen_weights import FrozenWeights
from mlxmm.terminal import say
from mlxmm.training.callback import Callback
from mlxmm.training.monitors import check_monitor, validates, without_validation
from mlxmm.training.trainer_config import duration, duration_text, is_duration


@functools.cache
def writer() -> ThreadPoolExecutor:
    """The thread that writes all checkpoints of this process. For each thread that writes arrays, MLX's CPU backend
    starts another one, which stays until the process ends: 16 KiB and a thread for each fit, if each had its own."""
    return ThreadPoolExecutor(1, "checkpoint")


@attrs.define(field_transformer=checked)
class ModelCheckpoint(Callback):
    """Saves `checkpoints/step=N`: at intervals, at the end, and when the run is interrupted.

    The link `last` points to the newest checkpoint. A run that goes on from an earlier one sets aside those after it,
    in a folder `abandoned_0`. With `monitor`, a checkpoint is also saved after every validation, those with the
    `save_top_k` best values are kept (-1: all), and `best` points to the best. A checkpoint has a value if its metric
    was logged at its own step; NaN is never best, and of equal values the first is. Other checkpoints are deleted,
    except the one that the run was resumed from. In the `background`, a thread writes the arrays of that moment while
    training continues. Where the disk is full, a line says so and training goes on: the checkpoints before stay, and
    the next one is tried; but a run whose last checkpoint cannot be written fails.

    What is frozen is written once: later checkpoints link to that file, as long as the weights are the same to the bit.
    A file that is damaged costs `last` or `best`, and not both, where they are two: these share none.

    Each of several needs a `dirpath` of its own. Raises `UserError` if nothing logs `monitor`.
    """

    saves_checkpoints = True
    logs = ()

    every_n_train_steps: int | None = attrs.field(default=500, validator=optional(ge(1)), kw_only=True)
    every_n_epochs: int | None = attrs.field(default=None, validator=optional(ge(1)), kw_only=True)
    train_time_interval: str | None = attrs.field(
        default=None, converter=optional_converter(duration_text), validator=optional(is_duration), kw_only=True
    )
    monitor: str | None = attrs.field(default=None, kw_only=True)
    mode: str = attrs.field(default="min", validator=in_(("min", "max")), kw_only=True)
    save_top_k: int = attrs.field(default=1, validator=ge(-1), kw_only=True)
    dirpath: Path | None = attrs.field(default=None, converter=optional_converter(Path), kw_only=True)
    background: bool = attrs.field(default=True, kw_only=True)
    scores: dict[int, float] = attrs.field(factory=dict, init=False)  # by step
    last_step: int | None = attrs.field(default=None, init=False)
    _is_in_run: bool = attrs.field(default=True, init=False)  # `dirpath` was not given: it follows the run
    _enabled: bool = attrs.field(default=True, init=False)
    _checks_epochs: bool = attrs.field(default=False, init=False)  # for `monitor`, as no validation will
    _has_warned: bool = attrs.field(default=False, init=False)  # that nothing will be best
    _saved_at: float = attrs.field(default=0.0, init=False)  # in seconds of training
    _resumed_from: Path | None = attrs.field(default=None, init=False)
    _validated: bool = attrs.field(default=False, init=False)
    _is_fitting: bool = attrs.field(default=False, init=False)  # and rank 0, which writes
    _writing: Future | None = attrs.field(default=None, init=False)
    _frozen: FrozenWeights | None = attrs.field(default=None, init=False)  # as the newest checkpoint has them
    _written: tuple[int | None, dict[int, float]] = attrs.field(factory=lambda: (None, {}), init=False)  # before that

    def __attrs_post_init__(self):
        self._is_in_run = self.dirpath is None

    @property
    def state_key(self):
        name = type(self).__qualname__
        return name if self._is_in_run else f"{name}({self.dirpath.name})"

    def folder(self, root: Path | None) -> Path | None:
        """Where the checkpoints of a run in `root` are: `dirpath`, if it was given."""
        return self.dirpath if not self._is_in_run else root and Path(root) / "checkpoints"

    @property
    def best_step(self) -> int | None:
        """The step whose checkpoint has the best value of `monitor`."""
        return min(self.scores, key=self._rank, default=None)

    def _rank(self, step: int) -> tuple[float, int]:
        """The better a checkpoint, the smaller; of equal values the first is best."""
        return (self.scores[step] if self.mode == "min" else -self.scores[step]), step

    @property
    def best_model_score(self) -> float | None:
        """The best value of `monitor`."""
        return self.scores.get(self.best_step)

    @property
    def best_model_path(self) -> Path | None:
        """The folder of the best checkpoint; without `monitor`, of the newest."""
        step = self.last_step if self.monitor is None else self.best_step
        return None if step is None else self._folder(step)

    def setup(self, trainer, module, stage):
        self._enabled = trainer.config.enable_checkpointing
        if self._is_in_run:
            self.dirpath = self.folder(trainer.log_dir) if self._enabled else None
        if stage != "fit":
            return
        if not self._enabled and not trainer.config.fast_dev_run:
            raise UserError("ModelCheckpoint saves nothing with enable_checkpointing=False: leave one of the two out")
        self._checks_epochs = self._has_warned = False
        if self.monitor is not None and not validates(trainer):
            fault = without_validation("ModelCheckpoint", self.monitor, validates=False)
            self._checks_epochs = fault is None
            self._has_warned = fault is not None
            if fault:  # a run that has no best checkpoint still has its last
                warn(fault)
        if self._enabled and trainer.is_global_zero:
            self.dirpath.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.dirpath)
            self._resumed_from = trainer.ckpt_path and trainer.ckpt_path.resolve()
            self._is_fitting, self._frozen = True, None

    def check_run(self, trainer) -> None:
        """Raise `UserError` where the folder has checkpoints of another run than the one that is resumed."""
        newest = newest_state(self.dirpath) if self._enabled else {}
        if newest.get("run_id", trainer.progress.run_id) != trainer.progress.run_id:
            raise UserError(
                f"{self.dirpath} holds checkpoints of another run than {trainer.ckpt_path}: name another folder"
            )

    def go_back(self, trainer) -> None:
        """Make the checkpoint that the run is resumed from the newest one of its folder."""
        if self._enabled:
            self.load_state_dict(collectives.broadcast_object(lambda: self._go_back(trainer.global_step)))

    def _go_back(self, step: int) -> dict:
        go_back(self.dirpath, step)
        steps = by_step(self.dirpath)
        if not self._resumed_from.exists():  # it was `last`, of a copy that followed links
            self._resumed_from = self._folder(step)
        own = newest_state(self.dirpath).get("callbacks", {}).get(self.state_key)
        # Another callback saved the checkpoint of the run: it may not know of all that this one has saved.
        if own is not None and own["last_step"] != self.last_step:
            self.load_state_dict(own)
        self.scores = {known: score for known, score in self.scores.items() if known in steps}
        self.last_step = self.last_step if self.last_step in steps else None
        if own is not None and own["monitor"] == [self.monitor, self.mode]:  # what a killed run had no time to delete
            self._delete({old for old in steps if old < step} - {*self.scores, self.last_step})
        self._name(max(steps, default=None), self.best_step)
        return self.state_dict()

    def on_validation_end(self, trainer, module, metrics):
        self._validated = self.monitor is not None

    def on_save_point(self, trainer, module):
        if self._validated or (self._checks_epochs and trainer.batch_idx == 0):
            check_monitor(trainer, "ModelCheckpoint", self.monitor)
        is_due = self._is_due(trainer)
        if self.train_time_interval is not None:
            [is_due] = collectives.all_max(is_due)  # clocks differ, but all processes must save together
        if is_due:
            self._save(trainer)
        self._validated = False

    def on_train_end(self, trainer, module):
        self._save(trainer)
        self._finish(trainer)
        if self._enabled and self.monitor and self.save_top_k and not (self.scores or self._has_warned):
            warn(f"no checkpoint is best: none had a finite {self.monitor!r} of its own step")

    def on_exception(self, trainer, module, exception):
        # Any other exception may have been raised in the middle of an update.
        if isinstance(exception, Interrupted):
            self._save(trainer)
        self._finish(trainer)
        if (
            isinstance(exception, Interrupted)
            and trainer.is_global_zero
            and self is trainer.checkpoint_callback
            and not is_recipe()
        ):
            say(f"interrupted: kept {self._folder(self.last_step)}; fit(..., ckpt_path='last') goes on from there")

    def _is_due(self, trainer) -> bool:
        epochs, interval = self.every_n_epochs, self.train_time_interval
        return (
            self._validated
            or (self.every_n_train_steps is not None and trainer.global_step % self.every_n_train_steps == 0)
            or (epochs is not None and trainer.batch_idx == 0 and trainer.current_epoch % epochs == 0)
            or (interval is not None and trainer.training_seconds - self._saved_at >= duration(interval))
        )

    def _save(self, trainer) -> None:
        self._go_on_without(collectives.broadcast_object(self._failure))
        is_saved = self.last_step == trainer.global_step and not self._validated  # a later score makes it another
        if not self._enabled or is_saved:
            return
        self._written = self.last_step, dict(self.scores)
        before = {self.last_step, *self.scores} - {None}
        self.last_step, self._saved_at = trainer.global_step, trainer.training_seconds
        self._score(trainer.logged_metrics.get(self.monitor))
        contents = trainer.dump_checkpoint()
        if not trainer.is_global_zero:
            return
        old = before - {self.last_step, *self.scores}
        save_config, best = trainer.module.save_config, self.best_step
        self._writing = writer().submit(self._write, self.last_step, contents, save_config, best, old)
        if not self.background:
            wait([self._writing])

    def _score(self, score: float | None) -> None:
        if score is None or not math.isfinite(score) or self.save_top_k == 0:
            return
        self.scores[self.last_step] = score
        if 0 < self.save_top_k < len(self.scores):
            del self.scores[max(self.scores, key=self._rank)]

    def _write(self, step: int, contents: dict, save_config, best: int | None, old: set[int]) -> None:
        apart_from = None if best in (step, None) else self._folder(best)
        self._frozen = checkpoint.save(self._folder(step), contents, save_config, self._frozen, apart_from)
        self._name(step, best)
        self._delete(old)

    def _name(self, last: int | None, best: int | None) -> None:
        name_checkpoint(self.dirpath, "last", last)
        name_checkpoint(self.dirpath, "best", best)

    def _delete(self, steps: set[int]) -> None:
        for folder in map(self._folder, steps):
            if folder.resolve() != self._resumed_from:
                shutil.rmtree(folder, ignore_errors=True)

    def _failure(self) -> str | None:
        """Why the newest checkpoint could not be written, once that is over; None: it was. Raises what is no disk's."""
        writing, self._writing = self._writing, None
        try:
            if writing is not None:
                writing.result()
        except OSError as error:
            if not is_of_the_machine(error):
                raise
            return f"the checkpoint of step {self.last_step} cannot be written: {error.strerror}"
        return None

    def _go_on_without(self, failure: str | None) -> None:
        """Forget the newest checkpoint, on all ranks, where it could not be written."""
        if failure is not None:
            self.last_step, self.scores = self._written[0], dict(self._written[1])
            if self._is_fitting:
                say(f"warning: {failure}; training goes on, kept is {self._kept()}")

    def _kept(self) -> str:
        return "none" if self.last_step is None else str(self._folder(self.last_step))

    def _finish(self, trainer) -> None:
        try:
            failure = self._failure() if trainer.is_global_zero else None
            if failure is not None:
                self.last_step = self._written[0]
                raise UserError(f"{failure}; kept is {self._kept()}")
        finally:
            self._is_fitting = False

    def _folder(self, step: int) -> Path:
        return self.dirpath / f"step={step}"

    def state_dict(self):
        scores, monitor = list(self.scores.items()), [self.monitor, self.mode]
        return {"monitor": monitor, "scores": scores, "last_step": self.last_step, "saved_at": self._saved_at}

    def load_state_dict(self, state):
        is_same = state["monitor"] == [self.monitor, self.mode]  # values of another metric say nothing
        self.scores = {int(step): score for step, score in state["scores"]} if is_same else {}
        self.last_step, self._saved_at = state["last_step"], state["saved_at"]
