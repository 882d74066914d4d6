"""A run's folder: made once, found again without being touched, and closed with a summary that no recipe can forget."""

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import DistinctBatches, TinyRegression

from mlxmm import Callback, Trainer
from mlxmm.callbacks import ModelCheckpoint
from mlxmm.cli import parse_config, run_recipe
from mlxmm.config import Preset
from mlxmm.errors import UserError
from mlxmm.storage import checkpoint, checksums
from mlxmm.storage.cache import cached
from mlxmm.storage.runs import RunConfig, TrainingRunConfig, open_run, table

PRESETS = {"default": Preset("", TrainingRunConfig())}


def stopped_run(folder: Path, **settings) -> Path:
    """A run that logged something and was killed."""
    with pytest.raises(KeyboardInterrupt), open_run(TrainingRunConfig(run_dir=folder, **settings), "test") as run:
        (run.folder / "metrics.jsonl").write_text('{"step": 5}\n')
        (run.folder / "events.out.tfevents.1.host").write_bytes(b"x")
        raise KeyboardInterrupt
    return folder


def interrupted(capsys, flags: list[str], main) -> tuple[int, str, str]:
    """The exit code, standard output and standard error of a recipe."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["test", *flags])
        run_recipe("test", main, PRESETS)
    return ended.value.code, *capsys.readouterr()


def train_until(number: int, *, step: int):
    """A recipe that trains, and gets a signal in an update, or after training if the step does not come."""

    class Kill(Callback):
        def on_train_batch_start(self, trainer, module, batches):
            if trainer.global_step == step:
                os.kill(os.getpid(), number)

    def main(config):
        with open_run(config, "test") as run:
            trainer = Trainer(max_steps=4, default_root_dir=run.folder, callbacks=[Kill(), ModelCheckpoint()])
            trainer.fit(TinyRegression(), DistinctBatches(), ckpt_path=run.ckpt_path)
            os.kill(os.getpid(), number)

    return main


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
@pytest.mark.parametrize(("step", "kept"), [(1, "step=2"), (9, "step=4")])
def test_a_signal_ends_a_recipe_with_one_line_that_says_what_was_kept_and_how_to_go_on(
    tmp_path, capsys, number, step, kept
):
    folder = tmp_path / "a run"
    code, out, err = interrupted(capsys, ["--run-dir", str(folder)], train_until(number, step=step))
    last = err.splitlines()[-1]
    assert code == 128 + number and "Traceback" not in err and out.startswith(f"run: {folder}\n")
    assert last.startswith(f"interrupted: kept {folder}/checkpoints/{kept}; go on with: ")
    assert last.endswith(f" -m recipes.test --run-dir '{folder}' --resume last")


def test_a_recipe_that_is_interrupted_before_it_wrote_anything_keeps_nothing(tmp_path, capsys):
    def main(config):
        with open_run(config, "test"):
            os.kill(os.getpid(), signal.SIGINT)

    code, _, err = interrupted(capsys, ["--run-dir", str(tmp_path / "r")], main)
    assert (code, err) == (130, "interrupted: nothing was kept\n") and not (tmp_path / "r").exists()


def test_a_full_disk_ends_a_recipe_with_one_line(tmp_path, capsys):
    def main(config):
        with open("/dev/full", "w") as file:
            file.write("x" * 100_000)

    code, _, err = interrupted(capsys, [], main)
    assert (code, err) == (2, "error: No space left on device\n")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def checkpoints(folder: Path, steps: int = 4) -> Path:
    """A run with checkpoints of the steps 2 and 4."""
    with open_run(TrainingRunConfig(run_dir=folder), "test") as run:
        save = ModelCheckpoint(every_n_train_steps=2, save_top_k=-1, monitor="val/loss", background=False)
        settings = {"max_steps": steps, "default_root_dir": run.folder, "val_check_interval": 2}
        trainer = Trainer(**settings, callbacks=[save], logger=False, enable_model_summary=False)
        trainer.fit(TinyRegression(), train_dataloaders=DistinctBatches(), val_dataloaders=DistinctBatches(1))
    return folder


@pytest.mark.parametrize("flags", [["--help"], ["--help-all"], ["--seed", "no"], ["--nonsense"], []])
def test_parsing_flags_of_a_run_to_be_resumed_touches_no_file(tmp_path, flags):
    folder = stopped_run(tmp_path / "r")
    before = contents(folder)
    try:
        parse_config("test", PRESETS, ["--resume", "last", "--run-dir", str(folder), *flags])
    except (SystemExit, UserError):
        pass
    assert contents(folder) == before and "metrics.jsonl" in before


def test_a_run_stopped_before_its_first_checkpoint_starts_its_metrics_again_when_it_is_opened(tmp_path):
    folder = stopped_run(tmp_path / "r")
    with open_run(TrainingRunConfig(run_dir=folder, resume="last"), "test") as again:
        assert again.ckpt_path is None and list(contents(folder)) == ["config.json"]


def test_a_folder_that_exists_is_no_new_run(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "notes").touch()
    with pytest.raises(UserError, match="exists: name another --run-dir, or add --resume last"):
        with open_run(RunConfig(run_dir=tmp_path / "r"), "test"):
            pass
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["notes"]


@pytest.mark.parametrize("left", [[], [".tmp-4194304999-config.json"]], ids=["empty", "killed at its beginning"])
def test_a_folder_in_which_nothing_was_begun_may_be_a_new_run(left, tmp_path):
    for name in left:
        (tmp_path / name).write_text("{")
    with open_run(TrainingRunConfig(run_dir=tmp_path), "test"):
        assert {path.name for path in tmp_path.iterdir()} == {"config.json"}
    with pytest.raises(UserError, match="exists"), open_run(TrainingRunConfig(run_dir=tmp_path), "test"):
        pass


def test_a_new_run_that_fails_before_it_wrote_anything_leaves_no_folder(tmp_path):
    with pytest.raises(UserError, match="no such column"), open_run(RunConfig(run_dir=tmp_path / "r"), "test"):
        raise UserError("no such column")
    assert not (tmp_path / "r").exists()


def test_a_resumed_run_that_fails_keeps_its_folder(tmp_path):
    folder = checkpoints(tmp_path / "r")
    (folder / "summary.json").unlink()
    with pytest.raises(UserError), open_run(TrainingRunConfig(run_dir=folder, resume="last"), "test"):
        raise UserError("no such column")
    assert (folder / "checkpoints" / "last").exists()


def test_every_run_ends_with_a_summary_a_table_and_where_the_results_are(tmp_path, capsys):
    with open_run(RunConfig(run_dir=tmp_path / "r"), "test") as run:
        (run.folder / "samples.png").write_bytes(b"x")
        run.report({"accuracy": 0.5, "accuracy_chance": 0.25})
        run.report({"pictures": 8, "skipped": ["a"]})
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary.pop("seconds") >= 0
    assert summary == {"accuracy": 0.5, "accuracy_chance": 0.25, "pictures": 8, "skipped": ["a"]}
    printed = capsys.readouterr().out
    assert f"samples: {tmp_path / 'r' / 'samples.png'}" in printed and table(summary) in printed
    assert "curves" not in printed and [line.split() for line in table(summary).splitlines()] == [
        ["chance"],
        ["accuracy", "0.5000", "0.2500"],
        ["pictures", "8"],
    ]


def test_a_run_that_fails_has_no_summary(tmp_path):
    folder = stopped_run(tmp_path / "r")
    assert not (folder / "summary.json").exists()


def test_a_checkpoint_is_hashed_once_from_the_flags_to_the_first_update(tmp_path, monkeypatch):
    folder, hashed = checkpoints(tmp_path / "r"), []
    checksums._known.clear()
    sha256 = checksums.sha256
    monkeypatch.setattr(checksums, "sha256", lambda path: hashed.append(path.name) or sha256(path))
    config = parse_config("test", PRESETS, ["--resume", "last", "--run-dir", str(folder)])
    with open_run(config, "test") as run:
        trainer = Trainer(max_steps=5, logger=False, enable_model_summary=False, enable_checkpointing=False)
        trainer.fit(TinyRegression(), train_dataloaders=DistinctBatches(), ckpt_path=run.ckpt_path)
    assert sorted(hashed) == ["optimizer.safetensors", "weights.safetensors"]


def test_a_file_that_changed_is_hashed_again(tmp_path):
    folder = checkpoints(tmp_path / "r") / "checkpoints" / "step=4"
    checkpoint.read_state(folder)
    weights = folder / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, (1, 1))
    with pytest.raises(UserError, match="weights.safetensors is missing or damaged"):
        checkpoint.read_state(folder)


def test_a_damaged_checkpoint_is_skipped_and_if_all_are_the_damaged_file_is_named_and_nothing_deleted(tmp_path, capsys):
    folder = checkpoints(tmp_path / "r")
    (folder / "metrics.jsonl").write_text("{}\n")
    (folder / "checkpoints/step=4/weights.safetensors").write_bytes(b"cut")
    with open_run(TrainingRunConfig(run_dir=folder, resume="last"), "test") as run:
        assert run.ckpt_path.name == "step=2"
    assert "skipped" in capsys.readouterr().out
    (folder / "checkpoints/step=2/optimizer.safetensors").unlink()
    with pytest.raises(UserError, match="step=4/weights.safetensors is missing or damaged"):
        with open_run(TrainingRunConfig(run_dir=folder, resume="last"), "test"):
            pass
    assert (folder / "metrics.jsonl").exists()


def test_a_damaged_checkpoint_that_is_named_is_refused_when_the_run_is_opened(tmp_path):
    folder = checkpoints(tmp_path / "r")
    (folder / "checkpoints/step=2/optimizer.safetensors").write_bytes(b"cut")
    resume = str(folder / "checkpoints" / "step=2")
    with pytest.raises(UserError, match="step=2/optimizer.safetensors is missing or damaged"):
        with open_run(TrainingRunConfig(resume=resume), "test"):
            raise AssertionError("data are opened")


def test_the_settings_of_a_run_come_back_when_it_is_resumed_and_flags_change_them(tmp_path):
    folder = stopped_run(tmp_path / "r", seed=7)
    flags = ["--resume", "last", "--run-dir", str(folder)]
    assert parse_config("test", PRESETS, flags).seed == 7
    assert parse_config("test", PRESETS, [*flags, "--seed", "8"]).seed == 8
    (folder / "config.json").write_text('{"seed": "many"}')
    with pytest.raises(UserError, match=r"TrainingRunConfig cannot be read: invalid value for type, expected int"):
        parse_config("test", PRESETS, flags)


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


DAMAGES = {
    "flipped": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:3]),
    "emptied": lambda path: path.write_bytes(b""),
    "of another type": lambda path: path.write_text("[1]"),
    "missing": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", ["x.json", "checksums.json"])
def test_a_damaged_folder_of_the_cache_is_made_again_and_said(tmp_path, monkeypatch, capsys, name, damage):
    monkeypatch.setenv("MLXMM_CACHE", str(tmp_path))
    make = lambda folder: (folder / "x.json").write_text('{"a": 1}')
    folder = cached("thing", {}, make)
    before = contents(folder)
    damage(folder / name)
    assert cached("thing", {}, make) == folder and contents(folder) == before
    assert "the cache is damaged: " in (told := capsys.readouterr().out) and str(folder) in told
    assert cached("thing", {}, make) == folder and not capsys.readouterr().out


def test_what_a_killed_process_left_in_the_cache_is_swept(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXMM_CACHE", str(tmp_path))
    (tmp_path / ".tmp-1-thing").mkdir()
    cached("thing", {}, lambda folder: None)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("text", [None, "", '{"seed": 1', "[]", '{"seed": {}}', '{"sead": 1}', "[" * 100_000])
def test_a_run_whose_settings_are_missing_or_damaged_is_not_resumed_with_others(tmp_path, text):
    folder = stopped_run(tmp_path / "r", seed=7)
    path, flags = folder / "config.json", ["--resume", "last", "--run-dir", str(folder)]
    path.unlink()
    if text is not None:
        path.write_text(text)
    before = contents(folder)
    with pytest.raises(UserError, match=f"{path}.*; to resume the run without that file, give --preset and its flags"):
        parse_config("test", PRESETS, flags)
    assert parse_config("test", PRESETS, [*flags, "--preset", "default", "--seed", "7"]).seed == 7
    assert contents(folder) == before


@pytest.mark.parametrize("change", [{"global_step": 5}, {"checksum": 0}, {"checksum": None}, {"more": 1}])
def test_a_state_that_is_not_what_was_saved_is_named(tmp_path, change):
    folder = checkpoints(tmp_path / "r") / "checkpoints" / "last"
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | change))
    with pytest.raises(UserError, match="state.json is damaged; take another checkpoint"):
        checkpoint.read_state(folder)


def test_a_state_of_another_format_is_named(tmp_path):
    folder = checkpoints(tmp_path / "r") / "checkpoints" / "last"
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"format": "x"}))
    with pytest.raises(UserError, match="state.json has format 'x', expected was 3: use the mlxmm that wrote it"):
        checkpoint.read_state(folder)


def test_a_checkpoint_that_was_being_replaced_when_the_run_was_killed_is_resumed_from(tmp_path):
    folder = checkpoints(tmp_path / "r")
    (folder / "checkpoints/step=4").rename(folder / "checkpoints/.old-step=4")
    (folder / "checkpoints/.tmp-1-step=4").mkdir()
    with open_run(TrainingRunConfig(run_dir=folder, resume="last"), "test") as run:
        assert run.ckpt_path.name == "step=4" and not list((folder / "checkpoints").glob(".*"))


def test_a_run_whose_settings_the_disk_does_not_take_leaves_no_folder(tmp_path, full_disk):
    full_disk(10)
    with pytest.raises(OSError, match="config.json"), open_run(RunConfig(run_dir=tmp_path / "r"), "test"):
        pass
    assert not (tmp_path / "r").exists()


def test_arrays_of_a_verified_checkpoint_are_those_that_were_saved(tmp_path):
    folder = checkpoints(tmp_path / "r") / "checkpoints" / "last"
    assert all(mx.isfinite(array).all() for array in checkpoint.load(folder)["weights"].values())


def test_two_runs_that_begin_in_the_same_second_have_a_folder_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda format: "2026-01-01_00-00-00")
    folders = []
    for _ in range(3):
        with open_run(RunConfig(), "test") as run:
            folders.append(run.folder.name)
    assert folders == ["2026-01-01_00-00-00", "2026-01-01_00-00-00_2", "2026-01-01_00-00-00_3"]


def resume(folder: Path) -> str:
    try:
        with open_run(TrainingRunConfig(run_dir=folder, resume="last"), "test"):
            return "opened"
    except UserError as error:
        return str(error)


def test_a_run_that_another_process_has_open_is_not_resumed_and_its_log_stays(tmp_path):
    processes = multiprocessing.get_context("fork")
    with open_run(TrainingRunConfig(run_dir=tmp_path / "r"), "test") as run:
        (run.folder / "metrics.jsonl").write_text('{"step": 5}\n')
        with processes.Pool(1) as pool:
            assert pool.apply(resume, [run.folder]).startswith(f"another process is writing the run in {run.folder}: ")
        assert (run.folder / "metrics.jsonl").exists()
    assert resume(tmp_path / "r") == "opened"
