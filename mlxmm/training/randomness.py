"""Random states of MLX, NumPy, Python and, where a program uses it, torch: set and restored together."""

import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from numbers import Integral

import mlx.core as mx
import numpy as np

from mlxmm.errors import UserError

GOLDEN = 0x9E3779B1  # 2**32 over the golden ratio: spreads the upper half of a seed over the lower


def seed_everything(seed: int, workers: bool = True) -> None:
    """Seed MLX (the key of this thread) and the global generators of NumPy, Python and torch, with up to 64 bits.

    `workers` is Lightning's, and changes nothing: the threads of loaders draw from the seed of their Trainer and epoch.
    Raises `UserError`.
    """
    if not isinstance(seed, Integral) or not 0 <= seed < 1 << 64:
        raise UserError(f"a seed is an integer from 0 to 2**64 - 1: {seed!r}")
    seed = int(seed)
    mx.random.seed(seed)
    np.random.seed(((seed >> 32) * GOLDEN ^ seed) & 0xFFFFFFFF)  # one integer seeds three times as fast as two
    random.seed(seed)
    if torch := _torch():
        torch.default_generator.manual_seed(seed)


def step_seed(seed: int, rank: int, step: int) -> int:
    """A 64-bit seed made of seed (24 bits), rank (8 bits) and step (32 bits)."""
    return (seed & 0xFFFFFF) << 40 | (rank & 0xFF) << 32 | step


@contextlib.contextmanager
def isolated_random_state() -> Iterator[None]:
    """Restore every random state at the end of the block."""
    restore = remembered_random_state()
    try:
        yield
    finally:
        restore()


def remembered_random_state(numpy: bool = True) -> Callable[[], None]:
    """A function that restores every random state as it is now; NumPy's only if asked to."""
    high, low = mx.random.state[0].tolist()
    of_numpy, python, torch = numpy and np.random.get_state(), random.getstate(), _torch()
    of_torch = torch and torch.default_generator.get_state()

    def restore() -> None:
        mx.random.seed(high << 32 | low)  # the key of seed(n) is n's two halves
        if numpy:
            np.random.set_state(of_numpy)
        random.setstate(python)
        if torch:
            torch.default_generator.set_state(of_torch)

    return restore


def _torch():
    """torch, if the program has imported it."""
    torch = sys.modules.get("torch")
    return torch if hasattr(torch, "default_generator") else None
