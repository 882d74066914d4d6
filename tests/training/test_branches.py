"""A run that goes back to an earlier checkpoint, copies of a run, and whatever else lies among its checkpoints."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DistinctBatches, TinyRegression

from mlxmm import Callback, Trainer
from mlxmm.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from mlxmm.distributed.signals import Interrupted
from mlxmm.errors import UserError
from mlxmm.storage import checkpoint
from mlxmm.storage.atomic import follow_link
from mlxmm.storage.runs import Run, find_run


class Kill(Callback):
    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(self, trainer, module, metrics, batches):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def fit(make_trainer, tmp_path):
    def fit(max_steps, ckpt_path=None, *, root=tmp_path / "run", callbacks=(), keep=None, **settings):
        keep = keep or ModelCheckpoint(every_n_train_steps=5, monitor="train/loss", save_top_k=-1)
        settings = {"max_steps": max_steps, "default_root_dir": root, "log_every_n_steps": 1} | settings
        trainer = make_trainer(callbacks=[*callbacks, keep], **settings)
        trainer.fit(TinyRegression(), DistinctBatches(), DistinctBatches(2), ckpt_path=ckpt_path)
        return trainer

    return fit


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def logged_steps(run: Path) -> list[int]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "train/loss" in line]


def test_last_is_the_newest_checkpoint_of_the_branch_that_goes_on_and_the_other_branch_is_set_aside(fit, tmp_path):
    folder = tmp_path / "run/checkpoints"
    fit(30, logger=True)
    with pytest.raises(Interrupted):
        fit(30, folder / "step=10", callbacks=[Kill(14)], logger=True)
    assert names(folder) == {"step=5", "step=6", "step=10", "step=12", "step=14", "last", "best", "abandoned_0"}
    assert names(folder / "abandoned_0") == {f"step={n}" for n in (12, 15, 18, 20, 24, 25, 30)}
    assert checkpoint.latest(folder).name == (folder / "last").readlink().name == "step=14"
    assert logged_steps(folder.parent) == list(range(1, 15))
    assert fit(16, "last", logger=True).ckpt_path.name == "step=14"
    assert logged_steps(folder.parent) == list(range(1, 17))
    fit(6, folder / "step=5", logger=True)  # a second time, to an even earlier one
    assert names(folder / "abandoned_1") == {f"step={n}" for n in (6, 10, 12, 14, 15, 16)}
    assert logged_steps(folder.parent) == list(range(1, 7))


def test_a_run_killed_right_after_it_went_back_goes_on_from_there(fit, tmp_path):
    class Die(Callback):
        def on_train_start(self, trainer, module):
            raise RuntimeError("as a kill does: no checkpoint is saved")

    fit(30, logger=True)
    best = tmp_path / "run/checkpoints/best"
    with pytest.raises(RuntimeError):
        fit(30, tmp_path / "run/checkpoints/step=10", callbacks=[Die()], logger=True)
    assert fit(11, "last", logger=True).ckpt_path.name == "step=10" and logged_steps(tmp_path / "run")[-2:] == [10, 11]
    assert best.resolve().name in {"step=5", "step=6", "step=10", "step=11"}  # of this branch


def test_a_run_that_goes_back_ends_as_the_run_that_never_went_on(fit, tmp_path):
    fit(30, root=tmp_path / "run", logger=True)
    fit(20, tmp_path / "run/checkpoints/step=10", logger=True)
    fit(20, root=tmp_path / "whole", logger=True)
    files = [tmp_path / name / "checkpoints/step=20/weights.safetensors" for name in ("run", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert logged_steps(tmp_path / "run") == logged_steps(tmp_path / "whole")


@pytest.mark.parametrize("stray", ["step=10 copy", "step=abc", "step=010", "step=", "step=10.tar"])
@pytest.mark.parametrize("ckpt_path", ["last", "step=10"])
def test_what_else_lies_among_checkpoints_is_left_alone(fit, tmp_path, stray, ckpt_path):
    folder = tmp_path / "run/checkpoints"
    fit(10)
    shutil.copytree(folder / "step=10", folder / stray)
    (folder / "step=11").write_text("a file")
    (folder / "step=99").write_text("a file")
    fit(15, ckpt_path if ckpt_path == "last" else folder / ckpt_path, keep=ModelCheckpoint(every_n_train_steps=1))
    assert (folder / stray / "weights.safetensors").exists() and (folder / "step=99").is_file()
    assert (folder / "step=11.old0").read_text() == "a file"
    assert fit(16, "last").ckpt_path.name == "step=15"


@pytest.mark.parametrize("ckpt_path", ["last", "best", "step=5"])
def test_a_copy_that_followed_links_goes_on_and_has_links_again(fit, tmp_path, ckpt_path):
    fit(10)
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "run", copy)
    assert not (copy / "checkpoints/last").is_symlink()
    start = copy / "checkpoints" / ckpt_path if ckpt_path == "step=5" else ckpt_path
    trainer = fit(12, start, root=copy)
    folder = copy / "checkpoints"
    assert (folder / "last").readlink().name == "step=12" and (folder / "best").is_symlink()
    assert trainer.ckpt_path.exists() and not any(".old" in name for name in names(folder))


def test_of_a_copy_the_whole_one_of_two_folders_is_kept(fit, tmp_path):
    keep = lambda: ModelCheckpoint(every_n_train_steps=5)
    fit(10, keep=keep())
    folder = tmp_path / "copy/checkpoints"
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    (folder / "step=10/weights.safetensors").write_bytes(b"cut")
    assert fit(12, "last", root=tmp_path / "copy", keep=keep()).ckpt_path.name == "last"
    checkpoint.read_state(folder / "step=10")
    assert names(folder) == {"last", "step=10", "step=10.old0", "step=12"}


def test_a_checkpoint_that_was_copied_alone_as_last_is_resumed(fit, tmp_path):
    fit(10)
    shutil.copytree(tmp_path / "run/checkpoints/last", tmp_path / "copy/checkpoints/last")
    fit(12, "last", root=tmp_path / "copy")
    assert names(tmp_path / "copy/checkpoints") >= {"step=10", "step=12"}
    with pytest.raises(UserError, match="holds checkpoints of another run"):
        fit(12, root=tmp_path / "copy")


@pytest.fixture
def no_links(monkeypatch):
    def refuse(*args, **options):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)


def test_where_there_are_no_links_files_hold_the_names_and_are_taken_for_links(no_links, fit, tmp_path, make_trainer):
    folder = tmp_path / "run/checkpoints"
    trainer = fit(10)
    assert (folder / "last").read_text() == "step=10" and follow_link(folder / "best").is_dir()
    assert trainer.test(TinyRegression(), DistinctBatches(2), ckpt_path="best").keys() == {"test/loss"}
    assert fit(12, "last").ckpt_path.name == "step=10" and fit(13, folder / "last").ckpt_path.name == "step=12"
    TinyRegression.load_from_checkpoint(folder / "best")
    assert Run(folder.parent).model == follow_link(folder / "best")
    assert find_run("test", str(folder / "last"), None) == folder.parent


def test_a_checkpoint_of_another_run_is_not_mixed_with_those_in_the_folder(fit, tmp_path):
    fit(10, root=tmp_path / "a", logger=True)
    fit(10, root=tmp_path / "b", logger=True)
    before = (tmp_path / "b/metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="b/checkpoints holds checkpoints of another run than .*/a/checkpoints/step=5"):
        fit(12, tmp_path / "a/checkpoints/step=5", root=tmp_path / "b", logger=True)
    assert names(tmp_path / "b/checkpoints") >= {"step=5", "step=10"}
    assert (tmp_path / "b/metrics.jsonl").read_bytes() == before
    shutil.copytree(tmp_path / "a", tmp_path / "c", symlinks=True)
    fit(12, tmp_path / "a/checkpoints/step=5", root=tmp_path / "c", logger=True)  # of the same run: it goes back


def test_checkpoints_that_the_resumed_one_does_not_know_are_kept(fit, tmp_path, make_trainer):
    fit(10)
    silent = make_trainer(max_steps=11, default_root_dir=tmp_path / "other")
    silent.fit(TinyRegression(), DistinctBatches(), ckpt_path=tmp_path / "run/checkpoints/last")
    silent.save_checkpoint(tmp_path / "by_hand")
    trainer = fit(12, tmp_path / "by_hand")
    assert set(trainer.checkpoint_callback.scores) == {5, 6, 10, 12}
    assert names(tmp_path / "run/checkpoints") == {"step=5", "step=6", "step=10", "step=12", "last", "best"}


def test_of_two_model_checkpoints_each_knows_its_own_after_a_resume(fit, tmp_path):
    def both():
        often = ModelCheckpoint(every_n_train_steps=5, dirpath=tmp_path / "often")
        return often, ModelCheckpoint(every_n_train_steps=5, monitor="train/loss", dirpath=tmp_path / "best")

    often, best = both()
    fit(10, callbacks=[often], keep=best)
    often, again = both()
    assert fit(11, "last", callbacks=[often], keep=again).ckpt_path == tmp_path / "best/step=10"
    assert best.scores.keys() <= again.scores.keys() | {again.last_step}
    often, again = both()
    fit(12, tmp_path / "often/last", callbacks=[often], keep=again)  # which was saved before the other's of this step
    assert (tmp_path / "best/best").resolve() == again.best_model_path and len(
        checkpoint.by_step(tmp_path / "best")
    ) <= 2


def test_two_model_checkpoints_in_one_folder_are_refused(fit, tmp_path):
    second = type("Second", (ModelCheckpoint,), {})
    with pytest.raises(UserError, match="in one folder: give one another dirpath"):
        fit(1, callbacks=[second()])
    with pytest.raises(UserError, match="two callbacks save their state as ModelCheckpoint: .*another dirpath"):
        fit(1, callbacks=[ModelCheckpoint()])


@pytest.mark.parametrize(("top_k", "kept"), [(1, {1, 4}), (2, {1, 2, 4}), (-1, {1, 2, 3, 4})])
def test_of_equal_values_the_first_is_best(fit, tmp_path, top_k, kept):
    class Tie(Callback):
        def on_train_batch_end(self, trainer, module, metrics, batches):
            trainer.log({"score": 0.5})

    keep = ModelCheckpoint(every_n_train_steps=1, monitor="score", mode="max", save_top_k=top_k)
    fit(4, callbacks=[Tie()], keep=keep)
    assert keep.best_step == 1 and set(checkpoint.by_step(tmp_path / "run/checkpoints")) == kept


def test_values_of_another_metric_are_not_compared_and_its_checkpoints_stay(fit, tmp_path):
    fit(10, val_check_interval=5)
    keep = ModelCheckpoint(monitor="val/loss", mode="max", every_n_train_steps=None)
    fit(12, "last", val_check_interval=5, keep=keep)
    assert set(keep.scores) == {12} and names(tmp_path / "run/checkpoints") >= {"step=5", "step=10", "step=12"}


def test_a_checkpoint_that_an_exception_left_elsewhere_is_of_the_run(fit, tmp_path):
    class Fail(Callback):
        def on_train_batch_start(self, trainer, module, batches):
            if trainer.global_step == 8:
                raise RuntimeError

    rescue = OnExceptionCheckpoint(tmp_path / "rescue")
    with pytest.raises(RuntimeError):
        fit(12, callbacks=[Fail(), rescue], logger=True)
    fit(12, rescue.ckpt_path, logger=True)
    assert logged_steps(tmp_path / "run") == list(range(1, 13)) and "abandoned_0" not in names(
        tmp_path / "run/checkpoints"
    )


def test_the_log_of_an_earlier_run_is_set_aside_and_that_of_an_evaluation_is_not(make_trainer, tmp_path):
    make = lambda: make_trainer(max_steps=2, logger=True, log_every_n_steps=1)
    trainer = make()
    for again in (trainer, trainer, make()):
        again.validate(TinyRegression(), DistinctBatches(2))
        again.fit(TinyRegression(), DistinctBatches())
        assert logged_steps(tmp_path) == [1, 2]
    assert [logged_steps(tmp_path / f"earlier_{n}") for n in range(2)] == [[1, 2], [1, 2]]
    assert [len(list(tmp_path.glob(f"{where}events*"))) for where in ("earlier_0/", "earlier_1/", "")] == [3, 2, 1]


def test_a_fit_that_is_refused_leaves_the_trainer_as_it_was(fit, tmp_path):
    trainer = fit(10)
    scores, metrics = dict(trainer.checkpoint_callback.scores), dict(trainer.callback_metrics)
    with pytest.raises(UserError, match="holds checkpoints of another run: resume it, or name another folder"):
        trainer.fit(TinyRegression(), DistinctBatches())
    assert trainer.global_step == 10 and trainer.checkpoint_callback.scores == scores
    assert trainer.callback_metrics == metrics and trainer.test(dataloaders=DistinctBatches(1))


WRITES = """
import sys
sys.path[:0] = ["tests"]
from conftest import DistinctBatches, TinyRegression
from mlxmm import Callback, Trainer

class Wait(Callback):
    def on_train_start(self, trainer, module):
        print("writing", flush=True)
        sys.stdin.read()

Trainer(max_steps=3, default_root_dir=sys.argv[1], callbacks=[Wait()], enable_progress_bar=False).fit(
    TinyRegression(), DistinctBatches())
"""


@pytest.mark.parametrize("ckpt_path", [None, "last"])
def test_a_run_that_another_process_is_writing_is_refused_and_one_whose_process_was_killed_is_not(
    fit, tmp_path, ckpt_path
):
    command = [sys.executable, "-c", WRITES, str(tmp_path / "run")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    child = subprocess.Popen(command, cwd=Path(__file__).parents[2], **pipes, text=True)
    while "writing" not in child.stdout.readline():
        assert child.poll() is None
    with pytest.raises(UserError, match="another process is writing the run in .*/run: wait until it ends, or stop it"):
        fit(3, ckpt_path)
    child.kill()
    child.communicate()
    fit(3)


def test_a_checkpoint_that_its_run_deletes_while_it_is_looked_for_is_not_taken_for_damaged(fit, tmp_path, monkeypatch):
    fit(10)
    read, folder = checkpoint.read_state, tmp_path / "run/checkpoints"

    def delete_first(path):
        monkeypatch.setattr(checkpoint, "read_state", read)
        shutil.rmtree(path)
        return read(path)

    monkeypatch.setattr(checkpoint, "read_state", delete_first)
    assert checkpoint.latest(folder).name == "step=6"


def test_a_folder_of_that_name_that_is_no_checkpoint_of_ours_is_passed_over(fit, tmp_path, capsys):
    fit(10)
    for step, text in ((11, "[]"), (12, '{"format": 1}'), (13, None)):
        (tmp_path / f"run/checkpoints/step={step}").mkdir()
        if text is not None:
            (tmp_path / f"run/checkpoints/step={step}/state.json").write_text(text)
    assert fit(11, "last").ckpt_path.name == "step=10"
    assert names(tmp_path / "run/checkpoints/abandoned_0") == {"step=11", "step=12", "step=13"}


def test_nothing_is_written_into_a_dirpath_by_fast_dev_run_and_a_checkpoint_without_checkpointing_is_refused(tmp_path):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    keep = ModelCheckpoint(dirpath=tmp_path / "c")
    Trainer(fast_dev_run=True, callbacks=keep, **quiet).fit(TinyRegression(), DistinctBatches())
    assert not (tmp_path / "c").exists()
    with pytest.raises(UserError, match="ModelCheckpoint saves nothing with enable_checkpointing=False"):
        Trainer(max_steps=1, callbacks=keep, enable_checkpointing=False, **quiet).fit(
            TinyRegression(), DistinctBatches()
        )
