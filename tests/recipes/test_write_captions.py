"""write_captions: killed at any moment and resumed, its table is that of a job never disturbed."""

import io
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest
from PIL import Image

from mlxmm.captioners.caption_writer import Sampling
from mlxmm.captioners.filters import FilterConfig
from mlxmm.captioners.job import Shard, hashes_of
from mlxmm.captioners.journal import Entry
from mlxmm.captioners.records import Provenance
from mlxmm.data.caption_source import CaptionDataConfig, open_source
from mlxmm.data.pictures import open_pictures, open_split
from mlxmm.errors import UserError
from mlxmm.storage.runs import Run
from recipes.parts.captioners import JobConfig
from recipes.parts.publishing import Captions, DatasetConfig, make_dataset

ROOT = Path(__file__).parents[2]
SHAPES = ["--captioner.model", "shapes", "--data.shapes.num-train", "400", "--captioner.batch-size", "4"]


def command(*flags):
    return [sys.executable, "-m", "recipes.write_captions", *map(str, flags)]


def run(*flags):
    return subprocess.run(command(*flags), cwd=ROOT, capture_output=True, text=True, timeout=120)


def table(path) -> list[tuple]:
    """All captions in the order of their keys, without the time of writing."""
    with sqlite3.connect(path) as connection:
        rows = connection.execute("SELECT * FROM captions ORDER BY image, prompt").fetchall()
    return [row[:-1] for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("write") / "whole"
    done = run(*SHAPES, "--prompts", "short", "alt", "--run-dir", folder)
    assert done.returncode == 0, done.stderr
    return table(folder / "captions-1-of-1.sqlite")


def test_a_job_killed_at_random_moments_ends_as_one_never_disturbed(whole, tmp_path):
    folder, rng, written = tmp_path / "killed", random.Random(0), [0]
    flags = [*SHAPES, "--prompts", "short", "alt", "--run-dir", folder]
    for _ in range(4):
        child = subprocess.Popen(command(*flags), cwd=ROOT, stdout=subprocess.DEVNULL)
        journal = folder / "captions-1-of-1.sqlite"
        while not journal.exists() and child.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.6))
        child.kill()
        assert child.wait() in (-signal.SIGKILL, 0)
        flags = ["--run-dir", folder, "--resume", "last"]
        written.append(len(table(journal)) if journal.exists() else 0)
    assert written == sorted(written)  # nothing that was written is lost
    done = run(*flags)
    assert done.returncode == 0, done.stderr
    assert table(journal) == whole and len(whole) == 2 * len({row[0] for row in whole})
    missing = int(done.stdout.split(" of them to be written")[0].split()[-1])
    assert missing == len(whole) - written[-1]  # only what is missing is asked for


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folders = [tmp_path_factory.mktemp("shards") / str(number) for number in (1, 2)]
    for number, folder in enumerate(folders, 1):
        done = run(*SHAPES, "--prompts", "short", "alt", "--shard", f"{number}/2", "--run-dir", folder)
        assert done.returncode == 0, done.stderr
    return folders


def merge(*flags):
    program = [sys.executable, "-m", "recipes.merge_captions", *map(str, flags)]
    return subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_two_shards_merged_are_the_whole(whole, shards, tmp_path):
    done = merge(*shards, "--run-dir", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    assert table(tmp_path / "merged" / "captions-1-of-1.sqlite") == whole
    summary = json.loads((tmp_path / "merged" / "summary.json").read_text())
    assert summary["captions"] == len(whole)
    assert all(table(folder / f"captions-{number}-of-2.sqlite") for number, folder in enumerate(shards, 1))


@pytest.mark.slow
def test_shards_that_are_missing_doubled_unfinished_or_of_another_job_are_refused(shards, tmp_path):
    first, second = shards
    other, unfinished = tmp_path / "other", tmp_path / "unfinished"
    shutil.copytree(second, other)
    values = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(values | {"prompts": ["short"]}))
    shutil.copytree(second, unfinished)
    with sqlite3.connect(unfinished / "captions-2-of-2.sqlite") as connection:
        connection.execute("DELETE FROM captions WHERE prompt = 'alt'")
    cases = {
        (first,): "the shards 1/2 to 2/2 are wanted",
        (first, first): "each once; these are 1/2, 1/2",
        (first, other): "different settings",
        (first, unfinished): "captions are missing",
        (first, tmp_path): "config.json cannot be read",
        (): "name the folders",
    }
    for number, (folders, line) in enumerate(cases.items()):
        done = merge(*folders, "--run-dir", tmp_path / f"merged-{number}")
        assert done.returncode == 2 and line in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize(
    ("variables", "shard"),
    [
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "4"}, "3/4"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "2/2"),
        ({"SLURM_NTASKS": "1"}, "1/1"),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3"}, "3/3"),
        ({"MLX_RANK": "1", "NCCL_HOST_IP": "10.0.0.1", "NCCL_PORT": "9", "MLX_WORLD_SIZE": "4"}, "2/4"),
        ({}, "1/1"),
    ],
)
def test_a_rank_or_a_task_of_slurm_writes_its_shard_alone(variables, shard):
    """In a process of its own, which is a group of one from there on."""
    of_this_machine = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    code = (
        "from mlxmm.captioners.job import Shard; print(Shard.own()); from mlxmm.distributed import collectives as c; "
        "c.barrier(); print(c.rank(), c.world_size())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=of_this_machine | variables, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == [shard, "0 1"], done.stderr


def test_equal_pictures_are_captioned_once_and_a_broken_one_is_noted_with_its_reason(tmp_path):
    source = tmp_path / "pictures"
    source.mkdir()
    for name in ("one", "same"):
        Image.new("RGB", (32, 32), "red").save(source / f"{name}.png")
    (source / "broken.png").write_bytes(b"not a picture")
    from small_modules import small_aligner

    from mlxmm.networks.language_model import with_dtype

    module = small_aligner()
    module.vision_config = {"model_type": "clip_vision_model", **vars_of(module.vision.config)}
    module.lm_config = with_dtype(module.lm_config, module.language_model)
    module.save_pretrained(tmp_path / "captioner")
    flags = ["--captioner.model", tmp_path / "captioner", "--data.source", source, "--split", "all"]
    done = run(*flags, "--prompts", "none", "--run-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["pictures"], summary["captions"], summary["failed"]) == (2, 1, 1)
    [reason] = [row[8] for row in table(tmp_path / "run" / "captions-1-of-1.sqlite") if row[8]]
    assert "cannot be decoded" in reason


def test_captions_become_a_data_set_that_is_a_source_and_what_is_dropped_lies_beside_it(tmp_path):
    folder = tmp_path / "run"
    flags = [*SHAPES, "--captioner.lies", "0.3", "--include-images", "--filters.max-same-caption", "1"]
    done = run(*flags, "--data.shapes.num-val", "16", "--run-dir", folder)
    assert done.returncode == 0, done.stderr
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["dataset/captions"] + summary["dataset/dropped"] == summary["captions"] == 400
    assert summary["filters/same_caption"] == summary["dataset/dropped"] > 0
    source = open_source(CaptionDataConfig(source=str(folder / "dataset" / "default")), 0)
    rows = [rows[place] for rows in source.rows.values() for place in range(len(rows))]
    assert len(rows) == summary["dataset/pictures"] and all(row["image"].size == (32, 32) for row in rows)
    by_picture = {row[0]: row[5] for row in table(folder / "captions-1-of-1.sqlite")}
    assert {text for row in rows for text in row["captions"]} <= set(by_picture.values())
    again = run("--run-dir", folder, "--resume", "last")
    assert again.returncode == 0 and "0 of them to be written" in again.stdout


def folder_of_pictures(folder: Path, num_named: int, num: int = 20) -> CaptionDataConfig:
    folder.mkdir()
    for i in range(num):
        Image.new("RGB", (16, 16), (i * 9, 0, 0)).save(folder / f"{i:02}.png")
    rows = [json.dumps({"file_name": f"{i:02}.png", "caption": "" if i % 2 else "a thing"}) for i in range(num_named)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return CaptionDataConfig(source=str(folder))


def test_all_pictures_of_a_folder_are_captioned_or_only_those_without_a_caption(tmp_path, capsys):
    config = folder_of_pictures(tmp_path / "pictures", 12)
    pictures, split = open_split(config, 0, None)
    assert (len(pictures), split) == (20, "all")
    assert "captioned too: 8 pictures that the metadata do not name" in capsys.readouterr().out
    missing, _ = open_split(config, 0, None, only_missing=True)
    names = [missing.identity(place)["file_name"] for place in range(len(missing))]
    assert names == [f"{i:02}.png" for i in [*range(1, 12, 2), *range(12, 20)]]


def write_rows(path: Path, **columns) -> str:
    """A parquet file of pictures with these columns; its path."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    num = len(next(iter(columns.values())))
    table = datasets.Dataset.from_dict({"image": [{"bytes": file.getvalue(), "path": None}] * num, **columns})
    path.parent.mkdir(exist_ok=True)
    table.cast_column("image", datasets.Image(decode=False)).to_parquet(path)
    return str(path)


@pytest.mark.parametrize("wanted", [("caption_*",), ("caption_0", "caption_1"), ("about.text",)], ids=" ".join)
def test_a_picture_with_a_caption_in_any_of_the_columns_is_none_without(tmp_path, wanted):
    columns = {
        "caption_0": ["a", "", None],
        "caption_1": [None, "b", " "],
        "about": [{"text": t} for t in ("a", "b", "")],
    }
    config = CaptionDataConfig(source=write_rows(tmp_path / "rows.parquet", **columns), caption_column=wanted)
    assert open_split(config, 0, None, only_missing=True)[0].name(0) == "row 2"


def test_only_missing_is_refused_where_no_caption_can_be_missing_or_none_is_known(tmp_path):
    rows = write_rows(tmp_path / "rows.parquet", text=["a"])
    for name in ("cat", "dog"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "classes" / name / "1.png")
    told = {
        "shapes": "all pictures of shapes have captions",
        rows: "has no column 'caption'",
        str(tmp_path / "classes"): "has no pictures without a caption",
    }
    for source, line in told.items():
        with pytest.raises(UserError, match=line):
            open_split(CaptionDataConfig(source=source), 0, None, only_missing=True)


@pytest.mark.parametrize("of_here", [False, True])
def test_a_picture_is_named_below_the_folder_of_its_source_however_that_is_written(tmp_path, monkeypatch, of_here):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / name / "1.png")
    rows = [json.dumps({"file_name": f"{name}/1.png", "caption": "a thing"}) for name in ("a", "b")]
    (tmp_path / "pictures/metadata.jsonl").write_text("\n".join(rows))
    source = "./pictures" if of_here else str(tmp_path / "pictures")
    pictures, _ = open_split(CaptionDataConfig(source=source), 0, None)
    assert [pictures.identity(place)["file_name"] for place in (0, 1)] == ["a/1.png", "b/1.png"]


def test_a_picture_beside_tables_that_hold_theirs_is_not_captioned(tmp_path):
    source = Path(write_rows(tmp_path / "rows" / "rows.parquet", file_name=["/home/me/1.png"])).parent
    Image.new("RGB", (8, 8)).save(source / "preview.png")
    pictures, _ = open_split(CaptionDataConfig(source=str(source)), 0, None)
    assert len(pictures) == 1 and pictures.identity(0) == {"file_name": "1.png"}


def test_of_a_source_with_splits_train_is_captioned_and_what_is_left_is_said(tmp_path, capsys):
    for split, num in (("train", 5), ("val", 2), ("test", 1)):
        (tmp_path / split).mkdir()
        for i in range(num):
            Image.new("RGB", (16, 16), (i * 9, 0, num)).save(tmp_path / split / f"{i}.png")
    pictures, split = open_split(CaptionDataConfig(source=str(tmp_path)), 0, None)
    assert (len(pictures), split) == (5, "train")
    assert pictures.identity(0) == {"file_name": "train/0.png"}
    told = "captions are written of train; left: 2 pictures of val, 1 picture of test (--split val or test)"
    assert told in capsys.readouterr().out


def vars_of(config):
    import attrs

    return attrs.asdict(config)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ([], "--captioner.model is missing"),
        (["--captioner.model", "shapes", "--prompts", "nope"], "there is no prompt 'nope'"),
        (["--captioner.model", "shapes", "--shard", "4/3"], "--shard 4/3"),
        (["--captioner.model", "shapes", "--split", "holiday"], "--split holiday"),
        (["--captioner.model", "/nowhere"], "/nowhere is not there"),
        (["--captioner.model", "shapes", "--config-name", "data"], "cannot be called 'data'"),
        (["--captioner.model", "shapes", "--filters.clip", "/nowhere"], "/nowhere is not there"),
        (["--captioner.model", "shapes", "--push-to", "nowhere"], "'nowhere' is not a repository name"),
        (["--captioner.model", "shapes", "--split", "all", "--filters.min-hash-distance", "4"], "name another --split"),
        (["--captioner.model", "shapes", "--data.source", "/nowhere.parquet"], "/nowhere.parquet"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(flags, line, tmp_path):
    done = run(*flags, "--run-dir", tmp_path / "run")
    assert done.returncode == 2 and line in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "run").exists()


def test_a_filter_that_compares_pictures_passes_over_those_that_cannot_be_decoded(tmp_path):
    pytest.importorskip("imagehash")
    source = tmp_path / "pictures"
    for number in range(60):
        folder = source / ("train" if number < 40 else "test" if number < 50 else "validation")
        folder.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((32, 32), number + 20).convert("RGB").save(folder / f"{number}.png")
    for split in ("train", "test"):
        (source / split / "broken.png").write_bytes(b"not a picture")
    config = DatasetConfig(filters=FilterConfig(min_hash_distance=1), include_images=True)
    job = JobConfig(data=CaptionDataConfig(source=str(source)), split="train")
    pictures = open_pictures(job.data, 0, "train")
    places = hashes_of(pictures, Shard())
    names = {place: name for name, place in places.items()}
    broken = next(names[place] for place in range(len(pictures)) if "broken" in pictures.name(place))
    entries = [
        Entry(
            image=name,
            prompt="none",
            text="" if name == broken else f"picture {place}",
            num_tokens=2,
            finish_reason="stop",
            width=0,
            height=0,
            seconds=0.0,
        )
        for place, name in names.items()
    ]
    by = Provenance(captioner="shapes", captioner_revision="1", sampling=Sampling())
    folder = Run(tmp_path)
    make_dataset(config, job, 0, Captions(entries, pictures, places, by), folder)
    assert folder.metrics["dataset/pictures"] == 40 and folder.metrics["filters/empty"] == 1


def test_ranks_write_their_shards_alone_and_a_killed_one_goes_on(tmp_path):
    """One rank that is lost takes no other with it: they wait for nothing."""
    flags = [*SHAPES, "--data.shapes.num-train", "40", "--run-dir", tmp_path / "shards"]
    whole = run(*SHAPES, "--data.shapes.num-train", "40", "--run-dir", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    first, lost = (as_rank(number, *flags) for number in (0, 1))
    lost.kill()
    assert first.wait(60) == 0 and lost.wait(60) == -signal.SIGKILL
    again = as_rank(1, *flags, *(["--resume", "last"] if (tmp_path / "shards/shard-2-of-2").exists() else []))
    assert again.wait(60) == 0
    done = merge(*sorted((tmp_path / "shards").iterdir()), "--run-dir", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    assert table(tmp_path / "merged/captions-1-of-1.sqlite") == table(tmp_path / "whole/captions-1-of-1.sqlite")


def as_rank(number, *flags):
    """As `mpirun -n 2` starts it, but without anything to meet at."""
    variables = {"OMPI_COMM_WORLD_RANK": str(number), "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    return subprocess.Popen(command(*flags), cwd=ROOT, env=os.environ | variables, stdout=subprocess.DEVNULL)


def test_ranks_need_a_common_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "2")
    done = run(*SHAPES)
    assert done.returncode == 2 and done.stderr.startswith("error: --run-dir is missing")
