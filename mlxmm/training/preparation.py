"""What a `fit` prepares before its first update: the layers of the module, and what loggers write of the settings."""

import contextlib
from collections.abc import Iterator

import attrs

from mlxmm.compute.cores import cores_for
from mlxmm.compute.deterministic import deterministic_lookups
from mlxmm.compute.gradient_checkpointing import recomputed_layers
from mlxmm.config import to_json
from mlxmm.distributed import collectives
from mlxmm.training.anomaly import watched_outputs


@contextlib.contextmanager
def prepared_layers(trainer) -> Iterator[None]:
    """Within the block, the layers of `trainer.module` act as the settings say; all processes begin with one's
    weights."""
    module, config = trainer.module, trainer.config
    module.update(collectives.broadcast(module.parameters()))
    with contextlib.ExitStack() as stack:
        stack.enter_context(cores_for(module))
        if config.deterministic:
            stack.enter_context(deterministic_lookups(module))
        stack.enter_context(trainer.strategy.sharded(trainer))
        if config.gradient_checkpointing:
            stack.enter_context(recomputed_layers(module))
        if config.detect_anomaly:
            stack.enter_context(watched_outputs(module))
        yield


def hparams(trainer) -> dict:
    """The settings of a run, of its data, its module and the trainer, as JSON values."""
    config = attrs.evolve(trainer.config, default_root_dir=None)  # loggers know their folder
    data = getattr(trainer.datamodule, "hparams", {})
    return {"data": data, "module": trainer.module.hparams, "trainer": to_json(config)}
