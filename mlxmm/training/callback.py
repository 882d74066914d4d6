"""Callback: code that runs at named moments of a run. One sentence a moment; docs/hooks.md compares with Lightning."""

from collections.abc import Callable, Sequence
from functools import partial

from mlxmm.errors import UserError


class Callback:
    """Override the moments you want. `trainer` tells where the run is; `module` is what it fits.

    Callbacks are called in the trainer's order, then the module's own method of the same name, which gets neither
    `trainer` nor `module`. Hooks come per update, not per micro-batch. Metrics are scalar arrays: `float` of one
    waits for the device, so do that rarely.
    """

    reads_rows = False  # such callbacks come after those that replace rows
    saves_checkpoints = False  # such callbacks come last: what they save includes what the others did

    def setup(self, trainer, module, stage) -> None:
        """Before anything else of `fit`, `validate`, `test` or `predict` (the `stage`)."""

    def teardown(self, trainer, module, stage) -> None:
        """After everything else of a stage that ended well."""

    def on_fit_start(self, trainer, module) -> None:
        """Weights, counters and optimizer are there, restored if the run is resumed."""

    def on_fit_end(self, trainer, module) -> None:
        """The last update and its validation are behind."""

    def on_sanity_check_start(self, trainer, module) -> None:
        """A few validation batches are about to be tried. No other hook hears of them."""

    def on_sanity_check_end(self, trainer, module) -> None:
        """They went well; nothing was logged, and no random state was touched."""

    def on_train_start(self, trainer, module) -> None:
        """The first epoch is next."""

    def on_train_end(self, trainer, module) -> None:
        """The last epoch, or as much of it as was wanted, is behind."""

    def on_train_epoch_start(self, trainer, module) -> None:
        """An epoch is entered: at its beginning, or in its middle after a resume."""

    def on_train_epoch_end(self, trainer, module) -> None:
        """The last update of an epoch, and its validation, are behind."""

    def on_train_batch_start(self, trainer, module, batches) -> int | None:
        """An update is next; `batches` is the tuple of its micro-batches. Return -1 to skip the rest of the epoch."""

    def on_before_optimizer_step(self, trainer, module, grads) -> None:
        """Gradients are summed and divided, not yet clipped; overriding this splits the compiled step in two."""

    def on_train_batch_end(self, trainer, module, metrics, batches) -> None:
        """An update is done and counted; `metrics` are its means."""

    def on_save_point(self, trainer, module) -> None:
        """The update, its validation and its epoch's end are behind: a checkpoint saved now misses nothing."""

    def on_validation_start(self, trainer, module) -> None:
        """The module is about to be validated, and is in evaluation mode."""

    def on_validation_epoch_start(self, trainer, module) -> None:
        """Right after `on_validation_start`."""

    def on_validation_batch_start(self, trainer, module, batch, batch_idx) -> None:
        """A validation batch is next."""

    def on_validation_batch_end(self, trainer, module, batch, batch_idx) -> None:
        """A validation batch is counted."""

    def on_validation_epoch_end(self, trainer, module) -> None:
        """The last validation batch is behind; its means are logged next."""

    def on_validation_end(self, trainer, module, metrics) -> None:
        """The means over the validation data are known, and logged; the module is still in evaluation mode."""

    def on_test_start(self, trainer, module) -> None:
        """The module is about to be tested, and is in evaluation mode."""

    def on_test_epoch_start(self, trainer, module) -> None:
        """Right after `on_test_start`."""

    def on_test_batch_start(self, trainer, module, batch, batch_idx) -> None:
        """A test batch is next."""

    def on_test_batch_end(self, trainer, module, batch, batch_idx) -> None:
        """A test batch is counted."""

    def on_test_epoch_end(self, trainer, module) -> None:
        """The last test batch is behind; its means are logged next."""

    def on_test_end(self, trainer, module, metrics) -> None:
        """The means over the test data are known, and logged."""

    def on_predict_start(self, trainer, module) -> None:
        """Predictions are about to be made, in evaluation mode."""

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
        """The run ends early, by an error or by a signal; the exception is raised again afterwards."""

    def on_save_checkpoint(self, trainer, module, checkpoint) -> None:
        """Add to what is saved, or change it: a flat dict of arrays for each file, and JSON values as "state"."""

    def on_load_checkpoint(self, trainer, module, checkpoint) -> None:
        """The module is about to be restored from `checkpoint`, which is as `on_save_checkpoint` left it."""

    def state_dict(self) -> dict:
        """What to remember across a resume, as JSON values."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Take back what `state_dict` gave."""

    @property
    def state_key(self) -> str:
        """Under what name the state is saved; two callbacks of one class need two names."""
        return type(self).__qualname__


HOOKS = [name for name in vars(Callback) if name.startswith(("on_", "setup", "teardown"))]


def arrange_callbacks(callbacks: Sequence[Callback], of_module: Sequence[Callback] = ()) -> list[Callback]:
    """The order of a run's callbacks: as given, those that save checkpoints last.

    What a module's `configure_callbacks` gives (`of_module`) replaces callbacks of the same class, or of one that it
    derives from. Raises `UserError` where two would save their state under one name.
    """
    kept = [callback for callback in callbacks if not any(isinstance(new, type(callback)) for new in of_module)]
    arranged = sorted([*kept, *of_module], key=lambda callback: (callback.saves_checkpoints, callback.reads_rows))
    keys = [callback.state_key for callback in arranged if _overrides(callback, "state_dict")]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise UserError(f"two callbacks save their state as {', '.join(twice)}: give one another state_key")
    return arranged


def hook_table(callbacks: Sequence[Callback], trainer, module) -> dict[str, list[Callable]]:
    """For each moment, the methods that somebody wrote for it: an empty one costs nothing."""
    calls = {hook: [] for hook in HOOKS}
    for hook, methods in calls.items():
        methods += [partial(getattr(c, hook), trainer, module) for c in callbacks if _overrides(c, hook)]
        if own := getattr(module, hook, None):
            methods.append(own)
    return calls


def _overrides(callback: Callback, name: str) -> bool:
    return getattr(getattr(callback, name), "__func__", None) is not getattr(Callback, name)
