"""ModelCheckpoint: what to keep of a run."""

import math
import shutil
from pathlib import Path

import attrs
from attrs.validators import ge, in_

from mlxmm.callback import Callback
from mlxmm.files import point, remove_leftovers
from mlxmm.signals import Interrupted


@attrs.define
class ModelCheckpoint(Callback):
    """Saves `checkpoints/step=N` every `every_n_train_steps` updates, at the end, and when the run is interrupted.

    `last` names the newest. With `monitor`, `best` names the one with the best value of that metric, as
    it was when the checkpoint was saved; what is not a number is never best. Others are deleted.
    """

    every_n_train_steps: int = attrs.field(default=500, validator=ge(1), kw_only=True)
    monitor: str | None = attrs.field(default=None, kw_only=True)
    mode: str = attrs.field(default="min", validator=in_(("min", "max")), kw_only=True)
    dirpath: Path | None = attrs.field(default=None, kw_only=True)
    best_score: float | None = attrs.field(default=None, init=False)
    best_step: int | None = attrs.field(default=None, init=False)
    last_step: int | None = attrs.field(default=None, init=False)

    def setup(self, trainer, module, stage):
        root = trainer.config.default_root_dir
        if self.dirpath is None and root is not None and trainer.config.enable_checkpointing:
            self.dirpath = Path(root) / "checkpoints"
        if stage == "fit" and self.dirpath is not None and trainer.is_global_zero:
            self.dirpath.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.dirpath)

    def on_save_point(self, trainer, module):
        if trainer.global_step % self.every_n_train_steps == 0:
            self._save(trainer)

    def on_train_end(self, trainer, module):
        self._save(trainer)

    def on_exception(self, trainer, module, exception):
        # Any other exception may have come in the middle of an update.
        if isinstance(exception, Interrupted):
            self._save(trainer)

    def _save(self, trainer) -> None:
        if self.dirpath is None or self.last_step == trainer.global_step:
            return
        before, best_before = self.last_step, self.best_step
        self.last_step = trainer.global_step
        if self._is_better(trainer.callback_metrics.get(self.monitor)):
            self.best_score = trainer.callback_metrics[self.monitor]
            self.best_step = self.last_step
        trainer.save_checkpoint(self._folder(self.last_step))
        if trainer.is_global_zero:
            self._point_and_prune({before, best_before} - {None})

    def _point_and_prune(self, old: set[int]) -> None:
        for name, step in (("last", self.last_step), ("best", self.best_step)):
            if step is not None:
                point(self.dirpath / name, self._folder(step))
        for step in old - {self.last_step, self.best_step}:
            shutil.rmtree(self._folder(step), ignore_errors=True)

    def _is_better(self, score: float | None) -> bool:
        if score is None or not math.isfinite(score):
            return False
        if self.best_score is None:
            return True
        return score < self.best_score if self.mode == "min" else score > self.best_score

    def _folder(self, step: int) -> Path:
        return self.dirpath / f"step={step}"

    def state_dict(self):
        return {"best_score": self.best_score, "best_step": self.best_step, "last_step": self.last_step}

    def load_state_dict(self, state):
        self.best_score, self.best_step = state["best_score"], state["best_step"]
        self.last_step = state["last_step"]
