"""RoPE of narrow heads on CUDA, where MLX (0.32) asks for blocks of threads that CUDA does not have.

Its kernel takes blocks of up to 1,024 threads over (pairs of features, positions, groups of four heads), powers of two
(`get_block_dims_common` in mlx/backend/common/utils.cpp); CUDA takes no more than 64 over the third. So a token of more
than 64 groups of heads narrower than 32 ends in "cudaGraphAddKernelNode ... invalid argument".
"""

import functools
import math

import mlx.core as mx
import mlx.nn as nn

MIN_THREADS = 16  # threads of a block over pairs and positions: 1,024 / 64


def use_rope_of_narrow_heads(model: nn.Module) -> None:
    """On CUDA, let the RoPE of `model`'s layers turn narrow heads at several positions at a time."""
    if mx.cuda.is_available() and mx.default_device() != mx.cpu:
        for name, layer in model.named_modules():
            if name.endswith("rope"):
                layer.__class__ = with_positions(type(layer))


@functools.cache
def with_positions(cls: type) -> type:
    """A subclass of a RoPE that repeats positions where a block would have fewer than `MIN_THREADS` over pairs and
    positions, and leaves these out of the results."""

    def call(self, x: mx.array, *args, **kwargs) -> mx.array:
        length, width = max(1, x.shape[-2]), getattr(self, "dims", getattr(self, "dim", x.shape[-1]))
        pairs = 1 << (width // 2).bit_length() - 1  # the power of two that the kernel takes
        copies = math.ceil(MIN_THREADS / pairs / length)
        repeated = mx.concatenate([x] * copies, axis=-2) if copies > 1 else x
        return cls.__call__(self, repeated, *args, **kwargs)[..., : x.shape[-2], :]

    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})
