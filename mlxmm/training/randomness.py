"""Random keys: of MLX, NumPy and Python, together."""

import contextlib
import random
from collections.abc import Iterator

import mlx.core as mx
import numpy as np

GOLDEN = 0x9E3779B1  # 2**32 over the golden ratio: spreads the upper half of a seed over the lower


def seed_everything(seed: int) -> None:
    """Seed MLX (this thread's key), NumPy's global generator and Python's with up to 64 bits."""
    mx.random.seed(seed)
    np.random.seed(((seed >> 32) * GOLDEN ^ seed) & 0xFFFFFFFF)  # of one integer it is three times as fast
    random.seed(seed)


def step_seed(seed: int, rank: int, step: int) -> int:
    """Seed, rank and step, each with bits of its own, in the 64 that MLX makes a key of."""
    return (seed & 0xFFFFFF) << 40 | (rank & 0xFF) << 32 | step


@contextlib.contextmanager
def isolated_random_state() -> Iterator[None]:
    """Put every random state back, at the end of the block, to what it was at its beginning."""
    high, low = mx.random.state[0].tolist()
    numpy, python = np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        mx.random.seed(high << 32 | low)  # the key of seed(n) is n's two halves
        np.random.set_state(numpy)
        random.setstate(python)
