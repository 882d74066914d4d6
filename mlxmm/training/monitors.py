"""Monitors: metrics that callbacks watch, and what to say of one that does not come."""

from mlxmm.errors import UserError
from mlxmm.training.lightning_words import closest


def without_validation(owner: str, monitor: str, validates: bool) -> str | None:
    """What is wrong with a `monitor` that is measured by a validation where there is none; None if nothing is."""
    if validates or not monitor.startswith("val/"):
        return None
    return f"{owner}: {monitor!r} comes from validation, and there is none: give validation data"


def check_monitor(trainer, owner: str, monitor: str) -> None:
    """Raise `UserError` if `monitor` is due, and nothing logs it. Training metrics are due once any is logged."""
    known = trainer.callback_metrics
    is_early = monitor.startswith("train/") and not any(name.startswith("train/") for name in known)
    if monitor not in known and not is_early:
        near = closest(monitor.replace("_", "/", 1), known)
        meant = f"did you mean {near}?" if near else f"there are {', '.join(sorted(known)) or 'no metrics'}"
        raise UserError(f"{owner}: nothing logs {monitor!r}; {meant}")
