"""The Trainer: the loops. Everything else is a callback, a module or a loader.

A run is a function of (config, global_step): the order of examples comes from (seed, epoch), the random keys of
an update from (seed, rank, global_step). So a resumed run is the run that was never stopped, to the bit.
"""

import contextlib
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs
import mlx.core as mx

from mlxmm.compute.compiled import Compiler, can_compile
from mlxmm.compute.gradient_checkpointing import recomputed_layers
from mlxmm.config import to_json
from mlxmm.distributed import collectives
from mlxmm.distributed.signals import Interrupted, end_requests
from mlxmm.errors import UserError
from mlxmm.storage import checkpoint
from mlxmm.training import batches
from mlxmm.training.anomaly import assert_finite, watched_outputs
from mlxmm.training.callback import Callback, arrange_callbacks, hook_table
from mlxmm.training.datamodule import Loaders
from mlxmm.training.eval_loop import Evaluator
from mlxmm.training.loggers import JSONLLogger, Logger, TensorBoardLogger
from mlxmm.training.module import Module
from mlxmm.training.profiler import make_profiler
from mlxmm.training.randomness import seed_everything, step_seed
from mlxmm.training.strategy import Shards, sharded_layers
from mlxmm.training.train_step import build_train_step, checked_twice
from mlxmm.training.trainable import TraceSnapshot, set_trainable, trainable_names
from mlxmm.training.trainer_config import TrainerConfig, duration


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
        collectives.check_strategy(self.config.strategy)
        self.callbacks = arrange_callbacks(callbacks)
        self.loggers = [] if self.config.fast_dev_run else _make_loggers(logger, self.config.default_root_dir)
        self.profiler = make_profiler(self.config.profiler, self.config.default_root_dir)
        self.accumulate_grad_batches = self.config.accumulate_grad_batches
        self.global_step = 0  # updates, and nothing else
        self.current_epoch = 0
        self.batch_idx = 0  # micro-batches of this epoch that are behind
        self.seconds = 0.0  # of training, before this fit began
        self.should_stop = False
        self.state = "initializing"  # then running, and finished or interrupted
        self.callback_metrics: dict[str, float] = {}  # the newest value of all that was logged
        self.logged_metrics: dict[str, float] = {}  # what was logged since the newest update
        self.ckpt_path: Path | None = None  # the checkpoint that the run was resumed from
        self.module = self.optimizer = self.datamodule = None
        self.shards = Shards()  # of parameters; none but with strategy fsdp, while it fits

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

        `ckpt_path` is the checkpoint to go on from; "last" the newest whole one in `default_root_dir`.
        """
        data = datamodule or Loaders(train=train_dataloaders, val=val_dataloaders)
        [self.ckpt_path] = collectives.broadcast_paths(lambda: [ckpt_path and self._checkpoint_folder(ckpt_path)])
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

    def configure_optimizer(self, state: dict[str, mx.array] | None = None) -> None:
        """Ask the module for its optimizer, which takes its schedules from the data as they are now; `state` is what
        a checkpoint has of it."""
        self._updates_in_epoch = self._count_updates(self.datamodule.train_dataloader())
        self.optimizer = self.module.configure_optimizers()
        self.shards.check_optimizer(self.optimizer)
        if state is not None:
            checkpoint.load_optimizer(state, self.optimizer, self.module)
        self._build_train_step()

    def save_checkpoint(self, folder: Path | str) -> None:
        """Write a checkpoint of the run as it is now, whole or not at all."""
        contents = self.dump_checkpoint()
        if self.is_global_zero:
            checkpoint.save(Path(folder), contents, self.module.save_config)

    def dump_checkpoint(self) -> dict[str, dict]:
        """What a checkpoint of the run as it is now holds: later updates do not change it.

        With strategy fsdp all processes must call this, at the same update.
        """
        if self.shards.names and self.state == "interrupted":
            raise UserError("the shards of the other processes are out of reach after an exception")
        for logger in self.loggers:
            logger.flush()
        state = {
            "global_step": self.global_step,
            "current_epoch": self.current_epoch,
            "batch_idx": self.batch_idx,
            "seconds": self.training_seconds,
            "callback_metrics": self.callback_metrics,
            "trainable": trainable_names(self.module),
            "callbacks": {c.state_key: c.state_dict() for c in self.callbacks},
            "loggers": [logger.position() for logger in self.loggers],
        }
        contents = checkpoint.contents(self.module, self.optimizer, state)
        self._call("on_save_checkpoint", contents)
        return self.shards.whole(contents)

    def log(self, metrics: dict) -> None:
        """Write scalars under the current step. `float` waits for the device: not for every update."""
        with self.profiler.phase("logging"):
            values = {name: float(value) for name, value in metrics.items()}
            self.callback_metrics |= values
            self.logged_metrics |= values
            for logger in self.loggers:
                logger.log_metrics(values, self.global_step, self.current_epoch)

    @property
    def is_global_zero(self) -> bool:
        """Whether this process is the one that writes."""
        return collectives.rank() == 0

    @property
    def training_seconds(self) -> float:
        """How long this run has been in training, what came before a resume included."""
        return self.seconds + (time.perf_counter() - self._started if self.state == "running" else 0.0)

    @property
    def num_compiled_variants(self) -> int:
        """For how many batch shapes steps are compiled now: at most `max_compiled_variants` of each kind."""
        return self.compiler.num_variants

    @property
    def estimated_stepping_batches(self) -> int:
        """How many updates the run will have."""
        limits = [self.config.max_steps] if self.config.max_steps >= 0 else []
        if self._updates_in_epoch is not None and self.config.max_epochs >= 0:
            limits.append(self._updates_in_epoch * self.config.max_epochs)
        if not limits:
            raise UserError("set max_steps: the training data do not tell how many batches they have")
        return min(limits)

    # ------------------------------------------------------------------ the loops

    def _train(self) -> None:
        self._agree()
        while not self._done:
            self._call("on_train_epoch_start")
            for group, is_last in self._updates_of_epoch():
                is_last = self._agree(not self._update(group) or is_last)
                if self._validation_due(is_last):
                    self._validate()
                if is_last or self._done:
                    self._call("on_train_epoch_end")
                if is_last:
                    self.current_epoch, self.batch_idx = self.current_epoch + 1, 0
                self._call("on_save_point")
                self._agree()
                if self._signal:
                    raise Interrupted(self._signal)
                if is_last or self._done:
                    break

    def _agree(self, is_last: bool = False) -> bool:
        """Share among the processes the reasons to end: all must take the same turn. Whether any is at its last batch.

        A shorter shard ends the epoch of all, and so does one process's clock, callback or signal the run.
        """
        reasons = is_last, self.should_stop, self._is_out_of_time(), self._request.number or 0
        is_last, stop, self._time_is_up, self._signal = collectives.all_max(*reasons)
        self.should_stop = bool(stop)
        return bool(is_last)

    def _update(self, group: tuple) -> bool:
        """One optimizer update; False if a hook wants the rest of the epoch skipped instead."""
        if -1 in self._call("on_train_batch_start", group):
            return False
        if self._modes.changed():
            self._build_train_step()
        with self.profiler.phase("step"):
            seed_everything(step_seed(self.config.seed, collectives.rank(), self.global_step))
            collectives.enter_collective()
            self.shards.check_group(group)
            metrics = self._train_step(group)
            mx.eval(metrics, self.module.state, self.optimizer.state)
        self.logged_metrics = {}
        self.global_step += 1
        self.batch_idx += len(group)
        if self.global_step % self.config.log_every_n_steps == 0:
            self.log({f"train/{name}": value for name, value in metrics.items()})
        self._call("on_train_batch_end", metrics, group)
        return True

    def _updates_of_epoch(self) -> Iterator[tuple[tuple, bool]]:
        """The micro-batches of each update left in this epoch, and whether it is the epoch's last."""
        limit = self.config.overfit_batches or self.config.limit_train_batches
        number = 0 if self.config.overfit_batches else self.current_epoch
        loader = self._train_loader()
        self._updates_in_epoch = self._count_updates(loader)
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
            self.current_epoch, self.batch_idx = self.current_epoch + 1, 0

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
        self.should_stop = self._told_of_minimum = False
        self.state, self._started = "running", time.perf_counter()
        self.compiler = Compiler(self._compiles(), self.config.max_compiled_variants)
        self._evaluator = Evaluator(self, self._call)
        try:
            with collectives.watched():
                self.callbacks = arrange_callbacks(self.callbacks, module.configure_callbacks())
                self._hooks = hook_table(self.callbacks, self, module)
                collectives.broadcast_object(datamodule.prepare_data)
                datamodule.setup(stage)
                self._call("setup", stage)
                if self.config.precision == "bf16-true":
                    module.set_dtype(mx.bfloat16)
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
            if self.config.strategy == "fsdp":
                stack.enter_context(sharded_layers(self))
            if self.config.gradient_checkpointing:
                stack.enter_context(recomputed_layers(self.module))
            if self.config.detect_anomaly:
                stack.enter_context(watched_outputs(self.module))
            yield

    def _prepare_fit(self) -> None:
        saved = None if self.ckpt_path is None else self.shards.own(checkpoint.load(self.ckpt_path))
        if saved is not None:
            self._restore(saved)
        self.configure_optimizer(saved and saved["optimizer"])
        interval = self.config.val_check_interval
        if self._updates_in_epoch is None and isinstance(interval, float) and interval != 1.0:
            raise UserError("val_check_interval is a part of an epoch whose length nothing tells: give it in updates")
        for logger in self.loggers:
            logger.log_hyperparams({"module": self.module.hparams, "trainer": to_json(self.config)})

    def _checkpoint_folder(self, ckpt_path: Path | str) -> Path:
        if ckpt_path != "last":
            return Path(ckpt_path)
        root = self.config.default_root_dir
        folder = checkpoint.latest(Path(root) / "checkpoints") if root else None
        if folder is None:
            raise UserError(f"ckpt_path='last': there is no checkpoint in {root}")
        return folder

    def _restore(self, saved: dict[str, dict]) -> None:
        state = saved["state"]
        self.global_step, self.current_epoch = state["global_step"], state["current_epoch"]
        self.batch_idx, self.callback_metrics = state["batch_idx"], state["callback_metrics"]
        self.seconds = state["seconds"]
        for callback in self.callbacks:
            if callback.state_key in state["callbacks"]:
                callback.load_state_dict(state["callbacks"][callback.state_key])
        self._call("on_load_checkpoint", saved)
        checkpoint.load_arrays(self.ckpt_path, saved["weights"], self.module)
        set_trainable(self.module, state["trainable"])
        for logger, position in zip(self.loggers, state["loggers"]):
            logger.rewind(position, self.global_step)

    def _build_train_step(self) -> None:
        """Compile for what is trainable now. Moments already there stay; new parameters get their own."""
        self.optimizer.init(self.module.trainable_parameters())
        self._modes = TraceSnapshot(self.module)
        watches = self._hooks["on_before_optimizer_step"] or self.config.detect_anomaly
        self._train_step = build_train_step(
            self.module,
            self.optimizer,
            self.config,
            self.compiler,
            self._on_gradients if watches else None,
            self.shards,
        )
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
        self.seconds, self.state = self.training_seconds, state

    def _finalize(self, status: str) -> None:
        for logger in self.loggers:
            logger.finalize(status)
        if self.config.profiler and self.is_global_zero:
            print(self.profiler.table())

    # ------------------------------------------------------------------ when

    @property
    def _done(self) -> bool:
        config = self.config
        if 0 <= config.max_steps <= self.global_step or 0 <= config.max_epochs <= self.current_epoch:
            return True
        return self._time_is_up or (self.should_stop and self._may_stop())

    def _is_out_of_time(self) -> bool:
        return self.config.max_time is not None and self.training_seconds >= duration(self.config.max_time)

    def _may_stop(self) -> bool:
        config = self.config
        if self.global_step >= config.min_steps and self.current_epoch >= config.min_epochs:
            return True
        if not self._told_of_minimum:
            least = f"min_steps={config.min_steps}, min_epochs={config.min_epochs}"
            warnings.warn(f"asked to stop, but goes on until {least}", stacklevel=2)
        self._told_of_minimum = True
        return False

    def _validation_due(self, is_last: bool) -> bool:
        ends = is_last and 0 <= self.config.max_epochs <= self.current_epoch + 1
        if ends or self._done:
            return True
        if (self.current_epoch + 1) % self.config.check_val_every_n_epoch:
            return False
        interval = self.config.val_check_interval
        if isinstance(interval, int):
            return self.global_step % interval == 0
        if self._updates_in_epoch is None or interval == 1.0:
            return is_last
        done = -(-self.batch_idx // self.accumulate_grad_batches)
        return done % max(1, int(self._updates_in_epoch * interval)) == 0

    def _count_updates(self, loader) -> int | None:
        """The updates of an epoch, which ends for all processes with the shortest shard; None where nothing tells."""
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


def _make_loggers(logger, root: Path | None) -> list[Logger]:
    if logger is False or collectives.rank() > 0 or (logger is True and root is None):
        return []
    if logger is True:
        return [JSONLLogger(root), TensorBoardLogger(root)]
    return [logger] if isinstance(logger, Logger) else list(logger)
