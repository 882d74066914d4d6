"""Frozen weights in checkpoints: written once, linked as long as they are the same to the bit, and read as before."""

import json
import os
import shutil
import time

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import DistinctBatches, TinyRegression
from mlx.utils import tree_flatten

from callbacks import EMAWeightAveraging, FreezeSchedule, ModelCheckpoint
from mlxmm import Callback
from mlxmm.captioners.own_writer import checksum
from mlxmm.errors import UserError
from mlxmm.networks.adapters import LoRAConfig, add_adapters
from mlxmm.storage import checkpoint, checksums
from mlxmm.training.model_checkpoint import writer

FROZEN = "frozen.safetensors"


class HalfFrozen(TinyRegression):
    """A backbone that is frozen, in bfloat16, and a head that is trained."""

    def __init__(self):
        super().__init__()
        self.backbone.set_dtype(mx.bfloat16)
        self.backbone.freeze()


class Scores(Callback):
    """Logs a score with every update: by default each is better than the one before."""

    def __init__(self, *scores):
        self.scores = scores

    def on_train_batch_end(self, trainer, module, metrics, batches):
        trainer.log({"score": self.scores[trainer.global_step - 1] if self.scores else trainer.global_step})


class After(Callback):
    """Calls `act(module)` once, after the checkpoint of `step`."""

    def __init__(self, step: int, act):
        self.step, self.act = step, act

    def on_train_batch_start(self, trainer, module, batches):
        if trainer.global_step == self.step:
            writer().submit(lambda: None).result()  # one that is being written has the arrays themselves
            self.act(module)


@pytest.fixture
def fit(make_trainer):
    """Train a module with a checkpoint after each update, all of which are kept; returns the module."""

    def fit(*callbacks, module=None, scores=(), save_top_k=-1, max_steps=4, ckpt_path=None):
        save = ModelCheckpoint(every_n_train_steps=1, monitor="score", mode="max", save_top_k=save_top_k)
        trainer, module = make_trainer(callbacks=[Scores(*scores), *callbacks, save], max_steps=max_steps), module
        module = module or HalfFrozen()
        trainer.fit(module, train_dataloaders=DistinctBatches(), ckpt_path=ckpt_path)
        return module

    return fit


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


def files(folder) -> list[int]:
    """The number of the file of frozen weights that each checkpoint in `folder` has, in order; None: it has none."""
    paths = [path / FROZEN for path in checkpoint.by_step(folder).values()]
    inodes = [path.stat().st_ino if path.exists() else None for path in paths]
    first = list(dict.fromkeys(inode for inode in inodes if inode))
    return [first.index(inode) if inode else None for inode in inodes]


def saved(folder, step) -> dict[str, np.ndarray]:
    return numpy(checkpoint.load(folder / f"step={step}")["weights"])


def numpy(arrays) -> dict[str, np.ndarray]:
    return {name: np.array(array.astype(mx.float32)) for name, array in arrays.items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def assert_holds(folder, step, module):
    """The checkpoint of `step` has the weights of `module`, each once, and in their dtypes."""
    arrays = dict(tree_flatten(module.parameters()))
    loaded = checkpoint.load(folder / f"step={step}")["weights"]
    assert {name: array.dtype for name, array in loaded.items()} == {name: a.dtype for name, a in arrays.items()}
    assert_same(numpy(loaded), numpy(arrays))


def test_what_is_frozen_is_written_once_and_what_is_trained_each_time(fit, folder):
    module = fit()
    assert files(folder) == [0, 0, 0, 0]
    parts = {name: set(mx.load(str(folder / "step=4" / name))) for name in ("weights.safetensors", FROZEN)}
    assert parts == {"weights.safetensors": {"head.weight", "head.bias"}, FROZEN: {"backbone.weight", "backbone.bias"}}
    assert_holds(folder, 4, module)
    checkpoint.read_state(folder / "step=3")


def test_a_module_without_frozen_weights_has_all_in_one_file(fit, folder):
    module = fit(module=TinyRegression())
    assert files(folder) == [None] * 4 and len(mx.load(str(folder / "step=4/weights.safetensors"))) == 4
    assert_holds(folder, 4, module)


def write_in_place(module):
    module.backbone.weight[...] = mx.full((8, 4), 3.0)


def write_by_numpy(module):
    np.asarray(module.backbone.bias.view(mx.uint16), copy=False)[0] ^= 1


def replace(module):
    module.backbone.weight = mx.full((8, 4), 3.0, dtype=mx.bfloat16)


@pytest.mark.parametrize("change", [write_in_place, replace, write_by_numpy])
def test_frozen_weights_that_change_all_the_same_are_written_again(fit, folder, change):
    module = fit(After(2, change))
    assert files(folder) == [0, 0, 1, 1]
    assert_holds(folder, 4, module)
    assert any(
        (saved(folder, 2)[name] != array).any() for name, array in saved(folder, 3).items() if "backbone" in name
    )


def test_frozen_weights_that_are_replaced_by_equal_ones_are_not_written_again(fit, folder):
    def put_equal(module):
        module.backbone.weight = module.backbone.weight + 0

    fit(After(2, put_equal))
    assert files(folder) == [0, 0, 0, 0]


def test_what_is_saved_is_what_was_there_even_if_it_is_then_written_in_place(make_trainer):
    found = []

    class Dump(Callback):
        def on_train_start(self, trainer, module):
            contents = trainer.dump_checkpoint()
            found.append(numpy(contents["weights"])["backbone.weight"])
            write_in_place(module)
            found.append(numpy(contents["weights"])["backbone.weight"])

    make_trainer(callbacks=[Dump()], max_steps=1).fit(HalfFrozen(), train_dataloaders=DistinctBatches())
    np.testing.assert_array_equal(*found)


def test_what_is_being_saved_holds_no_copy_of_what_is_frozen(make_trainer):
    place = lambda array: np.asarray(array.view(mx.uint16), copy=False).ctypes.data

    class Dump(Callback):
        def on_train_end(self, trainer, module):
            contents = trainer.dump_checkpoint()
            assert place(contents["weights"]["backbone.weight"]) == place(module.backbone.weight)

    make_trainer(callbacks=[Dump()], max_steps=2).fit(HalfFrozen(), train_dataloaders=DistinctBatches())


def test_arrays_that_a_callback_puts_into_checkpoints_are_what_is_saved(fit, folder):
    class Replace(Callback):
        def on_save_checkpoint(self, trainer, module, checkpoint):
            fresh = mx.full((8,), float(trainer.global_step))
            checkpoint["weights"] = checkpoint["weights"] | {"backbone.bias": fresh}

    fit(Replace())
    assert [saved(folder, step)["backbone.bias"][0] for step in (1, 2, 3, 4)] == [1, 2, 3, 4]
    assert files(folder) == [0, 1, 1, 1]


def test_a_callback_whose_arrays_would_be_taken_for_frozen_weights_is_refused(fit):
    class Own(Callback):
        def on_save_checkpoint(self, trainer, module, checkpoint):
            checkpoint["frozen"] = {"x": mx.ones(1)}

    with pytest.raises(UserError, match="frozen weights of its own"):
        fit(Own())


def test_averages_of_what_is_trained_leave_the_frozen_file_alone(fit, folder):
    fit(EMAWeightAveraging(decay=0.5))
    assert files(folder) == [0, 0, 0, 0]


def test_a_layer_that_is_opened_trained_and_frozen_again_is_saved_as_it_was_at_each_step(fit, folder):
    schedule = FreezeSchedule({0: "head", 2: ("head", "backbone"), 3: "head"}, unit="step")
    module = fit(schedule, module=TinyRegression(), max_steps=5)
    assert files(folder) == [0, 0, None, 1, 1]
    assert_holds(folder, 5, module)
    assert (saved(folder, 2)["backbone.weight"] != saved(folder, 4)["backbone.weight"]).any()


def test_running_statistics_are_saved_as_they_are_beside_frozen_weights(fit, folder):
    class Normed(HalfFrozen):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm(4, affine=False)

        def training_step(self, batch):
            return super().training_step(batch | {"x": self.norm(batch["x"])})

    module = fit(module=Normed())
    assert files(folder) == [0, 1, 1, 1]  # what changes is known by the second
    assert_holds(folder, 4, module)
    means = [saved(folder, step)["norm.running_mean"] for step in (1, 2, 3, 4)]
    assert all((one != other).any() for one, other in zip(means, means[1:]))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(4, 4)

    def __call__(self, x):
        return self.q_proj(x)


def test_adapters_are_saved_each_time_and_the_weights_that_they_adapt_once(fit, folder):
    class Adapted(HalfFrozen):
        def __init__(self):
            super().__init__()
            self.layers = [Attention()]
            self.layers[0].freeze()
            add_adapters(self, LoRAConfig(rank=2, keys=("q_proj",)))

        def training_step(self, batch):
            return super().training_step(batch | {"x": self.layers[0](batch["x"])})

    module = fit(module=Adapted())
    assert files(folder) == [0, 0, 0, 0]
    names = set(mx.load(str(folder / "step=4/weights.safetensors")))
    assert "layers.0.q_proj.lora_a" in names and "layers.0.q_proj.linear.weight" not in names
    assert_holds(folder, 4, module)


def test_best_and_last_share_no_file_where_they_are_two(fit, folder):
    fit(scores=(5, 9, 1, 2, 10, 3), save_top_k=1, max_steps=6)
    assert list(checkpoint.by_step(folder)) == [5, 6]
    one, other = ((folder / name / FROZEN).stat() for name in ("best", "last"))
    assert one.st_ino != other.st_ino and one.st_nlink == other.st_nlink == 1


def test_only_the_checkpoint_after_a_best_one_is_written_anew(fit, folder):
    fit(scores=(1, 9, 2, 3, 4, 10, 5), max_steps=7)
    assert files(folder) == [0, 0, 1, 1, 1, 1, 2]


def test_a_checkpoint_outlives_the_one_that_wrote_its_frozen_weights(fit, folder):
    module = fit(save_top_k=1, max_steps=5)
    assert list(checkpoint.by_step(folder)) == [5] and (folder / "last" / FROZEN).stat().st_nlink == 1
    assert_holds(folder, 5, module)


def test_a_resumed_run_ends_as_the_one_that_never_stopped_and_writes_a_file_of_its_own(fit, folder):
    whole = fit(max_steps=6)
    shutil.move(folder, folder.with_name("whole"))
    fit(max_steps=3)
    module = fit(max_steps=6, ckpt_path="last")
    assert files(folder) == [0, 0, 0, 1, 1, 1]
    assert_same(numpy(dict(tree_flatten(whole.parameters()))), numpy(dict(tree_flatten(module.parameters()))))
    fit(max_steps=4, ckpt_path=folder / "step=2")  # another branch
    assert files(folder) == [0, 0, 1, 1] and files(folder / "abandoned_0") == [0, 1, 1, 1]


@pytest.mark.parametrize("damage", ["written over", "deleted", "replaced"])
def test_a_file_that_is_not_what_was_written_is_not_linked(fit, folder, damage):
    def spoil(module):
        while not (folder / "last").resolve().name == "step=2":
            time.sleep(0.001)  # until the thread has written it
        path = folder / "step=2" / FROZEN
        if damage == "written over":
            path.write_bytes(b"other")
        else:
            path.unlink()
        if damage == "replaced":
            path.write_bytes((folder / "step=1" / FROZEN).read_bytes())

    module = fit(After(2, spoil))
    assert files(folder)[2:] == [files(folder)[2]] * 2 and files(folder)[2] not in files(folder)[:2]
    assert_holds(folder, 4, module)


def test_where_the_file_system_has_no_hard_links_the_weights_are_written(fit, folder, monkeypatch):
    def refuse(*paths):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    module = fit()
    assert files(folder) == [0, 1, 2, 3]
    assert_holds(folder, 4, module)


def test_a_damaged_shared_file_is_named_in_each_checkpoint_and_the_run_goes_on_from_one_without_it(fit, folder, capsys):
    fit(scores=(9, 1, 2, 3))
    data = bytearray((folder / "last" / FROZEN).read_bytes())
    data[-1] ^= 1
    with (folder / "last" / FROZEN).open("r+b") as file:  # in place: all links have it
        file.write(data)
    checksums._known.clear()
    assert checkpoint.latest(folder).name == "step=1"
    assert capsys.readouterr().out.count(f"{FROZEN} is missing or damaged") == 3
    with pytest.raises(UserError, match="frozen.safetensors is missing or damaged"):
        fit(ckpt_path=folder / "step=4")


def test_a_linked_file_is_hashed_once(fit, folder, monkeypatch):
    fit()
    hashed, sha256 = [], checksums.sha256
    checksums._known.clear()
    monkeypatch.setattr(checksums, "sha256", lambda path: hashed.append(path.name) or sha256(path))
    for step in (1, 2, 3, 4):
        checkpoint.read_state(folder / f"step={step}")
    assert hashed.count(FROZEN) == 1


def test_a_saved_checkpoint_of_a_users_own_shares_nothing(fit, folder, tmp_path):
    class Own(Callback):
        def on_train_end(self, trainer, module):
            trainer.save_checkpoint(tmp_path / "own")

    fit(Own())
    assert (tmp_path / "own" / FROZEN).stat().st_nlink == 1


def test_copies_that_follow_links_are_read(fit, folder, tmp_path):
    module = fit()
    shutil.copytree(folder, copy := tmp_path / "copy")
    assert_holds(copy, 4, module)
    loaded = HalfFrozen.load_from_checkpoint(copy / "last")
    own = HalfFrozen()
    checkpoint.load_weights(copy / "last", own)
    for one in (loaded, own):
        assert_same(numpy(dict(tree_flatten(one.parameters()))), saved(folder, 4))


def test_a_checkpoint_without_its_frozen_weights_is_named_and_not_read_in_part(fit, folder):
    fit()
    (folder / "step=4" / FROZEN).unlink()
    for read in (checkpoint.check_model, HalfFrozen.load_from_checkpoint):
        with pytest.raises(UserError, match="frozen.safetensors is missing or damaged"):
            read(folder / "step=4")


def test_a_checkpoint_of_format_2_is_resumed_from(fit, folder):
    whole = fit(max_steps=4)
    path = folder / "step=2"
    for step in (3, 4):
        shutil.rmtree(folder / f"step={step}")
    weights = checkpoint.load(path)["weights"]
    mx.eval(weights)
    (path / FROZEN).unlink()
    mx.save_safetensors(str(path / "new.safetensors"), weights)
    os.replace(path / "new.safetensors", path / "weights.safetensors")
    state = json.loads((path / "state.json").read_text())
    del state["checksum"], state["files"]
    names = ("optimizer.safetensors", "weights.safetensors")
    state |= {"format": 2, "files": {name: checksums.sha256(path / name) for name in names}}
    (path / "state.json").write_text(json.dumps(state | {"checksum": checksums.checksum_of_values(state)}))
    module = fit(max_steps=4, ckpt_path=path)
    assert json.loads((folder / "step=4/state.json").read_text())["format"] == 3
    assert_same(*(numpy(dict(tree_flatten(one.parameters()))) for one in (whole, module)))


def test_a_captioners_version_depends_on_its_frozen_weights_too(fit, folder):
    fit(max_steps=1)
    before = checksum(folder / "step=1")
    mx.save_safetensors(str(folder / "step=1" / FROZEN), {"backbone.weight": mx.zeros(1)})
    assert checksum(folder / "step=1") != before
