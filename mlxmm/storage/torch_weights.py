"""PyTorch's weight files (`pytorch_model.bin`), read without torch and without running what a pickle may hold.

Since PyTorch 1.6 such a file is a zip: `data.pkl` says which tensors there are, `data/<key>` holds the bytes of one
storage. Older ones are pickles in a row, the storages behind them. (Facts: torch/serialization.py, torch/_utils.py.)

A pickle is a program: it may import any function and call it. This reader's imports are a table of a few names, and
each stands for a harmless function of this file. A file that asks for anything else is refused.
"""

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import attrs
import mlx.core as mx
import numpy as np

from mlxmm.errors import UserError

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
DTYPES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": np.uint16,  # NumPy has no bfloat16: its bits travel as integers
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


class _Refused(Exception):
    """The file is not a table of tensors; the message says why."""


@attrs.frozen
class _Storage:
    """A one-dimensional array in the file, by its key; `kind` is PyTorch's name of its type."""

    kind: str
    key: str


@attrs.frozen
class _Tensor:
    """A strided view of a storage. Offset and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_torch_weights(path: Path) -> dict[str, mx.array]:
    """The tensors of a state dict, by name. Doubles become float32, which is the widest that a GPU has in MLX.

    Raises `UserError` where the file is missing, damaged, or holds anything but tensors.
    """
    try:
        with path.open("rb") as file:
            read = _read_zip if zipfile.is_zipfile(file) else _read_legacy
            file.seek(0)
            return read(file)
    except _Refused as reason:
        raise UserError(f"{path} cannot be read: {reason}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # a damaged pickle fails in a dozen ways
        raise UserError(f"{path} is damaged, or no file of PyTorch weights: {type(error).__name__}: {error}") from None


def _read_zip(file: BinaryIO) -> dict[str, mx.array]:
    with zipfile.ZipFile(file) as archive:
        root = next((name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")), None)
        if root is None:
            raise _Refused("it is a zip, but has no data.pkl: a TorchScript model, or not PyTorch's")
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise _Refused("its members are compressed, which PyTorch never does")
        if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
            raise _Refused("its numbers are big-endian")
        table = _Unpickler(BytesIO(archive.read(f"{root}data.pkl"))).load()
        return _arrays(table, lambda storage: archive.read(f"{root}data/{storage.key}"))


def _read_legacy(file: BinaryIO) -> dict[str, mx.array]:
    """Pickles of a magic number, a protocol, the machine's sizes, the table, the keys; then each storage in turn."""
    load = lambda: _Unpickler(file).load()
    if load() != LEGACY_MAGIC or load() != LEGACY_PROTOCOL:
        raise _Refused("it is no file of PyTorch weights")
    if not load().get("little_endian", True):
        raise _Refused("its numbers are big-endian")
    table, keys = load(), load()
    sizes = {tensor.storage.key: np.dtype(DTYPES[tensor.storage.kind]).itemsize for tensor in _tensors(table).values()}
    storages = {}
    for key in keys:
        num_elements = int.from_bytes(file.read(8), "little")
        storages[key] = file.read(num_elements * sizes[key])
    return _arrays(table, lambda storage: storages[storage.key])


def _tensors(table) -> dict[str, _Tensor]:
    """The tensors of a state dict; of a checkpoint that wraps one as "state_dict", those."""
    if isinstance(table, dict) and isinstance(table.get("state_dict"), dict):
        table = table["state_dict"]
    if not isinstance(table, dict) or not table or not all(isinstance(value, _Tensor) for value in table.values()):
        raise _Refused("it does not hold a state dict, names with tensors")
    return table


def _arrays(table, read: Callable[[_Storage], bytes]) -> dict[str, mx.array]:
    tensors, storages = _tensors(table), {}
    for tensor in tensors.values():
        if tensor.storage not in storages:
            storages[tensor.storage] = np.frombuffer(read(tensor.storage), DTYPES[tensor.storage.kind])
    return {name: _array(tensor, storages[tensor.storage]) for name, tensor in tensors.items()}


def _array(tensor: _Tensor, storage: np.ndarray) -> mx.array:
    _check_bounds(tensor, len(storage))
    steps = [stride * storage.itemsize for stride in tensor.strides]
    view = np.lib.stride_tricks.as_strided(storage[tensor.offset :], tensor.shape, steps)
    if tensor.storage.kind == "BFloat16Storage":
        return mx.array(np.ascontiguousarray(view)).view(mx.bfloat16)
    return mx.array(view.astype(np.float32) if view.dtype == np.float64 else view)


def _check_bounds(tensor: _Tensor, num_elements: int) -> None:
    """`as_strided` checks nothing: a damaged file would read what lies behind the storage in memory."""
    numbers = (tensor.offset, *tensor.shape, *tensor.strides)
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    is_within = min(numbers) >= 0 and last < num_elements and math.prod(tensor.shape) <= num_elements
    if not (is_within or 0 in tensor.shape):
        raise _Refused("a tensor reaches beyond its storage: the file is cut short or damaged")


def _rebuild_tensor(storage: _Storage, offset: int, shape: tuple, strides: tuple, *_: Any) -> _Tensor:
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    **{("torch", kind): kind for kind in DTYPES},
}


class _Unpickler(pickle.Unpickler):
    """Knows the names of `KNOWN` and no others, so that nothing of Python's can be called."""

    def find_class(self, module: str, name: str):
        if (module, name) not in KNOWN:
            raise _Refused(f"it asks for {module}.{name}, which is no part of a state dict: it could run code")
        return KNOWN[module, name]

    def persistent_load(self, saved: tuple) -> _Storage:
        tag, kind, key, *_ = saved
        if tag != "storage" or kind not in DTYPES:
            raise _Refused(f"it holds a {kind} of a type that is not known")
        return _Storage(kind, str(key))
