"""ThroughputMonitor: examples, batches and tokens per second, and the share of time spent waiting for data."""

import time
from collections import deque
from collections.abc import Callable

import attrs
from attrs.validators import ge, gt, optional

from mlxmm.config import checked
from mlxmm.distributed import collectives
from mlxmm.training.batches import num_examples
from mlxmm.training.callback import Callback


@attrs.define(field_transformer=checked)
class ThroughputMonitor(Callback):
    """Logs "throughput/…" with the training metrics: means over the last `window_size` updates of all processes.

    examples_per_second and batches_per_second; tokens_per_second with `length_fn`, which returns the tokens of a batch;
    flops_per_second with `flops_per_batch` (forward and backward), and with `peak_flops` (of one process's device) mfu,
    the fraction of it that is used (arXiv 2204.02311, appendix B); data_wait_fraction, the fraction of time spent
    waiting for batches. Validation and saving of checkpoints do not count. The functions should read shapes only:
    reading values would wait for the device.
    """

    batch_size_fn: Callable = num_examples
    length_fn: Callable | None = None
    flops_per_batch: float | None = attrs.field(default=None, validator=optional(gt(0)), kw_only=True)
    peak_flops: float | None = attrs.field(default=None, validator=optional(gt(0)), kw_only=True)
    window_size: int = attrs.field(default=100, validator=ge(1), kw_only=True)
    _window: deque = attrs.field(init=False)  # of each update: seconds, seconds of waiting for data, and counts
    _counts: tuple | None = attrs.field(default=None, init=False)  # batches, examples, tokens of the current update
    _started: float = attrs.field(default=0.0, init=False)
    _waited: float = attrs.field(default=0.0, init=False)  # seconds of waiting for data, in total

    @_window.default
    def _empty(self):
        return deque(maxlen=self.window_size)

    def on_train_start(self, trainer, module):
        self._window.clear()
        self._waited = trainer.measure_phases().seconds["data"]  # the Trainer alone can tell when it waits for data

    def on_train_batch_start(self, trainer, module, batches):
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer, module, metrics, batches):
        tokens = sum(map(self.length_fn, batches)) if self.length_fn else 0
        self._counts = (len(batches), sum(map(self.batch_size_fn, batches)), tokens)

    def on_validation_start(self, trainer, module):
        self._started -= time.perf_counter()

    def on_validation_end(self, trainer, module, metrics):
        self._started += time.perf_counter()

    def on_save_point(self, trainer, module):
        if self._counts is None:  # the update was skipped
            return
        before, self._waited = self._waited, trainer.profiler.seconds["data"]
        waited = self._waited - before
        self._window.append((time.perf_counter() - self._started + waited, waited, *self._counts))
        self._counts = None
        if trainer.global_step % trainer.config.log_every_n_steps == 0:
            trainer.log({f"throughput/{name}": value for name, value in self.compute().items()})

    def compute(self) -> dict[str, float]:
        """The means over the window, by their names without "throughput/"."""
        seconds, waited, *counts = map(sum, zip(*self._window))
        batches, examples, tokens = (collectives.world_size() * count / seconds for count in counts)
        figures = {"examples_per_second": examples, "batches_per_second": batches}
        if self.length_fn:
            figures["tokens_per_second"] = tokens
        if self.flops_per_batch:
            figures["flops_per_second"] = batches * self.flops_per_batch
            if self.peak_flops:
                figures["mfu"] = figures["flops_per_second"] / (collectives.world_size() * self.peak_flops)
        return figures | {"data_wait_fraction": waited / seconds}
