"""`caption` on a folder of pictures: which it finds, where the table goes, and that training reads it."""

import csv
import json
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image
from small_modules import save_aligner

from mlxmm.cli import run_recipe
from mlxmm.config import Preset
from mlxmm.preprocessing.picture_folder import files_below


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    folder = tmp_path_factory.mktemp("captioner") / "module"
    save_aligner(folder)
    return folder


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Run a recipe in an empty folder: its exit code, its output and its errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLXMM_CACHE", str(tmp_path / "cache"))

    def run(recipe, *flags):
        monkeypatch.setattr(sys, "argv", [recipe, *map(str, flags)])
        monkeypatch.delitem(sys.modules, f"recipes.{recipe}", raising=False)  # to be run as the main module
        code = 0
        try:
            runpy.run_module(f"recipes.{recipe}", run_name="__main__")
        except SystemExit as exit:
            code = exit.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def holiday(tmp_path):
    """A folder with three pictures, one in a subfolder, and files that are not read."""
    for i, name in enumerate(("a.png", "b.JPG", "beach/c.png")):
        path = tmp_path / "holiday" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (60 * i, 0, 0)).save(path)
    for name in ("IMG_1.HEIC", "beach/IMG_2.CR2", ".hidden.png", "notes.txt"):
        (tmp_path / "holiday" / name).write_text("")
    return Path("holiday")


def names_in(table: Path) -> list[str]:
    with table.open() as file:
        return [row["file_name"] for row in csv.DictReader(file)]


def test_subfolders_are_captioned_and_what_is_not_read_is_named(run, captioner, holiday):
    code, told, errors = run("caption", "--module", captioner, holiday)
    assert code == 0, errors
    assert [line.partition(":")[0] for line in told.splitlines()] == [
        f"{holiday}/{n}" for n in ("a.png", "b.JPG", "beach/c.png")
    ]
    assert f"left out, 2 files that are not read: {holiday}/IMG_1.HEIC, {holiday}/beach/IMG_2.CR2\n" in errors
    code, told, errors = run(
        "write_captions", "--captioner.model", captioner, "--data.source", holiday, "--run-dir", "w"
    )
    assert code == 0, errors
    assert "3 pictures, 3 captions" in told and "left out, 2 files that are not read: " in told
    assert told.count("left out") == 1


def test_a_folder_whose_name_is_that_of_a_picture_is_none(tmp_path):
    for name in ("a.jpg/b.png", "a.jpg/.thumbnails/b.png", ".c.png", "d.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [path.relative_to(tmp_path).as_posix() for path in files_below(tmp_path)] == ["a.jpg/b.png", "d.png"]


def test_the_folder_of_the_table_is_made_before_anything_is_captioned(run, captioner, holiday, tmp_path):
    table = tmp_path / "out" / "deep" / "c.csv"
    assert run("caption", "--module", captioner, holiday, "--to", table)[0] == 0
    assert names_in(table) == [f"{holiday}/{name}" for name in ("a.png", "b.JPG", "beach/c.png")]
    (tmp_path / "file").write_text("")
    code, told, errors = run("caption", "--module", captioner, holiday, "--to", "file/c.csv")
    assert (code, told) == (2, "") and errors.splitlines()[-1].startswith("error: file cannot be made: ")


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_a_table_beside_its_pictures_names_them_as_training_wants_it(run, captioner, holiday, name):
    assert run("caption", "--module", captioner, holiday, "--to", holiday / name)[0] == 0
    table = (holiday / name).read_text()
    if name.endswith(".csv"):
        assert names_in(holiday / name) == ["a.png", "b.JPG", "beach/c.png"]
    else:
        assert [json.loads(line)["file_name"] for line in table.splitlines()] == ["a.png", "b.JPG", "beach/c.png"]
    code, told, errors = run("look_at_data", holiday, "--to", "look")
    assert code == 0 and "3 rows" in told, errors


def test_a_table_that_was_interrupted_is_gone_on_with(run, captioner, holiday, monkeypatch):
    flags = ["caption", "--module", captioner, holiday, "--to", "c.csv"]
    whole = run(*flags)[1]
    complete = Path("c.csv").read_text()
    Path("c.csv").write_text("".join(complete.splitlines(keepends=True)[:2]))
    code, _, errors = run(*flags)
    assert code == 2 and "c.csv exists: name another file, or add --append" in errors
    code, told, errors = run(*flags, "--append")
    assert code == 0 and told == "".join(whole.splitlines(keepends=True)[1:]), errors
    assert "c.csv has 1 of 3 pictures" in errors and Path("c.csv").read_text() == complete
    assert run(*flags, "--append")[:2] == (0, "") and Path("c.csv").read_text() == complete
    Path("c.csv").write_text("file_name,title\na.png,a\n")
    code, _, errors = run(*flags, "--append")
    assert code == 2 and "c.csv is no table of `caption`" in errors and "title" in Path("c.csv").read_text()
    assert "--append needs --to" in run("caption", "--module", captioner, holiday, "--append")[2]


def test_ctrl_c_keeps_the_captions_and_names_the_command_that_goes_on(
    captioner, holiday, monkeypatch, capsys, tmp_path
):
    from recipes import caption

    monkeypatch.chdir(tmp_path)
    tell, told = caption.tell, []

    def interrupted_after_one(path, pieces):
        if told:
            raise KeyboardInterrupt
        told.append(path)
        return tell(path, pieces)

    monkeypatch.setattr(caption, "tell", interrupted_after_one)
    monkeypatch.setattr(sys, "argv", ["caption", "--module", str(captioner), str(holiday), "--to", "c.csv"])
    with pytest.raises(SystemExit):
        run_recipe("caption", caption.main, {"default": Preset("", caption.Config())})
    last = capsys.readouterr().err.splitlines()[-1]
    assert "kept 1 caption in c.csv; go on with: " in last and last.endswith(f"{holiday} --to c.csv --append")
    assert names_in(Path("c.csv")) == ["holiday/a.png"]


def test_what_write_captions_fails_on_is_named_with_its_reason_and_equal_files_are_counted(run, captioner, holiday):
    for i in range(7):
        (holiday / f"broken{i}.png").write_text(f"no picture {i}")
    (holiday / "copy.png").write_bytes((holiday / "a.png").read_bytes())
    code, told, errors = run(
        "write_captions", "--captioner.model", captioner, "--data.source", holiday, "--run-dir", "w"
    )
    assert code == 0, errors
    lines = [line for line in told.splitlines() if line.startswith("failed, ")]
    assert len(lines) == 6 and lines[-1] == "failed, and 2 captions more"
    assert all("broken" in line and "the picture cannot be decoded: " in line for line in lines[:-1])
    assert "10 pictures, 10 captions" in told
    assert "1 more, equal to one of these, are captioned with it" in told


@pytest.mark.parametrize("recipe", ["caption", "serve"])
def test_a_run_without_a_model_is_unfinished_and_one_that_has_some_names_it(run, recipe, holiday, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.json").write_text(json.dumps({"run_dir": "mine", "seed": 0, "data": {}}))
    flags = ["--module", "mine", holiday] if recipe == "caption" else ["mine"]
    code, _, errors = run(recipe, *flags)
    assert code == 2 and errors.splitlines()[-1].startswith("error: mine is the folder of a run that has no model yet")
    assert errors.endswith("--run-dir mine --resume last\n")


def test_a_folder_that_is_not_there_is_said_before_what_the_hub_said(run):
    errors = run("serve", "runs/nosuch")[2]
    assert errors.startswith("error: runs/nosuch is no folder here, and not to be had from the Hub: ")


def test_an_evaluation_names_its_split_and_warns_of_few_pictures(run, captioner, holiday):
    assert run("caption", "--module", captioner, holiday, "--to", holiday / "metadata.csv")[0] == 0
    code, told, errors = run("evaluate_captions", "--module", captioner, "--data.source", holiday, "--run-dir", "e")
    assert code == 0, errors
    assert "evaluating on test, 1 picture\nwarning: test has 1 picture: what is measured on so few says little" in told


def test_a_job_with_nothing_left_to_write_shows_no_bar(run, captioner, holiday):
    flags = ["--captioner.model", captioner, "--data.source", holiday, "--run-dir", "w"]
    assert run("write_captions", *flags)[0] == 0
    code, told, errors = run("write_captions", "--run-dir", "w", "--resume", "last")
    assert code == 0 and "0 of them to be written" in told and "0/0" not in told + errors, errors


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems take no such names")
@pytest.mark.parametrize("table", ["captions.csv", "captions.jsonl"])
def test_a_file_whose_name_is_no_text_costs_no_caption(run, captioner, holiday, table):
    (holiday / "a.png").rename(holiday / "a\udcff.png")
    assert run("caption", "--module", captioner, holiday, "--to", holiday / table)[0] == 0
    written = (holiday / table).read_text(encoding="utf-8")
    assert written.count("udcff.png") == 1 and "b.JPG" in written and "beach/c.png" in written
    code, _, told = run("caption", "--module", captioner, holiday, "--to", holiday / table, "--append")
    assert code == 0 and "has 3 of 3 pictures" in told, told


def test_a_prompt_that_is_no_text_is_one_line(run, captioner, holiday):
    code, _, told = run("caption", "--module", captioner, holiday, "--prompt", "a\udcffb")
    assert code == 2 and told.splitlines()[-1] == r"error: a\udcffb is not a text in UTF-8"
