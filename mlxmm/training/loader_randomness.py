"""Random numbers of loaders: a function of (seed, epoch), whatever draws beside them.

A loader that shuffles or augments from a global generator (NumPy's, Python's, torch's, MLX's) has states of these to
itself. Generators and samplers that it holds begin each epoch at a seed of its own.
"""

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mlxmm.training.randomness import remembered_random_state, seed_everything, step_seed

HELD = ("batch_sampler", "sampler", "dataset")  # the parts of torch's DataLoader, and of those like it
MAX_COMPARED = 1_000_000  # items of a list or array that are compared in each epoch: 10 ms
END = object()
_numpy: Any = np.random  # whose types do not have `get_bit_generator`


class OwnRandomState:
    """Random states that only `with` blocks of this object draw from."""

    def __init__(self, seed: int):
        self._numpy = np.random.MT19937()  # exchanged as a whole: to copy its 2,500 bytes would take 0.1 ms
        self._resume: Callable[[], None] = lambda: seed_everything(seed)

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        outer, restore = _numpy.get_bit_generator(), remembered_random_state(numpy=False)
        _numpy.set_bit_generator(self._numpy)
        self._resume()
        try:
            yield
        finally:
            self._resume = remembered_random_state(numpy=False)
            _numpy.set_bit_generator(outer)
            restore()


def epoch_seed(seed: int, epoch: int) -> int:
    """A seed of 64 bits for the data of an epoch, the same for all processes; none of an update."""
    return step_seed(seed, 0xFF, epoch)


def isolated(begin: Callable[[], Iterator], seed: int) -> Iterator:
    """The items of `begin()`, which draws from random states of its own."""
    own = OwnRandomState(seed)
    with own():
        items = begin()
    return _items(items, own)


def _items(items: Iterator, own: OwnRandomState) -> Iterator:
    while True:
        with own():
            item = next(items, END)
        if item is END:
            return
        yield item


def begin_epoch(loader, seed: int, epoch: int) -> None:
    """Tell samplers and data sets their epoch, and seed the generators that they hold."""
    for part in _parts(loader):
        if callable(tell := getattr(part, "set_epoch", None)):
            tell(epoch)
        for generator in vars(part).values() if hasattr(part, "__dict__") else ():
            _seed(generator, epoch_seed(seed, epoch))


def _parts(loader) -> list:
    parts = [loader]
    for part in parts:
        held = [getattr(part, name, None) for name in HELD]
        parts += [one for one in held if one is not None and not any(one is known for known in parts)]
    return parts


def changes_in_place(loader) -> Callable[[], list[str]]:
    """A function that names the lists and arrays (N,) of `loader` that have another order since: what it shuffles in
    place depends on the epochs before, and a resumed run has none of these. A cache that is filled has no such order.
    """
    held = {
        f"{type(part).__name__}.{name}": value
        for part in _parts(loader)
        for name, value in (vars(part).items() if hasattr(part, "__dict__") else ())
        if (isinstance(value, list) or type(value) is np.ndarray and value.ndim == 1) and len(value) <= MAX_COMPARED
    }
    before = {name: _content(value) for name, value in held.items()}
    return lambda: [name for name, value in held.items() if _is_reordered(before[name], _content(value))]


def _content(value: list | np.ndarray) -> np.ndarray:
    """A copy of an array (N,); of Python's objects, which of them stands where."""
    is_of_objects = isinstance(value, list) or value.dtype.hasobject
    return np.fromiter(map(id, value), np.uint64, len(value)) if is_of_objects else value.copy()


def _is_reordered(before: np.ndarray, after: np.ndarray) -> bool:
    if len(before) != len(after) or before.tobytes() == after.tobytes():
        return False
    return np.sort(before).tobytes() == np.sort(after).tobytes()


def _seed(generator: Any, seed: int) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state  # type: ignore[call-arg]
    elif isinstance(generator, np.random.RandomState):
        generator.seed([seed >> 32, seed & 0xFFFFFFFF])
    elif isinstance(generator, random.Random):
        generator.seed(seed)
    elif hasattr(generator, "manual_seed"):  # torch's
        generator.manual_seed(seed)
