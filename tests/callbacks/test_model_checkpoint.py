"""ModelCheckpoint: what is kept, what is named best, and what a full disk or a damaged file does."""

import json
import math
import time

import mlx.core as mx
import numpy as np
import pytest
from conftest import DistinctBatches, TinyRegression

from callbacks import ModelCheckpoint
from mlxmm import Callback
from mlxmm.errors import UserError
from mlxmm.storage import checkpoint


class Scores(Callback):
    """Logs a score with every update."""

    def __init__(self, *scores):
        self.scores = scores

    def on_train_batch_end(self, trainer, module, metrics, batches):
        trainer.log({"score": self.scores[trainer.global_step - 1]})


def steps(folder) -> set[int]:
    return {int(path.name.removeprefix("step=")) for path in folder.glob("step=*")}


def named(folder, name) -> int:
    return int((folder / name).resolve().name.removeprefix("step="))


@pytest.fixture
def fit(make_trainer, tmp_path):
    def fit(*callbacks, ckpt_path=None, data=None, **settings):
        trainer = make_trainer(callbacks=callbacks, **settings)
        module = TinyRegression()
        trainer.fit(
            module,
            train_dataloaders=data or DistinctBatches(),
            val_dataloaders=DistinctBatches(2),
            ckpt_path=ckpt_path,
        )
        return trainer, module

    return fit


@pytest.mark.parametrize(
    ("scores", "mode", "top_k", "best", "kept"),
    [
        ((math.nan, 5, 7, 8), "max", 1, 4, {4}),
        ((math.nan, 5, 7, 8), "min", 1, 2, {2, 4}),
        ((5, 7, math.nan, 6), "max", 2, 2, {2, 4}),
        ((9, 1, 2, 3, 8), "max", 2, 1, {1, 5}),
        ((9, 1, 2, 3, 8), "min", -1, 2, {1, 2, 3, 4, 5}),
        ((3, 1, 2), "min", 0, None, {3}),
        ((math.nan, math.inf, math.nan), "max", 1, None, {3}),
    ],
)
def test_the_best_and_the_newest_are_kept_and_what_is_not_a_number_is_never_best(
    fit, tmp_path, scores, mode, top_k, best, kept
):
    keep = ModelCheckpoint(every_n_train_steps=1, monitor="score", mode=mode, save_top_k=top_k)
    fit(Scores(*scores), keep, max_steps=len(scores))
    folder = tmp_path / "checkpoints"
    assert steps(folder) == kept and named(folder, "last") == len(scores)
    assert keep.best_step == best and (folder / "best").exists() == (best is not None)
    state = json.loads((folder / "last/state.json").read_text())
    assert dict(state["callbacks"]["ModelCheckpoint"]["scores"]) == keep.scores  # `last` knows the best


def test_every_validation_of_a_monitored_run_is_saved_with_its_own_value(fit, tmp_path):
    seen = {}

    class Note(Callback):
        def on_validation_end(self, trainer, module, metrics):
            seen[trainer.global_step] = metrics["val/loss"]

    keep = ModelCheckpoint(every_n_train_steps=5, monitor="val/loss", save_top_k=-1)
    fit(Note(), keep, max_steps=11, val_check_interval=3)
    assert keep.scores == seen and set(seen) == {3, 6, 9, 11}


def test_a_callback_that_comes_later_in_the_list_is_in_the_checkpoint(fit, tmp_path):
    class Count(Callback):
        count = 0

        def on_save_point(self, trainer, module):
            self.count += 1

        def state_dict(self):
            return {"count": self.count}

    count = Count()
    fit(ModelCheckpoint(every_n_train_steps=2), count, max_steps=4)
    state = json.loads((tmp_path / "checkpoints/last/state.json").read_text())
    assert state["callbacks"][count.state_key] == {"count": 4}


def test_the_checkpoint_a_run_was_resumed_from_stays(fit, tmp_path):
    fit(ModelCheckpoint(every_n_train_steps=2), max_steps=2)
    last = tmp_path / "checkpoints" / "last"
    fit(ModelCheckpoint(every_n_train_steps=2), max_steps=8, ckpt_path=last)
    assert steps(tmp_path / "checkpoints") == {2, 8} and named(tmp_path / "checkpoints", "last") == 8


def test_what_is_written_in_the_background_is_what_was_there_at_the_time(fit, tmp_path):
    for background in (True, False):
        folder = tmp_path / str(background)
        fit(ModelCheckpoint(every_n_train_steps=1, background=background, dirpath=folder, save_top_k=-1), max_steps=9)
    for name in ("weights", "optimizer"):
        files = [(tmp_path / str(b) / "last" / f"{name}.safetensors").read_bytes() for b in (True, False)]
        assert files[0] == files[1]


def test_saving_over_the_checkpoint_that_was_resumed_from_keeps_its_bytes_right(fit, tmp_path):
    whole, _ = tmp_path / "whole", fit(ModelCheckpoint(dirpath=tmp_path / "whole"), max_steps=6)
    fit(ModelCheckpoint(dirpath=tmp_path / "c"), max_steps=3)

    class SaveOver(Callback):
        def on_train_start(self, trainer, module):
            trainer.save_checkpoint(tmp_path / "c" / "step=3")

    fit(SaveOver(), ModelCheckpoint(dirpath=tmp_path / "c"), max_steps=6, ckpt_path=tmp_path / "c" / "step=3")
    weights = [mx.load(str(folder / "last" / "weights.safetensors")) for folder in (whole, tmp_path / "c")]
    assert all(mx.array_equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert len(mx.load(str(tmp_path / "c" / "step=3" / "weights.safetensors"))) == len(weights[0])


class FullDisk(Callback):
    """The disk takes no more from the update `since` on, and everything again from `until` on."""

    def __init__(self, limit, since: int, until: int | None = None):
        self.limit, self.since, self.until = limit, since, until

    def on_train_batch_start(self, trainer, module, batches):
        while trainer.global_step == self.since and named(trainer.log_dir / "checkpoints", "last") != self.since - 1:
            time.sleep(0.001)  # until the thread has written it
        if trainer.global_step in (self.since, self.until):
            self.limit(200 if trainer.global_step == self.since else None)


@pytest.mark.parametrize("monitor", [None, "train/loss"])
def test_a_full_disk_costs_a_checkpoint_and_the_next_one_is_tried(fit, tmp_path, full_disk, capsys, monitor):
    save = ModelCheckpoint(every_n_train_steps=2, background=False, monitor=monitor, save_top_k=-1 if monitor else 1)
    fit(FullDisk(full_disk, 5, until=7), save, max_steps=9)
    folder, told = tmp_path / "checkpoints", capsys.readouterr().out
    assert told.count("warning:") == 1 and "the checkpoint of step 6 cannot be written" in told
    assert f"training goes on, kept is {folder / 'step=4'}" in told
    assert save.last_step == 9 and set(save.scores) <= steps(folder) and 6 not in steps(folder)
    assert named(folder, "last") == 9 and not list(folder.glob(".*"))
    fit(max_steps=10, ckpt_path=folder / "last")


@pytest.mark.parametrize("background", [True, False])
def test_a_run_whose_last_checkpoint_cannot_be_written_says_so_and_keeps_the_one_before(
    fit, tmp_path, full_disk, capsys, background
):
    save = ModelCheckpoint(every_n_train_steps=2, background=background)
    with pytest.raises(UserError, match="the checkpoint of step 9 cannot be written: .* kept is .*step=4"):
        fit(FullDisk(full_disk, 5), save, max_steps=9)
    full_disk(None)
    folder = tmp_path / "checkpoints"
    assert capsys.readouterr().out.count("training goes on, kept is") == 2  # of the steps 6 and 8
    assert steps(folder) == {named(folder, "last")} == {4} and not list(folder.glob(".*"))
    fit(max_steps=6, ckpt_path=folder / "last")


@pytest.mark.parametrize("damage", ["weights.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_file_is_named_and_last_falls_back_to_the_one_before(fit, tmp_path, damage, capsys):
    fit(ModelCheckpoint(every_n_train_steps=2, monitor="train/loss", save_top_k=-1), max_steps=4, log_every_n_steps=1)
    folder = tmp_path / "checkpoints"
    data = bytearray((folder / "step=4" / damage).read_bytes())
    data[len(data) // 2] ^= 0xFF
    (folder / "step=4" / damage).write_bytes(data)
    with pytest.raises(UserError, match=damage):
        fit(max_steps=6, ckpt_path=folder / "step=4")
    trainer, _ = fit(max_steps=3, ckpt_path="last")
    assert trainer.global_step == 3 and damage in capsys.readouterr().out


def test_a_folder_with_checkpoints_of_another_run_is_refused(fit, tmp_path):
    fit(ModelCheckpoint(), max_steps=2)
    before = (tmp_path / "checkpoints/last/weights.safetensors").read_bytes()
    with pytest.raises(UserError, match="another run"):
        fit(ModelCheckpoint(), max_steps=4)
    assert (tmp_path / "checkpoints/last/weights.safetensors").read_bytes() == before


def test_checkpoints_by_epochs_and_by_time(fit, tmp_path):
    fit(ModelCheckpoint(every_n_train_steps=None, every_n_epochs=2, dirpath=tmp_path / "e"), max_steps=13)
    assert named(tmp_path / "e", "last") == 13
    saved = []

    class Note(Callback):
        def on_save_checkpoint(self, trainer, module, checkpoint):
            saved.append(trainer.global_step)

    fit(Note(), ModelCheckpoint(every_n_train_steps=None, every_n_epochs=2, dirpath=tmp_path / "f"), max_epochs=4)
    assert saved == [12, 24]
    saved.clear()
    often = ModelCheckpoint(every_n_train_steps=None, train_time_interval="00:00", dirpath=tmp_path / "t")
    fit(Note(), often, max_steps=3)
    assert saved == [1, 2, 3]


def test_two_checkpoints_of_one_step_have_equal_moments(fit, tmp_path):
    _, module = fit(ModelCheckpoint(every_n_train_steps=1), max_steps=3)
    saved = mx.load(str(tmp_path / "checkpoints/last/weights.safetensors"))
    np.testing.assert_array_equal(np.array(saved["head.weight"]), np.array(module.head.weight))


@pytest.mark.parametrize("settings", [{"max_steps": 0}, {"max_time": "00:00"}], ids=str)
def test_a_run_without_an_update_saves_weights_that_nothing_has_evaluated_yet(settings, make_trainer, tmp_path):
    class Lazy(Callback):
        def on_save_checkpoint(self, trainer, module, checkpoint):
            checkpoint["extra"] = {"sum": mx.ones(3) + 1}

    make_trainer(callbacks=[ModelCheckpoint(), Lazy()], **settings).fit(
        TinyRegression(), train_dataloaders=DistinctBatches()
    )
    folder = tmp_path / "checkpoints" / "last"
    assert checkpoint.read_state(folder)["global_step"] == 0
    assert mx.load(str(folder / "extra.safetensors"))["sum"].tolist() == [2, 2, 2]
