"""The Trainer: the loops. Everything else is a callback, a module or a loader.

A run is a function of (config, global_step): the order of examples comes from (seed, epoch), the random keys of an
update from (seed, rank, global_step). So a resumed run is the run that was never stopped, to the bit.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import mlx.core as mx

from mlxmm.compute import memory
from mlxmm.compute.compiled import Compiler, can_compile
from mlxmm.compute.deterministic import deterministic_lookups
from mlxmm.compute.gradient_checkpointing import recomputed_layers
from mlxmm.compute.half_products import half_products
from mlxmm.compute.precision import set_dtypes
from mlxmm.config import to_json
from mlxmm.distributed import collectives
from mlxmm.distributed.signals import Interrupted, Request, end_requests
from mlxmm.errors import UserError
from mlxmm.storage import checkpoint
from mlxmm.training import batches, run_state
from mlxmm.training.anomaly import assert_finite, watched_outputs
from mlxmm.training.callback import Callback, arrange_callbacks, hook_table
from mlxmm.training.datamodule import Loaders
from mlxmm.training.eval_loop import Evaluator
from mlxmm.training.loggers import Logger, make_loggers
from mlxmm.training.module import Module
from mlxmm.training.profiler import NoProfiler, Profiler, make_profiler
from mlxmm.training.progress import Progress
from mlxmm.training.randomness import seed_everything, step_seed
from mlxmm.training.schedule import Schedule
from mlxmm.training.strategy import make_strategy
from mlxmm.training.train_step import TrainStep, checked_twice
from mlxmm.training.trainable import TraceSnapshot
from mlxmm.training.trainer_config import TrainerConfig


class Trainer:
    """Fits a `Module`: Lightning's Trainer on MLX.

    `callbacks` are called in the order given, those that save checkpoints last. `logger` is one Logger or several;
    True stands for JSON lines and TensorBoard in `default_root_dir`, False for none. Settings of `TrainerConfig`
    may be given by name.
    """

    def __init__(
        self,
        config: TrainerConfig | None = None,
        *,
        callbacks: Sequence[Callback] = (),
        logger: Logger | Sequence[Logger] | bool = True,
        **settings,
    ):
        self.config = attrs.evolve(config or TrainerConfig(), **settings).resolved()
        self.strategy = make_strategy(self.config.strategy)
        self.callbacks = arrange_callbacks(callbacks)
        self.loggers = [] if self.config.fast_dev_run else make_loggers(logger, self.config.default_root_dir)
        self.profiler = make_profiler(self.config.profiler, self.config.default_root_dir)
        self.progress = Progress()
        self.schedule = Schedule(self.config, self.progress, self.config.accumulate_grad_batches)
        self.should_stop = False  # set it to end the run after the update in hand
        self.state = "initializing"  # then running, and finished or interrupted
        self.callback_metrics: dict[str, float] = {}  # the newest value of everything that was logged
        self.logged_metrics: dict[str, float] = {}  # what was logged since the newest update
        self.ckpt_path: Path | None = None  # the checkpoint that the run was resumed from
        self.module: Any = None  # these three are of the newest stage
        self.optimizer: Any = None
        self.datamodule: Any = None
        self.compiler = Compiler(self._compiles(), self.config.max_compiled_variants)
        self._evaluator = Evaluator(self, self._call)
        self._hooks = hook_table(self.callbacks, self, None)
        self._train_step: Any = None  # the compiled update
        self._traced: Any = None  # what it was traced with
        self._request = Request()  # the signal that asks for the end
        self._peak_warning = memory.PeakWarning()
        self._signal = 0  # the one that all processes have agreed on
        self._started = 0.0  # when this stage began, by time.perf_counter

    # ------------------------------------------------------------------ what people call

    def fit(
        self,
        module: Module,
        datamodule=None,
        *,
        train_dataloaders=None,
        val_dataloaders=None,
        ckpt_path: Path | str | None = None,
    ) -> None:
        """Train until `max_steps` updates, `max_epochs` epochs, `max_time` or `should_stop`.

        `ckpt_path` is the checkpoint to resume from; "last" is the newest undamaged one in `default_root_dir`.
        """
        data = datamodule or Loaders(train=train_dataloaders, val=val_dataloaders)
        root = self.config.default_root_dir
        [self.ckpt_path] = collectives.broadcast_paths(lambda: [run_state.find(ckpt_path, root) if ckpt_path else None])
        with self._stage("fit", module, data), self._layers_prepared(), end_requests() as self._request:
            self._prepare_fit()
            self._call("on_fit_start")
            self._sanity_check()
            self._call("on_train_start")
            self._train()
            self._call("on_train_end")
            self._call("on_fit_end")

    def validate(self, module: Module, datamodule=None, *, dataloaders=None) -> dict[str, float]:
        """The means of `validation_step` over the validation data, as "val/…"."""
        with self._stage("validate", module, datamodule or Loaders(val=dataloaders)):
            return self._validate()

    def test(self, module: Module, datamodule=None, *, dataloaders=None) -> dict[str, float]:
        """The means of `test_step` over the test data, as "test/…"."""
        with self._stage("test", module, datamodule or Loaders(test=dataloaders)):
            return self._evaluator.measure("test", self.datamodule.test_dataloader(), self.config.limit_test_batches)

    def predict(self, module: Module, datamodule=None, *, dataloaders=None) -> list:
        """What `predict_step` returns for each batch."""
        with self._stage("predict", module, datamodule or Loaders(predict=dataloaders)):
            return self._evaluator.predict(self.datamodule.predict_dataloader(), self.config.limit_predict_batches)

    def save_checkpoint(self, folder: Path | str) -> None:
        """Write a checkpoint of the run as it is now, whole or not at all. Raises `UserError` before `fit`."""
        contents = self.dump_checkpoint()
        if self.is_global_zero:
            checkpoint.save(Path(folder), contents, self.module.save_config)

    def dump_checkpoint(self) -> dict[str, dict]:
        """What a checkpoint of the run as it is now holds: later updates do not change it.

        With strategy fsdp all processes must call this, at the same update. Raises `UserError` before `fit`.
        """
        contents = run_state.dump(self)
        self._call("on_save_checkpoint", contents)
        contents = self.strategy.gather(contents)
        mx.eval(contents)  # another thread may write them, and a lazy array belongs to the thread that made it
        return contents

    def log(self, metrics: dict) -> None:
        """Write scalars under the current step. `float` waits for the device: do not log every update."""
        with self.profiler.phase("logging"):
            values = {name: float(value) for name, value in metrics.items()}
            self.callback_metrics |= values
            self.logged_metrics |= values
            for logger in self.loggers:
                logger.log_metrics(values, self.global_step, self.current_epoch)

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
        """How many updates the run will have."""
        return self.schedule.num_updates

    # ------------------------------------------------------------------ what callbacks may change

    def accumulate(self, num_batches: int) -> None:
        """Make every following update from so many micro-batches. To be called between epochs."""
        self.schedule.accumulate_grad_batches = num_batches

    def replace_datamodule(self, datamodule) -> None:
        """Take batches from another datamodule, from the next epoch or validation on."""
        self.datamodule = datamodule

    def measure_phases(self) -> Profiler:
        """The profiler; one that measures, where `profiler` asked for none."""
        if isinstance(self.profiler, NoProfiler):
            self.profiler = Profiler()
        return self.profiler

    def configure_optimizer(self, state: dict[str, mx.array] | None = None) -> None:
        """Ask the module for its optimizer, whose schedules depend on the length of the data as they are now.

        `state` is what a checkpoint has of it.
        """
        self.schedule.updates_in_epoch = self._count_updates(self.datamodule.train_dataloader())
        self.optimizer = self.module.configure_optimizers()
        self.strategy.check_optimizer(self.optimizer)
        if state is not None:
            checkpoint.load_optimizer(state, self.optimizer, self.module)
        self._build_train_step()

    # ------------------------------------------------------------------ the loops

    def _train(self) -> None:
        self._agree()
        while not self.schedule.is_done(self.should_stop):
            self._call("on_train_epoch_start")
            for group, is_last in self._updates_of_epoch():
                is_last = self._agree(not self._update(group) or is_last)
                if self.schedule.validation_due(is_last, self.should_stop):
                    self._validate()
                ends = is_last or self.schedule.is_done(self.should_stop)
                if ends:
                    self._call("on_train_epoch_end")
                if is_last:
                    self.progress.finish_epoch()
                self._call("on_save_point")
                self._agree()
                if self._signal:
                    raise Interrupted(self._signal)
                if is_last or self.schedule.is_done(self.should_stop):
                    break

    def _agree(self, is_last: bool = False) -> bool:
        """Share the reasons to end among the processes, which must all take the same turn. Returns whether any
        process is at its last batch: the shortest shard ends the epoch of all."""
        out_of_time = self.schedule.is_out_of_time(self.training_seconds)
        reasons = is_last, self.should_stop, out_of_time, self._request.number or 0
        is_last, stop, self.schedule.time_is_up, self._signal = collectives.all_max(*reasons)
        self.should_stop = bool(stop)
        return bool(is_last)

    def _update(self, group: tuple) -> bool:
        """One optimizer update; False if a hook wants the rest of the epoch skipped instead."""
        if -1 in self._call("on_train_batch_start", group):
            return False
        if self._traced.changed():
            self._build_train_step()
        with self.profiler.phase("step"):
            seed_everything(step_seed(self.config.seed, collectives.rank(), self.global_step))
            collectives.barrier()  # a GPU must not wait inside the update for a process whose batch is late
            collectives.enter_collective()
            self.strategy.check_micro_batches(len(group))
            metrics = self._train_step(group)
            mx.eval(metrics, self.module.state, self.optimizer.state)
        self.logged_metrics = {}
        self.progress.finish_update(len(group))
        if self.global_step % self.config.log_every_n_steps == 0:
            self._peak_warning.check()
            self.log({f"train/{name}": value for name, value in metrics.items()})
        self._call("on_train_batch_end", metrics, group)
        return True

    def _updates_of_epoch(self) -> Iterator[tuple[tuple, bool]]:
        """The micro-batches of each update left in this epoch, and whether it is the epoch's last."""
        limit = self.config.overfit_batches or self.config.limit_train_batches
        number = 0 if self.config.overfit_batches else self.current_epoch
        loader = self._train_loader()
        self.schedule.updates_in_epoch = self._count_updates(loader)
        rest = batches.epoch(loader, number, self.batch_idx, limit)
        groups = batches.updates(rest, self.accumulate_grad_batches)
        empty = True
        while True:
            with self.profiler.phase("data"):
                group = next(groups, None)
            if group is None:
                break
            empty = False
            yield group
        if empty and self.batch_idx == 0:
            raise UserError("the training data gave no batch: fewer examples than one batch holds?")
        if empty:  # resumed where an exception came between the epoch's last update and its end
            self.progress.finish_epoch()

    def _validate(self) -> dict[str, float]:
        if self.config.overfit_batches:
            return self._evaluator.measure("validation", self._train_loader(), self.config.overfit_batches)
        loader, limit = self.datamodule.val_dataloader(), self.config.limit_val_batches
        return self._evaluator.measure("validation", loader, limit)

    def _sanity_check(self) -> None:
        loader, limit = self.datamodule.val_dataloader(), self.config.num_sanity_val_steps
        if loader is not None and limit > 0 and self.global_step == 0 and self.config.limit_val_batches != 0:
            self._evaluator.sanity_check(loader, limit)

    # ------------------------------------------------------------------ before and after

    @contextlib.contextmanager
    def _stage(self, stage: str, module: Module, datamodule) -> Iterator[None]:
        self.module, self.datamodule, module.trainer = module, datamodule, self
        self.should_stop, self.schedule.time_is_up = False, False
        self.state, self._started = "running", time.perf_counter()
        self.compiler = Compiler(self._compiles(), self.config.max_compiled_variants)
        self._evaluator = Evaluator(self, self._call)
        try:
            with collectives.watched(), memory.limited(self.config.cache_limit_gib, self.config.wired_limit_gib):
                self.callbacks = arrange_callbacks(self.callbacks, module.configure_callbacks())
                self._hooks = hook_table(self.callbacks, self, module)
                collectives.broadcast_object(datamodule.prepare_data)
                datamodule.setup(stage)
                self._call("setup", stage)
                set_dtypes(module, self.config.precision)
                with half_products(module):
                    yield
                datamodule.teardown(stage)
                self._call("teardown", stage)
                collectives.barrier()  # what rank 0 wrote is there for all
        except BaseException as exception:
            self._leave("interrupted")
            self._call("on_exception", exception)
            self._finalize("failed")
            if isinstance(exception, Interrupted):
                collectives.barrier()  # a launcher ends all processes with the first: the last checkpoint comes before
            raise
        self._leave("finished")
        self._finalize("success")

    @contextlib.contextmanager
    def _layers_prepared(self) -> Iterator[None]:
        self.module.update(collectives.broadcast(self.module.parameters()))
        with contextlib.ExitStack() as stack:
            if self.config.deterministic:
                stack.enter_context(deterministic_lookups(self.module))
            stack.enter_context(self.strategy.sharded(self))
            if self.config.gradient_checkpointing:
                stack.enter_context(recomputed_layers(self.module))
            if self.config.detect_anomaly:
                stack.enter_context(watched_outputs(self.module))
            yield

    def _prepare_fit(self) -> None:
        saved = None if self.ckpt_path is None else self.strategy.own(checkpoint.load(self.ckpt_path))
        if saved is not None:
            run_state.restore(self, saved, lambda: self._call("on_load_checkpoint", saved))
        self.configure_optimizer(saved and saved["optimizer"])
        self.schedule.check_interval()
        for logger in self.loggers:
            logger.log_hyperparams({"module": self.module.hparams, "trainer": to_json(self.config)})

    def _build_train_step(self) -> None:
        """Compile for what is trainable now. Moments already there stay; new parameters get their own."""
        set_dtypes(self.module, self.config.precision)
        self.optimizer.init(self.module.trainable_parameters())
        self._traced = TraceSnapshot(self.module)
        needs_gradients = self._hooks["on_before_optimizer_step"] or self.config.detect_anomaly
        on_gradients = self._on_gradients if needs_gradients else None
        parts = self.module, self.optimizer, self.config, self.compiler, self.strategy
        self._train_step = TrainStep(*parts, on_gradients)
        if self.config.deterministic:
            self._train_step = checked_twice(self._train_step, self.module, self.optimizer)

    def _on_gradients(self, grads) -> None:
        if self.config.detect_anomaly:
            assert_finite(grads, f"at step {self.global_step}, the gradient")
        self._call("on_before_optimizer_step", grads)

    def _compiles(self) -> bool:
        return self.config.compile and not self.config.detect_anomaly and can_compile()

    def _call(self, hook: str, *args) -> list:
        methods = self._hooks[hook]
        if not methods:
            return methods
        with self.profiler.phase("callbacks"):
            return [method(*args) for method in methods]

    def _leave(self, state: str) -> None:
        self.progress.seconds, self.state = self.training_seconds, state

    def _finalize(self, status: str) -> None:
        for logger in self.loggers:
            logger.finalize(status)
        if self.config.profiler and self.is_global_zero:
            print(self.profiler.table())

    def _count_updates(self, loader) -> int | None:
        """The updates of an epoch, which the shortest shard ends for all processes; None where nothing tells."""
        limit = self.config.overfit_batches or self.config.limit_train_batches
        total = None if loader is None else batches.count(loader, limit)
        if collectives.all_max(total is None) == [1]:
            return None
        return -collectives.all_max(-total // self.accumulate_grad_batches)[0]

    def _train_loader(self):
        loader = self.datamodule.train_dataloader()
        if loader is None:
            raise UserError("there is no training data: give a datamodule or train_dataloaders")
        return loader
