"""Data sets of captions: what is written is read back, by `datasets` and as a source; pictures only if asked."""

import hashlib
import io
import json

import attrs
import datasets
import numpy as np
import pytest
import yaml
from PIL import Image

from mlxmm.data.caption_source import CaptionDataConfig, open_source
from mlxmm.errors import UserError
from mlxmm.export import dataset
from mlxmm.export.dataset import CaptionRecord, PictureRecord, write_dataset
from mlxmm.export.dataset_card import CardFacts, size_category

SAMPLING = {"temperature": 0.5, "top_p": 1.0, "max_tokens": 64, "seed": 0}
NOON = 1_790_000_000.75


@pytest.fixture(autouse=True)
def own_cache_of_datasets(tmp_path_factory, monkeypatch):
    """`datasets` finds what it cached of a folder by the folder's name alone."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


class Pictures:
    """Random pictures, their files and their hashes."""

    def __init__(self, num, seed=0):
        rng = np.random.default_rng(seed)
        self.images = [Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)) for _ in range(num)]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, place):
        return self.images[place]

    def file(self, place):
        buffer = io.BytesIO()
        self.images[place].save(buffer, "PNG")
        return buffer.getvalue()

    def sha256(self, place):
        return hashlib.sha256(self.file(place)).hexdigest()


def caption(text, **settings):
    own = {"captioner": "Qwen/Qwen2.5-VL-3B-Instruct", "captioner_revision": "abc", "sampling": SAMPLING}
    return CaptionRecord(
        **{"text": text, "prompt": "short", "num_tokens": 7, "finish_reason": "stop", "created_at": NOON}
        | own
        | settings
    )


def records(pictures, split="train", num_captions=2, source="alice/pictures"):
    """A record of each picture, with a caption more, that is dropped, of every third."""
    for i in range(len(pictures)):
        captions = [caption(f"caption {j} | of {i}", clip_score=i / 8) for j in range(num_captions)]
        dropped = [caption("sorry", prompt="alt", flags={"refusal": "no", "min_words": "1"})] if i % 3 == 0 else []
        size = {"width": pictures[i].width, "height": pictures[i].height}
        own = {"source": source, "source_split": split, "source_revision": "main", "row_id": f"row {i}"}
        yield PictureRecord(
            sha256=pictures.sha256(i), image=pictures.file(i), captions=captions + dropped, **size, **own
        )


def load(source, name=None, split="train"):
    return datasets.load_dataset(str(source), name, split=split)


def test_a_row_has_each_caption_with_its_provenance(tmp_path):
    pictures = Pictures(4)
    counts = write_dataset(tmp_path / "set", records(pictures), CardFacts())
    assert counts == {"pictures": 4, "captions": 8, "dropped": 2}
    table = load(tmp_path / "set")
    assert len(table) == 4 and "image" not in table.column_names
    row = table[3]
    assert row["image_sha256"] == pictures.sha256(3) and (row["width"], row["height"]) == (12, 9)
    assert [row[name] for name in ("source", "source_split", "source_revision", "row_id")] == [
        *("alice/pictures", "train", "main", "row 3")
    ]
    assert row["caption"] == ["caption 0 | of 3", "caption 1 | of 3"] and row["clip_score"] == [0.375, 0.375]
    assert row["captioner"] == ["Qwen/Qwen2.5-VL-3B-Instruct"] * 2 and row["quantization"] == [None] * 2
    assert [json.loads(text) for text in row["sampling"]] == [SAMPLING] * 2
    assert [int(time.timestamp()) for time in row["created_at"]] == [int(NOON)] * 2
    assert all(len(row[name]) == 2 for name in dataset.CAPTION)


def test_what_was_dropped_is_kept_aside_with_the_reasons(tmp_path):
    write_dataset(tmp_path / "set", records(Pictures(4)), CardFacts())
    table = load(tmp_path / "set", "dropped")
    assert table["row_id"][:] == ["row 0", "row 3"] and table["caption"][:] == ["sorry"] * 2
    assert table[0]["filters"] == ["refusal", "min_words"] and table[0]["reasons"] == ["no", "1"]


def test_a_picture_without_a_kept_caption_has_no_row_and_a_set_without_any_is_refused(tmp_path):
    first, second = records(Pictures(2), num_captions=0)
    third = next(records(Pictures(1, seed=1)))
    counts = write_dataset(tmp_path / "set", [first, second, third], CardFacts())
    assert counts == {"pictures": 1, "captions": 2, "dropped": 2}
    with pytest.raises(UserError, match="no caption is kept: 1 were dropped"):
        write_dataset(tmp_path / "none", [first, second], CardFacts())
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_with_pictures_the_folder_is_a_source_like_any_other(tmp_path):
    pictures = Pictures(40)
    write_dataset(tmp_path / "set", records(pictures), CardFacts(), include_images=True, config_name="refresh-2")
    source = open_source(CaptionDataConfig(source=str(tmp_path / "set")), seed=0)
    rows = [part[i] for part in source.rows.values() for i in range(len(part))]
    assert {split: len(part) for split, part in source.rows.items()} == {"train": 36, "val": 2, "test": 2}
    found = {hashlib.sha256(row["image"].tobytes()).digest(): row["captions"] for row in rows}
    assert found == {
        hashlib.sha256(image.tobytes()).digest(): [f"caption {j} | of {i}" for j in range(2)]
        for i, image in enumerate(pictures)
    }


def test_splits_of_the_source_stay_apart(tmp_path):
    splits = ("train", "val", "test")
    parts = [record for i, split in enumerate(splits) for record in records(Pictures(3, seed=i), split)]
    write_dataset(tmp_path / "set", parts, CardFacts(), include_images=True)
    rows = open_source(CaptionDataConfig(source=str(tmp_path / "set")), seed=0).rows
    for i, split in enumerate(splits):
        assert [np.array(rows[split][j]["image"]).tolist() for j in range(3)] == [
            np.array(image).tolist() for image in Pictures(3, seed=i)
        ]


def test_rows_are_divided_over_shards_of_at_most_so_many_bytes(tmp_path, monkeypatch):
    pictures = Pictures(5)
    monkeypatch.setattr(dataset, "MAX_SHARD_BYTES", 2 * len(pictures.file(0)) + 99)
    write_dataset(tmp_path / "set", records(pictures), CardFacts(), include_images=True)
    names = sorted(path.name for path in (tmp_path / "set/default").iterdir())
    assert names == [f"train-{i:05}-of-00003.parquet" for i in range(3)]
    assert load(tmp_path / "set")["row_id"][:] == [f"row {i}" for i in range(5)]


def test_the_card_says_where_captions_come_from_and_what_was_dropped(tmp_path):
    facts = CardFacts(counts={"captions": 5, "kept": 4, "refusal": 1, "min_words": 1}, licence="cc-by-4.0")
    pictures = records(Pictures(2), source="alice/pictures@main")
    write_dataset(tmp_path / "set", pictures, facts, include_images=True)
    card = (tmp_path / "set/README.md").read_text()
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["annotations_creators"] == ["machine-generated"] and "synthetic" in metadata["tags"]
    assert metadata["license"] == "cc-by-4.0" and metadata["language"] == ["en"]
    assert metadata["source_datasets"] == ["alice/pictures"] and metadata["size_categories"] == ["n<1K"]
    assert metadata["configs"] == [
        {"config_name": name, "data_files": [{"split": "train", "path": f"{name}/train-*.parquet"}]}
        for name in ("default", "dropped")
    ]
    assert "| source | alice/pictures@main, split train, revision main: 2 pictures |" in card
    assert "Qwen/Qwen2.5-VL-3B-Instruct, revision abc, quantization none, prompt short, max_tokens 64, seed 0" in card
    assert "| captions | 4 |\n| captions dropped | 1 |\n| captions stripped of boilerplate | 0 |\n" in card
    assert "| captions it dropped |\n| --- | --- |\n| refusal | 1 |\n" in card and "| kept |" not in card
    assert "| refusal | 1 |" in card and "| min_words | 1 |" in card and "The pictures are included." in card
    assert "| caption 0 \\| of 0 | short | Qwen/Qwen2.5-VL-3B-Instruct |" in card


def test_a_card_without_pictures_or_licence_says_so_and_its_code_joins_them(tmp_path):
    pictures = Pictures(3)
    write_dataset(tmp_path / "set", records(pictures), CardFacts())
    write_dataset(tmp_path / "source", records(pictures), CardFacts(), include_images=True)
    card = (tmp_path / "set/README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "unknown"
    assert "The licence of pictures and captions is not known." in card
    code = card.split("```python\n")[1].split("```")[0]
    found: dict = {}
    named = code.replace("NAME_OF_THIS_DATA_SET", f"{tmp_path}/set").replace("NAME_OF_THE_SOURCE", f"{tmp_path}/source")
    exec(named, found)
    assert [captions[0] for _, captions in found["pairs"]] == [f"caption 0 | of {i}" for i in range(3)]
    assert [image["bytes"] for image, _ in found["pairs"]] == [pictures.file(i) for i in range(3)]


def test_no_path_of_this_machine_is_in_a_data_set(tmp_path):
    captions = [
        caption("a cat", captioner=f"{tmp_path}/runs/mine/checkpoints/best"),
        caption("x", flags={"min_words": "1"}),
    ]
    one = attrs.evolve(
        next(records(Pictures(1), source=f"{tmp_path}/holiday")),
        row_id=f"{tmp_path}/me/cat.jpg (row 1)",
        identity={"file_name": f"{tmp_path}/me/cat.jpg", "id": r"C:\me\7", "url": f"file://{tmp_path}/me/cat.jpg"},
        captions=captions,
    )
    write_dataset(tmp_path / "set", [one], CardFacts())
    row = load(tmp_path / "set")[0]
    assert (row["source"], row["row_id"], row["captioner"]) == ("holiday", "cat.jpg (row 1)", ["mine"])
    assert (row["file_name"], row["id"], row["url"]) == ("cat.jpg", "7", "cat.jpg")
    assert load(tmp_path / "set", "dropped")[0]["row_id"] == "cat.jpg (row 1)"
    assert str(tmp_path) not in (tmp_path / "set/README.md").read_text()
    kept = attrs.evolve(one, identity={"file_name": "me/cat.jpg", "url": "https://x.org/cat.jpg"}).values()
    assert (kept["file_name"], kept["id"], kept["url"]) == ("me/cat.jpg", None, "https://x.org/cat.jpg")


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path):
    one = next(records(Pictures(1)))
    without = attrs.evolve(one, image=None)
    with pytest.raises(UserError, match="row 0 has no file: leave out the pictures"):
        write_dataset(tmp_path / "set", [without], CardFacts(), include_images=True)
    for name in ("data", "dropped", "a/b", ""):
        with pytest.raises(UserError, match="a configuration cannot be called"):
            write_dataset(tmp_path / "set", [one], CardFacts(), config_name=name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("num_rows", "category"),
    [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (31_014, "10K<n<100K"), (10**9, "n>1B"), (10**6, "1M<n<10M")],
)
def test_size_categories_are_those_of_the_hub(num_rows, category):
    assert size_category(num_rows) == category


def test_a_folder_that_was_written_anew_is_read_anew(tmp_path):
    for seed in (0, 1):
        pictures = Pictures(20, seed)
        write_dataset(tmp_path / str(seed) / "set", records(pictures), CardFacts(), include_images=True)
        (tmp_path / "set").unlink(missing_ok=True)
        (tmp_path / "set").symlink_to(tmp_path / str(seed) / "set")
        rows = open_source(CaptionDataConfig(source=str(tmp_path / "set")), seed=0).rows["test"]
        assert rows[0]["image"].tobytes() in [image.tobytes() for image in pictures]


@pytest.mark.parametrize(
    "configs", ["", "configs:\n- config_name: default\n  data_files: '*.parquet'\n", "tags: [x]\n"]
)
def test_a_card_that_names_no_files_changes_nothing(tmp_path, configs):
    write_dataset(tmp_path / "set", records(Pictures(20)), CardFacts(), include_images=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "set/default/train-00000-of-00001.parquet").rename(tmp_path / "other/train.parquet")
    (tmp_path / "other/README.md").write_text(f"---\n{configs}---\n" if configs else "no metadata")
    assert len(open_source(CaptionDataConfig(source=str(tmp_path / "other")), seed=0).rows["train"]) == 18


def test_a_folder_with_several_configurations_gives_the_one_that_is_named(tmp_path):
    from mlxmm.storage.dataset_push import merge_cards

    old, new = tmp_path / "old", tmp_path / "new"
    for folder, name, seed in ((old, "default", 0), (new, "refresh-2", 1)):
        write_dataset(folder, records(Pictures(20, seed)), CardFacts(), include_images=True, config_name=name)
    (new / "refresh-2").rename(old / "refresh-2")
    (old / "README.md").write_text(merge_cards((old / "README.md").read_text(), (new / "README.md").read_text()))
    for name, seed in ((None, 0), ("default", 0), ("refresh-2", 1)):
        rows = open_source(CaptionDataConfig(source=str(old), config_name=name), seed=0).rows["test"]
        assert rows[0]["image"].tobytes() in [image.tobytes() for image in Pictures(20, seed)]
    with pytest.raises(UserError, match="has no configuration 'x'; it has default, dropped, refresh-2, refresh-2-dro"):
        open_source(CaptionDataConfig(source=str(old), config_name="x"), seed=0)
    with pytest.raises(UserError, match="parquet has no configuration 'x': it has no card that names parquet files"):
        open_source(CaptionDataConfig(source=f"{old}/default/*.parquet", config_name="x"), seed=0)
