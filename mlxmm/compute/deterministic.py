"""Lookups in tables whose gradient has the same bits each time, on GPUs too.

N indices, V rows of a table, D features; (...) any leading dimensions.

On GPUs, MLX adds the gradients of equal indices by atomic operations, in an order that differs from run to run
(mlx/backend/metal/kernels/indexing/scatter.h, mlx/backend/cuda/device/scatter_ops.cuh). Here they are sorted together
and added in pairs, in float32, and each row of the table receives one sum. Indices that are all different need none of
this: of one logit for each position, or of positions drawn without repetition.
"""

import contextlib
from collections.abc import Callable, Iterator

import mlx.core as mx
import mlx.nn as nn

from mlxmm import environment
from mlxmm.compute.cores import custom_function
from mlxmm.compute.layer_calls import replaced_calls
from mlxmm.errors import warn

TABLES = ("weight", "lora_a", "m")  # of nn.Embedding, and of mlx-lm's LoRAEmbedding and DoRAEmbedding


def repeats_to_the_bit(device: mx.Device, deterministic: bool) -> bool:
    """Whether a run on `device`, repeated on the same machine, gives the same bits."""
    return deterministic or device.type == mx.DeviceType.cpu


@contextlib.contextmanager
def deterministic_lookups(module: nn.Module) -> Iterator[None]:
    """Within the block, the gradients of all embeddings in `module` are computed as above. Those of quantized
    embeddings do not exist. Warns where something else is not deterministic."""
    if mx.cuda.is_available() and environment.uses_cudnn_attention():
        warn("deterministic: cuDNN's attention may not be; set MLX_CUDA_USE_CUDNN_SDPA=0")
    with replaced_calls({name: part for name, part in module.named_modules() if _looks_up(part)}, _by_lookup):
        yield


def _looks_up(part: nn.Module) -> bool:
    return isinstance(part, nn.Embedding) or ("lora_a" in part and "embedding" in part)


def _by_lookup(name: str, call: Callable) -> Callable:
    def run(self, x: mx.array) -> mx.array:
        tables = {name: self[name] for name in TABLES if name in self}
        self |= {name: Table(array) for name, array in tables.items()}
        try:
            return call(self, x)
        finally:
            self |= tables

    return run


class Table:
    """An array (V, ...) that stands in for a parameter while a layer indexes it."""

    def __init__(self, array: mx.array):
        self._array = array

    def __getitem__(self, indices: mx.array) -> mx.array:
        return lookup(self._array, indices)

    def __getattr__(self, name: str):
        return getattr(self._array, name)


@custom_function
def lookup(table: mx.array, indices: mx.array) -> mx.array:
    """The rows (..., D) of `table` (V, D) at `indices` (...)."""
    return table[indices]


@lookup.vjp
def _lookup_vjp(primals, cotangent, _):
    table, indices = primals
    return add_rows(mx.zeros_like(table), indices.reshape(-1), cotangent), mx.zeros_like(indices)


def add_rows(table: mx.array, indices: mx.array, rows: mx.array) -> mx.array:
    """`table` (V, D) with each of `rows` (N, D) added to its row at `indices` (N,); in place of table.at[indices].add.

    Takes the memory of about five arrays like `rows` in float32. Within 1e-6 of MLX's sum, for sums around 1.
    """
    if not indices.size:
        return table
    flat = table.reshape(len(table), -1)
    indices, sums = sums_of_equal(indices, rows.reshape(len(indices), -1))
    return flat.at[indices].add(sums.astype(table.dtype)).reshape(table.shape)


def sums_of_equal(indices: mx.array, rows: mx.array) -> tuple[mx.array, mx.array]:
    """`indices` (N,) sorted, and for each (N, D): the sum of all `rows` of this index at its last place, zeros before.

    A scan over segments (Hillis and Steele, 1986): after k rounds each row is the sum of up to 2^k rows of its index.
    """
    order = mx.argsort(indices)
    indices, sums = indices[order], rows[order].astype(mx.float32)
    step = 1
    while step < len(indices):
        same = (indices[step:] == indices[:-step])[:, None]
        sums = mx.concatenate([sums[:step], sums[step:] + mx.where(same, sums[:-step], 0)])
        step *= 2
    is_last = mx.concatenate([indices[1:] != indices[:-1], mx.array([True])])
    return indices, mx.where(is_last[:, None], sums, 0)
