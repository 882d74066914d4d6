"""Resume is exact to the bit, on a GPU with `deterministic`, wherever a run was stopped; and how it may be stopped."""

import os
import random
import signal
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import DistinctBatches, TinyRegression
from mlx.utils import tree_flatten

from callbacks import FreezeSchedule, ModelCheckpoint, SyntheticRefresh
from mlxmm import Callback
from mlxmm.compute.deterministic import repeats_to_the_bit
from mlxmm.distributed.signals import Interrupted
from mlxmm.storage import checkpoint
from mlxmm.training.datamodule import DataModule
from tools.chaos import agree


@pytest.fixture
def make_trainer(make_trainer):
    """Makes Trainers whose runs repeat to the bit on this device."""
    return partial(make_trainer, deterministic=not repeats_to_the_bit(mx.default_device(), deterministic=False))


def checkpoints(folder) -> dict[int, dict]:
    """All that the checkpoints of a run hold, but the seconds it took."""
    found = {}
    for path in folder.glob("step=*"):
        saved = checkpoint.load(path)
        arrays = {f"{part}.{name}": np.array(a) for part in ("weights", "optimizer") for name, a in saved[part].items()}
        keys = ("global_step", "current_epoch", "batch_idx", "trainable", "callback_metrics")
        found[int(path.name.removeprefix("step="))] = arrays | {key: saved["state"][key] for key in keys}
    return found


def assert_equal(left: dict, right: dict):
    assert left.keys() == right.keys()
    for name, value in left.items():
        np.testing.assert_array_equal(value, right[name], err_msg=str(name))


@pytest.mark.parametrize("resume_at", [2, 4, 6, 8])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_later_checkpoint_of_a_resumed_run_is_the_same_to_the_bit(make_trainer, tmp_path, resume_at, accumulate):
    def fit(folder, ckpt_path=None, max_epochs=4):
        keep = ModelCheckpoint(every_n_train_steps=2, monitor="train/loss", save_top_k=-1, dirpath=folder)
        schedule = FreezeSchedule({0: "head", 2: ("head", "backbone")})
        trainer = make_trainer(
            callbacks=[schedule, keep],
            max_epochs=max_epochs,
            accumulate_grad_batches=accumulate,
            log_every_n_steps=1,
        )
        data = DistinctBatches(6)
        trainer.fit(TinyRegression(), train_dataloaders=data, val_dataloaders=data, ckpt_path=ckpt_path)

    fit(tmp_path / "whole")
    fit(tmp_path / "resumed", ckpt_path=tmp_path / "whole" / f"step={resume_at}")
    whole, resumed = checkpoints(tmp_path / "whole"), checkpoints(tmp_path / "resumed")
    assert set(resumed) == {step for step in whole if step > resume_at} and resumed
    for step in resumed:
        assert_equal(whole[step], resumed[step])


class Plain:
    """Batches that can be iterated again and nothing more: no `epoch`, no place to start at."""

    def __init__(self, num: int = 10):
        self.num = num

    def __len__(self):
        return self.num

    def __iter__(self):
        rng = np.random.default_rng(3)
        for i in range(self.num):
            yield {"x": rng.normal(size=(2, 4)).astype(np.float32), "y": np.full(2, i, np.float32), "mask": np.ones(2)}


def test_a_loader_that_cannot_start_in_the_middle_is_skipped_to_the_place_with_a_warning(make_trainer, tmp_path):
    seen = []

    class See(Callback):
        def on_train_batch_start(self, trainer, module, batches):
            seen.append(int(batches[0]["y"][0].item()))

    trainer = make_trainer(max_steps=2)
    trainer.fit(TinyRegression(), train_dataloaders=Plain())
    trainer.save_checkpoint(tmp_path / "c")
    with pytest.warns(UserWarning, match="Plain cannot start at batch 2"):
        make_trainer(callbacks=[See()], max_steps=5).fit(
            TinyRegression(), train_dataloaders=Plain(), ckpt_path=tmp_path / "c"
        )
    assert seen == [2, 3, 4]


def test_random_numbers_of_every_kind_are_a_function_of_the_step(make_trainer, tmp_path):
    drawn = {}

    class Draw(Callback):
        def on_train_batch_end(self, trainer, module, metrics, batches):
            if trainer.global_step == 7:
                drawn[len(drawn)] = (mx.random.uniform().item(), np.random.rand(), random.random())

    def fit(max_steps, callbacks=(), ckpt_path=None, **settings):
        trainer = make_trainer(max_steps=max_steps, callbacks=callbacks, **settings)
        data = DistinctBatches()
        trainer.fit(TinyRegression(), train_dataloaders=data, val_dataloaders=data, ckpt_path=ckpt_path)
        return trainer

    fit(8, [Draw()])
    fit(8, [Draw()], num_sanity_val_steps=0)
    fit(3).save_checkpoint(tmp_path / "c")
    fit(8, [Draw()], ckpt_path=tmp_path / "c")
    assert len(drawn) == 3 and len(set(drawn.values())) == 1


def test_asking_how_long_the_run_is_leaves_the_place_in_the_data_alone(make_trainer, tmp_path):
    seen = []

    class Asks(TinyRegression):
        def configure_optimizers(self):
            assert self.trainer.estimated_stepping_batches == 20
            return super().configure_optimizers()

    class See(Callback):
        def on_train_batch_start(self, trainer, module, batches):
            seen.append(batches[0]["x"][0, 0].item())

    whole = make_trainer(max_epochs=2, callbacks=[See()])
    whole.fit(Asks(), train_dataloaders=DistinctBatches(10))
    expected, seen[:] = seen[3:], []
    stopped = make_trainer(max_epochs=2, callbacks=[StopAt(3)])
    stopped.fit(Asks(), train_dataloaders=DistinctBatches(10))
    stopped.save_checkpoint(tmp_path / "c")
    make_trainer(max_epochs=2, callbacks=[See()]).fit(
        Asks(), train_dataloaders=DistinctBatches(10), ckpt_path=tmp_path / "c"
    )
    assert seen == expected


class StopAt(Callback):
    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(self, trainer, module, metrics, batches):
        trainer.should_stop = trainer.global_step == self.step


def test_should_stop_in_an_epoch_validates_once_and_ends_in_order(make_trainer):
    heard = []

    class Hear(Callback):
        def on_validation_end(self, trainer, module, metrics):
            heard.append(("validation", trainer.global_step))

        def on_train_epoch_end(self, trainer, module):
            heard.append("epoch_end")

        def on_fit_end(self, trainer, module):
            heard.append("fit_end")

    trainer = make_trainer(callbacks=[StopAt(5), Hear()], max_epochs=3)
    trainer.fit(TinyRegression(), train_dataloaders=DistinctBatches(10), val_dataloaders=DistinctBatches(2))
    assert heard == [("validation", 5), "epoch_end", "fit_end"] and trainer.global_step == 5


def test_new_rows_of_an_epoch_are_the_same_rows_after_a_resume(make_trainer, tmp_path):
    class Data(DataModule):
        def __init__(self):
            self.rows = {"train": None}

        train_dataloader = lambda self: self.rows["train"]

        def replace_rows(self, split, rows):
            self.rows[split] = rows

    def make(epoch):
        data = DistinctBatches(4)
        for batch in data.batches:
            batch["y"] = batch["y"] + epoch
        return data

    def fit(max_steps, ckpt_path=None):
        trainer = make_trainer(callbacks=[SyntheticRefresh(make, every_n_epochs=2)], max_steps=max_steps)
        module = TinyRegression()
        trainer.fit(module, Data(), ckpt_path=ckpt_path)
        return trainer, module

    _, whole = fit(19)
    trainer, _ = fit(11)
    trainer.save_checkpoint(tmp_path / "c")
    _, resumed = fit(19, tmp_path / "c")
    assert_equal(*({n: np.array(a) for n, a in tree_flatten(m.parameters())} for m in (whole, resumed)))


def test_a_handler_that_was_there_is_called_too_and_a_second_sigterm_does_no_harm(make_trainer, tmp_path):
    called = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: called.append(number))

    class Kill(Callback):
        def on_train_batch_start(self, trainer, module, batches):
            if trainer.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)

    try:
        own = signal.getsignal(signal.SIGTERM)
        with pytest.raises(Interrupted) as caught:
            make_trainer(max_steps=9, callbacks=[Kill(), ModelCheckpoint()]).fit(
                TinyRegression(), train_dataloaders=DistinctBatches()
            )
        assert caught.value.code == 143 and called == [signal.SIGTERM] * 2
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)
    assert checkpoint.read_state(tmp_path / "checkpoints" / "last")["global_step"] == 3


def test_a_second_ctrl_c_interrupts_at_once(make_trainer):
    class Insist(Callback):
        def on_train_batch_start(self, trainer, module, batches):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    trainer = make_trainer(max_steps=9, callbacks=[Insist()])
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(TinyRegression(), train_dataloaders=DistinctBatches())
    assert trainer.global_step == 0 and trainer.state == "interrupted"


def test_a_run_in_another_thread_than_the_main_one_works(make_trainer):
    trainer, failed = make_trainer(max_steps=3), []

    def fit():
        try:
            trainer.fit(TinyRegression(), train_dataloaders=DistinctBatches())
        except BaseException as error:  # noqa: BLE001 what a thread raises is lost
            failed.append(error)

    thread = threading.Thread(target=fit)
    thread.start()
    thread.join()
    assert not failed and trainer.global_step == 3


def test_the_loaders_threads_are_gone_after_a_failure(make_trainer):
    from mlxmm.data.loader import Loader

    class Fail(Callback):
        def on_train_batch_end(self, trainer, module, metrics, batches):
            raise RuntimeError("in the middle")

    rows = [{"x": np.full(4, i, np.float32), "y": np.float32(i), "mask": np.float32(1)} for i in range(64)]
    loader = Loader(rows=rows, transform=lambda row, rng: row, batch_size=4, num_threads=2)
    before = threading.active_count()
    with pytest.raises(RuntimeError):
        make_trainer(max_steps=9, callbacks=[Fail()]).fit(TinyRegression(), train_dataloaders=loader)
    for _ in range(100):
        if threading.active_count() <= before:
            break
        threading.Event().wait(0.05)
    assert threading.active_count() <= before


@pytest.mark.parametrize("after", ["weights.safetensors", "optimizer.safetensors", "state.json"])
def test_a_process_killed_after_any_file_of_a_checkpoint_leaves_the_one_before(tmp_path, after):
    program = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
import mlx.core as mx
from conftest import DistinctBatches, TinyRegression
from callbacks import ModelCheckpoint
from mlxmm import Trainer
from mlxmm.storage import checkpoint

def dying(write):
    def run(path, *args, **kwargs):
        write(path, *args, **kwargs)
        if str(path).endswith({after!r}) and trainer.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
    return run

mx.save_safetensors, checkpoint.write_json = dying(mx.save_safetensors), dying(checkpoint.write_json)
save = ModelCheckpoint(every_n_train_steps=2, background=False)
trainer = Trainer(max_steps=6, logger=False, default_root_dir={str(tmp_path)!r}, callbacks=[save])
trainer.fit(TinyRegression(), train_dataloaders=DistinctBatches())
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder = tmp_path / "checkpoints"
    assert list(folder.glob(".tmp-*step=4")) and checkpoint.latest(folder).name == "step=2"


def test_the_chaos_tool_compares_to_the_bit_or_within_a_tolerance():
    run = {"weights": mx.ones(3), "rows": [{"step": 5, "loss": 1.0}]}
    near = {"weights": mx.ones(3) + 1e-3, "rows": [{"step": 5, "loss": 1.001}]}
    far = {"weights": mx.ones(3) + 0.2, "rows": [{"step": 5, "loss": 1.0}]}
    later = {"weights": mx.ones(3), "rows": [{"step": 6, "loss": 1.0}]}
    longer = {"weights": mx.ones(4), "rows": [{"step": 5, "loss": 1.0}]}
    ends = run, near, far, later, longer
    assert [agree(run, end, exact=True) for end in ends] == [True, False, False, False, False]
    assert [agree(run, end, exact=False) for end in ends] == [True, True, False, False, False]
