"""fast_dev_run: where a recipe trains a small model first, that is tried as briefly as what is trained on it."""

import attrs

from mlxmm import TrainerConfig


def tried_too(trainer: TrainerConfig, outer: TrainerConfig) -> TrainerConfig:
    """The settings of the first training: with the `fast_dev_run` of the outer one."""
    return attrs.evolve(trainer, fast_dev_run=outer.fast_dev_run) if outer.fast_dev_run else trainer
