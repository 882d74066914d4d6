"""Which hook comes when: Lightning's order, for callbacks and for the module."""

import mlx.core as mx
import pytest
from conftest import DistinctBatches, TinyRegression

from mlxmm import Callback
from mlxmm.errors import UserError
from mlxmm.training.callback import HOOKS
from mlxmm.training.datamodule import DataModule


def recorder(name: str, calls: list):
    """A callback that notes every hook it hears."""

    def note(hook):
        return lambda self, trainer, module, *args: calls.append((name, hook))

    kind = type(name, (Callback,), {hook: note(hook) for hook in HOOKS})
    kind.state_dict = lambda self: calls.append((name, "state_dict")) or {"n": 1}
    kind.load_state_dict = lambda self, state: calls.append((name, "load_state_dict"))
    return kind()


class Recorded(TinyRegression):
    """A module that notes its hooks too, and what it is asked for."""

    def __init__(self, calls: list):
        super().__init__()
        self.note = calls.append

    def configure_optimizers(self):
        self.note(("module", "configure_optimizers"))
        return super().configure_optimizers()

    def predict_step(self, batch):
        return self.head(mx.maximum(self.backbone(batch["x"]), 0))


for hook in set(HOOKS) - {"on_before_optimizer_step"}:
    setattr(Recorded, hook, lambda self, *args, hook=hook: self.note(("module", hook)))


class NotedData(DataModule):
    """Two training and two validation batches from a DataModule that notes what is asked of it."""

    def __init__(self, calls: list):
        self.calls, self.train, self.val = calls, DistinctBatches(2), DistinctBatches(2)

    def prepare_data(self):
        self.calls.append(("data", "prepare_data"))

    def setup(self, stage):
        self.calls.append(("data", f"setup {stage}"))

    def teardown(self, stage):
        self.calls.append(("data", f"teardown {stage}"))

    def train_dataloader(self):
        return self.train

    def val_dataloader(self):
        return self.val

    test_dataloader = predict_dataloader = val_dataloader


def both(*hooks) -> list:
    """Each hook of the callback, then of the module."""
    return [(who, hook) for hook in hooks for who in ("Cb", "module")]


def evaluation(stage: str, batches: int = 2) -> list:
    each = (f"on_{stage}_batch_start", f"on_{stage}_batch_end")
    begin, end = (f"on_{stage}_start", f"on_{stage}_epoch_start"), (f"on_{stage}_epoch_end", f"on_{stage}_end")
    return both(*begin, *each * batches, *end)


UPDATE = [
    *both("on_train_batch_start"),
    ("Cb", "on_before_optimizer_step"),
    *both("on_train_batch_end"),
]
BEFORE_FIT = [("data", "prepare_data"), ("data", "setup fit"), *both("setup")]
AFTER_FIT = [*both("on_train_end", "on_fit_end"), ("data", "teardown fit"), *both("teardown")]


def epoch(updates: int) -> list:
    *first, last = [UPDATE + both("on_save_point")] * (updates - 1) + [UPDATE]
    ended = [*evaluation("validation"), *both("on_train_epoch_end", "on_save_point")]
    return [*both("on_train_epoch_start"), *sum(first, []), *last, *ended]


@pytest.fixture
def recorded(make_trainer):
    def make(**settings):
        calls: list = []
        trainer = make_trainer(callbacks=[recorder("Cb", calls)], **settings)
        calls.clear()  # the Trainer asks for the state that its callbacks begin with
        return trainer, Recorded(calls), NotedData(calls), calls

    return make


def test_fit_calls_hooks_in_lightnings_order(recorded):
    trainer, module, data, calls = recorded(max_epochs=2)
    trainer.fit(module, data)
    assert calls == [
        *BEFORE_FIT,
        ("module", "configure_optimizers"),
        *both("on_fit_start", "on_sanity_check_start", "on_sanity_check_end", "on_train_start"),
        *epoch(2),
        *epoch(2),
        *AFTER_FIT,
    ]


@pytest.mark.parametrize(("saved_at", "updates_left"), [(1, 1), (2, 0)])
def test_a_resumed_fit_repeats_no_hook_of_what_is_behind(recorded, tmp_path, saved_at, updates_left):
    trainer, module, data, _ = recorded(max_steps=saved_at)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "c")
    trainer, module, data, calls = recorded(max_epochs=2)
    trainer.fit(module, data, ckpt_path=tmp_path / "c")
    rest = epoch(1) if updates_left else []
    assert calls == [
        *BEFORE_FIT,
        ("Cb", "load_state_dict"),
        *both("on_load_checkpoint"),
        ("module", "configure_optimizers"),
        *both("on_fit_start", "on_train_start"),
        *rest,
        *epoch(2),
        *AFTER_FIT,
    ]
    assert trainer.current_epoch == 2 and trainer.global_step == 4


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
@pytest.mark.parametrize("limit", [0, 2])
def test_validate_test_and_predict_call_their_hooks_and_none_without_batches(recorded, stage, limit):
    name = {"validate": "validation"}.get(stage, stage)
    trainer, module, data, calls = recorded(**{f"limit_{stage.removesuffix('idate')}_batches": limit})
    results = getattr(trainer, stage)(module, data)
    inside = evaluation(name) if limit else []
    before = [("data", "prepare_data"), ("data", f"setup {stage}"), *both("setup")]
    assert calls == [*before, *inside, ("data", f"teardown {stage}"), *both("teardown")]
    assert len(results) == (limit if stage == "predict" else min(limit, 1))


def test_callbacks_keep_their_order_with_checkpoints_last(make_trainer):
    class A(Callback): ...

    class BetterA(A): ...

    class B(Callback): ...

    class Saver(Callback):
        saves_checkpoints = True

    trainer = make_trainer(callbacks=[Saver(), A(), B()], max_steps=1)
    assert [type(c).__name__ for c in trainer.callbacks] == ["A", "B", "Saver"]

    class Own(TinyRegression):
        def configure_callbacks(self):
            return [BetterA()]

    trainer.fit(Own(), train_dataloaders=DistinctBatches())
    assert [type(c).__name__ for c in trainer.callbacks] == ["B", "BetterA", "Saver"]


def test_two_callbacks_that_save_under_one_name_are_an_error_that_names_them(make_trainer):
    class Twice(Callback):
        def state_dict(self):
            return {}

    with pytest.raises(UserError, match="Twice"):
        make_trainer(callbacks=[Twice(), Twice()])


def test_minus_one_skips_the_rest_of_each_epoch(make_trainer):
    ended = []

    class Skip(Callback):
        def on_train_batch_start(self, trainer, module, batches):
            return -1 if trainer.batch_idx == 2 else None

        def on_train_epoch_end(self, trainer, module):
            ended.append(trainer.current_epoch)

    trainer = make_trainer(callbacks=[Skip()], max_epochs=3)
    trainer.fit(TinyRegression(), train_dataloaders=DistinctBatches(5))
    assert trainer.global_step == 2 * 3 and ended == [0, 1, 2]


def test_on_exception_is_called_once_and_loggers_end_as_failed(make_trainer):
    from mlxmm.training.loggers import Logger

    told = []

    class Note(Logger):
        def finalize(self, status):
            told.append(status)

    class Fail(Callback):
        def on_train_batch_end(self, trainer, module, metrics, batches):
            raise KeyError("in a callback")

        def on_exception(self, trainer, module, exception):
            told.append(type(exception))

        def on_train_end(self, trainer, module):
            told.append("on_train_end")

    module = TinyRegression()
    trainer = make_trainer(callbacks=[Fail()], logger=Note(), max_steps=3)
    with pytest.raises(KeyError):
        trainer.fit(module, train_dataloaders=DistinctBatches())
    assert told == [KeyError, "failed"] and trainer.state == "interrupted"
    mx.eval(module.parameters())
