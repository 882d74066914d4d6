"""EarlyStopping and ModelCheckpoint: a metric that does not come is said, and one that is old is not taken for new."""

import warnings

import pytest
from conftest import DistinctBatches, TinyRegression

from mlxmm import Callback
from mlxmm.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from mlxmm.errors import UserError


@pytest.fixture
def fit(make_trainer, tmp_path):
    def fit(*callbacks, val=True, ckpt_path=None, **settings):
        settings = {"log_every_n_steps": 1, "callbacks": list(callbacks)} | settings
        trainer = make_trainer(**settings)
        trainer.fit(TinyRegression(), DistinctBatches(4), DistinctBatches(2) if val else None, ckpt_path=ckpt_path)
        return trainer

    return fit


class LogAt(Callback):
    """Logs a score after the validations at some steps."""

    def __init__(self, **scores: float):
        self.scores = {int(step[1:]): score for step, score in scores.items()}

    def on_validation_end(self, trainer, module, metrics):
        if trainer.global_step in self.scores:
            trainer.log({"score": self.scores[trainer.global_step]})


WATCHERS = {
    "EarlyStopping": EarlyStopping,
    "ModelCheckpoint": lambda monitor: ModelCheckpoint(monitor=monitor, every_n_train_steps=None),
}


NO_VALIDATION = [{"val": False}, {"limit_val_batches": 0}]


@pytest.mark.parametrize("settings", NO_VALIDATION, ids=str)
def test_early_stopping_by_validation_without_validation_is_refused_before_training(fit, settings):
    updates = []
    count = type("Count", (Callback,), {"on_train_batch_start": lambda self, *args: updates.append(1)})()
    with pytest.raises(UserError, match="^EarlyStopping: 'val/loss' comes from validation, and there is none"):
        fit(count, EarlyStopping("val/loss"), max_epochs=2, **settings)
    assert not updates


@pytest.mark.parametrize("settings", NO_VALIDATION, ids=str)
def test_a_best_checkpoint_by_validation_without_validation_is_a_warning_at_once(fit, tmp_path, settings):
    with pytest.warns(UserWarning, match="^ModelCheckpoint: 'val/loss' comes from validation, and there is none"):
        fit(WATCHERS["ModelCheckpoint"]("val/loss"), max_epochs=2, **settings)
    assert (tmp_path / "checkpoints/last").exists() and not (tmp_path / "checkpoints/best").exists()


@pytest.mark.parametrize("kind", WATCHERS)
@pytest.mark.parametrize("val", [True, False])
def test_a_metric_that_nobody_logs_is_said_at_the_end_of_the_first_epoch(fit, kind, val):
    steps = []
    note = type("Note", (Callback,), {"on_exception": lambda self, trainer, *args: steps.append(trainer.global_step)})()
    with pytest.raises(
        UserError, match=f"^{kind}: nothing logs 'xyz'; there are train/grad_norm, train/loss, train/loss_epoch"
    ):
        fit(note, WATCHERS[kind]("xyz"), max_epochs=3, val=val)
    assert steps == [4]


@pytest.mark.parametrize("kind", WATCHERS)
@pytest.mark.parametrize(
    ("monitor", "told"), [("val_loss", "did you mean val/loss"), ("val/xyz", "validation gives val/loss")]
)
def test_a_misspelt_monitor_of_validation_is_said_before_the_first_update(fit, kind, monitor, told):
    updates = []
    methods = {"logs": (), "on_train_batch_start": lambda self, *args: updates.append(1)}
    with pytest.raises(UserError, match=f"^{kind}: nothing logs '{monitor}'; {told}"):
        count = type("Count", (Callback,), methods)()
        fit(LearningRateMonitor(), count, WATCHERS[kind](monitor), max_epochs=3)
    assert not updates


class LogsInItsStep(TinyRegression):
    def training_step(self, batch):
        self.trainer.log("score", 1.0)
        return super().training_step(batch)


def test_a_monitor_that_a_step_in_plain_python_logs_is_waited_for(make_trainer):
    trainer = make_trainer(max_epochs=2, compile=False, callbacks=[EarlyStopping("score")])
    trainer.fit(LogsInItsStep(), DistinctBatches(4), DistinctBatches(2))
    assert trainer.global_step == 8


def test_a_monitor_that_a_callback_logs_is_waited_for(fit):
    fit(LogAt(_4=1.0), LearningRateMonitor(), EarlyStopping("score"), EarlyStopping("lr"), max_steps=8)


@pytest.mark.parametrize("kind", WATCHERS)
def test_a_training_metric_that_is_not_logged_yet_is_waited_for(fit, tmp_path, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = {"max_steps": 8, "val_check_interval": 1, "log_every_n_steps": 5}
        assert fit(WATCHERS[kind]("train/loss"), **settings).global_step == 8
        with pytest.raises(UserError, match="nothing logs 'train/los'"):
            fit(WATCHERS[kind]("train/los"), default_root_dir=tmp_path / "other", **settings)


def test_without_validation_epochs_count(fit):
    stop = EarlyStopping("train/loss", min_delta=10.0, patience=2)
    assert fit(stop, max_epochs=9, val=False).global_step == 12
    assert stop.stopping_reason.startswith("train/loss did not improve in 2 epochs")


def test_a_value_that_was_not_logged_since_the_last_validation_is_no_new_one(fit):
    stop = EarlyStopping("score", patience=2)
    trainer = fit(stop, LogAt(s1=1.0, s5=1.0, s9=1.0), max_steps=20, val_check_interval=1)
    assert trainer.global_step == 9 and stop.wait_count == 2


def test_a_value_of_before_a_resume_is_no_new_one(fit, tmp_path):
    log = lambda: LogAt(s1=1.0, s6=1.0, s8=1.0)
    keep = lambda: ModelCheckpoint(every_n_train_steps=4)
    whole = fit(EarlyStopping("score", patience=2), log(), max_steps=20, val_check_interval=1)
    fit(EarlyStopping("score", patience=2), log(), keep(), max_steps=4, val_check_interval=1)
    again = EarlyStopping("score", patience=2)
    trainer = fit(again, log(), keep(), max_steps=20, val_check_interval=1, ckpt_path="last")
    assert trainer.global_step == whole.global_step == 8 and again.wait_count == 2


def test_a_metric_that_another_callback_logs_after_validation_is_read_whatever_the_order(fit):
    for order in (1, -1):
        stop = EarlyStopping("score", patience=1)
        trainer = fit(*[stop, LogAt(s1=1.0, s2=2.0, s3=3.0)][::order], max_steps=9, val_check_interval=1)
        assert trainer.global_step == 2 and stop.best_score == 1.0


def test_a_run_in_which_no_checkpoint_can_be_best_says_so(fit, tmp_path):
    keep = ModelCheckpoint(monitor="score", every_n_train_steps=3)
    log = lambda self, trainer, *args: trainer.global_step == 4 and trainer.log("score", 1.0)
    with pytest.warns(UserWarning, match="no checkpoint is best: none had a finite 'score' of its own step"):
        fit(type("Log", (Callback,), {"on_train_batch_end": log})(), keep, max_steps=7, val=False)
    assert keep.best_model_path is None and not (tmp_path / "checkpoints/best").exists()


@pytest.mark.parametrize("val", [True, False])
def test_the_mean_of_an_epoch_shorter_than_the_interval_of_logs_is_what_callbacks_watch(fit, val):
    losses, keep = [], ModelCheckpoint(monitor="train/loss")
    stop = EarlyStopping("train/loss", patience=1, min_delta=100.0)
    note = lambda self, trainer, module, metrics, batches: losses.append(metrics["loss"].item())
    note = type("Note", (Callback,), {"on_train_batch_end": note})()
    trainer = fit(note, stop, keep, max_epochs=9, log_every_n_steps=50, val=val)
    means = [sum(losses[start : start + 4]) / 4 for start in range(0, len(losses), 4)]
    assert len(means) == 2 and "train/loss did not improve in 1 " in stop.stopping_reason
    assert trainer.callback_metrics["train/loss_epoch"] == means[1] and keep.best_model_score == min(means)


def test_the_mean_of_an_epoch_is_the_same_after_a_resume_in_its_middle(fit, tmp_path):
    fit(ModelCheckpoint(), max_steps=3)
    again = fit(ModelCheckpoint(), max_steps=4, ckpt_path="last").callback_metrics
    assert fit(max_steps=4, default_root_dir=tmp_path / "whole").callback_metrics == again


def test_what_was_logged_since_the_newest_update_is_known_after_a_resume_too(fit, tmp_path):
    fit(ModelCheckpoint(), max_steps=4)
    trainer = fit(ModelCheckpoint(), max_steps=4, ckpt_path="last")
    assert trainer.logged_metrics.keys() == {"train/loss", "train/loss_epoch", "train/grad_norm", "val/loss"}


@pytest.mark.parametrize("late", [False, True])
def test_wrong_monitors_of_two_callbacks_are_told_together(fit, late):
    watchers = [EarlyStopping("val_loss"), ModelCheckpoint(monitor="val/los")]
    with pytest.raises(UserError) as error:
        fit(*watchers, *[Callback()] * late, max_epochs=2)  # which may log them, so that it takes a validation to know
    assert error.value.faults == [
        "EarlyStopping: nothing logs 'val_loss'; did you mean val/loss?",
        "ModelCheckpoint: nothing logs 'val/los'; did you mean val/loss?",
    ]


def test_metrics_have_torchs_item(fit):
    trainer = fit(max_epochs=1)
    value = trainer.callback_metrics["val/loss"]
    assert type(value.item()) is float and value.item() == value == trainer.callback_metrics.get("val/loss").item()
    assert trainer.logged_metrics["val/loss"].item() == value and trainer.callback_metrics.get("other") is None


def test_without_a_monitor_the_newest_checkpoint_is_the_path_of_the_best(fit, tmp_path):
    keep = ModelCheckpoint()
    fit(keep, max_epochs=1)
    assert keep.best_model_path == tmp_path / "checkpoints/step=4" and keep.best_model_path.is_dir()
