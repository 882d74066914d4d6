"""Runs by default, and what can be used again: a trainer, a module, callbacks; or is refused with a reason."""

import copy
import multiprocessing
import pickle
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import DistinctBatches, TinyRegression
from mlx.utils import tree_flatten

from mlxmm import Callback, Trainer, callbacks
from mlxmm.errors import UserError
from mlxmm.storage.runs import RUNS
from mlxmm.training.callback import HOOKS
from mlxmm.training.run_folder import make_version

QUIET = {"enable_model_summary": False, "enable_progress_bar": False}
DATA = DistinctBatches()


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def weights(module) -> dict:
    return {name: np.array(array) for name, array in tree_flatten(module.parameters())}


def equal(some: dict, others: dict) -> bool:
    return all(np.array_equal(some[name], others[name]) for name in some)


def versions() -> list[str]:
    return sorted(path.name for path in (RUNS / "TinyRegression").iterdir())


def fit(trainer: Trainer, **options) -> int:
    trainer.fit(TinyRegression(), DATA, DATA, **options)
    return trainer.global_step


def test_a_bare_trainer_shows_parts_and_progress_and_keeps_metrics_and_checkpoints(capsys):
    trainer = Trainer(max_epochs=1, log_every_n_steps=3)
    trainer.fit(TinyRegression(), DATA)
    assert trainer.log_dir == RUNS / "TinyRegression/version_0"
    kept = {path.name for path in trainer.log_dir.rglob("*")}
    assert {"metrics.jsonl", "last", "step=6", "weights.safetensors"} <= kept
    out, err = capsys.readouterr()
    assert out.startswith("TinyRegression:\n") and "backbone" in out and "fit: 6/6" in err and "train/loss=" in err
    assert [path.name for path in Path().iterdir()] == ["runs"]


@pytest.mark.parametrize("settings", [{"logger": False, "enable_checkpointing": False}, {"fast_dev_run": True}])
def test_a_trainer_that_is_to_keep_nothing_makes_no_folder(settings):
    fit(Trainer(max_epochs=1, **QUIET, **settings))
    assert not list(Path().iterdir())


def test_a_run_that_failed_before_it_wrote_anything_leaves_no_folder():
    class Fails(Callback):
        def setup(self, trainer, module, stage):
            raise UserError("no")

    with pytest.raises(UserError, match="^no$"):
        fit(Trainer(max_epochs=1, callbacks=Fails(), **QUIET))
    assert versions() == []


def test_every_fit_is_a_run_of_its_own_in_the_next_folder():
    trainer, module = Trainer(max_epochs=2, **QUIET), TinyRegression()
    steps = []
    for _ in range(2):
        trainer.fit(module, DATA, DATA)
        steps.append(trainer.global_step)
    fit(Trainer(max_epochs=1, **QUIET))
    assert steps == [12, 12] and versions() == ["version_0", "version_1", "version_2"]


def test_a_second_module_in_the_same_trainer_is_trained_as_if_it_were_the_first():
    trainer = Trainer(max_epochs=2, logger=False, **QUIET)
    first, second = TinyRegression(), TinyRegression()
    trainer.fit(first, DATA)
    trainer.fit(second, DATA)
    assert equal(weights(first), weights(second)) and not equal(weights(first), weights(TinyRegression()))


def test_a_second_run_in_a_folder_that_has_a_name_is_refused(tmp_path):
    trainer = Trainer(max_epochs=1, default_root_dir=tmp_path / "run", logger=False, **QUIET)
    fit(trainer)
    with pytest.raises(UserError, match="holds checkpoints of another run: resume it, or name another folder"):
        fit(trainer)


def test_the_newest_run_of_a_module_goes_on_in_its_folder():
    whole, stopped = TinyRegression(), TinyRegression()
    Trainer(max_epochs=3, logger=False, enable_checkpointing=False, **QUIET).fit(whole, DATA)
    Trainer(max_epochs=1, **QUIET).fit(TinyRegression(), DATA)
    again = Trainer(max_epochs=3, **QUIET)
    again.fit(stopped, DATA, ckpt_path="last")
    assert versions() == ["version_0"] and again.ckpt_path.name == "step=6" and equal(weights(whole), weights(stopped))


def test_a_run_that_goes_on_from_a_named_checkpoint_gets_a_folder_of_its_own():
    fit(Trainer(max_epochs=1, callbacks=callbacks.ModelCheckpoint(monitor="val/loss"), **QUIET))
    again = Trainer(max_epochs=2, callbacks=callbacks.ModelCheckpoint(monitor="val/loss"), **QUIET)
    assert fit(again, ckpt_path=RUNS / "TinyRegression/version_0/checkpoints/step=6") == 12
    assert versions() == ["version_0", "version_1"] and again.checkpoint_callback.best_model_path.exists()


def test_the_weights_of_a_checkpoint_are_evaluated_and_the_module_keeps_them():
    trainer, module = Trainer(max_epochs=1, **QUIET), TinyRegression()
    trainer.fit(module, DATA)
    trained, tested = weights(module), trainer.test(dataloaders=DATA)
    module.head.weight = mx.zeros_like(module.head.weight)
    assert trainer.test(module, DATA) != tested
    assert trainer.test(module, DATA, ckpt_path="last") == tested and equal(weights(module), trained)
    assert equal(weights(TinyRegression.load_from_checkpoint(trainer.log_dir / "checkpoints/last")), trained)
    with pytest.raises(UserError, match="'best' needs ModelCheckpoint"):
        trainer.test(ckpt_path="best", dataloaders=DATA)


def make(count: int) -> list[str]:
    return [make_version("TinyRegression").name for _ in range(count)]


def test_processes_that_begin_at_once_never_get_the_same_folder():
    with multiprocessing.get_context("fork").Pool(4) as pool:
        made = [name for names in pool.map(make, [25] * 4) for name in names]
    assert len(set(made)) == 100 == len(versions()) and all(re.fullmatch(r"version_\d+", name) for name in made)


def test_callbacks_of_the_last_fold_begin_anew():
    stop = callbacks.EarlyStopping("val/loss", mode="max", patience=1)
    keep = callbacks.ModelCheckpoint(monitor="val/loss")
    steps, best = [], []
    for _ in range(2):
        steps.append(fit(Trainer(max_epochs=9, callbacks=[stop, keep], logger=False, **QUIET)))
        best.append(keep.best_model_path)
    assert steps == [12, 12] and stop.wait_count == 1
    assert [path.parts[2] for path in best] == ["version_0", "version_1"] and all(path.exists() for path in best)


@pytest.mark.parametrize("stage", ["test", "validate", "predict", "fit"])
def test_a_stage_within_a_stage_of_the_same_trainer_is_refused(stage):
    class Within(Callback):
        def on_train_epoch_end(self, trainer, module):
            getattr(trainer, stage)(module, DATA)

    with pytest.raises(UserError, match=f"^{stage} within another stage of the same Trainer: give it one of its own"):
        fit(Trainer(max_epochs=1, logger=False, callbacks=Within(), **QUIET))


def test_another_trainer_tests_within_a_fit_and_changes_nothing():
    class Within(Callback):
        def on_train_epoch_end(self, trainer, module):
            self.tested = Trainer(logger=False, **QUIET).test(module, DATA)
            assert module.trainer is trainer

    alone, watched = TinyRegression(), TinyRegression()
    settings = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, **QUIET}
    Trainer(**settings).fit(alone, DATA)
    Trainer(**settings, callbacks=(within := Within())).fit(watched, DATA)
    assert within.tested["test/loss"] > 0 and equal(weights(alone), weights(watched))


def test_a_module_and_its_callbacks_are_copied_and_pickled_after_fit_and_a_trainer_is_not():
    keep = callbacks.ModelCheckpoint()
    trainer, module = Trainer(max_epochs=1, callbacks=keep, **QUIET), TinyRegression()
    trainer.fit(module, DATA)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert equal(weights(module), weights(other)) and other.trainer is None
        Trainer(max_epochs=1, logger=False, enable_checkpointing=False, **QUIET).fit(other, DATA)
        assert not equal(weights(module), weights(other))
    assert copy.deepcopy(keep).last_step == pickle.loads(pickle.dumps(keep)).last_step == 6
    for call in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(UserError, match="a Trainer cannot be copied or pickled: copy its module"):
            call(trainer)


def test_a_metric_to_monitor_that_nobody_logs_is_an_error():
    with pytest.raises(UserError, match="ModelCheckpoint: nothing logs 'val_loss'; did you mean val/loss"):
        fit(Trainer(max_epochs=1, callbacks=callbacks.ModelCheckpoint(monitor="val_loss"), **QUIET))


def test_names_that_lightning_has_and_mlxmm_has_not_do_not_hide_from_hasattr():
    module, trainer = TinyRegression(), Trainer(**QUIET)
    assert not hasattr(module, "device") and getattr(trainer, "model", 3) == 3
    assert module.trainer is None and not hasattr(module, "__wrapped__")


def test_a_method_that_is_like_no_hook_is_the_users_own():
    own = type("Own", (Callback,), {"on_button": lambda self: None, "best_epoch": lambda self: None})
    fit(Trainer(max_epochs=1, logger=False, enable_checkpointing=False, callbacks=own(), **QUIET))
    takes_all = type("TakesAll", (Callback,), {hook: lambda self, *args: None for hook in HOOKS})
    fit(Trainer(max_epochs=1, logger=False, enable_checkpointing=False, callbacks=takes_all(), **QUIET))


def test_a_generator_serves_one_epoch_and_is_named_in_the_second():
    batches = lambda: (batch for batch in DATA.batches)
    trainer = Trainer(max_epochs=1, logger=False, **QUIET)
    trainer.fit(TinyRegression(), batches())
    assert trainer.global_step == 6
    with pytest.raises(UserError, match="no batch in epoch 1: an iterator is read once, give a list"):
        Trainer(max_epochs=2, logger=False, **QUIET).fit(TinyRegression(), batches())


class Tensor:
    """Stands for a tensor of torch that requires gradients: it cannot be exported."""

    def __dlpack__(self, **options):
        raise BufferError("Can't export tensors that require gradient, use tensor.detach()")


Tensor.__module__ = "torch"


def test_a_tensor_that_cannot_become_an_array_is_named_with_what_to_write():
    batch = DATA.batches[0] | {"x": Tensor()}
    with pytest.raises(UserError, match=r"x holds a Tensor: give tensor.detach\(\).float\(\).numpy\(\)"):
        Trainer(max_epochs=1, logger=False, **QUIET).fit(TinyRegression(), [batch])


def test_a_loader_whose_length_raises_is_a_loader_without_length():
    class Loader:
        def __len__(self):
            raise TypeError("object of type 'IterableDataset' has no len()")

        def __iter__(self):
            return iter(DATA.batches)

    trainer = Trainer(max_epochs=2, logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer.fit(TinyRegression(), Loader())  # and the bar has no end to show
    assert trainer.global_step == 12


def test_a_run_that_goes_on_from_another_folder_says_that_its_best_is_chosen_anew(capsys):
    run = lambda **settings: Trainer(callbacks=callbacks.ModelCheckpoint(monitor="val/loss"), **QUIET | settings)
    fit(run(max_epochs=1))
    first = RUNS / "TinyRegression/version_0/checkpoints"
    fit(run(max_epochs=2), ckpt_path=first / "last")
    assert capsys.readouterr().out.splitlines() == [
        f"the run goes on from {first}/last in {RUNS}/TinyRegression/version_1/checkpoints: "
        "best is chosen anew, of the checkpoints that are saved there"
    ]
    assert sorted(path.name for path in first.iterdir()) == ["best", "last", "step=6"]
    fit(run(max_epochs=3), ckpt_path="last")
    assert "goes on" not in capsys.readouterr().out


def test_the_folder_of_a_run_stands_for_its_best_checkpoint_or_is_answered_with_its_last():
    trainer = Trainer(max_epochs=2, callbacks=callbacks.ModelCheckpoint(monitor="val/loss"), **QUIET)
    fit(trainer)
    loaded = TinyRegression.load_from_checkpoint(trainer.log_dir, map_location="cpu", strict=True, weights_only=True)
    assert equal(weights(loaded), weights(TinyRegression.load_from_checkpoint(trainer.log_dir / "checkpoints/best")))
    with pytest.raises(UserError, match="state.json is missing; write runs/TinyRegression/version_0/checkpoints/last$"):
        fit(Trainer(max_epochs=3, **QUIET), ckpt_path=trainer.log_dir)


def test_an_argument_of_the_modules_own_goes_to_it_whatever_lightning_calls_so():
    class Strict(TinyRegression):
        def __init__(self, strict):
            super().__init__()
            self.kept = strict

    trainer = Trainer(max_epochs=1, **QUIET)
    trainer.fit(Strict(True), DATA)
    assert Strict.load_from_checkpoint(trainer.log_dir, strict=False).kept is False
