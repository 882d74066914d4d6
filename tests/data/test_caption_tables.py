"""Captions from tables beside the pictures: found by hash or name, counted, and known by who wrote them."""

import csv
import gzip
import hashlib
import json
import re

import datasets
import pytest
from small_sources import png, sha256, three_splits, write_source

from mlxmm.data.caption_source import CaptionDataConfig, open_source
from mlxmm.data.sources.caption_tables import PictureIndex, entries_of
from mlxmm.errors import UserError
from mlxmm.export.dataset import CaptionRecord, PictureRecord, write_dataset
from mlxmm.export.dataset_card import CardFacts

NUMBERS = range(40)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures/deep").mkdir(parents=True)
    for i in NUMBERS:
        (tmp_path / "pictures/deep" / f"{i}.png").write_bytes(png(i))
    return tmp_path / "pictures"


def opened(source, *captions, **settings):
    return open_source(CaptionDataConfig(source=str(source), captions=tuple(map(str, captions)), **settings), 0)


def captions_of(source) -> dict[str, list[str]]:
    """The captions of each picture, by the number of its file."""
    pairs = [(rows.name(i), rows[i]["captions"]) for rows in source.rows.values() for i in range(len(rows))]
    return {re.search(r"(\d+)\.png", name)[1]: captions for name, captions in pairs}


def write_rows(path, rows):
    """Rows as the file's suffix says."""
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        text = json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows))
        path.write_bytes(gzip.compress(text.encode())) if path.suffix == ".gz" else path.write_text(text)
    return path


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "jsonl.gz", "json", "csv"])
@pytest.mark.parametrize(
    ("column", "name"),
    [
        ("image_sha256", sha256),
        ("file_name", "deep/{}.png".format),
        ("filename", "elsewhere/{}.jpg".format),
        ("item_key", str),
        ("id", "{}.png".format),
        ("url", "https://example.org/a/{}.png?size=large".format),
    ],
)
def test_captions_are_found_by_the_hash_or_a_name_of_their_picture(folder, tmp_path, suffix, column, name, capsys):
    rows = [{column: name(i), "caption": f"a thing, {i}"} for i in range(3, 45)]
    source = opened(folder, write_rows(tmp_path / f"captions.{suffix}", rows))
    assert captions_of(source) == {str(i): [f"a thing, {i}"] for i in range(3, 40)}
    counts = f"captions of 37 of 40 pictures of {folder}; 3 are left out; 5 captions are of no picture of it\n"
    assert capsys.readouterr().out == f"{tmp_path}/captions.{suffix}: {counts}"


def record(i):
    """A caption by one model, and one by another with a lower score."""
    values = {"prompt": "describe", "captioner_revision": "1", "sampling": {}, "num_tokens": 3, "finish_reason": "stop"}
    captions = [
        CaptionRecord(text=f"{name} {i}", captioner=f"org/{name}", clip_score=score, created_at=0, **values)
        for name, score in (("good", 0.9), ("bad", 0.1))
    ]
    facts = {"source": "me/pictures", "source_split": "train", "row_id": f"row {i}", "width": 20, "height": 16}
    return PictureRecord(sha256=sha256(i), captions=captions, **facts)


@pytest.mark.parametrize("name", ["set", "set/default"])
def test_a_data_set_of_captions_without_pictures_is_read_with_its_provenance(folder, tmp_path, name):
    write_dataset(tmp_path / "set", map(record, NUMBERS), CardFacts())
    source = opened(folder, tmp_path / name, where=("clip_score>=0.5",))
    assert captions_of(source) == {str(i): [f"good {i}"] for i in NUMBERS}
    [lineage] = source.lineage
    assert lineage["captioners"] == [
        {"captioner": "org/good", "revision": "1", "quantization": None, "captions": len(source.rows["train"])}
    ]
    assert lineage["captions"] == [str(tmp_path / name)]


def test_such_a_data_set_alone_is_refused_with_the_flag_that_reads_it(tmp_path):
    write_dataset(tmp_path / "set", map(record, NUMBERS), CardFacts())
    with pytest.raises(UserError, match="no column 'image'; .*: captions without their pictures.*--data.captions"):
        opened(tmp_path / "set")


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_captionflows_exports_are_read_with_their_contributor(folder, tmp_path, suffix):
    common = {"job_id": "1", "dataset": "me/pictures", "shard": "data-0000", "url": "", "contributor_id": "anna"}
    rows = [
        common | {"item_key": f"data-0000_{i}", "filename": f"{i}.png", "captions": [f"one {i}", "", f"two {i}"]}
        for i in NUMBERS
    ]
    source = opened(folder, write_rows(tmp_path / f"export.{suffix}", rows))
    assert captions_of(source) == {str(i): [f"one {i}", f"two {i}"] for i in NUMBERS}
    [facts] = source.lineage[0]["captioners"]
    assert facts["captioner"] == "anna" and facts["captions"] == 2 * len(source.rows["train"])


@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("suffix", ["parquet", "jsonl.gz"])
def test_datatroves_rollouts_are_read_and_not_its_prompts(folder, tmp_path, expanded, suffix):
    rows = []
    for i in NUMBERS:
        results = [{"text": f"{word} {i}", "finish_reason": "stop", "usage": {"total_tokens": 9}} for word in "ab"]
        media = [{"id": f"{i}", "type": 0, "url": f"https://example.org/{i}.png"}]
        metadata = {"model": "org/vlm"} | ({} if expanded else {"rollout_results": results})
        row = {"text": "Describe the picture.", "id": f"folder/{1_000 + i}", "media": media, "metadata": metadata}
        rows.append(row | ({"rollout_results": results} if expanded else {}))
    source = opened(folder, write_rows(tmp_path / f"out.{suffix}", rows))
    assert captions_of(source) == {str(i): [f"a {i}", f"b {i}"] for i in NUMBERS}
    assert source.lineage[0]["captioners"][0]["captioner"] == "org/vlm"


def test_captions_of_several_tables_and_rows_are_those_of_one_picture_and_replace_its_own(tmp_path):
    source = write_source(tmp_path / "pictures.parquet", range(10), split=three_splits(6))
    one = write_rows(
        tmp_path / "1.jsonl", [{"image_sha256": sha256(i), "caption": f"{w} {i}"} for i in range(10) for w in "ab"]
    )
    two = write_rows(tmp_path / "2.csv", [{"file_name": f"{i}.png", "text": f"c {i}"} for i in range(10)])
    read = opened(source, one, two, split_column="split")
    assert captions_of(read) == {str(i): [f"a {i}", f"b {i}", f"c {i}"] for i in range(10)}
    assert [len(rows) for rows in read.rows.values()] == [6, 2, 2] and len(opened(source).rows["train"]) == 8


def test_all_sources_of_a_mixture_read_the_same_tables(tmp_path):
    first = write_source(tmp_path / "1.parquet", range(10), split=three_splits(6))
    second = write_source(tmp_path / "2.parquet", range(10, 14))
    table = write_rows(tmp_path / "all.jsonl", [{"id": i, "caption": f"new {i}"} for i in range(14)])
    config = CaptionDataConfig(source=(first, second), captions=str(table), split_column="split")
    assert list(open_source(config, 0).rows["train"].captions()) == [f"new {i}" for i in [*range(6), *range(10, 14)]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "100.png", "caption": "a cat"}], "no caption of .*captions.jsonl is of a picture of .*pictures"),
        ([{"id": "1.png", "said": "a cat"}], "has no captions in caption, captions, .*; it has id, said"),
        ([{"picture": "1.png", "caption": "a cat"}], "does not say which pictures its captions are of"),
        ([["1.png", "a cat"]], "must hold an object for each row"),
    ],
)
def test_a_table_that_does_not_fit_is_one_clear_line(folder, tmp_path, rows, message):
    with pytest.raises(UserError, match=message) as caught:
        opened(folder, write_rows(tmp_path / "captions.jsonl", rows))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"captions": "no/such.jsonl"}, "--data.captions no/such.jsonl is not there"),
        ({"captions": "a.jsonl", "streaming": True}, "not for a stream"),
        ({"captions": "a.jsonl", "source": "shapes"}, "not for `shapes`"),
    ],
)
def test_captions_that_cannot_be_had_are_one_clear_line(folder, settings, message):
    with pytest.raises(UserError, match=message):
        open_source(CaptionDataConfig(**{"source": str(folder)} | settings), 0)


def test_a_file_that_is_cut_short_is_named(folder, tmp_path):
    (tmp_path / "c.jsonl").write_text('{"id": "1", "caption": "a"}\n{"id": ')
    with pytest.raises(UserError, match=r"c\.jsonl cannot be read: JSONDecodeError"):
        opened(folder, tmp_path / "c.jsonl")


def test_a_name_of_several_pictures_is_refused_and_its_folder_tells_them_apart():
    index = PictureIndex()
    for place, name in enumerate(("x/a/1.png", "x/b/1.png")):
        index.add(place, [name], hashlib.sha256(b"same").hexdigest())
    find = lambda **row: index.find(entries_of("table", [row | {"caption": "a cat"}], "caption")[0])
    assert find(file_name="b/1.png") == find(file_name="b/1") == find(url="http://h/b/1.png") == [1]
    assert find(image_sha256=hashlib.sha256(b"same").hexdigest()) == [0, 1] and find(id="2.png") == []
    with pytest.raises(UserError, match="'1.png' may be of 2 pictures: name them with their folders"):
        find(file_name="1.png")


@pytest.mark.parametrize("name", ["c.jsonl", "c.json"])
@pytest.mark.parametrize(
    ("caption", "told"),
    [('"a \\ud800 cat"', "is not a text in UTF-8"), ("[" * 100_000 + "]" * 100_000, "is nested too deeply")],
)
def test_half_letters_and_deep_nesting_are_one_clear_line(folder, tmp_path, name, caption, told):
    row = f'{{"id": "1.png", "caption": {caption}}}'
    (tmp_path / name).write_text(row if name == "c.jsonl" else f"[{row}]")
    with pytest.raises(UserError, match=f"{name} .*{told}") as caught:
        opened(folder, tmp_path / name)
    assert "\n" not in str(caught.value)
