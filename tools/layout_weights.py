"""Random weights, written array by array: safetensors, and the zip that torch.save writes (without torch).

Nothing is larger in memory than one block of rows, however large an array is.
(Facts: the README of safetensors; torch/serialization.py and torch/_utils.py.)
"""

import json
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import numpy as np

BLOCK = 1 << 22  # numbers that are drawn at once
ITEM_SIZES = {"F32": 4, "BF16": 2, "I64": 8}
STORAGES = {"F32": "FloatStorage", "BF16": "BFloat16Storage", "I64": "LongStorage"}


@attrs.frozen
class Array:
    """An array to be drawn: `mean` + `std` times a normal number; integers count from 0."""

    shape: tuple[int, ...]
    std: float = 0.0
    mean: float = 0.0
    dtype: str = "F32"

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_SIZES[self.dtype]


def blocks(array: Array, name: str, seed: int) -> Iterator[bytes]:
    """The bytes of an array, in order: a function of (seed, name)."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    size = math.prod(array.shape)
    for start in range(0, size, BLOCK):
        yield _block(array, start, min(BLOCK, size - start), rng).tobytes()


def _block(array: Array, start: int, count: int, rng: np.random.Generator) -> np.ndarray:
    if array.dtype == "I64":
        return np.arange(start, start + count, dtype=np.int64)
    values = np.full(count, array.mean, dtype=np.float32)
    if array.std:
        values += np.float32(array.std) * rng.standard_normal(count, dtype=np.float32)
    return bfloat16(values) if array.dtype == "BF16" else values


def bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits of finite float32 numbers, rounded to the nearest bfloat16, as uint16: NumPy has no such type."""
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_safetensors(path: Path, arrays: Mapping[str, Array], seed: int) -> None:
    """The format's length of the header, the header, and the bytes of all arrays."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, array in arrays.items():
        start, end = end, end + array.num_bytes
        header[name] = {"dtype": array.dtype, "shape": array.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that numbers lie at multiples of their size
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, array in arrays.items():
            _write(file, array, name, seed)


def write_torch(path: Path, arrays: Mapping[str, Array], seed: int) -> None:
    """A state dict as torch.save writes one: a pickle of names and views, and the bytes of each storage."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", state_dict_pickle(arrays))
        for key, (name, array) in enumerate(arrays.items()):
            with archive.open(f"archive/data/{key}", "w", force_zip64=True) as file:
                _write(file, array, name, seed)
        archive.writestr("archive/version", "3\n")


def _write(file, array: Array, name: str, seed: int) -> None:
    for block in blocks(array, name, seed):
        file.write(block)


# ---- the pickle of a state dict, in protocol 2 as torch.save writes it


@attrs.frozen
class Global:
    """A name that the reader imports."""

    module: str
    name: str


@attrs.frozen
class Call:
    """What `function(*arguments)` gives when it is read."""

    function: Global
    arguments: tuple


@attrs.frozen
class Ordered:
    """An OrderedDict, with attributes of its own."""

    items: dict
    attributes: dict = {}


@attrs.frozen
class Persistent:
    """What lies outside of the pickle, by its id."""

    key: tuple


def state_dict_pickle(arrays: Mapping[str, Array]) -> bytes:
    """The program that makes an OrderedDict of tensors, with the versions of all modules as its `_metadata`."""
    modules = {"", *(name[:place] for name in arrays for place, sign in enumerate(name) if sign == ".")}
    versions = Ordered({name: {"version": 1} for name in sorted(modules)})
    tensors = {name: _tensor(array, key) for key, (name, array) in enumerate(arrays.items())}
    return b"\x80\x02" + _program(Ordered(tensors, {"_metadata": versions})) + pickle.STOP


def _tensor(array: Array, key: int) -> Call:
    """A view of the whole of storage `key`."""
    strides = tuple(math.prod(array.shape[axis + 1 :]) for axis in range(len(array.shape)))
    storage = ("storage", Global("torch", STORAGES[array.dtype]), str(key), "cpu", math.prod(array.shape))
    arguments = Persistent(storage), 0, array.shape, strides, False, Ordered({})
    return Call(Global("torch._utils", "_rebuild_tensor_v2"), arguments)


def _program(value) -> bytes:
    """The opcodes that leave `value` on the stack."""
    match value:
        case bool():
            return pickle.NEWTRUE if value else pickle.NEWFALSE
        case int():
            return pickle.BININT + struct.pack("<i", value)
        case str():
            text = value.encode()
            return pickle.BINUNICODE + struct.pack("<I", len(text)) + text
        case tuple():
            return pickle.MARK + b"".join(map(_program, value)) + pickle.TUPLE
        case dict():
            return pickle.EMPTY_DICT + _set_items(value)
        case Global(module, name):
            return pickle.GLOBAL + f"{module}\n{name}\n".encode()
        case Call(function, arguments):
            return _program(function) + _program(arguments) + pickle.REDUCE
        case Persistent(key):
            return _program(key) + pickle.BINPERSID
        case Ordered(items, attributes):
            made = _program(Call(Global("collections", "OrderedDict"), ())) + _set_items(items)
            return made + (_program(attributes) + pickle.BUILD if attributes else b"")
    raise TypeError(f"there are no opcodes here for {value!r}")


def _set_items(items: dict) -> bytes:
    pairs = b"".join(_program(part) for pair in items.items() for part in pair)
    return pickle.MARK + pairs + pickle.SETITEMS
