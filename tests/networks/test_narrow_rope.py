import math

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxmm.networks.narrow_rope import MIN_THREADS, with_positions


@pytest.mark.parametrize("width", [2, 4, 6, 16, 24, 32])
@pytest.mark.parametrize("length", [1, 2, 3, 20])
@pytest.mark.parametrize("offset", [0, 7])
def test_narrow_heads_are_turned_as_mlx_turns_them_and_in_blocks_that_cuda_has(width, length, offset):
    seen = []

    class Watched(nn.RoPE):
        def __call__(self, x, offset=0):
            seen.append(x.shape[-2])
            return super().__call__(x, offset=offset)

    x = mx.random.normal((3, 2, length, width), key=mx.random.key(0))
    plain, wide = nn.RoPE(width), with_positions(Watched)(width)
    assert mx.array_equal(wide(x, offset=offset), plain(x, offset=offset))
    lower = lambda count: 2 ** int(math.log2(count))  # the power of two that MLX takes
    assert lower(width // 2) * lower(seen[0]) >= MIN_THREADS


@pytest.mark.parametrize("length", [0, 1])
def test_of_a_head_that_is_turned_in_part_the_part_counts(length):
    x = mx.random.normal((1, 2, length, 64), key=mx.random.key(0))
    assert mx.array_equal(with_positions(nn.RoPE)(4)(x), nn.RoPE(4)(x))
