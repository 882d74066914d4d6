"""Fully sharded layers (ZeRO's third stage, arXiv 1910.02054): of a repeated layer, each process holds its rows alone.

MLX's `fully_shard` gathers the parameters of a layer when it is called, and scatters its gradients. It acts behind
the layer's call here, not in the layer's place, so that parameters keep their names.
"""

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

import attrs
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.nn.layers.distributed import fully_shard
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

from mlxmm.compute.layer_calls import repeated_layers, replaced_calls
from mlxmm.distributed import collectives
from mlxmm.distributed.signals import Interrupted
from mlxmm.errors import UserError
from mlxmm.storage import checkpoint


@attrs.frozen
class Shards:
    """The parameters, by their dotted `names`, that are shards: each process has its rows of them, in rank order."""

    names: frozenset[str] = frozenset()

    def all_sum(self, trees: list) -> list:
        """Add [sums, gradients] across processes; the backward pass has made means of the gradients of shards."""
        is_shard = lambda path: path.partition(".")[2] in self.names
        others = collectives.all_sum([array for path, array in tree_flatten(trees) if not is_shard(path)])
        rest, size = iter(others), collectives.world_size()
        return tree_map_with_path(lambda path, array: array * size if is_shard(path) else next(rest), trees)

    def total(self, numbers: dict[str, mx.array]) -> mx.array:
        """The sum of one number of each parameter, with those that other processes have of their shards."""
        own = sum((number for name, number in numbers.items() if name in self.names), mx.array(0.0))
        others = sum((number for name, number in numbers.items() if name not in self.names), mx.array(0.0))
        return others + collectives.all_sum(own) if self.names else others

    def check_group(self, group: tuple) -> None:
        """Raise `UserError` where processes have more and fewer micro-batches for an update: they gather in step."""
        if self.names and collectives.all_max(len(group), -len(group)) != [len(group), -len(group)]:
            raise UserError("strategy fsdp: processes have more and fewer batches for one update: make shards equal")

    def whole(self, contents: dict[str, dict]) -> dict[str, dict]:
        """The contents of a checkpoint with whole arrays for shards. A meeting point, where there are any."""
        if not self.names:
            return contents
        collectives.enter_collective()
        contents = self._changed(contents, collectives.all_gather)
        mx.eval(contents)  # what writes them may be another thread, of one process
        return contents

    def own(self, contents: dict[str, dict]) -> dict[str, dict]:
        """What this process has of the contents of a checkpoint."""
        rows = lambda array: mx.split(array, collectives.world_size())[collectives.rank()]
        return self._changed(contents, lambda array: mx.contiguous(rows(array)))  # a view would keep all of it

    def _changed(self, contents: dict[str, dict], change: Callable) -> dict[str, dict]:
        def changed(arrays: dict) -> dict:
            return {name: change(x) if self._is_part(name) and x.ndim else x for name, x in arrays.items()}

        return {file: held if file == "state" else changed(held) for file, held in contents.items()}

    def _is_part(self, name: str) -> bool:
        """Whether this is a shard, or a moment of one: "layers.0.weight.m", "states.1.layers.0.weight.m"."""
        name = re.sub(r"^states\.\d+\.", "", name)
        return name in self.names or name.rpartition(".")[0] in self.names

    def check_optimizer(self, optimizer: optim.Optimizer) -> None:
        """Raise `UserError` for an optimizer whose update of a row depends on the others."""
        for one in getattr(optimizer, "optimizers", [optimizer]):
            if self.names and isinstance(one, optim.Adafactor | optim.Muon):
                raise UserError(f"strategy fsdp: {type(one).__name__} needs whole matrices: use AdamW, or strategy ddp")


@contextlib.contextmanager
def sharded_layers(trainer) -> Iterator[None]:
    """Until the end of the block, the repeated layers of the trainer's module, and their moments, are shards.

    Raises `UserError` if there is none to shard, and for callbacks that need whole layers. After an exception other
    than `Interrupted`, which all processes have at once, shards stay shards.
    """
    module = trainer.module
    layers = shardable_layers(module)
    if not layers:
        raise UserError(f"strategy fsdp: {type(module).__name__} has no entry of a list `layers` to shard: use ddp")
    if unfit := [type(callback).__name__ for callback in trainer.callbacks if callback.needs_whole_layers]:
        raise UserError(f"strategy fsdp: {', '.join(unfit)} needs whole layers: leave it out, or use ddp")
    behind = {name: fully_shard(layer) for name, layer in layers.items()}
    mx.eval(module.parameters())
    trainer.shards = Shards(frozenset(f"{name}.{key}" for name in layers for key, _ in _parameters(layers[name])))

    def wrap(name, call):
        # Not `behind[name](...)`, which would come back here.
        return lambda self, *args, **kwargs: behind[name]._gathered_call(partial(call, self), *args, **kwargs)

    try:
        with replaced_calls(layers, wrap):
            yield
    except Interrupted:
        _put_together(trainer)
        raise
    _put_together(trainer)


def _put_together(trainer) -> None:
    trees = {"module": trainer.module.parameters(), "optimizer": trainer.optimizer.state}
    whole = trainer.shards.whole({name: dict(tree_flatten(tree)) for name, tree in trees.items()})
    trainer.module.update(tree_unflatten(list(whole["module"].items())))
    checkpoint.load_optimizer(whole["optimizer"], trainer.optimizer, trainer.module)
    trainer.shards = Shards()


def shardable_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The repeated layers, but those within others, that can be divided by rows. All else is replicated.

    Not those with a scalar, with parameters of two types or none that is a float, with one that the layer's own call
    changes (`BatchNorm`), or with a part that is in the module twice.
    """
    layers, counts = repeated_layers(module), Counter(map(id, module.modules()))
    outermost = [name for name in layers if not any(name.startswith(f"{other}.") for other in layers)]
    return {name: layers[name] for name in outermost if _can_shard(layers[name], counts)}


def _can_shard(layer: nn.Module, counts: Counter) -> bool:
    arrays = [array for _, array in _parameters(layer)]
    return (
        len({array.dtype for array in arrays}) == 1
        and mx.issubdtype(arrays[0].dtype, mx.floating)
        and all(array.ndim and len(array) % collectives.world_size() == 0 for array in arrays)
        and all(counts[id(part)] == 1 and not isinstance(part, nn.BatchNorm) for part in layer.modules())
    )


def _parameters(layer: nn.Module) -> list[tuple[str, mx.array]]:
    return tree_flatten(layer.parameters())
