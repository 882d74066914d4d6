"""TQDMProgressBar: a progress bar; plain lines where the output is neither a terminal nor a notebook."""

import time

from mlxmm.progress_bar import moves, progress_bar
from mlxmm.training.callback import Callback


class TQDMProgressBar(Callback):
    """A bar over the updates of a run, with the newest logged losses; without a terminal one line at each log."""

    def __init__(self, name: str = "fit", refresh_seconds: float = 0.2):
        self.name, self.refresh_seconds = name, refresh_seconds
        self._bar = None

    def on_train_start(self, trainer, module):
        if not (trainer.config.enable_progress_bar and trainer.is_global_zero):
            return
        self._total, self._start = trainer.schedule.known_updates, time.perf_counter()
        self._moves = moves()
        self._bar = progress_bar(
            self.name, self._total, "step", initial=trainer.global_step, mininterval=self.refresh_seconds
        )

    def on_train_batch_end(self, trainer, module, metrics, batches):
        if self._bar is None:
            return
        self._bar.update()
        if trainer.global_step % trainer.config.log_every_n_steps == 0:
            shown = {k: f"{v:.4f}" for k, v in trainer.callback_metrics.items() if k.endswith("loss")}
            self._bar.set_postfix(shown, refresh=False)
            if not self._moves:
                seconds = time.perf_counter() - self._start
                told = "  ".join(f"{name} {value}" for name, value in shown.items())
                of = "" if self._total is None else f"/{self._total}"
                print(f"{self.name} {trainer.global_step}{of}  {told}  {seconds:.1f} s", flush=True)

    def on_train_end(self, trainer, module):
        self._close()

    def on_exception(self, trainer, module, exception):
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
