"""Every source keeps the protocol of rows, and an own one in a few lines trains a captioner."""

import inspect

import numpy as np
import pytest
from PIL import Image

from mlxmm.data.caption_data import CaptionData
from mlxmm.data.caption_source import CaptionDataConfig, CaptionSource, open_source
from mlxmm.data.feature_cache import FeatureRows
from mlxmm.data.sources.rows import Rows, is_stream
from mlxmm.data.sources.shapes import ShapesConfig

METHODS = ["__len__", "__getitem__"]
METHODS += [name for name, _ in inspect.getmembers(Rows, inspect.isfunction) if not name.startswith("_")]


def parquet(folder):
    import datasets

    images = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(6)]
    rows = {
        "image": images,
        "caption": [[f"a {i}", f"b {i}"] for i in range(6)],
        "split": ["train"] * 4 + ["val", "test"],
    }
    path = str(folder / "rows.parquet")
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(path)
    return open_source(CaptionDataConfig(source=path, split_column="split"), 0).rows["train"]


def folder_of_images(folder):
    for i in range(40 if not (folder / "0.png").exists() else 0):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i}.png")
    lines = [f'{{"file_name": "{i}.png", "caption": "a {i}"}}' for i in range(40)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return open_source(CaptionDataConfig(source=str(folder)), 0).rows["train"]


def shapes(folder):
    return open_source(CaptionDataConfig(shapes=ShapesConfig(num_train=5)), 0).rows["train"]


def features(folder):
    rows = shapes(folder)
    return FeatureRows(rows, np.zeros((len(rows), 4, 2), np.float16))


@pytest.mark.parametrize("make", [parquet, folder_of_images, shapes, features])
def test_every_source_keeps_the_protocol_of_rows(make, tmp_path):
    rows = make(tmp_path)
    assert all(callable(getattr(rows, name)) for name in METHODS) and not is_stream(rows)
    row = rows[0]
    without = {name: value for name, value in row.items() if name not in ("image", "features")}
    assert set(row) == {"captions", "id", "image" if make is not features else "features"}
    assert rows.without_image(0) == without and row["id"] == rows.name(0)
    assert list(rows.captions()) == [text for i in range(len(rows)) for text in rows[i]["captions"]]
    assert isinstance(rows.fingerprint(), bytes) and rows.fingerprint() == make(tmp_path).fingerprint()
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_a_source_of_ones_own_needs_nothing_but_rows():
    class Two:
        def __len__(self):
            return 2

        def __getitem__(self, place):
            return {"image": Image.new("RGB", (4, 4)), **self.without_image(place)}

        def without_image(self, place):
            return {"captions": ["a", "b"], "id": self.name(place)}

        def captions(self):
            return ["a", "b"] * 2

        def name(self, place):
            return f"row {place}"

        def fingerprint(self):
            return b"two"

    source = CaptionSource(rows={"train": Two(), "val": Two()})
    assert source.sample_captions() == ["a", "b"] * 2 and source.test_splits == []
    data = CaptionData(source, transform=lambda row, caption: {"n": np.array([len(caption)])})
    assert [batch["n"].tolist() for batch in data.val_dataloader().epoch(0)] == [[[1], [1]]]
    assert len(list(data.train_dataloader().epoch(0))) == 1


def test_the_rows_of_a_source_and_of_its_data_change_by_replace_rows_alone():
    source = open_source(CaptionDataConfig(shapes=ShapesConfig(num_train=4)), 0)
    data = CaptionData(source, transform=lambda row, caption: row)
    for rows in (source.rows, data.rows):
        with pytest.raises(TypeError):
            rows["train"] = None
    data.replace_rows("train", source.fresh_rows(3))
    assert data.rows["train"].epoch == 3 and source.rows["train"].epoch == 0
