"""Callback: code that runs at named moments of a run. One sentence a moment; docs/hooks.md compares with Lightning."""

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from mlxmm.errors import UserError, warn
from mlxmm.training import lightning_arguments, lightning_words, unknown_names


class Callback(metaclass=lightning_arguments.AnswersArguments):
    """Override the hooks you need. `trainer` knows the state of the run; `module` is what it fits.

    Callbacks are called in the trainer's order, then the module's own method of the same name, which gets neither
    `trainer` nor `module`. Hooks run once per update, not per micro-batch. Metrics are scalar arrays: `float` of one
    waits for the device, so call it rarely.
    """

    logs: tuple[str, ...] | None = None  # how the names of the metrics that it logs begin; None: in any way
    reads_rows = False  # such callbacks come after those that replace rows
    reads_metrics = False  # such callbacks come after those that log metrics of their own
    saves_checkpoints = False  # such callbacks come last: what they save includes what the others did
    stopping_reason: str | None = None  # of one that sets `trainer.should_stop`: the Trainer prints it at the end

    def __init__(self) -> None:
        """Takes nothing: the arguments of `object` are anything."""

    def __getattr__(self, name: str):
        """For names of Lightning's, what to write instead."""
        if name in lightning_words.CALLBACK:
            raise unknown_names.missing(type(self).__name__, name, lightning_words.CALLBACK)
        return super().__getattribute__(name)

    def setup(self, trainer, module, stage) -> None:
        """Called first in `fit`, `validate`, `test` or `predict` (the `stage`), before the optimizer exists."""

    def teardown(self, trainer, module, stage) -> None:
        """Called last in a stage that ended without an exception."""

    def on_fit_start(self, trainer, module) -> None:
        """Weights, counters and optimizer exist, and are restored if the run is resumed."""

    def on_fit_end(self, trainer, module) -> None:
        """The last update and its validation are done."""

    def on_sanity_check_start(self, trainer, module) -> None:
        """A few validation batches are about to run as a check. No other hook is called for them."""

    def on_sanity_check_end(self, trainer, module) -> None:
        """The check passed. Nothing was logged, and random states are unchanged."""

    def on_train_start(self, trainer, module) -> None:
        """The first epoch is about to begin."""

    def on_train_end(self, trainer, module) -> None:
        """Training is over; the last epoch may be incomplete."""

    def on_train_epoch_start(self, trainer, module) -> None:
        """An epoch begins, or continues in its middle after a resume."""

    def on_train_epoch_end(self, trainer, module) -> None:
        """The last update of an epoch, and its validation, are done."""

    def on_train_batch_start(self, trainer, module, batches) -> int | None:
        """An update is about to run on the micro-batches `batches`. Return -1 to skip the rest of the epoch."""

    def on_before_optimizer_step(self, trainer, module, grads) -> None:
        """Gradients are averaged, not yet clipped. Overriding this splits the compiled update in two."""

    def on_train_batch_end(self, trainer, module, metrics, batches) -> None:
        """An update is done and counted; `metrics` are its means, as scalar arrays."""

    def on_save_point(self, trainer, module) -> None:
        """The update, its validation and the end of its epoch are done: a checkpoint saved now resumes exactly here."""

    def on_validation_start(self, trainer, module) -> None:
        """Validation is about to begin; the module is in evaluation mode."""

    def on_validation_epoch_start(self, trainer, module) -> None:
        """Right after `on_validation_start`."""

    def on_validation_batch_start(self, trainer, module, batch, batch_idx) -> None:
        """A validation batch is about to be evaluated."""

    def on_validation_batch_end(self, trainer, module, batch, batch_idx) -> None:
        """A validation batch is evaluated."""

    def on_validation_epoch_end(self, trainer, module) -> None:
        """The last validation batch is done; the means are logged next."""

    def on_validation_end(self, trainer, module, metrics) -> None:
        """The means over the validation data are logged; the module is still in evaluation mode."""

    def on_test_start(self, trainer, module) -> None:
        """Testing is about to begin; the module is in evaluation mode."""

    def on_test_epoch_start(self, trainer, module) -> None:
        """Right after `on_test_start`."""

    def on_test_batch_start(self, trainer, module, batch, batch_idx) -> None:
        """A test batch is about to be evaluated."""

    def on_test_batch_end(self, trainer, module, batch, batch_idx) -> None:
        """A test batch is evaluated."""

    def on_test_epoch_end(self, trainer, module) -> None:
        """The last test batch is done; the means are logged next."""

    def on_test_end(self, trainer, module, metrics) -> None:
        """The means over the test data are logged."""

    def on_predict_start(self, trainer, module) -> None:
        """Prediction is about to begin; the module is in evaluation mode."""

    def on_predict_epoch_start(self, trainer, module) -> None:
        """Right after `on_predict_start`."""

    def on_predict_batch_start(self, trainer, module, batch, batch_idx) -> None:
        """A batch is about to be predicted."""

    def on_predict_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        """`outputs` is what `predict_step` returned, evaluated."""

    def on_predict_epoch_end(self, trainer, module) -> None:
        """The last batch is predicted."""

    def on_predict_end(self, trainer, module) -> None:
        """Right after `on_predict_epoch_end`."""

    def on_exception(self, trainer, module, exception) -> None:
        """The stage ends early, by an error or a signal; the exception is raised again afterwards."""

    def on_save_checkpoint(self, trainer, module, checkpoint) -> None:
        """Add to what is saved, or change it: a flat dict of arrays for each file, and JSON values as "state"."""

    def on_load_checkpoint(self, trainer, module, checkpoint) -> None:
        """The module is about to be restored from `checkpoint`, which is as `on_save_checkpoint` left it."""

    def state_dict(self) -> dict:
        """The state to keep across a resume, as JSON values."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned."""

    @property
    def state_key(self) -> str:
        """The name under which the state is saved; two callbacks of one class need different ones."""
        return type(self).__qualname__


HOOKS = [name for name in vars(Callback) if name.startswith(("on_", "setup", "teardown"))]


def arrange_callbacks(callbacks: Sequence[Callback], of_module: Sequence[Callback] = ()) -> list[Callback]:
    """The order in which a run's callbacks are called: as given, but those that save checkpoints last.

    Callbacks of the module (`configure_callbacks`) replace those of the same class or of a base class of theirs.
    Raises `UserError` if two would save their state under one name.
    """
    kept = [callback for callback in callbacks if not any(isinstance(new, type(callback)) for new in of_module)]
    place = lambda callback: (callback.saves_checkpoints, callback.reads_metrics, callback.reads_rows)
    arranged = sorted([*kept, *of_module], key=place)
    keys = [callback.state_key for callback in arranged if overrides(callback, "state_dict")]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        advice = "give one another state_key, or of a ModelCheckpoint another dirpath"
        raise UserError(f"two callbacks save their state as {', '.join(twice)}: {advice}")
    return arranged


def hook_table(callbacks: Sequence[Callback], trainer, module) -> dict[str, list[Callable]]:
    """For each hook, the methods that override it: hooks that nobody overrides cost nothing."""
    calls = {hook: [] for hook in HOOKS}
    for hook, methods in calls.items():
        methods += [partial(getattr(c, hook), trainer, module) for c in callbacks if overrides(c, hook)]
        if own := getattr(module, hook, None):
            methods.append(own)
    return calls


def note_first_state(callbacks: Iterable[Callback]) -> None:
    """Keep the state of callbacks that have not been in a Trainer before."""
    for callback in callbacks:
        if overrides(callback, "state_dict") and "_first_state" not in vars(callback):
            vars(callback).update(_first_state=copy.deepcopy(callback.state_dict()), _has_run=False)


def restart_callbacks(callbacks: Iterable[Callback]) -> None:
    """Give callbacks of an earlier run the state that they had before it: those of the last fold begin anew."""
    note_first_state(callbacks)  # those of the module
    for callback in callbacks:
        if vars(callback).get("_has_run"):
            callback.load_state_dict(copy.deepcopy(vars(callback)["_first_state"]))
        vars(callback)["_has_run"] = "_first_state" in vars(callback)


def give_each_its_turn(methods: Iterable[Callable], *args) -> None:
    """Call all `methods`, whatever one raises: that becomes a warning, as an exception is on its way already."""
    for method in methods:
        try:
            method(*args)
        except (Exception, SystemExit) as error:  # noqa: BLE001
            name = getattr(getattr(method, "func", method), "__qualname__", method)
            warn(f"{name} failed: {type(error).__name__}: {error}")


def overrides(callback: Callback, name: str) -> bool:
    """Whether `callback` has its own method of this name, from its class or set on it alone."""
    return getattr(getattr(callback, name), "__func__", None) is not getattr(Callback, name)
