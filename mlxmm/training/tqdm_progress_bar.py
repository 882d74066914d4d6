"""TQDMProgressBar: a progress bar; plain lines where the output is neither a terminal nor a notebook."""

from typing import Any

from mlxmm.progress_bar import progress_bar
from mlxmm.training.callback import Callback


class TQDMProgressBar(Callback):
    """A bar over the updates of a run, with the newest logged losses; without a terminal, a line now and then."""

    logs = ()

    def __init__(self, *, name: str = "fit", refresh_seconds: float = 0.2):
        self.name, self.refresh_seconds = name, refresh_seconds
        self._bar: Any = None
        self._is_first = True  # update of this process, which compiles what it needs

    def on_train_start(self, trainer, module):
        if not (trainer.config.enable_progress_bar and trainer.is_global_zero):
            return
        total, start = trainer.schedule.known_updates, trainer.global_step
        self._bar = progress_bar(self.name, total, "step", initial=start, mininterval=self.refresh_seconds)
        self._is_first = trainer.compiler.enabled
        if self._is_first:
            self._bar.set_postfix_str("compiling kernels …")

    def on_train_batch_end(self, trainer, module, metrics, batches):
        if self._bar is None:
            return
        if self._is_first:
            self._bar.set_postfix_str("", refresh=False)
            self._is_first = False
        if trainer.global_step % trainer.config.log_every_n_steps == 0:
            shown = {k: f"{v:.4f}" for k, v in trainer.callback_metrics.items() if k.endswith("loss")}
            self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def on_train_end(self, trainer, module):
        if self._bar is not None and self._bar.n == self._bar.initial:  # there is no rate, and nothing to look at
            self._bar.leave = False
        self._close()

    def on_exception(self, trainer, module, exception):
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
