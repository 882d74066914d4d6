"""Strategies: what each process holds of a module, and how gradients meet.

`Replicated` (auto, ddp): every process holds all of it. `FullySharded` (fsdp; ZeRO stage 3, arXiv 1910.02054): of each
repeated layer, rank r holds the r-th block of rows of every parameter.

MLX's `fully_shard` gathers the parameters of a layer when it is called, and scatters its gradients. It acts behind
the layer's call here, not in the layer's place, so that parameters keep their names.
"""

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial

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


class Replicated:
    """Every process holds the whole module, and trains it on its share of the data."""

    def sharded(self, trainer) -> contextlib.AbstractContextManager:
        """Within the block, what is sharded of the trainer's module and optimizer is."""
        return contextlib.nullcontext()

    def check_optimizer(self, optimizer: optim.Optimizer) -> None:
        """Raise `UserError` for an optimizer that cannot update what this process holds."""

    def check_micro_batches(self, count: int) -> None:
        """Raise `UserError` where processes bring different numbers of micro-batches to an update."""

    def all_sum(self, trees: list) -> list:
        """Add [sums, gradients] across processes."""
        return collectives.all_sum(trees)

    def sum_over_parameters(self, numbers: dict[str, mx.array]) -> mx.array:
        """The sum of one number of each parameter of the whole module."""
        return sum(numbers.values(), mx.array(0.0))

    def gather(self, contents: dict[str, dict]) -> dict[str, dict]:
        """The contents of a checkpoint with whole arrays. A collective call where something is sharded."""
        return contents

    def own(self, contents: dict[str, dict]) -> dict[str, dict]:
        """The part of a checkpoint's contents that this process holds."""
        return contents

    def lockstep(self, batches: Iterable) -> Iterator[tuple]:
        """(batch, whether it counts) for evaluation: processes that gather layers make equally many calls."""
        return ((batch, True) for batch in batches)

    def check_interrupted(self) -> None:
        """Raise `UserError` where a checkpoint cannot be saved after an exception."""


REPLICATED = Replicated()


class FullySharded(Replicated):
    """The repeated layers of a module, and their moments, are sharded while `fit` runs; all else is replicated."""

    def __init__(self):
        self.names: frozenset[str] = frozenset()  # dotted names of the sharded parameters

    @contextlib.contextmanager
    def sharded(self, trainer) -> Iterator[None]:
        """Raises `UserError` if there is nothing to shard. After an exception shards stay shards, except for
        `Interrupted`, which all processes raise at the same update."""
        layers = shardable_layers(trainer.module)
        if not layers:
            kind = type(trainer.module).__name__
            raise UserError(f"strategy fsdp: {kind} has no entry of a list `layers` to shard: use ddp")
        behind = {name: fully_shard(layer) for name, layer in layers.items()}
        mx.eval(trainer.module.parameters())
        self.names = frozenset(f"{name}.{key}" for name in layers for key, _ in _parameters(layers[name]))

        def wrap(name, call):
            # Not `behind[name](...)`, which would come back here.
            return lambda layer, *args, **kwargs: behind[name]._gathered_call(partial(call, layer), *args, **kwargs)

        try:
            with replaced_calls(layers, wrap):
                yield
        except Interrupted:
            self._unshard(trainer)
            raise
        self._unshard(trainer)

    def _unshard(self, trainer) -> None:
        trees = {"module": trainer.module.parameters(), "optimizer": trainer.optimizer.state}
        whole = self.gather({name: dict(tree_flatten(tree)) for name, tree in trees.items()})
        trainer.module.update(tree_unflatten(list(whole["module"].items())))
        checkpoint.load_optimizer(whole["optimizer"], trainer.optimizer, trainer.module)
        self.names = frozenset()

    def check_optimizer(self, optimizer):
        for one in getattr(optimizer, "optimizers", [optimizer]):
            if isinstance(one, optim.Adafactor | optim.Muon):  # whose update of a row depends on the others
                raise UserError(f"strategy fsdp: {type(one).__name__} needs whole matrices: use AdamW, or strategy ddp")

    def check_micro_batches(self, count):
        if collectives.all_max(count, -count) != [count, -count]:
            raise UserError("strategy fsdp: processes have more and fewer batches for one update: make shards equal")

    def all_sum(self, trees):
        """The backward pass has made means of the gradients of shards: they are only multiplied by world_size."""
        is_shard = lambda path: path.partition(".")[2] in self.names
        others = collectives.all_sum([array for path, array in tree_flatten(trees) if not is_shard(path)])
        rest, size = iter(others), collectives.world_size()
        return tree_map_with_path(lambda path, array: array * size if is_shard(path) else next(rest), trees)

    def sum_over_parameters(self, numbers):
        own = sum((number for name, number in numbers.items() if name in self.names), mx.array(0.0))
        others = sum((number for name, number in numbers.items() if name not in self.names), mx.array(0.0))
        return others + collectives.all_sum(own)

    def gather(self, contents):
        collectives.enter_collective()
        contents = self._changed(contents, collectives.all_gather)
        mx.eval(contents)  # by all processes at this point, not when one of them needs it
        return contents

    def own(self, contents):
        rows = lambda array: mx.split(array, collectives.world_size())[collectives.rank()]
        return self._changed(contents, lambda array: mx.contiguous(rows(array)))  # a view would keep all of it

    def _changed(self, contents: dict[str, dict], change: Callable) -> dict[str, dict]:
        def changed(arrays: dict) -> dict:
            return {name: change(x) if self._is_sharded(name) and x.ndim else x for name, x in arrays.items()}

        return {file: held if file == "state" else changed(held) for file, held in contents.items()}

    def _is_sharded(self, name: str) -> bool:
        """Whether this is a sharded parameter or a moment of one: "layers.0.weight.m", "states.1.layers.0.weight.m"."""
        name = re.sub(r"^states\.\d+\.", "", name)
        return name in self.names or name.rpartition(".")[0] in self.names

    def lockstep(self, batches):
        return collectives.lockstep(batches)

    def check_interrupted(self):
        if self.names:
            raise UserError("strategy fsdp: the shards of the other processes cannot be gathered after an exception")


def make_strategy(name: str) -> Replicated:
    """The strategy of a `TrainerConfig`. Raises `UserError` where processes cannot work together by it."""
    collectives.check_strategy(name)
    return FullySharded() if name == "fsdp" else REPLICATED


def shardable_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The repeated layers that can be divided by rows; of layers within layers the outer ones. All else is replicated.

    A layer cannot be sharded if it has a scalar parameter, parameters of two dtypes or of integers, parameters that
    its own call changes (`BatchNorm`), or a part that is in the module twice.
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
