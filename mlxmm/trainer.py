"""The Trainer: the loops. Everything else is a callback, a module or a loader.

A run is a function of (config, global_step): the order of examples comes from (seed, epoch), the random key of
an update from (seed, rank, global_step). So a resumed run is the run that was never stopped, to the bit.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import attrs
import mlx.core as mx
from attrs.validators import ge, optional
from mlx.utils import tree_map

from mlxmm import checkpoint, distributed
from mlxmm.callback import HOOKS, Callback
from mlxmm.config import UserError, option, to_json
from mlxmm.loggers import JSONLLogger, Logger, TensorBoardLogger
from mlxmm.module import Modes, Module, evaluating, set_trainable, trainable_names
from mlxmm.signals import Request, end_requests
from mlxmm.train_step import average_sums, build_eval_step, build_train_step


@attrs.frozen(kw_only=True)
class TrainerConfig:
    """How long to train and what to do on the way. A step is one optimizer update."""

    max_steps: int = option(-1, "updates to run; -1: no limit", ge(-1))
    max_epochs: int = option(1_000, "passes over the training data", ge(0))
    accumulate_grad_batches: int = option(1, "batches per update", ge(1))
    gradient_clip_val: float | None = option(1.0, "largest global gradient norm, or none", optional(ge(0)))
    val_check_interval: int | None = option(
        None, "updates between validations; none: at each epoch's end", optional(ge(1))
    )
    log_every_n_steps: int = option(50, "updates between lines of training metrics", ge(1))
    seed: int = option(0, "of data order, dropout and all else that is random", ge(0))
    compile: bool = option(True, "compile each update; without, it runs as plain Python")
    default_root_dir: Path | None = option(None, "where loggers and checkpoints write; none: nowhere")
    enable_checkpointing: bool = option(True, "let ModelCheckpoint write")
    enable_progress_bar: bool = option(True, "show TQDMProgressBar")
    enable_model_summary: bool = option(True, "print ModelSummary")


class Trainer:
    """Fits a `Module`: Lightning's Trainer on MLX.

    `callbacks` are called in the order given. `logger` is one Logger or several; True stands for
    JSON lines and TensorBoard in `default_root_dir`, False for none. Settings of `TrainerConfig` may be given by name.
    """

    def __init__(
        self,
        config: TrainerConfig | None = None,
        *,
        callbacks: Sequence[Callback] = (),
        logger: Logger | Sequence[Logger] | bool = True,
        **settings,
    ):
        if isinstance(root := settings.get("default_root_dir"), str):
            settings["default_root_dir"] = Path(root)
        self.config = attrs.evolve(config or TrainerConfig(), **settings)
        self.callbacks = list(callbacks)
        self.loggers = _make_loggers(logger, self.config.default_root_dir)
        self._hooks = _overridden_hooks(self.callbacks)
        self.global_step = 0  # updates, and nothing else
        self.current_epoch = 0
        self.batch_idx = 0  # micro-batches of this epoch that are behind
        self.should_stop = False
        self.callback_metrics: dict[str, float] = {}  # the newest value of all that was logged
        self.module = self.optimizer = self.datamodule = None

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
        """Train until `max_steps` updates, `max_epochs` epochs or `should_stop`; `ckpt_path` resumes a run."""
        data = datamodule or _Loaders(train_dataloaders, val_dataloaders)
        with self._stage("fit", module, data), end_requests() as request:
            state = self._restore(ckpt_path)
            self._call("on_fit_start")
            self._make_optimizer(ckpt_path, state)
            self._log_hyperparams()
            self._call("on_train_start")
            self._train(request)
            self._call("on_train_end")
            self._call("on_fit_end")

    def validate(self, module: Module, datamodule=None, *, dataloaders=None) -> dict[str, float]:
        """The means of `validation_step` over the validation data, as "val/…"."""
        with self._stage("validate", module, datamodule or _Loaders(val=dataloaders)):
            return self._evaluate("validation", "val")

    def test(self, module: Module, datamodule=None, *, dataloaders=None) -> dict[str, float]:
        """The means of `test_step` over the test data, as "test/…"."""
        with self._stage("test", module, datamodule or _Loaders(test=dataloaders)):
            return self._evaluate("test", "test")

    def save_checkpoint(self, folder: Path | str) -> None:
        """Write a checkpoint of the run as it is now, whole or not at all."""
        for logger in self.loggers:
            logger.flush()
        state = {
            "global_step": self.global_step,
            "current_epoch": self.current_epoch,
            "batch_idx": self.batch_idx,
            "callback_metrics": self.callback_metrics,
            "trainable": trainable_names(self.module),
            "callbacks": {c.state_key: c.state_dict() for c in self.callbacks},
            "loggers": [logger.position() for logger in self.loggers],
        }
        if self.is_global_zero:
            checkpoint.save(Path(folder), self.module, self.optimizer, state)

    def log(self, metrics: dict) -> None:
        """Write scalars under the current step. `float` waits for the device: not for every update."""
        values = {name: float(value) for name, value in metrics.items()}
        self.callback_metrics |= values
        for logger in self.loggers:
            logger.log_metrics(values, self.global_step, self.current_epoch)

    @property
    def is_global_zero(self) -> bool:
        """Whether this process is the one that writes."""
        return distributed.rank() == 0

    @property
    def estimated_stepping_batches(self) -> int:
        """How many updates the run will have."""
        limits = [self.config.max_steps] if self.config.max_steps >= 0 else []
        loader = self.datamodule.train_dataloader()
        if hasattr(loader, "__len__"):
            updates = -(-len(loader) // self.config.accumulate_grad_batches)
            limits.append(updates * self.config.max_epochs)
        if not limits:
            raise UserError("set max_steps: the training data do not tell how many batches they have")
        return min(limits)

    # ------------------------------------------------------------------ the loop

    def _train(self, request: Request) -> None:
        while not self._done:
            self._call("on_train_epoch_start")
            for batches, is_last in self._updates_of_epoch():
                self._update(batches)
                if self._validation_due(is_last):
                    self._evaluate("validation", "val")
                if is_last:
                    self._call("on_train_epoch_end")
                    self.current_epoch, self.batch_idx = self.current_epoch + 1, 0
                self._call("on_save_point")
                request.raise_if_made()
                if self._done:
                    break

    def _update(self, batches: tuple) -> None:
        self._call("on_train_batch_start", batches)
        if self._modes.changed():
            self._build_train_step()
        mx.random.seed(self._step_seed())
        metrics = self._train_step(batches)
        mx.eval(metrics, self.module.state, self.optimizer.state)
        self.global_step += 1
        self.batch_idx += len(batches)
        if self.global_step % self.config.log_every_n_steps == 0:
            self.log({f"train/{name}": value for name, value in metrics.items()})
        self._call("on_train_batch_end", metrics)

    def _updates_of_epoch(self) -> Iterator[tuple[tuple, bool]]:
        """The micro-batches of each update left in this epoch, and whether it is the epoch's last."""
        batches = _epoch(self.datamodule.train_dataloader(), self.current_epoch, self.batch_idx)
        updates = iter(lambda: tuple(islice(batches, self.config.accumulate_grad_batches)), ())
        update = next(updates, None)
        if update is None:
            raise UserError("the training data gave no batch: fewer examples than one batch holds?")
        while update is not None:
            following = next(updates, None)
            yield update, following is None
            update = following

    def _evaluate(self, stage: str, prefix: str) -> dict[str, float]:
        """The weighted means of `<stage>_step` over the data; {} where there are none."""
        loader = getattr(self.datamodule, f"{prefix}_dataloader")()
        if loader is None:
            return {}
        self._call(f"on_{stage}_start")
        with evaluating(self.module):
            step = self._eval_step(f"{stage}_step")
            total = None
            for batch in _epoch(loader, 0, 0):
                total = step(batch, total)
                mx.eval(total)
        means = {} if total is None else average_sums(total)[0]
        metrics = {f"{prefix}/{name}": float(value) for name, value in means.items()}
        self.log(metrics)
        self._call(f"on_{stage}_end", metrics)
        return metrics

    # ------------------------------------------------------------------ before and after

    @contextlib.contextmanager
    def _stage(self, stage: str, module: Module, datamodule) -> Iterator[None]:
        self.module, self.datamodule, module.trainer = module, datamodule, self
        self.should_stop, self._eval_steps = False, {}
        try:
            datamodule.prepare_data()
            datamodule.setup(stage)
            self._call("setup", stage)
            yield
            self._call("teardown", stage)
        except BaseException as exception:
            self._call("on_exception", exception)
            self._finalize("failed")
            raise
        self._finalize("success")

    def _restore(self, ckpt_path: Path | str | None) -> dict | None:
        if ckpt_path is None:
            return None
        state = checkpoint.read_state(Path(ckpt_path))
        checkpoint.load_weights(Path(ckpt_path) / checkpoint.WEIGHTS, self.module)
        set_trainable(self.module, state["trainable"])
        self.global_step, self.current_epoch = state["global_step"], state["current_epoch"]
        self.batch_idx, self.callback_metrics = state["batch_idx"], state["callback_metrics"]
        for callback in self.callbacks:
            if callback.state_key in state["callbacks"]:
                callback.load_state_dict(state["callbacks"][callback.state_key])
        for logger, position in zip(self.loggers, state["loggers"]):
            logger.rewind(position, self.global_step)
        return state

    def _make_optimizer(self, ckpt_path: Path | str | None, state: dict | None) -> None:
        self.optimizer = self.module.configure_optimizers()
        if state is not None:
            checkpoint.load_optimizer(Path(ckpt_path), self.optimizer, self.module)
        self._build_train_step()

    def _log_hyperparams(self) -> None:
        for logger in self.loggers:
            logger.log_hyperparams({"module": self.module.hparams, "trainer": to_json(self.config)})

    def _build_train_step(self) -> None:
        """Compile for what is trainable now. Moments already there stay; new parameters get their own."""
        self.optimizer.init(self.module.trainable_parameters())
        self._modes = Modes(self.module)
        watches = self._hooks["on_before_optimizer_step"]
        on_gradients = (lambda grads: self._call("on_before_optimizer_step", grads)) if watches else None
        self._train_step = build_train_step(self.module, self.optimizer, self.config, on_gradients)

    def _eval_step(self, name: str):
        if name not in self._eval_steps:
            self._eval_steps[name] = build_eval_step(self.module, getattr(self.module, name), self.config)
        return self._eval_steps[name]

    def _call(self, hook: str, *args) -> None:
        for method in self._hooks[hook]:
            method(self, self.module, *args)

    def _finalize(self, status: str) -> None:
        for logger in self.loggers:
            logger.finalize(status)

    def _validation_due(self, is_last: bool) -> bool:
        interval = self.config.val_check_interval
        return self._done or (is_last if interval is None else self.global_step % interval == 0)

    def _step_seed(self) -> int:
        """Seed, rank and step, each with bits of its own, in the 64 that MLX makes a key of."""
        return (self.config.seed & 0xFFFFFF) << 40 | distributed.rank() << 32 | self.global_step

    @property
    def _done(self) -> bool:
        ran_out = 0 <= self.config.max_steps <= self.global_step
        return self.should_stop or ran_out or self.current_epoch >= self.config.max_epochs


@attrs.frozen
class _Loaders:
    """Loaders handed to the Trainer one by one, in the shape of a DataModule."""

    train: Iterable | None = None
    val: Iterable | None = None
    test: Iterable | None = None

    def prepare_data(self) -> None: ...

    def setup(self, stage: str) -> None: ...

    def train_dataloader(self):
        return self.train

    def val_dataloader(self):
        return self.val

    def test_dataloader(self):
        return self.test


def _epoch(loader, epoch: int, start: int) -> Iterator:
    """The batches of an epoch from number `start` on, as trees of MLX arrays.

    Our loaders go there directly; of any other iterable the first batches are skipped.
    """
    if loader is None:
        raise UserError("there is no training data: give a datamodule or train_dataloaders")
    batches = loader.epoch(epoch, start) if hasattr(loader, "epoch") else islice(iter(loader), start, None)
    return (tree_map(mx.array, batch) for batch in batches)


def _overridden_hooks(callbacks: Sequence[Callback]) -> dict[str, list]:
    """For each moment, the methods that somebody wrote for it: an empty one costs nothing."""
    keys = [callback.state_key for callback in callbacks if callback.state_dict()]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise UserError(f"two callbacks save their state as {', '.join(twice)}: give one another state_key")
    return {
        hook: [getattr(c, hook) for c in callbacks if getattr(type(c), hook) is not getattr(Callback, hook)]
        for hook in HOOKS
    }


def _make_loggers(logger, root: Path | None) -> list[Logger]:
    if logger is False or distributed.rank() > 0 or (logger is True and root is None):
        return []
    if logger is True:
        return [JSONLLogger(root), TensorBoardLogger(root)]
    return [logger] if isinstance(logger, Logger) else list(logger)
