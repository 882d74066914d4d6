"""Several processes that train one module. A lone process is a group of one, so nobody else asks."""

import functools

import mlx.core as mx
from mlx.utils import tree_map


@functools.cache
def _group() -> mx.distributed.Group:
    return mx.distributed.init()


def rank() -> int:
    """This process's number, from 0."""
    return _group().rank()


def world_size() -> int:
    """How many processes train together."""
    return _group().size()


def all_sum(tree):
    """Add every array of `tree` across processes."""
    if world_size() == 1:
        return tree
    return tree_map(mx.distributed.all_sum, tree)


def all_gather(array: mx.array) -> mx.array:
    """Concatenate (B, ...) arrays of all processes, in rank order, to (world_size * B, ...).

    The gradient is what the losses of all processes ask of this one's part (MLX's own: what this one's asks).
    """
    if world_size() == 1:
        return array
    gather = mx.custom_function(mx.distributed.all_gather)
    own = slice(rank() * len(array), (rank() + 1) * len(array))
    gather.vjp(lambda primal, cotangent, _: mx.distributed.all_sum(cotangent)[own])  # a ring has no sum_scatter
    return gather(array)
