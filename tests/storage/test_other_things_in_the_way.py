"""Where a file should be there is a folder, a pipe, a link to nothing or a name that is too long: one line, or the run
goes on; in every place alike."""

import errno
import json
import os
import signal
import sys

import numpy as np
import pytest

from mlxmm.cli import run_recipe
from mlxmm.config import Preset
from mlxmm.data.feature_cache import cached_features
from mlxmm.errors import UserError
from mlxmm.storage import checkpoint, json_values
from mlxmm.storage.atomic import write_text
from mlxmm.storage.cache import cached
from mlxmm.storage.disk import going_on, read_text
from mlxmm.storage.pretrained import read_json
from mlxmm.storage.runs import RunConfig, open_run
from mlxmm.training.loggers import JSONLLogger


def folder(path):
    path.mkdir()


def link_to_nothing(path):
    path.symlink_to(path.with_name("no") / "where")


@pytest.fixture
def not_waiting():
    """What waits for a pipe ends with a failure."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits for a pipe"))
    signal.alarm(5)
    yield
    signal.alarm(0)


@pytest.mark.parametrize("make", [folder, os.mkfifo, link_to_nothing])
def test_a_state_that_is_no_file_is_named_in_one_line(tmp_path, not_waiting, make):
    make(tmp_path / "state.json")
    with pytest.raises(UserError, match="state.json") as error:
        checkpoint.read_state(tmp_path)
    assert "\n" not in str(error.value) and checkpoint.step_of(tmp_path) == -1


@pytest.mark.parametrize("name", ["features.bin", "blocks.jsonl"])
def test_a_pipe_in_the_place_of_cached_features_is_refused_at_once(tmp_path, not_waiting, name):
    os.mkfifo(tmp_path / name)
    pixels = lambda row: np.zeros((2, 2, 3), np.uint8)
    with pytest.raises(OSError, match=f"neither a file nor a link to one: '.*{name}'"):
        cached_features(tmp_path, [{}, {}], pixels, lambda images: images.reshape(-1, 1, 12))


@pytest.mark.parametrize("make", [folder, os.mkfifo])
def test_a_config_that_is_no_file_is_refused_at_once(tmp_path, not_waiting, make):
    make(tmp_path / "config.json")
    with pytest.raises(UserError, match=r"config\.json cannot be read: Is "):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("make", [folder, link_to_nothing])
def test_metrics_that_cannot_be_written_cost_themselves_alone(tmp_path, capsys, make):
    make(tmp_path / "metrics.jsonl")
    logger = JSONLLogger(tmp_path)
    logger.rewind(10, 1)
    logger.log_metrics({"loss": 1.0}, 1, 0)
    logger.log_metrics({"loss": 1.0}, 2, 0)
    assert capsys.readouterr().out.count("warning: JSONLLogger cannot write, the run goes on: ") == 1


def test_a_result_in_whose_place_is_a_folder_costs_itself_alone(tmp_path, capsys):
    folder(tmp_path / "samples.png")
    with going_on("samples.png"):
        write_text(tmp_path / "samples.png", "x")
    assert "samples.png cannot be written, the run goes on" in capsys.readouterr().out
    assert os.listdir(tmp_path) == ["samples.png"]


@pytest.mark.parametrize("way", ["a" * 300, "file/in/it", "loop"])
def test_a_folder_that_cannot_be_is_one_line(tmp_path, monkeypatch, capsys, way):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch(), (tmp_path / "loop").symlink_to("loop")
    monkeypatch.setattr(sys, "argv", ["test", "--run-dir", way])

    def main(config):
        with open_run(config, "test"):
            pytest.fail("it began")

    with pytest.raises(SystemExit) as ended:
        run_recipe("test", main, {"default": Preset("", RunConfig())})
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.startswith("error: ") and told.count("\n") == 1


@pytest.mark.parametrize("root", ["file", "file/cache", "link", "a" * 300])
def test_a_cache_that_cannot_be_is_one_line(tmp_path, monkeypatch, root):
    (tmp_path / "file").touch(), (tmp_path / "link").symlink_to("no/where")
    monkeypatch.setenv("MLXMM_CACHE", str(tmp_path / root))
    with pytest.raises((UserError, OSError)) as error:
        cached("thing", 1, lambda folder: None)
    assert isinstance(error.value, UserError) or error.value.errno == errno.ENAMETOOLONG


def test_json_of_any_depth_is_a_value_or_a_ValueError(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[" * 100_000)
    for read in (json_values.read, lambda path: json_values.loads(path.read_bytes())):
        with pytest.raises(ValueError, match="nested too deeply"):
            read(path)


def test_texts_are_read_and_written_in_utf_8_whatever_they_hold(tmp_path):
    write_text(tmp_path / "a.jsonl", json.dumps("caf\xe9 \udcff", ensure_ascii=False))
    assert (tmp_path / "a.jsonl").read_bytes() == b'"caf\xc3\xa9 \\udcff"'
    assert json.loads(read_text(tmp_path / "a.jsonl")) == "caf\xe9 \udcff"
