"""Random states of MLX, NumPy and Python, set and restored together."""

import contextlib
import random
from collections.abc import Iterator
from numbers import Integral

import mlx.core as mx
import numpy as np

from mlxmm.errors import UserError

GOLDEN = 0x9E3779B1  # 2**32 over the golden ratio: spreads the upper half of a seed over the lower


def seed_everything(seed: int, workers: bool = True) -> None:
    """Seed MLX (the key of this thread) and the global generators of NumPy and Python, with up to 64 bits.

    `workers` is Lightning's, and changes nothing: the threads of loaders draw from the seed of their Trainer and epoch.
    Raises `UserError`.
    """
    if not isinstance(seed, Integral) or not 0 <= seed < 1 << 64:
        raise UserError(f"a seed is an integer from 0 to 2**64 - 1: {seed!r}")
    mx.random.seed(int(seed))
    np.random.seed(((seed >> 32) * GOLDEN ^ seed) & 0xFFFFFFFF)  # one integer seeds three times as fast as two
    random.seed(seed)


def step_seed(seed: int, rank: int, step: int) -> int:
    """A 64-bit seed made of seed (24 bits), rank (8 bits) and step (32 bits)."""
    return (seed & 0xFFFFFF) << 40 | (rank & 0xFF) << 32 | step


@contextlib.contextmanager
def isolated_random_state() -> Iterator[None]:
    """Restore every random state at the end of the block."""
    high, low = mx.random.state[0].tolist()
    numpy, python = np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        mx.random.seed(high << 32 | low)  # the key of seed(n) is n's two halves
        np.random.set_state(numpy)
        random.setstate(python)
