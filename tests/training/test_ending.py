"""A run says in one line why it ended before its limits, and why a resumed one has nothing left to do."""

import pytest
from conftest import DistinctBatches, TinyRegression

from mlxmm import Callback
from mlxmm.callbacks import EarlyStopping, ModelCheckpoint, Timer, TQDMProgressBar


@pytest.fixture
def told(make_trainer, capsys):
    def told(*callbacks, ckpt_path=None, **settings):
        trainer = make_trainer(callbacks=[*callbacks, ModelCheckpoint(every_n_train_steps=1)], **settings)
        trainer.fit(TinyRegression(), DistinctBatches(4), DistinctBatches(2), ckpt_path=ckpt_path)
        return capsys.readouterr().out.splitlines()

    return told


class Stop(Callback):
    def on_train_batch_end(self, trainer, module, metrics, batches):
        trainer.should_stop = True


class StopForAReason(Stop):
    stopping_reason = "the loss is good enough"


def early(**settings):
    return EarlyStopping("val/loss", min_delta=100.0, patience=1, **settings)


def test_early_stopping_says_what_did_not_improve_and_what_the_best_was(told):
    stop = early()
    [line] = told(stop, max_epochs=5)
    assert line == (
        "training ended after 8 updates of 20: EarlyStopping: val/loss did not improve in 1 validations; "
        f"the best was {stop.best_score:.6g}"
    )


def test_a_timer_a_callback_of_ones_own_and_max_time_say_so_too(told, tmp_path):
    ended = "training ended after 1 update of 20: "
    go_on = "; to go on, change what stops it, or leave it out"
    assert told(Timer("00:00"), max_epochs=5) == [f"no update was made: Timer: duration=00:00 is over{go_on}"]
    other = lambda name: {"max_epochs": 5, "default_root_dir": tmp_path / name}
    assert told(Stop(), **other("a")) == [f"{ended}trainer.should_stop was set"]
    assert told(StopForAReason(), **other("b")) == [f"{ended}StopForAReason: the loss is good enough"]
    assert told(max_time="00:00", **other("c")) == [f"no update was made: max_time=00:00 is over{go_on}"]


def test_a_run_that_comes_to_its_limit_says_nothing(told):
    assert told(max_epochs=2) == []


def test_a_stopped_run_that_is_resumed_says_why_it_makes_no_update(told, capsys):
    told(early(), max_epochs=5)
    [line] = told(early(), ckpt_path="last", max_epochs=9)
    assert line.startswith("no update was made, the run has had 8 updates: EarlyStopping: val/loss did not improve")


def test_a_finished_run_that_is_resumed_says_which_limit_is_reached(told):
    told(max_epochs=2)
    assert told(ckpt_path="last", max_epochs=2) == [
        "no update was made, the run has had 8 updates: max_epochs=2 is reached"
    ]


def test_a_bar_without_an_update_leaves_no_line(make_trainer, capsys):
    trainer = make_trainer(callbacks=[TQDMProgressBar()], max_steps=0)
    trainer.fit(TinyRegression(), DistinctBatches(4))
    assert "compiling" not in capsys.readouterr().err


def test_the_means_of_test_and_validate_are_printed_once_unless_told_not_to(make_trainer, capsys):
    data = DistinctBatches(2)
    trainer = make_trainer(callbacks=[TQDMProgressBar()], max_steps=2)
    trainer.fit(TinyRegression(), data, data)
    assert "val/loss" not in capsys.readouterr().out
    for stage, name in (("test", "test/loss"), ("validate", "val/loss")):
        means = getattr(trainer, stage)(dataloaders=data)
        assert capsys.readouterr().out == f"{name:<36}{means[name]:>10.4f}\n"
        getattr(trainer, stage)(dataloaders=data, verbose=False)
        getattr(make_trainer(), stage)(trainer.module, data)  # without a bar
        assert capsys.readouterr().out == ""
