"""A second start finds what the first found out, without reading a picture; and of other files it reads nothing old."""

import hashlib
import os
from pathlib import Path

import datasets
import numpy as np
import pytest
from small_sources import pictures, png, three_splits, write_source

from mlxmm.data.caption_source import CaptionDataConfig, open_source
from mlxmm.data.sources.arrow_columns import selected_rows
from mlxmm.data.sources.picture_column import PictureColumn
from mlxmm.data.sources.rows import CaptionRows
from mlxmm.storage.remembered import remembered

KINDS = ("sha256", "captionless", "checksum")


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """Empty caches of this test's own, of mlxmm's and of datasets'."""
    monkeypatch.setenv("MLXMM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path / "cache"


def source(folder: Path, numbers=range(120), caption="a thing", split=None, name="rows.parquet") -> CaptionDataConfig:
    split = three_splits(len(numbers) - 8, 4) if split is None else split
    return CaptionDataConfig(source=write_source(folder / name, numbers, caption, split=split), split_column="split")


def seen(config: CaptionDataConfig) -> list:
    """All that a start finds out."""
    opened = open_source(config, 0)
    rows = {split: (part.indices.tolist(), part.captions(), part.fingerprint()) for split, part in opened.rows.items()}
    return [rows, opened.skipped, opened.lineage]


def never(self):
    raise AssertionError("it is remembered")


def test_a_second_start_hashes_no_picture_and_reads_no_caption(tmp_path, monkeypatch):
    config = source(tmp_path)
    before = open_source(config, 0)
    monkeypatch.setattr(PictureColumn, "_hash", never)
    monkeypatch.setattr(CaptionRows, "_values", never)
    after = open_source(config, 0)
    assert after.lineage == before.lineage and after.skipped == before.skipped


@pytest.mark.parametrize("kept", ["size", "time"])
def test_a_file_of_another_size_or_time_is_judged_again(tmp_path, kept):
    config = source(tmp_path)
    path = Path(config.only_source)
    before, stat = seen(config), path.stat()
    source(tmp_path, [500, *range(1, 120)], "a thing" if kept == "size" else "another thing")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + (kept == "size") * 10**9))
    assert path.stat().st_size != stat.st_size or kept == "size"
    after = seen(config)
    assert after[2][0]["fingerprint"] != before[2][0]["fingerprint"]
    assert after[0]["train"][2] != before[0]["train"][2] and after[0]["val"][2] == before[0]["val"][2]


def test_a_picture_file_that_changed_is_judged_again(tmp_path):
    folder = pictures(
        tmp_path / "folder", [f"{split}/{i}.png" for split in ("train", "val", "test") for i in range(40)]
    )
    for split in ("train", "val", "test"):
        lines = "".join(f'{{"file_name": "{i}.png", "caption": "a thing"}}\n' for i in range(40))
        (folder / split / "metadata.jsonl").write_text(lines)
    config = CaptionDataConfig(source=str(folder))
    assert seen(config)[1] == ()
    (folder / "train" / "7.png").write_bytes(png(7)[:40])
    [skipped] = seen(config)[1]
    assert "train/7.png" in skipped


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: b"", lambda data: data[:40] + b"x" + data[41:]]
)
def test_damaged_findings_are_made_again(tmp_path, caches, damage):
    config = source(tmp_path, caption=" ")  # of which all would be without a caption
    config = source(tmp_path)
    before = seen(config)
    files = {path: path.read_bytes() for kind in KINDS for path in (caches / kind).iterdir() if path.is_file()}
    assert {path.parent.name for path in files} == set(KINDS)
    for path, data in files.items():
        path.write_bytes(damage(data))
    assert seen(config) == before
    assert all(path.read_bytes() == data for path, data in files.items())


def test_a_start_finds_the_same_with_a_cache_and_without(tmp_path, monkeypatch):
    config = source(tmp_path, [*range(116), 1, 2, 3, 4])
    first, second = seen(config), seen(config)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLXMM_CACHE", str(tmp_path / "file"))
    assert first == second == seen(config)


def test_twins_are_found_at_each_start(tmp_path, capsys):
    config = source(tmp_path, [*range(60), *range(60), 200, 201, 1, 3])  # all of val and half of test are in train too
    for _ in range(2):
        assert [len(part) for part in open_source(config, 0).rows.values()] == [60, 4, 4]
        out = capsys.readouterr().out
        assert "124 rows of" in out and "4 pictures of val of" in out and "2 pictures of test of" in out


def test_rows_of_one_picture_are_on_one_side_at_each_start(tmp_path):
    config = CaptionDataConfig(source=write_source(tmp_path / "rows.parquet", [*range(60), *range(60)]))
    for _ in range(2):
        rows = open_source(config, 0).rows
        every = [part.pictures.digest(i) for part in rows.values() for i in part.indices.tolist()]
        assert len(every) == len(set(every)) == 60


def test_a_column_reads_what_datasets_reads(tmp_path):
    cells = [None, {"bytes": png(1), "path": "1.png"}, {"bytes": None, "path": "2.png"}, {"bytes": b"", "path": None}]
    columns = {"image": cells * 30, "number": list(range(120))}
    table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image(decode=False))
    for part in (table, table.select(range(5, 90)), table.select([3, 1, 7, 100]), table.select([])):
        column, own = PictureColumn.of(part, "image"), part["image"][:]
        assert len(column) == len(own) and list(column) == own
        assert column.paths == [cell and cell["path"] for cell in own]
        assert column.num_bytes.tolist() == [
            -1 if not cell or cell["bytes"] is None else len(cell["bytes"]) for cell in own
        ]
        assert [column.digest(i) is None for i in range(len(own))] == (column.num_bytes < 0).tolist()


def test_a_finding_is_for_its_key_alone(caches):
    assert remembered("kind", b"a", lambda: b"one") == remembered("kind", b"a", lambda: b"two") == b"one"
    assert remembered("kind", b"b", lambda: b"two") == remembered("other", b"a", lambda: b"two") == b"two"
    assert np.frombuffer(remembered("kind", b"c", bytes), np.int64).size == 0


def test_findings_that_were_used_last_are_kept(caches, monkeypatch):
    monkeypatch.setattr("mlxmm.storage.remembered.MAX_KEPT", 3, raising=False)
    for number, key in enumerate([b"a", b"b", b"c", b"a", b"d"]):
        remembered("kind", key, key.upper)
        newest = max((caches / "kind").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, (number, number))  # a clock may stand still between two of them
    assert remembered("kind", b"a", lambda: b"made again") == b"A"
    assert remembered("kind", b"b", lambda: b"made again") == b"made again"
    assert len(list((caches / "kind").iterdir())) == 3


@pytest.mark.parametrize("kind", ["captionless", "checksum"])
def test_captions_that_are_read_otherwise_are_judged_again(tmp_path, monkeypatch, caches, kind):
    config = source(tmp_path)
    open_source(config, 0)
    before = len(list((caches / kind).iterdir()))
    monkeypatch.setattr("mlxmm.data.sources.rows.READER", 2, raising=False)
    open_source(config, 0)
    assert len(list((caches / kind).iterdir())) == 2 * before


def test_rows_are_divided_by_the_pictures_that_are_trained_on(tmp_path):
    kinds = datasets.Features(thumbnail=datasets.Image(), photo=datasets.Image(), caption=datasets.Value("string"))
    cells = lambda numbers: [{"bytes": png(number), "path": None} for number in numbers]
    twice = [number // 2 for number in range(40)]  # two rows of each photo, whose thumbnails differ
    columns = {"thumbnail": cells(range(100, 140)), "photo": cells(twice), "caption": ["a thing"] * 40}
    datasets.Dataset.from_dict(columns, features=kinds).to_parquet(tmp_path / "rows.parquet")
    config = CaptionDataConfig(source=str(tmp_path / "rows.parquet"), image_column="photo")
    assert sum(map(len, open_source(config, 0).rows.values())) == 20  # none is on two sides


def two_columns(path: Path) -> datasets.Dataset:
    """A file with two columns of 30 pictures, whose bytes all differ."""
    kinds = datasets.Features(image=datasets.Image(), other=datasets.Image())
    cells = lambda first: [{"bytes": png(first + i), "path": None} for i in range(30)]
    datasets.Dataset.from_dict({"image": cells(0), "other": cells(100)}, features=kinds).to_parquet(path)
    table = datasets.load_dataset("parquet", data_files=str(path), split="train")
    return table.cast(datasets.Features({name: datasets.Image(decode=False) for name in kinds}))


def test_what_is_known_of_a_picture_is_of_its_own_column_and_row(tmp_path):
    table = two_columns(tmp_path / "rows.parquet")
    halves = [(table.select(range(start, start + 15)), name) for name in ("image", "other") for start in (0, 15)]
    assert all(selected_rows(half) is None for half, _ in halves)  # each is a slice of the file
    columns = [PictureColumn.of(half, name) for half, name in halves]
    digests = [pictures.digest(row) for pictures in columns for row in range(15)]
    assert digests == [hashlib.sha256(cell["bytes"]).digest() for pictures in columns for cell in pictures]
    assert len(set(digests)) == 60
