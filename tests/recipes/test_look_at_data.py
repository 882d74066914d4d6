"""look_at_data says what is in a source, and what would make a run meaningless; the page of formats runs."""

import json
import shlex
from pathlib import Path

import datasets
import pytest
from PIL import Image
from small_sources import NUM, TEXT, pictures, png, sha256, three_splits, write_source, write_tar
from test_readme import commands

from mlxmm.cli import parse_config
from mlxmm.config import Preset
from mlxmm.data.caption_source import CaptionDataConfig, open_source
from mlxmm.data.overview import Overview, training_warnings
from mlxmm.errors import UserError
from recipes import look_at_data

PAGE = (Path(__file__).parents[2] / "docs/your-own-data.md").read_text()


def look(arguments: str, folder: Path) -> str:
    """The report of a command."""
    presets = {"default": Preset("", look_at_data.Config())}
    config = parse_config("look_at_data", presets, [*shlex.split(arguments), "--to", str(folder)])
    look_at_data.main(config)
    assert Image.open(folder / "samples.png").height > 124
    return (folder / "report.txt").read_text()


def test_the_report_says_what_is_there_what_is_broken_and_what_is_there_twice(tmp_path, capsys):
    numbers = [*range(8), 0, *range(8, 15), 1]
    cells = [{"bytes": png(i), "path": f"{place}.png"} for place, i in enumerate(numbers)]
    cells[4] = {"bytes": b"no picture", "path": "4.png"}
    captions = [[f"a thing {i}", "one two three four five"] for i in numbers]
    captions[5] = []
    splits = ["train"] * 12 + ["val"] * 4 + ["test"]
    columns = {"image": cells, "caption": captions, "split": splits}
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "rows.parquet")
    report = look(f"{tmp_path}/rows.parquet --data.split-column split", tmp_path / "report")
    for line in (
        "rows.parquet: 17 rows\n  train:\n    12 rows, 11 different pictures, 22 captions\n",
        "    captions of a row: 0 to 2, median 2\n    words of a caption: 3 to 5, median 4; 11 different\n",
        "    pixels: width 20 to 20, median 20; height 16 to 16, median 16\n",
        "    1 picture that cannot be decoded: 4.png (row 4)\n",
        "    1 row without a caption: 5.png (row 5)\n",
        "    1 picture with several rows: 0.png (row 0) = 8.png (row 8)\n",
        "  warning: what is measured on test is partly remembered: 1 of its 1 pictures, as train has them too\n",
    ):
        assert line in report and line in capsys.readouterr().out + report
    assert json.loads((tmp_path / "report/summary.json").read_text())["train/pictures"] == 12


def test_the_sheet_is_a_seeded_sample_of_each_split_and_broken_pictures_are_on_it_by_name():
    sizes = [(2, 2)] * 99 + [None]
    overview = Overview([["a thing"]] * 100, [str(i) for i in range(100)], sizes, [f"{i}.png" for i in range(100)])
    first, second = (look_at_data.sampled(overview, look_at_data.Config(seed=seed)) for seed in (0, 1))
    assert len(first) == 8 and first == sorted(first) != second and max(first) > 50 and 99 not in first
    rows = [{"image": Image.new("RGB", (2, 2)), "captions": ["a thing"]}] * 99
    parts = list(look_at_data._samples({"set": {"train": rows}}, {"set": {"train": overview}}, look_at_data.Config()))
    assert [part.title for part in parts] == ["set: train", "set: train, cannot be decoded"]
    assert [row["captions"] for row in parts[1].rows] == [["99.png"]]


def test_a_source_may_be_drawn_mixed_or_given_captions_and_not_a_stream(tmp_path):
    source = write_source(tmp_path / "rows.parquet", range(NUM), "a thing")
    (tmp_path / "c.jsonl").write_text(
        "\n".join(json.dumps({"image_sha256": sha256(i), "caption": "new"}) for i in range(NUM))
    )
    assert "- new\n" in look(f"{source} --data.captions {tmp_path}/c.jsonl", tmp_path / "1")
    shapes = "shapes --data.shapes.num-train 6 --data.shapes.num-val 2 --data.shapes.num-test 2"
    mixed = look(shapes.replace("shapes ", f"shapes {source} ", 1), tmp_path / "2")
    assert "shapes: 14 rows" in mixed and f"{source}: 20 rows" in mixed
    with pytest.raises(UserError, match="a stream is not looked at"):
        look(f"--data.source {source} --data.streaming", tmp_path / "3")


def warnings(path: str, contrastive=True, **settings) -> list[str]:
    config = CaptionDataConfig(source=path, split_column="split", **settings)
    return training_warnings(open_source(config, 0), contrastive=contrastive)


def test_what_makes_a_run_meaningless_is_a_line_each_when_it_begins(tmp_path):
    good = write_source(tmp_path / "good.parquet", range(22), split=three_splits(6, 8))
    assert warnings(good) == [] == warnings(good, contrastive=False, batch_size=1)
    [line] = warnings(good, batch_size=1)
    assert "with one pair in a batch it is 0" in line
    shared = write_source(tmp_path / "shared.parquet", [0, 1, 2, 3, 4, 0], split=three_splits(4, 1))
    one, few, leak = warnings(shared)
    assert few.startswith("test has 1 picture: what is measured on so few says little")
    assert "val has one picture" in one and "1 of its 1 pictures, as train has them too" in leak


def make_everything(folder: Path) -> None:
    """The smallest files of each format that the page names."""
    numbers, names = range(NUM), [f"{i}.png" for i in range(NUM)]
    write_source(folder / "pictures.parquet", numbers)
    (folder / "shards").mkdir()
    write_source(folder / "shards/0.parquet", numbers)
    rows = [{"file_name": name, "caption": f"a thing {i}"} for i, name in enumerate(names)]
    for name in ("FOLDER", "WITH_TEXTS", "train2017", "flickr30k-images"):
        pictures(folder / name)
    (folder / "FOLDER/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for i in numbers:
        (folder / f"WITH_TEXTS/{i}.txt").write_text(f"a thing {i}")
    pictures(folder / "CLASSES", [f"{('cat', 'dog')[i % 2]}/{i}.png" for i in numbers])
    write_tar(folder / "tars/00000.tar", numbers, **TEXT)
    for suffix, separator, start in (("csv", ",", "FOLDER/"), ("tsv", "\t", "")):
        lines = [f"{start}{name}{separator}a thing" for name in names]
        (folder / f"list.{suffix}").write_text("\n".join([f"filepath{separator}title", *lines]))
    (folder / "annotations").mkdir()
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    coco = {"images": images, "annotations": [{"image_id": i, "caption": "a thing"} for i in numbers]}
    (folder / "annotations/captions_train2017.json").write_text(json.dumps(coco))
    splits = ["train"] * 12 + ["val", "test"] * 4
    images = [{"filename": n, "split": s, "sentences": [{"raw": "a thing"}]} for n, s in zip(names, splits)]
    (folder / "dataset_flickr30k.json").write_text(json.dumps({"images": images}))
    words = [f"thing {i}" for i in numbers]
    columns = {"image": [{"bytes": png(i), "path": None} for i in numbers], "caption_0": words, "caption_1": words}
    columns |= {"sentences": [[{"raw": word}] for word in words]}
    datasets.Dataset.from_dict(columns).to_parquet(folder / "several.parquet")
    table = [{"image_sha256": sha256(i), "caption": "new", "file_name": f"{i}.png"} for i in numbers]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, table)))
    (folder / "runs/write_captions/mine/dataset").mkdir(parents=True)
    datasets.Dataset.from_list(table).to_parquet(folder / "runs/write_captions/mine/dataset/train.parquet")


def test_every_command_of_the_page_runs_on_the_smallest_files_of_its_format(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_everything(tmp_path)
    for number, (recipe, arguments) in enumerate(commands(PAGE)):
        if "SOURCE" not in arguments and arguments.strip():
            assert recipe == "look_at_data"
            report = look(arguments, tmp_path / str(number))
            assert f"{NUM} rows" in report and "cannot be decoded" not in report and "no caption" not in report, (
                arguments
            )
    assert number > 12
