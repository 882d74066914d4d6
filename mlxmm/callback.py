"""Callback: code that runs at named moments of a run. One sentence a moment."""


class Callback:
    """Override the moments you want. `trainer` tells where the run is; `module` is what it fits.

    Hooks come per update, not per micro-batch, and in the order of the trainer's list. Metrics are scalar
    arrays: `float` of one waits for the device, so do that rarely.
    """

    def setup(self, trainer, module, stage) -> None:
        """Before anything else of `fit`, `validate` or `test` (the `stage`)."""

    def teardown(self, trainer, module, stage) -> None:
        """After everything else of a stage that ended well."""

    def on_fit_start(self, trainer, module) -> None:
        """Counters and weights are restored; the optimizer does not exist yet."""

    def on_fit_end(self, trainer, module) -> None:
        """The last update and its validation are behind."""

    def on_train_start(self, trainer, module) -> None:
        """The optimizer exists; the first epoch is next."""

    def on_train_end(self, trainer, module) -> None:
        """The last epoch, or as much of it as was wanted, is behind."""

    def on_train_epoch_start(self, trainer, module) -> None:
        """An epoch is entered: at its beginning, or in its middle after a resume."""

    def on_train_epoch_end(self, trainer, module) -> None:
        """The last update of an epoch, and its validation, are behind."""

    def on_train_batch_start(self, trainer, module, batches) -> None:
        """An update is next; `batches` is the tuple of its micro-batches."""

    def on_before_optimizer_step(self, trainer, module, grads) -> None:
        """Gradients are summed and divided, not yet clipped; overriding this splits the compiled step in two."""

    def on_train_batch_end(self, trainer, module, metrics) -> None:
        """An update is done and counted; `metrics` are its means."""

    def on_save_point(self, trainer, module) -> None:
        """The update, its validation and its epoch's end are behind: a checkpoint saved now misses nothing."""

    def on_validation_start(self, trainer, module) -> None:
        """The module is about to be validated."""

    def on_validation_end(self, trainer, module, metrics) -> None:
        """The means over the validation data are known and logged."""

    def on_test_start(self, trainer, module) -> None:
        """The module is about to be tested."""

    def on_test_end(self, trainer, module, metrics) -> None:
        """The means over the test data are known and logged."""

    def on_exception(self, trainer, module, exception) -> None:
        """The run ends early, by an error or by a signal; the exception is raised again afterwards."""

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
