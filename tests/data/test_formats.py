"""Formats that people have are read as they are; what is not read is named; no file outside a source is opened."""

import json
import os
import re
import signal
import unicodedata
from pathlib import Path

import attrs
import datasets
import pytest
from small_clip import small_clip
from small_sources import JSON, NUM, TEXT, pictures, png, write_source, write_tar

from mlxmm.data.caption_source import CaptionDataConfig, open_source
from mlxmm.data.sources.caption_tables import text_rows
from mlxmm.data.sources.captions import texts_in
from mlxmm.data.sources.formats import SPLIT_OF, find_local
from mlxmm.errors import UserError
from recipes import evaluate_clip


def opened(source, **settings):
    return open_source(CaptionDataConfig(source=str(source), **settings), 0)


def sizes(source) -> list[int]:
    return [len(rows) for rows in source.rows.values()]


def captions(source) -> set[str]:
    """All captions; every picture is decoded."""
    return {text for rows in source.rows.values() for i in range(len(rows)) for text in rows[i]["captions"]}


def said(word="a thing", numbers=range(NUM)) -> set[str]:
    return {f"{word} {i}" for i in numbers}


def test_a_text_beside_each_picture_is_its_captions_line_by_line(tmp_path):
    folder = pictures(tmp_path / "pics")
    for i in range(NUM):
        (folder / f"{i}.txt").write_text(f"a thing {i}\n\nanother {i}\n")
    assert captions(opened(folder)) == said() | said("another")


@pytest.mark.parametrize("texts", [TEXT, JSON, TEXT | JSON], ids=["txt", "json", "both"])
@pytest.mark.parametrize("name", ["00000.tar", "*.tar", ""], ids=["file", "glob", "folder"])
def test_tars_of_webdataset_are_read(tmp_path, texts, name):
    write_tar(tmp_path / "shards/00000.tar", range(NUM), **texts)
    assert captions(opened(tmp_path / "shards" / name)) == said()


def test_tars_are_streamed_and_their_names_say_their_splits(tmp_path):
    for split, numbers in (("train", range(12)), ("val", range(12, 16)), ("test", range(16, NUM))):
        write_tar(tmp_path / f"cc3m-{split}-0000.tar", numbers, **TEXT)
    assert sizes(opened(tmp_path)) == [12, 4, 4]
    stream = opened(tmp_path, streaming=True).rows["train"]
    rows = [stream.row(values) for values in stream.shuffled(0, 4)]
    assert {row["captions"][0] for row in rows} == said(numbers=range(12)) and rows[0]["image"].size == (20, 16)


@pytest.mark.parametrize(("suffix", "separator"), [("csv", ","), ("tsv", "\t"), ("csv", "\t"), ("csv", ";")])
def test_open_clips_lists_are_read_and_rows_of_a_picture_are_one(tmp_path, suffix, separator):
    pictures(tmp_path / "images")
    lines = [f'images/{i}.png{separator}"a thing {i}"{separator}{i / 2}' for i in range(NUM)]
    lines.append(separator.join(("images/0.png", "again", "0.0")))
    path = tmp_path / f"list.{suffix}"
    path.write_text("\n".join([separator.join(("filepath", "title", "score")), *lines]))
    source = opened(path)
    assert captions(source) == said() | {"again"} and sum(sizes(source)) == NUM
    assert captions(opened(path, where=("score>=1",))) == said(numbers=range(2, NUM))


def test_a_jsonl_and_a_json_list_of_file_names_are_read(tmp_path):
    pictures(tmp_path)
    rows = [
        {"image": f"{i}.png", "caption": [f"a thing {i}"], "split": s}
        for i, s in enumerate(["train"] * 14 + ["dev", "test"] * 3)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    for name in ("rows.jsonl", "rows.json"):
        assert sizes(opened(tmp_path / name)) == [14, 3, 3] and captions(opened(tmp_path / name)) == said()


def test_cocos_captions_are_read_with_the_folder_of_its_pictures(tmp_path):
    names = [f"COCO_train2014_{i:012}.png" for i in range(NUM)]
    pictures(tmp_path / "train2014", names)
    images = [{"id": 100 + i, "file_name": name} for i, name in enumerate(names)]
    annotations = [{"id": n, "image_id": 100 + n % NUM, "caption": f"a thing {n % NUM}"} for n in range(2 * NUM)]
    (tmp_path / "annotations").mkdir()
    path = tmp_path / "annotations/captions_train2014.json"
    path.write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))
    source = opened(path, image_folder=str(tmp_path / "train2014"))
    assert captions(source) == said() and sum(sizes(source)) == NUM
    assert len(source.rows["val"][0]["captions"]) == 2
    with pytest.raises(UserError, match="none of its pictures is there, as .*; --data.image-folder names"):
        opened(path)
    path.write_text(json.dumps({"images": images, "annotations": [{"image_id": 100, "bbox": [0, 0, 1, 1]}]}))
    with pytest.raises(UserError, match="neither COCO's captions nor Karpathy's splits: a source is a parquet file"):
        opened(path)


def test_karpathys_splits_are_read_and_restval_is_trained_on(tmp_path, capsys):
    pictures(tmp_path / "val2014")
    splits = ["train"] * 4 + ["restval"] * 8 + ["val"] * 4 + ["test"] * 4
    images = [
        {
            "filepath": "val2014",
            "filename": f"{i}.png",
            "split": split,
            "sentences": [{"raw": f"a thing {i}", "tokens": ["a"]}],
        }
        for i, split in enumerate(splits)
    ]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))
    source = opened(tmp_path / "dataset_coco.json")
    assert sizes(source) == [12, 4, 4] and captions(source) == said()
    assert "trained on: 8 rows of restval" in capsys.readouterr().out


def test_class_folders_have_their_names_as_captions_and_that_is_said(tmp_path, capsys):
    pictures(tmp_path / "pics", [f"{('cat', 'dog', 'train')[i % 3]}/{i}.png" for i in range(NUM)])
    assert captions(opened(tmp_path / "pics")) == {"cat", "dog", "train"}
    assert "pics has no captions: the names of its 3 folders are taken for them\n" in capsys.readouterr().out


@pytest.mark.parametrize("folders", [("train", "test"), ("train", "val", "test")])
def test_pictures_in_split_folders_without_captions_have_no_classes(tmp_path, folders, capsys):
    pictures(tmp_path / "pics", [f"{folders[i % len(folders)]}/{i}.png" for i in range(NUM)])
    with pytest.raises(UserError, match="pics has no column 'caption'"):
        opened(tmp_path / "pics")
    assert "are taken for them" not in capsys.readouterr().out


def test_class_folders_below_split_folders_are_classes_of_each_split(tmp_path):
    names = [f"{('train', 'train', 'val', 'test')[i % 4]}/{('cat', 'dog')[i // 4 % 2]}/{i}.png" for i in range(NUM)]
    source = opened(pictures(tmp_path, names))
    assert sizes(source) == [10, 5, 5] and captions(source) == {"cat", "dog"}


def with_columns(path: Path, **columns) -> Path:
    cells = [{"bytes": png(i), "path": None} for i in range(NUM)]
    datasets.Dataset.from_dict({"image": cells} | columns).to_parquet(path)
    return path


@pytest.mark.parametrize("wanted", [("caption_0", "caption_1"), ("caption_*",)])
@pytest.mark.parametrize("streaming", [False, True])
def test_captions_in_several_columns_are_those_of_one_picture(tmp_path, wanted, streaming):
    columns = {f"caption_{n}": [f"{word} {i}" for i in range(NUM)] for n, word in enumerate(("a thing", "another"))}
    splits = ["train"] * 10 + ["val", "test"] * 5
    path = with_columns(tmp_path / "rows.parquet", **columns, split=splits)
    source = opened(path, caption_column=wanted, split_column="split", streaming=streaming)
    assert source.rows["val"][0]["captions"] == ["a thing 10", "another 10"]
    numbers = range(10)
    assert set(source.rows["train"].captions()) == said(numbers=numbers) | said("another", numbers)


def test_captions_in_structs_are_read(tmp_path):
    sentences = [[{"raw": f"a thing {i}", "id": i}, {"raw": f"another {i}", "id": i}] for i in range(NUM)]
    path = with_columns(tmp_path / "rows.parquet", sentences=sentences)
    assert captions(opened(path, caption_column="sentences.raw")) == said() | said("another")
    with pytest.raises(UserError, match="has no column 'nothing.raw'; it has image, sentences"):
        opened(path, caption_column="nothing.raw")


@pytest.mark.parametrize("name", ["photo of a train.png", "test.png", "val.png"])
def test_the_word_of_a_split_in_a_pictures_name_hides_nothing(tmp_path, name):
    names = [name, *(f"COCO_train2014_{i:06}.png" for i in range(1, NUM))]
    pictures(tmp_path, names)
    lines = [json.dumps({"file_name": name, "caption": f"a thing {i}"}) for i, name in enumerate(names)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    assert captions(opened(tmp_path)) == said()


def test_metadata_at_the_top_of_split_folders_are_of_all_of_them(tmp_path):
    names = [f"{('train', 'train', 'validation', 'test')[i % 4]}/{i}.png" for i in range(NUM)]
    lines = [json.dumps({"file_name": name, "caption": f"a thing {i}"}) for i, name in enumerate(names)]
    (pictures(tmp_path, names) / "metadata.jsonl").write_text("\n".join(lines))
    assert sizes(opened(tmp_path)) == [10, 5, 5] and captions(opened(tmp_path)) == said()


def test_files_of_a_folder_that_do_not_all_name_a_split_are_all_read(tmp_path):
    write_source(tmp_path / "a train.parquet", range(10), "a thing")
    write_source(tmp_path / "rest.parquet", range(10, NUM), "a thing")
    assert captions(opened(tmp_path)) == said()


def test_a_split_column_is_of_all_files_whatever_their_names(tmp_path):
    splits = ["train"] * 6 + ["val", "test"] * 2
    write_source(tmp_path / "train-0.parquet", range(10), "a thing", split=splits)
    write_source(tmp_path / "test-0.parquet", range(10, NUM), "a thing", split=splits)
    assert sizes(opened(tmp_path, split_column="split")) == [12, 4, 4]


@pytest.mark.parametrize(
    "labels",
    [["Train", "VAL", "Test"], datasets.ClassLabel(names=["train", "val", "test"])],
    ids=["capitals", "classes"],
)
def test_labels_of_splits_may_be_capitals_and_classes(tmp_path, labels):
    numbers = [0] * 10 + [1, 2] * 5
    is_class = isinstance(labels, datasets.ClassLabel)
    path = with_columns(
        tmp_path / "1.parquet", caption=sorted(said()), split=numbers if is_class else [labels[n] for n in numbers]
    )
    if is_class:
        datasets.Dataset.from_parquet(str(path)).cast_column("split", labels).to_parquet(path)
    assert sizes(opened(path, split_column="split")) == [10, 5, 5]


def test_labels_that_name_no_split_are_counted_and_if_all_do_they_are_shown(tmp_path, capsys):
    splits = ["train"] * 8 + ["unused"] * 4 + ["val", "test"] * 4
    path = with_columns(tmp_path / "1.parquet", caption=sorted(said()), split=splits, fold=[i % 2 for i in range(NUM)])
    assert sizes(opened(path, split_column="split")) == [8, 4, 4]
    assert "says neither train, val nor test: 'unused' (4 rows)" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"'fold' must say train, val or test; it holds '0' \(10 rows\), '1' \(10 rows\)"
    ):
        opened(path, split_column="fold")


def test_splits_that_a_column_does_not_name_come_with_what_it_says(tmp_path):
    path = write_source(tmp_path / "rows.parquet", range(NUM), "a thing", fold=["training"] * NUM)
    with pytest.raises(UserError, match="has no rows for val, test; its column 'fold' says training$"):
        opened(path, split_column="fold")


def test_classes_that_a_column_of_splits_has_are_told_by_their_names(tmp_path, capsys):
    def source(names, numbers):
        path = with_columns(tmp_path / "rows.parquet", caption=sorted(said()), split=numbers)
        kind = datasets.ClassLabel(names=names)
        datasets.Dataset.from_parquet(str(path)).cast_column("split", kind).to_parquet(path)
        return path

    with pytest.raises(UserError, match="has no rows for val, test; its column 'split' says train$"):
        opened(source(["train", "unused"], [0] * NUM), split_column="split")
    with pytest.raises(UserError, match=r"must say train, val or test; it holds 'unused' \(20 rows\)"):
        opened(source(["train", "unused"], [1] * NUM), split_column="split")
    opened(source(["train", "val", "test", "unused"], list(range(4)) * 5), split_column="split")
    assert "says neither train, val nor test: 'unused' (5 rows)" in capsys.readouterr().out


def only_parquet(folder, splits):
    folder.mkdir(exist_ok=True)
    for place, split in enumerate(splits):
        write_source(folder / f"{split}-0.parquet", range(place * 20, place * 20 + 20), "a thing")
    return {"source": str(folder)}


def only_folders(folder, splits):
    for place, split in enumerate(splits):
        own = pictures(folder / split, [f"{place}-{i}.png" for i in range(20)])
        lines = [json.dumps({"file_name": path.name, "caption": "a thing"}) for path in own.glob("*.png")]
        (own / "metadata.jsonl").write_text("\n".join(lines))
    return {"source": str(folder)}


def only_labels(folder, splits):
    labels = [split for split in splits for _ in range(20)]
    path = write_source(folder / "rows.parquet", range(len(labels)), "a thing", split=labels)
    return {"source": path, "split_column": "split"}


def only_listed(folder, splits):
    labels = [split for split in splits for _ in range(20)]
    own = pictures(folder, [f"{i}.png" for i in range(len(labels))])
    rows = [{"file_name": f"{i}.png", "caption": "a thing", "split": label} for i, label in enumerate(labels)]
    (own / "list.json").write_text(json.dumps(rows))
    return {"source": str(own / "list.json")}


@pytest.mark.parametrize("make", [only_parquet, only_folders, only_labels, only_listed])
@pytest.mark.parametrize("splits", [["test"], ["validation"], ["dev"], ["val", "test"]], ids="-".join)
def test_a_source_for_evaluation_is_not_trained_on_unasked(tmp_path, make, splits):
    config = CaptionDataConfig(**make(tmp_path, splits))
    with pytest.raises(
        UserError, match="not trained on unasked: --data.split-column random divides all rows"
    ) as caught:
        open_source(config, 0)
    said = f"column 'split' says {splits[0]}" if make is only_labels else f"its splits are {SPLIT_OF[splits[0]]}"
    assert "\n" not in str(caught.value) and said in str(caught.value)
    rows = open_source(config, 0, to_train=False).rows
    assert {split: len(part) for split, part in rows.items()} == {SPLIT_OF[split]: 20 for split in splits}
    asked = open_source(attrs.evolve(config, split_column="random"), 0).rows
    assert sum(map(len, asked.values())) == 20 * len(splits) and len(asked["train"]) == 18 * len(splits)


def test_a_stream_of_nothing_but_test_is_judged_and_not_trained_on(tmp_path):
    config = CaptionDataConfig(**only_parquet(tmp_path, ["test"]), streaming=True)
    with pytest.raises(UserError, match="has no rows for train, val; its splits are test$"):
        open_source(config, 0)
    assert list(map(len, open_source(config, 0, to_train=False).rows.values())) == [20]
    with pytest.raises(UserError, match="a stream cannot be split at random"):
        open_source(attrs.evolve(config, split_column="random"), 0)


def test_rows_of_one_picture_are_one_row_with_all_its_captions_on_one_side(tmp_path, capsys):
    numbers = [i for i in range(NUM) for _ in range(5)]
    texts = [f"caption {place % 5} of {i}" for place, i in enumerate(numbers)]
    scores, labels = [place / 100 for place in range(100)], [str(i) for i in numbers]
    path = write_source(tmp_path / "rows.parquet", numbers, caption=texts, score=scores, label=labels)
    rows = opened(path).rows
    own = [[tuple(part.without_image(i)["captions"]) for i in range(len(part))] for part in rows.values()]
    lists = [tuple(f"caption {k} of {i}" for k in range(5)) for i in range(NUM)]
    assert [len(part) for part in own] == [18, 1, 1] and sorted(sum(own, [])) == sorted(lists)
    assert f"100 rows of {path} are of 20 pictures" in capsys.readouterr().out
    some = opened(path, where=("score>=0.03",)).rows["train"]  # of the first picture, two captions
    assert sum(len(some.without_image(i)["captions"]) for i in range(len(some))) == 90 - 3
    assert rows["train"].table["label"][0] == "0"


def test_a_picture_under_several_names_is_on_one_side(tmp_path, capsys):
    cells = [{"bytes": png(i), "path": f"{i}-{name}.png"} for i in range(40) for name in "abc"]
    table = datasets.Dataset.from_dict({"image": cells, "caption": ["a thing"] * len(cells)})
    table.cast_column("image", datasets.Image(decode=False)).to_parquet(tmp_path / "rows.parquet")
    rows = opened(tmp_path / "rows.parquet").rows
    own = [{rows[split].name(i).split("-")[0] for i in range(len(rows[split]))} for split in rows]
    assert list(map(len, own)) == [36, 2, 2] and len(set.union(*own)) == 40
    assert "in train too" not in capsys.readouterr().out


def test_rows_of_one_file_are_one_row_by_a_split_column_too(tmp_path):
    numbers = [i for i in range(10) for _ in range(2)]
    splits = ["train"] * 12 + ["val"] * 4 + ["test"] * 4
    path = write_source(tmp_path / "rows.parquet", numbers, split=splits)
    assert sizes(opened(path, split_column="split")) == [6, 2, 2]


def test_pictures_that_are_held_out_and_in_train_too_are_named(tmp_path, capsys):
    write_source(tmp_path / "train-0.parquet", range(10), "a thing")
    write_source(tmp_path / "val-0.parquet", [9, 10, 11], "a thing")
    write_source(tmp_path / "test-0.parquet", [12, 3, 4], "a thing")
    assert sizes(opened(tmp_path)) == [10, 3, 3]
    told = capsys.readouterr().out
    assert "1 picture of val of" in told and "2 pictures of test of" in told
    assert "in train too: 3.png (row 1), 4.png (row 2)" in told


def test_metadata_csv_keeps_captions_that_pandas_takes_for_none(tmp_path):
    texts = ["NA", "null", "None", "nan", "n/a"]
    lines = [f"{i}.png,{texts[i] if i < 5 else f'a thing {i}'}" for i in range(NUM)]
    (pictures(tmp_path) / "metadata.csv").write_text("file_name,caption\n" + "\n".join(lines))
    assert captions(opened(tmp_path)) == {*texts, *said(numbers=range(5, NUM))}


def test_metadata_csv_of_split_folders_are_of_each(tmp_path):
    names = [f"{('train', 'train', 'validation', 'test')[i % 4]}/{i}.png" for i in range(NUM)]
    lines = [f"{name},a thing {i}" for i, name in enumerate(names)]
    (pictures(tmp_path, names) / "metadata.csv").write_text("file_name,caption\n" + "\n".join(lines))
    assert sizes(opened(tmp_path)) == [10, 5, 5] and captions(opened(tmp_path)) == said()


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "list.jsonl"])
@pytest.mark.parametrize("forms", [("NFD", "NFC"), ("NFC", "NFD")], ids=str)
def test_names_with_accents_are_found_however_the_disk_writes_them(tmp_path, name, forms):
    on_disk, listed = ([unicodedata.normalize(form, f"café {i}.png") for i in range(NUM)] for form in forms)
    pictures(tmp_path, on_disk)
    rows = [{"file_name": name, "caption": f"a thing {i}"} for i, name in enumerate(listed)]
    lines = ["file_name,caption", *(",".join(row.values()) for row in rows)]
    text = lines if name.endswith("csv") else [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / name).write_text("\n".join(text))
    assert captions(opened(tmp_path if name.startswith("metadata") else tmp_path / name)) == said()


def test_a_caption_of_nothing_that_is_seen_is_none_and_a_list_in_a_text_is_read(tmp_path):
    texts = [json.dumps([f"a thing {i}", f"an object {i}"]) for i in range(NUM)]
    assert captions(opened(with_columns(tmp_path / "1.parquet", caption=texts))) == said() | said("an object")
    path = with_columns(tmp_path / "2.parquet", caption=["\u200b\u200d"] + [f"a thing {i}" for i in range(1, NUM)])
    assert opened(path).skipped == ("row 0",)
    for written in ("['a cat', \"it's\"]", "['a cat' \"it's\"]", "['a cat'\n \"it's\"]"):  # as pandas writes them
        assert texts_in(written) == ["a cat", "it's"]
    for plain in ("['a' on a mat", "['a', 1]", "['a' + 'b']", "[b'a']", "['" * 3_000):
        assert texts_in(plain) == [plain]
    assert texts_in("\x00 ") == [] and texts_in('["not closed') == ['["not closed'] and texts_in("[1]") == ["[1]"]


@pytest.mark.parametrize("seed", range(4))
def test_what_cannot_be_used_is_judged_over_the_source_not_over_a_small_split(tmp_path, seed):
    path = write_source(tmp_path / "1.parquet", range(120), caption=[None] + [f"a thing {i}" for i in range(119)])
    source = open_source(CaptionDataConfig(source=path), seed)
    assert sum(sizes(source)) == 119 and source.skipped == ("0.png (row 0)",)


def test_labels_of_a_stream_that_name_no_split_are_counted_and_if_all_do_they_are_shown(tmp_path, capsys):
    splits = ["train"] * 8 + ["unused"] * 4 + ["val", "test"] * 4
    path = with_columns(
        tmp_path / "1.parquet", caption=sorted(said()), split=splits, fold=[[i % 2] for i in range(NUM)]
    )
    rows = opened(path, split_column="split", streaming=True).rows
    assert len(rows["val"]) == len(rows["test"]) == 4
    assert "says neither train, val nor test: 'unused' (4 rows)" in capsys.readouterr().out
    for streaming in (False, True):
        with pytest.raises(UserError, match=r"must say train, val or test; it holds '\[0\]' \(10 rows\)"):
            opened(path, split_column="fold", streaming=streaming)


# What is not read


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "list.csv"])
def test_a_file_that_is_not_there_is_named_wherever_the_list_names_it(tmp_path, name):
    names = ["gone.png", *(f"{i}.png" for i in range(NUM))]
    split = lambda name: {"1.png": "val", "2.png": "test"}.get(name, "train")
    pictures(tmp_path, names[1:])
    lines = [json.dumps({"file_name": one, "caption": "a thing", "split": split(one)}) for one in names]
    if name.endswith("csv"):
        lines = ["file_name,caption,split", *(f"{one},a thing,{split(one)}" for one in names)]
    (tmp_path / name).write_text("\n".join(lines))
    [skipped] = opened(tmp_path / name if name == "list.csv" else tmp_path, split_column="split").skipped
    assert skipped.endswith("gone.png (row 0), no such file")


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "list.csv"])
def test_a_list_with_a_mark_of_utf8_is_read_and_one_in_utf16_is_one_line(tmp_path, name):
    pictures(tmp_path, [f"{i}.png" for i in range(NUM)])
    rows = [{"file_name": f"{i}.png", "caption": f"a thing {i}"} for i in range(NUM)]
    text = "\n".join(map(json.dumps, rows))
    if name.endswith("csv"):
        text = "file_name,caption\n" + "".join(f"{row['file_name']},{row['caption']}\n" for row in rows)
    source = tmp_path / name if name == "list.csv" else tmp_path
    (tmp_path / name).write_text(text, encoding="utf-8-sig")
    assert captions(opened(source)) == said()
    (tmp_path / name).write_text(text, encoding="utf-16")
    with pytest.raises(UserError, match=f"{name} is not a text in UTF-8: save it in that encoding"):
        opened(source)


def test_home_is_expanded_and_what_is_absent_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_source(tmp_path / "rows.parquet", range(NUM), "a thing")
    assert captions(opened("~/rows.parquet")) == said()
    for name in ("~/gone.csv", "pics/gone.tar", "gone", str(tmp_path / "gone")):
        with pytest.raises(UserError, match="gone.* is not there"):
            opened(name)


def test_a_name_that_may_be_of_the_hub_is_said_to_be_no_file_here(monkeypatch):
    def unreachable(*names, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        UserError, match="data/pics is neither a file nor a folder here, and cannot be read from the Hub"
    ):
        opened("data/pics")


def test_a_zip_is_to_be_unpacked(tmp_path):
    (tmp_path / "pictures.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match="holds no pictures: pictures.zip is not read, unpack it; a folder holds"):
        opened(tmp_path)


def test_a_file_of_another_kind_is_one_line_that_lists_what_is_read(tmp_path):
    (tmp_path / "notes.docx").write_bytes(b"PK")
    with pytest.raises(
        UserError, match=r"notes\.docx is not read: a source is a parquet file or glob, tar shards"
    ) as caught:
        opened(tmp_path / "notes.docx")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "shown"), [("a red circle", "'a red circle'"), ("iVBORw0KGgo" * 90, "text of 990 letters")]
)
def test_an_image_column_that_holds_texts_is_named(tmp_path, text, shown):
    path = with_columns(tmp_path / "rows.parquet", caption=[text] * NUM)
    with pytest.raises(UserError, match=f"column 'caption' of .* does not hold pictures, but {shown}"):
        opened(path, image_column="caption")


def outside(tmp_path) -> Path:
    """A folder with a list that names a picture beside the folder."""
    folder = pictures(tmp_path / "source")
    (tmp_path / "secret.png").write_bytes(png(99))
    return folder


@pytest.mark.parametrize("name", ["../secret.png", "{}/secret.png", "a/../../secret.png", "file://{}/secret.png"])
@pytest.mark.parametrize(
    "kind", ["list.csv", "rows.jsonl", "coco.json", "metadata.jsonl", "rows.parquet", "bytes.parquet"]
)
def test_no_file_outside_a_source_is_read_through_a_path(tmp_path, kind, name):
    folder, name = outside(tmp_path), name.format(tmp_path)
    names = [name, *(f"{i}.png" for i in range(1, NUM))]
    path = folder / kind
    rows = [{"file_name": one, "caption": "a thing"} for one in names]
    if kind == "list.csv":
        path.write_text("filepath,title\n" + "\n".join(f"{one},a thing" for one in names))
    elif kind == "coco.json":
        images = [{"id": i, "file_name": one} for i, one in enumerate(names)]
        path.write_text(
            json.dumps({"images": images, "annotations": [{"image_id": i, "caption": "x"} for i in range(NUM)]})
        )
    elif path.suffix == ".parquet":
        cells = names if kind == "rows.parquet" else [{"bytes": None, "path": one} for one in names]
        datasets.Dataset.from_dict({"image": cells, "caption": ["a thing"] * NUM}).to_parquet(path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=re.escape(name)):
        opened(folder if kind == "metadata.jsonl" else path)


def test_paths_in_a_parquet_file_are_below_its_folder(tmp_path):
    folder = pictures(tmp_path / "source")
    cells = [f"{i}.png" for i in range(NUM)]
    for column in (cells, [{"bytes": None, "path": cell} for cell in cells]):
        values = {"image": column, "caption": sorted(said())}
        datasets.Dataset.from_dict(values).to_parquet(folder / "rows.parquet")
        assert captions(opened(folder / "rows.parquet")) == said()


def test_a_stream_reads_no_file_outside_its_source(tmp_path):
    folder = outside(tmp_path)
    cells = [{"bytes": None, "path": str(tmp_path / "secret.png")}] * NUM
    values = {"image": cells, "caption": ["a thing"] * NUM, "split": ["train"] * 10 + ["val", "test"] * 5}
    datasets.Dataset.from_dict(values).to_parquet(folder / "rows.parquet")
    with pytest.raises(UserError, match=r"secret\.png', which is not in"):
        opened(folder / "rows.parquet", streaming=True, split_column="split")


def test_a_clip_is_judged_on_a_source_with_nothing_but_test(tmp_path):
    small_clip().save_pretrained(tmp_path / "clip")
    data = CaptionDataConfig(**only_parquet(tmp_path / "data", ["test"]))
    config = evaluate_clip.Config(module=str(tmp_path / "clip"), data=data, run_dir=tmp_path / "run")
    evaluate_clip.main(config)
    assert "retrieval/text_to_image/recall_at_1" in json.loads((tmp_path / "run" / "summary.json").read_text())
    with pytest.raises(UserError, match="--probe is fitted on train and val: .* has no train"):
        evaluate_clip.main(attrs.evolve(config, run_dir=tmp_path / "probe", labels=True, probe=True))


@pytest.mark.parametrize(
    "name", ["list.csv", "list.jsonl", "list.json", "p.parquet", "p.tar", "pictures/metadata.jsonl"]
)
def test_a_pipe_in_the_place_of_a_list_is_refused_at_once(tmp_path, name):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").touch()
    os.mkfifo(tmp_path / name)
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits for a pipe"))
    signal.alarm(5)
    try:
        for source in {tmp_path / name, tmp_path / ("pictures" if "/" in name else name)}:
            with pytest.raises(UserError, match=f"{name} cannot be read: Is neither a file nor a link to one"):
                find_local(str(source), None, None)
        if name.startswith("list"):
            with pytest.raises(UserError, match="neither a file nor a link to one"):
                text_rows(tmp_path / name)
    finally:
        signal.alarm(0)
