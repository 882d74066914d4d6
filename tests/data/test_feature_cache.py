"""Features on disk: computed once, completed after a kill, and computed again where they are damaged or stale."""

import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxmm.data.feature_cache import BLOCK, cache_key, cached_features

N = 3 * BLOCK + 5


class Rows:
    """Numbered rows that count how often they are read."""

    def __init__(self, num: int = N):
        self.num, self.reads = num, 0

    def __len__(self):
        return self.num

    def __getitem__(self, i):
        self.reads += 1
        return {"number": i}


def pixels(row) -> np.ndarray:
    return np.full((4, 4, 3), row["number"] % 251, np.uint8)


def compute(images: mx.array) -> mx.array:
    return images.astype(mx.float32).reshape(len(images), 4, 12) * 0.5


EXPECTED = np.stack([pixels({"number": i}) for i in range(N)]).reshape(N, 4, 12).astype(np.float16) / 2


def test_features_are_computed_once_and_found_again(tmp_path):
    rows = Rows()
    features = cached_features(tmp_path, rows, pixels, compute)
    np.testing.assert_array_equal(features, EXPECTED)
    assert features.dtype == np.float16 and isinstance(features, np.memmap)
    rows.reads = 0
    np.testing.assert_array_equal(cached_features(tmp_path, rows, pixels, compute), EXPECTED)
    assert rows.reads == 1  # for their shape


@pytest.mark.parametrize("damage", ["features", "journal"])
def test_a_damaged_block_is_computed_again_and_no_other(tmp_path, damage):
    cached_features(tmp_path, Rows(), pixels, compute)
    if damage == "features":
        data = np.memmap(tmp_path / "features.bin", np.float16, "r+", shape=EXPECTED.shape)
        data[BLOCK + 1] += 1
        data.flush()
    else:
        text = (tmp_path / "blocks.jsonl").read_text()
        (tmp_path / "blocks.jsonl").write_text(text[:-3])
    rows = Rows()
    np.testing.assert_array_equal(cached_features(tmp_path, rows, pixels, compute), EXPECTED)
    assert 1 < rows.reads <= BLOCK + 1


def test_a_cache_cut_off_by_a_kill_is_completed(tmp_path):
    program = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_feature_cache import *
def dying(images):
    if float(images.max()) >= {BLOCK + 3}:
        os.kill(os.getpid(), signal.SIGKILL)
    return compute(images)
import mlxmm.data.feature_cache as cache
cache.mx.compile = lambda f: f
cached_features(Path({str(tmp_path)!r}), Rows(), pixels, dying)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len((tmp_path / "blocks.jsonl").read_text().splitlines()) == 1
    rows = Rows()
    np.testing.assert_array_equal(cached_features(tmp_path, rows, pixels, compute), EXPECTED)
    assert rows.reads == N - BLOCK + 1


def test_whatever_features_depend_on_is_in_the_key():
    key = {"weights": b"abc", "layer": 1, "pictures": b"x", "preprocessing": {"mean": [0.5]}}
    others = [key | {"weights": b"abd"}, key | {"layer": 2}, key | {"pictures": b"y"}, key | {"preprocessing": {}}]
    keys = [cache_key(**parts) for parts in (key, *others)]
    assert len(set(keys)) == 5 and cache_key(**key) == keys[0]


def shared(folder: Path) -> None:
    """What each of two processes does: all rows get features, in their order, and one process writes them."""
    from mlxmm.distributed import collectives

    features = cached_features(folder / "shared", Rows(), pixels, compute, num_threads=2)
    assert np.array_equal(features, EXPECTED) and collectives.world_size() == 2


def test_two_processes_compute_the_features_of_all_rows_and_one_writes_them(tmp_path, monkeypatch):
    from test_distributed import run_workers

    monkeypatch.setenv("HOSTFILES", str(tmp_path))
    ended, _ = run_workers(__file__, "shared", tmp_path)
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert len((tmp_path / "shared" / "blocks.jsonl").read_text().splitlines()) == -(-N // BLOCK)


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))


@pytest.mark.parametrize("line", [b"[1", b"7", b'["0", 1]', b"[0, 1, 2]", b"\xff\xfe", b"[" * 100_000, b"[-1, 0]", b""])
def test_a_damaged_line_of_the_journal_costs_its_block_alone(tmp_path, line):
    cached_features(tmp_path, Rows(), pixels, compute)
    journal, rows = tmp_path / "blocks.jsonl", Rows()
    _, *others = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(line + b"\n" + b"".join(others))
    np.testing.assert_array_equal(cached_features(tmp_path, rows, pixels, compute), EXPECTED)
    assert rows.reads == BLOCK + 1


def test_a_full_disk_is_an_error_that_names_the_file_and_what_is_there_stays(tmp_path, full_disk):
    size = EXPECTED.nbytes
    cached_features(tmp_path, Rows(BLOCK), pixels, compute)
    full_disk(size // 2)
    with pytest.raises(OSError, match="features.bin"):
        cached_features(tmp_path, Rows(), pixels, compute)
    full_disk(None)
    rows = Rows()
    np.testing.assert_array_equal(cached_features(tmp_path, rows, pixels, compute), EXPECTED)
    assert rows.reads == N - BLOCK + 1
