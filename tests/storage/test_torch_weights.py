"""PyTorch's weight files are read to the bit, and nothing that a pickle may hold is run."""

import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxmm.errors import UserError
from mlxmm.storage.torch_weights import read_torch_weights

FIXTURES = Path(__file__).parents[1] / "fixtures" / "torch"


@pytest.mark.parametrize("name", ["zip.bin", "legacy.bin"])
def test_both_formats_are_read_to_the_bit(name):
    arrays, values = read_torch_weights(FIXTURES / name), np.load(FIXTURES / "values.npz")
    assert arrays.keys() == set(values)
    for key, array in arrays.items():
        assert array.shape == values[key].shape
        assert np.array_equal(np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array), values[key])
    assert arrays["bfloat16"].dtype == mx.bfloat16 and arrays["half"].dtype == mx.float16
    assert arrays["double"].dtype == mx.float32 and arrays["int64"].dtype == mx.int64


class Runs:
    """A pickle of this creates a file when it is unpickled by Python's own `pickle.load`."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def zipped(path: Path, table: bytes, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", table)
        for name, data in members.items():
            archive.writestr(f"archive/data/{name}", data)
    return path


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_runs_none(tmp_path, as_zip):
    table, file = pickle.dumps({"weight": Runs(tmp_path / "ran")}), tmp_path / "pytorch_model.bin"
    zipped(file, table) if as_zip else file.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C) + table)
    with pytest.raises(UserError, match=r"it asks for \w+\.\w+.*could run code"):
        read_torch_weights(file)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["builtins.eval", "os.system", "torch.load", "numpy.load", "collections.Counter"])
def test_no_name_is_known_that_is_no_part_of_a_state_dict(tmp_path, name):
    module, _, function = name.rpartition(".")
    table = f"c{module}\n{function}\n(S'1'\ntR.".encode()  # a call, in pickle's first protocol
    with pytest.raises(UserError, match=f"asks for {name}"):
        read_torch_weights(zipped(tmp_path / "pytorch_model.bin", table))


def table(shape: tuple, strides: tuple, offset: int = 0) -> bytes:
    """The pickle of {"x": a view of four floats}, spelled out in pickle's first protocol."""
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n("
    storage = b"(S'storage'\nctorch\nFloatStorage\nS'0'\nS'cpu'\nI4\ntQ"
    numbers = lambda values: b"(" + b"".join(f"I{value}\n".encode() for value in values) + b"t"
    tensor = rebuild + storage + f"I{offset}\n".encode() + numbers(shape) + numbers(strides) + b"I00\nNtR"
    return b"(dS'x'\n" + tensor + b"s."


def test_a_tensor_written_by_hand_is_read(tmp_path):
    data = np.arange(4, dtype=np.float32).tobytes()
    arrays = read_torch_weights(zipped(tmp_path / "x.bin", table((2, 2), (1, 2)), **{"0": data}))
    assert arrays["x"].tolist() == [[0, 2], [1, 3]]


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [((5,), (1,), 0), ((4,), (1,), 1), ((2,), (4,), 0), ((2,), (-1,), 3), ((2,), (1,), -1), ((1 << 40,), (0,), 0)],
)
def test_a_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path, shape, strides, offset):
    file = zipped(tmp_path / "x.bin", table(shape, strides, offset), **{"0": bytes(16)})
    with pytest.raises(UserError, match="reaches beyond its storage"):
        read_torch_weights(file)


@pytest.mark.parametrize("keep", [0, 1, 100, 900, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("name", ["zip.bin", "legacy.bin"])
def test_a_file_cut_short_is_one_clear_error(tmp_path, name, keep):
    data = (FIXTURES / name).read_bytes()
    (tmp_path / name).write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(UserError, match=name):
        read_torch_weights(tmp_path / name)


def test_a_missing_file_and_one_that_is_no_state_dict_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.bin cannot be read: No such file"):
        read_torch_weights(tmp_path / "nowhere.bin")
    for value in ([1, 2], OrderedDict(a=1), {}):
        with pytest.raises(UserError, match="does not hold a state dict"):
            read_torch_weights(zipped(tmp_path / "x.bin", pickle.dumps(value)))
