"""Limits of a run that hold too for a small model that a recipe trains first: `fast_dev_run` and `max_time`."""

import attrs

from mlxmm import TrainerConfig


def tried_too(trainer: TrainerConfig, outer: TrainerConfig) -> TrainerConfig:
    """The settings of the first training: with the limits of the outer one, each training for itself."""
    limits = {name: value for name in ("fast_dev_run", "max_time") if (value := getattr(outer, name))}
    return attrs.evolve(trainer, **limits)
