"""The file of pixels: filled while rows are read, right to the byte whatever happens to it, with room for new ones."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlxmm.data.pixel_cache import PixelFile, PixelRows, make_room, num_bytes

ROOT = Path(__file__).parents[2]
SIDE, N = 4, 40


class Rows:
    """Numbered rows that count how often they are read."""

    def __init__(self):
        self.reads = []

    def __len__(self):
        return N

    def __getitem__(self, place):
        self.reads.append(place)
        return {"image": place} | self.without_image(place)

    def without_image(self, place):
        return {"captions": [str(place)], "id": str(place)}


def pixels(row) -> np.ndarray:
    return np.random.default_rng(row["image"]).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def read_all(path: Path) -> list[int]:
    """The places of the rows that were decoded; all have their pixels."""
    rows = Rows()
    kept = PixelRows(rows, pixels, PixelFile(path, SIDE))
    for place in np.random.default_rng(os.getpid()).permutation(N).tolist():
        row = kept[place]
        assert np.array_equal(row.pop("pixels"), pixels({"image": place})) and row == rows.without_image(place)
    return sorted(rows.reads)


def flip(data: bytearray, place: int) -> None:
    data[place * num_bytes(1, SIDE) + 7] ^= 1


def swap(data: bytearray, place: int) -> None:
    size = num_bytes(1, SIDE)
    data[place * size : (place + 1) * size] = data[:size]


def cut(data: bytearray, place: int) -> None:
    del data[place * num_bytes(1, SIDE) + 7 :]


@pytest.mark.parametrize(("damage", "decoded"), [(flip, [5]), (swap, [5]), (cut, [*range(5, N)])])
def test_what_is_damaged_is_decoded_again_and_nothing_else(tmp_path, damage, decoded):
    path = tmp_path / "kept"
    assert read_all(path) == list(range(N)) and read_all(path) == []
    whole = path.read_bytes()
    assert len(whole) == num_bytes(N, SIDE)
    damage(data := bytearray(whole), 5)
    path.write_bytes(data)
    assert read_all(path) == decoded and path.read_bytes() == whole


def test_a_file_that_is_cut_or_deleted_while_it_is_read_costs_time_alone(tmp_path):
    file = PixelFile(tmp_path / "kept", SIDE)
    kept = PixelRows(rows := Rows(), pixels, file)
    expected = [kept[place]["pixels"].tolist() for place in range(N)]
    os.truncate(tmp_path / "kept", 0)
    assert [kept[place]["pixels"].tolist() for place in range(N)] == expected
    (tmp_path / "kept").unlink()
    assert [kept[place]["pixels"].tolist() for place in range(N)] == expected and len(rows.reads) == 2 * N


def test_two_processes_at_once_fill_one_file_with_the_same_pixels(tmp_path):
    code = "import sys; sys.path.insert(0, 'tests/data'); from pathlib import Path\n"
    code += "from test_pixel_cache import *; print(len(read_all(Path(sys.argv[1]))))"
    command = [sys.executable, "-c", code, str(tmp_path / "kept")]
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **options) for _ in range(2)]
    decoded = [int(process.communicate(timeout=60)[0]) for process in processes]
    assert [process.returncode for process in processes] == [0, 0] and N <= sum(decoded) <= 2 * N
    assert read_all(tmp_path / "kept") == []


def test_files_that_were_opened_longest_ago_make_room(tmp_path):
    for age, name in enumerate(["new", "middle", "needed", "old"]):
        fill(tmp_path / f"{name}.pixels", age)
    left = lambda: sorted(path.stem for path in tmp_path.iterdir())
    make_room(tmp_path, {"needed.pixels": 4_096}, 3 * 4_096)
    assert left() == ["middle", "needed", "new"]
    make_room(tmp_path, {"more.pixels": 4_096, "needed.pixels": 4_096}, 3 * 4_096)
    assert left() == ["needed", "new"]


def fill(path: Path, age: float) -> None:
    path.write_bytes(b"1" * 4_096)
    os.utime(path, (1e9 - age, 1e9 - age))


def test_files_that_are_not_of_pixels_are_never_deleted(tmp_path):
    fill(tmp_path / "thesis.docx", 10**6)
    make_room(tmp_path, {"needed.pixels": 4_096}, 4_096)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.docx"]


def test_a_file_that_another_process_has_just_deleted_is_no_fault(tmp_path, monkeypatch):
    fill(tmp_path / "old.pixels", 0)
    glob = lambda folder, pattern: [tmp_path / "old.pixels", tmp_path / "gone.pixels"]
    monkeypatch.setattr(Path, "glob", glob)
    make_room(tmp_path, {"needed.pixels": 4_096}, 4_096)
    assert not os.listdir(tmp_path)


def test_more_than_half_of_the_free_disk_is_no_room(tmp_path):
    with pytest.raises(OSError, match="more than half of the .* GiB that are free"):
        make_room(tmp_path, {"huge": 2**62}, 2**63)
