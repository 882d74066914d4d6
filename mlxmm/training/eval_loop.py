"""The loops over held-out data: validation, test, prediction, and the sanity check before training."""

from collections.abc import Callable, Iterable, Iterator

import mlx.core as mx

from mlxmm.compute import memory
from mlxmm.distributed import collectives
from mlxmm.distributed.signals import check_end
from mlxmm.progress_bar import passing_bar
from mlxmm.training import batches
from mlxmm.training.module import evaluating
from mlxmm.training.monitors import Metrics, check_before_training
from mlxmm.training.randomness import isolated_random_state
from mlxmm.training.train_step import add_sums, average_sums, build_eval_step, fill_empty_sums

PREFIXES = {"validation": "val", "test": "test"}  # of the metrics of a stage


class Evaluator:
    """Evaluates the module of a `trainer`; `call(hook, *args)` runs a hook of all callbacks."""

    def __init__(self, trainer, call: Callable):
        self.trainer, self.call = trainer, call
        self._steps: dict[str, Callable] = {}

    def measure(self, stage: str, loader, limit: int | float) -> dict[str, float]:
        """The weighted means of `<stage>_step` over the data of all processes; {} where there are none."""
        trainer, prefix = self.trainer, PREFIXES[stage]
        if loader is None or collectives.all_max(batches.count(loader, limit) != 0) == [0]:
            return Metrics()
        pairs = trainer.strategy.lockstep(self._with_hooks(stage, loader, limit))
        with trainer.profiler.phase(stage), evaluating(trainer.module):
            step, total = self._step(stage), None
            for batch, counts in self._bar(stage, batches.count(loader, limit), pairs):
                check_end()
                sums = step(batch)
                total = add_sums(total, sums) if counts else total
                mx.eval(sums, total)
            total = fill_empty_sums(total)
            with collectives.off_gpu():
                means = {} if total is None else average_sums(total)[0]
                metrics = Metrics({f"{prefix}/{name}": float(value) for name, value in means.items()})
            trainer.log(metrics)
            self.call(f"on_{stage}_epoch_end")
            self.call(f"on_{stage}_end", metrics)
        memory.give_back()
        return metrics

    def predict(self, loader, limit: int | float) -> list:
        """What `predict_step` returns for each batch, evaluated."""
        module, results = self.trainer.module, []
        if loader is None or (count := batches.count(loader, limit)) == 0:
            return results
        with self.trainer.profiler.phase("predict"), evaluating(module):
            self.call("on_predict_start")
            self.call("on_predict_epoch_start")
            for batch_idx, batch in enumerate(self._bar("prediction", count, batches.epoch(loader, 0, limit=limit))):
                self.call("on_predict_batch_start", batch, batch_idx)
                results.append(module.predict_step(batch))
                mx.eval(results[-1])
                self.call("on_predict_batch_end", results[-1], batch, batch_idx)
            self.call("on_predict_epoch_end")
            self.call("on_predict_end")
        return results

    def sanity_check(self, loader, limit: int) -> None:
        """Run a few validation batches, so that an error in validation is raised now and not after an hour."""
        with isolated_random_state(), evaluating(self.trainer.module):
            self.call("on_sanity_check_start")
            step = self._step("validation")
            pairs = self.trainer.strategy.lockstep(batches.epoch(loader, 0, limit=limit))
            name = "sanity check" + ", compiling kernels" * self.trainer.compiler.enabled
            measured: set[str] = set()
            for batch, _ in self._bar(name, limit, pairs):
                check_end()
                mx.eval(sums := step(batch))
                measured |= {f"val/{name}" for name in sums if name != "weight"}
            of_ranks = collectives.all_gather_object(sorted(measured))  # one may have no batches
            check_before_training(self.trainer, set().union(*of_ranks))
            self.call("on_sanity_check_end")

    def _bar(self, name: str, total: int | None, items: Iterable) -> Iterator:
        with passing_bar(name, total, "batch", items, shown=self.trainer.config.enable_progress_bar) as bar:
            yield from bar

    def _with_hooks(self, stage: str, loader, limit: int | float) -> Iterator:
        """The batches; runs the hooks at the start of the stage, and before and after each batch."""
        self.call(f"on_{stage}_start")
        self.call(f"on_{stage}_epoch_start")
        for batch_idx, batch in enumerate(batches.epoch(loader, 0, limit=limit)):
            self.call(f"on_{stage}_batch_start", batch, batch_idx)
            yield batch
            self.call(f"on_{stage}_batch_end", batch, batch_idx)

    def _step(self, stage: str) -> Callable:
        if stage not in self._steps:
            module, step = self.trainer.module, getattr(self.trainer.module, f"{stage}_step")
            self._steps[stage] = build_eval_step(module, step, self.trainer.config, self.trainer.compiler)
        return self._steps[stage]
