"""The Trainer: the loops. Everything else is a callback, a module or a loader.

A run is a function of (config, global_step): the order of examples comes from (seed, epoch), the random keys of an
update from (seed, rank, global_step). So a resumed run is the run that was never stopped, to the bit.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxmm.compute import memory
from mlxmm.compute.compiled import Compiler, can_compile, warn_of_plain_python
from mlxmm.compute.half_products import half_products
from mlxmm.compute.precision import set_dtypes
from mlxmm.distributed import collectives
from mlxmm.distributed.signals import Interrupted, Request, end_requests
from mlxmm.errors import UserError
from mlxmm.storage import checkpoint
from mlxmm.storage.runs import table
from mlxmm.terminal import say
from mlxmm.training import batches, lightning_arguments, mlx_errors, run_folder, run_state
from mlxmm.training.anomaly import DivergenceWarning, assert_finite
from mlxmm.training.callback import (
    Callback,
    arrange_callbacks,
    give_each_its_turn,
    hook_table,
    note_first_state,
    restart_callbacks,
)
from mlxmm.training.checks import (
    as_callbacks,
    check_optimizer,
    check_stage,
    check_trainable,
    checked_arguments,
    warn_of_zero_rate,
)
from mlxmm.training.datamodule import (
    DataModule,
    as_datamodule,
    needed_loader,
    stage_loader,
    train_loader,
    why_empty,
)
from mlxmm.training.default_callbacks import with_defaults
from mlxmm.training.dispatch import Dispatch
from mlxmm.training.ending import why_ended
from mlxmm.training.eval_loop import Evaluator
from mlxmm.training.loader_randomness import epoch_seed
from mlxmm.training.logger import Logger
from mlxmm.training.loggers import make_loggers
from mlxmm.training.module import Module
from mlxmm.training.monitors import Metrics
from mlxmm.training.preparation import hparams, prepared_layers
from mlxmm.training.profiler import NoProfiler, Profiler, make_profiler
from mlxmm.training.progress import Progress
from mlxmm.training.randomness import seed_everything, step_seed
from mlxmm.training.schedule import Schedule
from mlxmm.training.strategy import make_strategy
from mlxmm.training.trace import TraceSnapshot, forget_moments
from mlxmm.training.train_step import TrainStep, checked_twice
from mlxmm.training.trainer_config import TrainerConfig
from mlxmm.training.trainer_properties import TrainerProperties


class Trainer(TrainerProperties):
    """Fits a `Module`: Lightning's Trainer on MLX.

    `callbacks` are called in the order given, those that save checkpoints last. A `ModelSummary`, a `TQDMProgressBar`
    and a `ModelCheckpoint` are added where none is given, unless `enable_model_summary` etc. are off. `logger` is one
    Logger or several, or names ("tensorboard,wandb"), which stand for JSON lines too, in the run's folder; True for the
    names that `config.logger` has, False for none. Settings of `TrainerConfig` may be given by name, Lightning's
    spellings among them (docs/from-lightning.md).

    The run's folder is `default_root_dir`, or else the next runs/<Module>/version_N, which each `fit` makes.
    """

    def __init__(
        self,
        config: TrainerConfig | None = None,
        *,
        callbacks: Callback | Sequence[Callback] | None = None,
        logger: Logger | Sequence[Logger] | str | bool | None = True,
        **settings,
    ):
        self.config, callbacks = checked_arguments(config or TrainerConfig(), settings, callbacks)
        self.strategy = make_strategy(self.config.strategy)
        self._own_callbacks = with_defaults(callbacks, self.config)
        self.callbacks = arrange_callbacks(self._own_callbacks)
        note_first_state(self.callbacks)
        self.log_dir = self.config.default_root_dir  # the folder of the run; without this setting, `fit` makes one
        logger = self.config.logger if logger is None or logger is True else logger
        self._logger = False if self.config.fast_dev_run else logger
        self.loggers = make_loggers(self._logger, self.log_dir)
        self.profiler = make_profiler(self.config.profiler, self.config.default_root_dir)
        self._restart()
        self.should_stop = False  # set it to end the run after the update in hand
        self.state = "initializing"  # then running, and finished or interrupted
        self.ckpt_path: Path | None = None  # the checkpoint that the run was resumed from
        self.module: Any = None  # these three are of the newest stage
        self.optimizer: Any = None
        self.datamodule: Any = None
        self.compiler = Compiler(self._compiles(), self.config.max_compiled_variants)
        self._evaluator = Evaluator(self, self._call)
        self._hooks = hook_table(self.callbacks, self, None)
        self._train_step: Any = None  # the compiled update
        self._traced: Any = None  # what it was traced with
        self._dispatch = Dispatch()
        self.locks = contextlib.ExitStack()  # on the folders that a fit writes
        self._request = Request()  # the signal that asks for the end
        self._peak_warning = memory.PeakWarning()
        self._signal = 0  # the one that all processes have agreed on
        self._started = 0.0  # when this stage began, by time.perf_counter

    # ------------------------------------------------------------------ what people call

    @lightning_arguments.answers_calls
    def fit(
        self,
        model: Module,
        train_dataloaders=None,
        val_dataloaders=None,
        datamodule=None,
        ckpt_path: Path | str | None = None,
    ) -> None:
        """Train until `max_steps` updates, `max_epochs` epochs, `max_time` or `should_stop`.

        A datamodule may also be in the place of `train_dataloaders`. `ckpt_path` is the checkpoint to resume from:
        "last" is the newest undamaged one of the run, or of the module's newest run where the trainer has no folder
        yet; "best" that of `ModelCheckpoint`. Without it each call is a run of its own, from the module's weights.
        """
        data = as_datamodule(datamodule, train=train_dataloaders, val=val_dataloaders)
        alone = collectives.world_size() == 1
        ending, stage = contextlib.ExitStack(), self._stage("fit", model, data, ckpt_path)
        with ending, stage, prepared_layers(self), end_requests(alone, ending) as self._request:
            self._prepare_fit()
            self._call("on_fit_start")
            self._sanity_check()
            self._call("on_train_start")
            first_step = self.global_step
            self._train()
            self._call("on_train_end")
            if self.is_global_zero and (told := why_ended(self, first_step)):
                say(told)
            self._call("on_fit_end")

    @lightning_arguments.answers_calls
    def validate(
        self,
        model: Module | None = None,
        dataloaders=None,
        *,
        datamodule=None,
        ckpt_path: Path | str | None = None,
        verbose: bool = True,
    ) -> dict[str, float]:
        """The means of `validation_step` over the validation data, as "val/…", which are printed too if `verbose`.

        Without `model`, it is of the module fitted before, and without data, on the data of that fit; with `ckpt_path`,
        with the weights of that checkpoint. With `enable_progress_bar=False` nothing is printed. Raises `UserError` for
        want of such data.
        """
        with self._stage("validate", model, self._held_out("val", datamodule, dataloaders), ckpt_path):
            metrics = self._validate(needed_loader)
        return self._printed(metrics, verbose)

    @lightning_arguments.answers_calls
    def test(
        self,
        model: Module | None = None,
        dataloaders=None,
        *,
        datamodule=None,
        ckpt_path: Path | str | None = None,
        verbose: bool = True,
    ) -> dict[str, float]:
        """The means of `test_step` over the test data, as "test/…"; arguments as of `validate`."""
        with self._stage("test", model, self._held_out("test", datamodule, dataloaders), ckpt_path):
            loader = needed_loader(self.datamodule, "test")
            metrics = self._evaluator.measure("test", loader, self.config.limit_test_batches)
        return self._printed(metrics, verbose)

    @lightning_arguments.answers_calls
    def predict(
        self, model: Module | None = None, dataloaders=None, *, datamodule=None, ckpt_path: Path | str | None = None
    ) -> list:
        """What `predict_step` returns for each batch; arguments as of `validate`."""
        with self._stage("predict", model, self._held_out("predict", datamodule, dataloaders), ckpt_path):
            loader = needed_loader(self.datamodule, "predict")
            return self._evaluator.predict(loader, self.config.limit_predict_batches)

    def save_checkpoint(self, folder: Path | str) -> None:
        """Write a checkpoint of the run as it is now, whole or not at all. Raises `UserError` before `fit`."""
        contents = self.dump_checkpoint()
        if self.is_global_zero:
            checkpoint.save(Path(folder), contents, self.module.save_config)

    def dump_checkpoint(self) -> dict[str, dict]:
        """What a checkpoint of the run as it is now holds: later updates do not change it.

        With strategy fsdp all processes must call this, at the same update. Raises `UserError` before `fit`.
        """
        contents = run_state.dump(self, lambda contents: self._call("on_save_checkpoint", contents))
        contents = self.strategy.gather(contents)
        mx.eval(contents)  # another thread may write them, and a lazy array belongs to the thread that made it
        return contents

    def log(self, metrics: Mapping[str, float] | str, value: float | None = None) -> None:
        """Write scalars, or one by its name, under the current step. `float` waits for the device: not every update.

        What is logged after a run, as results of a test, is on disk when this returns.
        """
        with self.profiler.phase("logging"):
            named = {metrics: value} if isinstance(metrics, str) else metrics
            values = {name: float(value) for name, value in named.items()}
            self.callback_metrics |= values
            self.logged_at |= dict.fromkeys(values, self.global_step)
            self._divergence.check(values, self.global_step)
            for logger in self.loggers:
                logger.log_metrics(values, self.global_step, self.current_epoch)
                if self.state == "finished":
                    logger.finalize("success")

    # ------------------------------------------------------------------ what callbacks may change

    def accumulate(self, num_batches: int) -> None:
        """Make every following update from so many micro-batches. To be called between epochs."""
        self.schedule.accumulate_grad_batches = int(num_batches)

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
        self.schedule.measure_epoch(self.datamodule.train_dataloader())
        self.optimizer = check_optimizer(self.module, self.compiler.enabled)
        self.strategy.check_optimizer(self.optimizer)
        warn_of_zero_rate(self.optimizer, self.schedule.known_updates or 0)
        if state is not None:
            checkpoint.load_optimizer(state, self.optimizer, self.module)
        self._build_train_step()

    # ------------------------------------------------------------------ the loops

    def _train(self) -> None:
        self._agree()
        if self.progress.validating:  # a signal ended the run in the middle of it
            self._validate_in_fit()
            self._call("on_save_point")
        while not self.schedule.is_done(self.should_stop):
            self._call("on_train_epoch_start")
            for group, is_last in self._updates_of_epoch():
                is_last = self._agree(not self._update(group) or is_last)
                if is_last or self.schedule.is_done(self.should_stop):
                    self._log_epoch()
                if self.schedule.validation_due(is_last, self.should_stop):
                    self._validate_in_fit()
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
            forget_moments(self.optimizer, self.module, self._traced)
            self._build_train_step()
        with self.profiler.phase("step"):
            seed_everything(step_seed(self.config.seed, collectives.rank(), self.global_step))
            collectives.barrier()  # a GPU must not wait inside the update for a process whose batch is late
            collectives.enter_collective()
            self.strategy.check_micro_batches(len(group))
            metrics = self._train_step(group)
            self._dispatch(metrics, self.module.state, self.optimizer.state)
        self.progress.finish_update(len(group), metrics)
        if self.global_step % self.config.log_every_n_steps == 0:
            self._peak_warning.check()
            self.log({f"train/{name}": value for name, value in metrics.items()})
        self._call("on_train_batch_end", metrics, group)
        return True

    def _log_epoch(self) -> None:
        """Log the means of the epoch. For callbacks that watch "train/loss", they are its newest value."""
        means = {f"train/{name}": mean for name, mean in self.progress.means.means().items() if name != "grad_norm"}
        if means:  # a hook may have skipped the epoch
            self.log({f"{name}_epoch": mean for name, mean in means.items()})
        self.callback_metrics |= means
        self.logged_at |= dict.fromkeys(means, self.global_step)

    def _updates_of_epoch(self) -> Iterator[tuple[tuple, bool]]:
        """The micro-batches of each update left in this epoch, and whether it is the epoch's last."""
        limit = self.config.overfit_batches or self.config.limit_train_batches
        number = 0 if self.config.overfit_batches else self.current_epoch
        loader = train_loader(self.datamodule, epoch_seed(self.config.seed, number))
        self.schedule.measure_epoch(loader)
        rest = batches.epoch(loader, number, self.batch_idx, limit, self.config.seed)
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
            raise UserError(why_empty(loader, self.current_epoch))
        if empty:  # resumed where an exception came between the epoch's last update and its end
            self.progress.finish_epoch()

    def _validate_in_fit(self) -> None:
        self.progress.validating = True
        self._validate()
        self.progress.validating = False

    def _validate(self, find_loader: Callable = stage_loader) -> dict[str, float]:
        if limit := self.config.overfit_batches:
            return self._evaluator.measure("validation", train_loader(self.datamodule), limit)
        loader = find_loader(self.datamodule, "val")
        return self._evaluator.measure("validation", loader, self.config.limit_val_batches)

    def _printed(self, metrics: dict[str, float], verbose: bool) -> dict[str, float]:
        if verbose and metrics and self.config.enable_progress_bar and self.is_global_zero:
            say(*table(metrics).split("\n"))
        return metrics

    def _sanity_check(self) -> None:
        loader, limit = stage_loader(self.datamodule, "val"), self.config.num_sanity_val_steps
        if loader is not None and limit > 0 and self.global_step == 0 and self.config.limit_val_batches != 0:
            self._evaluator.sanity_check(loader, limit)

    # ------------------------------------------------------------------ before and after

    @contextlib.contextmanager
    def _stage(self, stage: str, module: Module | None, data: DataModule, ckpt_path=None) -> Iterator[None]:
        module = self.module if module is None else module
        check_stage(self, stage, module, data)
        outer = module.trainer  # of a fit, in one of whose callbacks this stage runs
        self.module, self.datamodule, module.trainer = module, data, self
        with contextlib.suppress(AttributeError):  # a frozen datamodule does not know its trainer
            data.trainer = self
        self.callbacks = arrange_callbacks(self._own_callbacks, as_callbacks(module.configure_callbacks()))
        weights = None if stage == "fit" else run_folder.find_checkpoint(self, ckpt_path)
        if stage == "fit":
            self._open_run(ckpt_path)
        self.should_stop, self.schedule.time_is_up = False, False
        self.state, self._started = "running", time.perf_counter()
        self.compiler = Compiler(self._compiles(), self.config.max_compiled_variants)
        self._evaluator = Evaluator(self, self._call)
        try:
            memory_limits = memory.limited(self.config.cache_limit_gib, self.config.wired_limit_gib)
            with collectives.watched(), memory_limits, mlx_errors.noted():
                self._hooks = hook_table(self.callbacks, self, module)
                collectives.broadcast_object(data.prepare_data)
                data.setup(stage)
                self._call("setup", stage)
                if weights is not None:
                    checkpoint.load_arrays(weights, checkpoint.load(weights)["weights"], module)
                set_dtypes(module, self.config.precision)
                with half_products(module):
                    yield
                data.teardown(stage)
                self._call("teardown", stage)
                collectives.barrier()  # what rank 0 wrote is there for all
        except BaseException as exception:
            self._leave("interrupted")
            give_each_its_turn(self._hooks["on_exception"], exception)
            give_each_its_turn([self._finalize], "failed")
            if isinstance(exception, Interrupted):
                collectives.barrier()  # a launcher ends all processes with the first: the last checkpoint comes before
            raise
        finally:
            run_folder.close(self)
            if outer is not None and outer.state == "running":
                module.trainer = outer
        self._leave("finished")
        self._finalize("success")

    def _held_out(self, kind: str, datamodule, loaders) -> DataModule:
        """The data that were given for a stage, or else those of the stage before."""
        if datamodule is None and loaders is None and self.datamodule is not None:
            return self.datamodule
        return as_datamodule(datamodule, **{kind: loaders})

    def _restart(self) -> None:
        """Set what a run counts and measures to its beginning."""
        self.progress = Progress()
        self.schedule = Schedule(self.config, self.progress, self.config.accumulate_grad_batches)
        self.callback_metrics = Metrics()  # the newest value of everything that was logged
        self.logged_at: dict[str, int] = {}  # the step of each
        self._divergence = DivergenceWarning()

    def _open_run(self, ckpt_path: Path | str | None) -> None:
        """Begin a run in its folder, which is made if it has no name."""
        [self.ckpt_path, folder] = collectives.broadcast_paths(lambda: run_folder.open_run(self, ckpt_path))
        self._restart()
        restart_callbacks(self.callbacks)
        if self.config.default_root_dir is None:
            self.log_dir, self.loggers = folder, make_loggers(self._logger, folder)

    def _prepare_fit(self) -> None:
        saved = None if self.ckpt_path is None else self.strategy.own(checkpoint.load(self.ckpt_path))
        if saved is not None:
            run_state.restore(self, saved, lambda: self._call("on_load_checkpoint", saved))
        self.configure_optimizer(saved and saved["optimizer"])
        self.schedule.check(stage_loader(self.datamodule, "val"))
        run_folder.begin(self, saved and saved["state"])  # before this nothing is changed that is on disk
        for logger in self.loggers:
            logger.log_hyperparams(hparams(self))

    def _build_train_step(self) -> None:
        """Compile for what is trainable now. Moments already there stay; new parameters get their own."""
        set_dtypes(self.module, self.config.precision)
        check_trainable(self.module)
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
        wanted = self.config.compile and not self.config.detect_anomaly
        if wanted and not can_compile():
            warn_of_plain_python()
        return wanted and can_compile()

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
            say(*self.profiler.table().split("\n"))
