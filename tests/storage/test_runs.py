"""A run's folder: made once, found again, begun anew where it left no checkpoint."""

import json

import pytest

from mlxmm.errors import UserError
from mlxmm.storage.cache import cached
from mlxmm.storage.runs import RunConfig, open_run


def test_a_run_stopped_before_its_first_checkpoint_begins_its_metrics_anew(tmp_path):
    run = open_run(RunConfig(run_dir=tmp_path / "r"), "test")
    (run.folder / "metrics.jsonl").write_text('{"step": 5}\n')
    (run.folder / "events.out.tfevents.1.host").write_bytes(b"x")
    again = open_run(RunConfig(run_dir=tmp_path / "r", resume="last"), "test")
    assert again.ckpt_path is None and [path.name for path in again.folder.iterdir()] == ["config.json"]


def test_a_folder_that_exists_is_no_new_run(tmp_path):
    (tmp_path / "r").mkdir()
    with pytest.raises(UserError, match="exists: name another --run-dir, or add --resume last"):
        open_run(RunConfig(run_dir=tmp_path / "r"), "test")
    assert not list((tmp_path / "r").iterdir())


def test_what_is_cached_is_made_once_for_each_key_and_not_at_all_if_making_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXMM_CACHE", str(tmp_path))
    made = []

    def make(folder):
        made.append(folder)
        (folder / "x.json").write_text(json.dumps(len(made)))

    first = cached("thing", {"seed": 0}, make)
    assert cached("thing", {"seed": 0}, make) == first and len(made) == 1
    assert cached("thing", {"seed": 1}, make) != first and len(made) == 2

    def fail(folder):
        (folder / "half").write_text("")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        cached("thing", {"seed": 2}, fail)
    assert len(list(tmp_path.iterdir())) == 2
