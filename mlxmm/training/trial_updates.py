"""Trial updates: real updates of a run's module, after which everything is restored."""

import contextlib
import gc
from collections.abc import Iterator
from itertools import count

import mlx.core as mx

from mlxmm.compute.compiled import snapshot
from mlxmm.distributed import collectives
from mlxmm.errors import UserError
from mlxmm.training import batches
from mlxmm.training.datamodule import is_spent_once
from mlxmm.training.randomness import isolated_random_state, seed_everything, step_seed
from mlxmm.training.train_step import TrainStep


@contextlib.contextmanager
def restored_after(trainer) -> Iterator[None]:
    """At the end of the block, restore weights, moments, schedules and random states."""
    optimizer = trainer.optimizer
    restore, schedules = snapshot([trainer.module, optimizer.state]), dict(optimizer._schedulers)
    with isolated_random_state():
        try:
            yield
        finally:
            restore()
            optimizer._schedulers = schedules
            gc.collect()  # compiled steps refer to themselves, and are large


def trial_updates(trainer, num_updates: int) -> Iterator[dict]:
    """Run updates as `trainer` would from the first epoch on, and yield the metrics of each, evaluated.

    No hook is called, nothing is counted or logged. Raises `UserError` if the data can be read only once.
    """
    module, optimizer = trainer.module, trainer.optimizer
    train_step = TrainStep(module, optimizer, trainer.config, trainer.compiler, trainer.strategy)
    groups = _groups(trainer)
    for step in range(num_updates):
        seed_everything(step_seed(trainer.config.seed, collectives.rank(), step))
        metrics = train_step(next(groups))
        mx.eval(metrics, module.state, optimizer.state)
        yield metrics


def _groups(trainer) -> Iterator[tuple]:
    """The micro-batches of each update, epoch after epoch."""
    limit = trainer.config.overfit_batches or trainer.config.limit_train_batches
    for number in count():
        loader = trainer.datamodule.train_dataloader()
        if is_spent_once(loader):
            raise UserError("the training data can be read only once, and trial updates read them: give a loader")
        epoch = batches.updates(
            batches.epoch(loader, number, 0, limit, trainer.config.seed), trainer.accumulate_grad_batches
        )
        group = None
        for group, _ in epoch:
            yield group
        if group is None:
            raise UserError("the training data gave no batch: fewer examples than one batch holds?")
