"""Values of Python in JSON, and back: what JSON has not, NaN and keys that are no text, is an object of one key."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxmm.errors import UserError
from mlxmm.storage.disk import read_text

FLOAT, ITEMS = "__float__", "__items__"  # {"__float__": "nan"}, {"__items__": [[0, "a"]]}


def loads(text: str | bytes, **options):
    """The value of a JSON text. Raises `ValueError`, also for one that is nested too deeply."""
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read(path: Path):
    """The value in a JSON file. Raises `OSError` and `ValueError`."""
    return loads(read_text(path))


def dumps(value, **options) -> str:
    """`value` as JSON that every reader takes: NaN and infinities become null."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(json.loads(json.dumps(value), parse_constant=lambda name: None), **options)


def encode(value, *path: str):
    """`value` of JSON values alone, in new containers; `decode` gives it back, tuples as lists.

    Scalars of NumPy and MLX become Python's. Raises `UserError` that says what, at which `path`, cannot be held.
    """
    if isinstance(value, np.generic) or (isinstance(value, mx.array | np.ndarray) and value.ndim == 0):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {FLOAT: str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [encode(one, *path, str(place)) for place, one in enumerate(value)]
    if isinstance(value, Mapping):
        return _encode_items(value, path)
    advice = "arrays are added in on_save_checkpoint" if hasattr(value, "shape") else "give JSON values"
    raise UserError(f"a checkpoint cannot hold {' > '.join(path)}, a {type(value).__name__}: {advice}")


def _encode_items(items: Mapping, path: tuple[str, ...]) -> dict:
    if unknown := [key for key in items if not isinstance(key, str | int | float | np.generic | None)]:
        raise UserError(f"a checkpoint cannot hold {' > '.join(path)}: its key {unknown[0]!r} is no text or number")
    encoded = [(encode(key), encode(value, *path, str(key))) for key, value in items.items()]
    return dict(encoded) if all(isinstance(key, str) for key in items) else {ITEMS: [list(pair) for pair in encoded]}


def decode(value: dict):
    """One object of what `encode` gave: the `object_hook` of `json.loads`."""
    if len(value) == 1 and FLOAT in value:
        return float(value[FLOAT])
    return dict(map(tuple, value[ITEMS])) if len(value) == 1 and ITEMS in value else value
