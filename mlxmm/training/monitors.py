"""Monitors: metrics that callbacks watch, and what to say of one that does not come."""

import itertools
from collections.abc import Collection, Iterable

from mlxmm.distributed import collectives
from mlxmm.errors import Faults, UserError
from mlxmm.training.callback import HOOKS
from mlxmm.training.unknown_names import closest


class UnknownMetric(UserError, KeyError):
    """A metric that nothing measured."""

    __str__ = ValueError.__str__  # that of KeyError shows quotes


class Metric(float):
    """A number, with the method of torch's tensors, which Lightning's metrics are."""

    def item(self) -> float:
        """The number itself."""
        return float(self)


class Metrics(dict):
    """Metrics by name. Of a stage, Lightning returns a list of such dicts, one for each loader."""

    def __getitem__(self, name):
        return Metric(super().__getitem__(name))

    def get(self, name, default=None):
        """The metric, or `default` where nothing measured it."""
        return self[name] if name in self else default

    def __missing__(self, name):
        near = meant(str(name), self)
        known = ", ".join(self) or "nothing, for want of data"
        told = f"did you mean {near}?" if near else f"this is a dict of {known}"
        raise UnknownMetric(f"metrics[{name!r}]: {told}")


def meant(name: str, known: Iterable[str]) -> str | None:
    """The metric that `name` most likely means: "val_loss" is "val/loss", and so is "loss"."""
    return closest(name.replace("_", "/", 1), known) or closest(f"val/{name}", known, 0.9)


def check_before_training(trainer, measured: Collection[str]) -> None:
    """Raise `UserError` for a monitor that is none of the metrics that validation has `measured`, where nothing else
    can log it: neither a callback, a hook of the module, nor a step in plain Python. Nothing measured proves nothing.
    """
    logged = [callback.logs for callback in trainer.callbacks]
    has_hooks = any(hasattr(type(trainer.module), hook) for hook in HOOKS)
    if not measured or None in logged or has_hooks or not trainer.compiler.enabled:
        return
    others, faults = ("train/", *itertools.chain(*logged)), Faults()
    for owner, monitor in _monitors(trainer):
        if monitor not in measured and not monitor.startswith(others):
            near = meant(monitor, measured)
            told = f"did you mean {near}?" if near else f"validation gives {', '.join(sorted(measured))}"
            faults.append(f"{owner}: nothing logs {monitor!r}; {told}")
    faults.refuse()


def validates(trainer) -> bool:
    """Whether any process has something to validate on. All of them must call this."""
    return bool(collectives.all_max(trainer.enable_validation)[0])


def without_validation(owner: str, monitor: str, validates: bool) -> str | None:
    """What is wrong with a `monitor` that is measured by a validation where there is none; None if nothing is."""
    if validates or not monitor.startswith("val/"):
        return None
    return f"{owner}: {monitor!r} comes from validation, and there is none: give validation data"


def check_monitor(trainer, owner: str, monitor: str) -> None:
    """Raise `UserError` if `monitor` is due, and nothing logs it; it tells of other callbacks' monitors too. Training
    metrics are due once any is logged."""
    fault = _fault(trainer.callback_metrics, owner, monitor)
    others = (_fault(trainer.callback_metrics, *other) for other in _monitors(trainer))
    Faults(filter(None, [fault])).refuse(also=filter(None, others))


def _monitors(trainer) -> list[tuple[str, str]]:
    """The callbacks that watch a metric, by the names of their classes, each with its metric."""
    pairs = [(type(callback).__name__, getattr(callback, "monitor", None)) for callback in trainer.callbacks]
    return [(owner, monitor) for owner, monitor in pairs if isinstance(monitor, str)]


def _fault(known: Collection[str], owner: str, monitor: str) -> str | None:
    is_early = monitor.startswith("train/") and not any(name.startswith("train/") for name in known)
    if monitor in known or is_early:
        return None
    near = meant(monitor, known)
    told = f"did you mean {near}?" if near else f"there are {', '.join(sorted(known)) or 'no metrics'}"
    return f"{owner}: nothing logs {monitor!r}; {told}"
