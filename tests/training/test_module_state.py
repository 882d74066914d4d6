"""What a module may hold: lists, dicts, shared parts, buffers, attributes that change, parts that are replaced."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from conftest import DistinctBatches, TinyRegression
from mlx.utils import tree_flatten

from callbacks import EMAWeightAveraging, FreezeSchedule
from mlxmm import Callback, Module
from mlxmm.compute.gradcache import call_in_chunks
from mlxmm.errors import UserError
from mlxmm.optimizers import AdamW, grouped
from mlxmm.training.trainable import match_parameters


class Net(TinyRegression):
    """TinyRegression with something between its two layers."""

    def __init__(self):
        super().__init__(dropout=0.0)
        self.build()

    def build(self):
        pass

    def between(self, hidden):
        return hidden

    def training_step(self, batch):
        hidden = self.between(mx.maximum(self.backbone(batch["x"]), 0))
        return {"loss": mx.square(self.head(hidden)[:, 0] - batch["y"]).mean()}

    def configure_optimizers(self):
        return AdamW(0.05)


def weights(module):
    return {name: np.array(array) for name, array in tree_flatten(module.parameters())}


def fit(make_trainer, module, max_steps=3, ckpt_path=None, **settings):
    trainer = make_trainer(max_steps=max_steps, compile=False, **settings)
    trainer.fit(module, train_dataloaders=DistinctBatches(), ckpt_path=ckpt_path)
    return trainer


def moved(make_trainer, module, **settings) -> set[str]:
    before = weights(module)
    fit(make_trainer, module, **settings)
    return {name for name, array in weights(module).items() if not np.array_equal(array, before[name])}


class ArraysInList(Net):
    def build(self):
        self.gains = [mx.ones(8), mx.ones(8)]

    def between(self, hidden):
        return hidden * self.gains[0] * self.gains[1]


class ArraysInDict(Net):
    def build(self):
        self.gains = {"a": mx.ones(8), "1": mx.ones(8)}

    def between(self, hidden):
        return hidden * self.gains["a"] * self.gains["1"]


class PartsInDict(Net):
    KEYS = ("0", "1")

    def build(self):
        self.gains = {key: nn.Linear(8, 8) for key in self.KEYS}

    def between(self, hidden):
        for key in self.KEYS:
            hidden = self.gains[key](hidden)
        return hidden


class DottedParts(PartsInDict):
    KEYS = ("vqa.v2", "vqa", "coco")


@pytest.mark.parametrize("kind", [ArraysInList, ArraysInDict, PartsInDict, DottedParts])
def test_what_lists_and_dicts_hold_is_trained_frozen_and_resumed(make_trainer, tmp_path, kind):
    def names(module):
        return {name for name in weights(module) if name.startswith("gains")}

    module = kind()
    assert names(module) <= moved(make_trainer, module)
    assert moved(make_trainer, kind(), callbacks=[FreezeSchedule({0: "head"})]) == {"head.weight", "head.bias"}
    assert moved(make_trainer, kind(), callbacks=[FreezeSchedule({0: "gains"})]) == names(module)
    average = lambda: [FreezeSchedule({0: ("head", "gains")}), EMAWeightAveraging(0.5)]
    whole, resumed = kind(), kind()
    fit(make_trainer, whole, 6, callbacks=average())
    fit(make_trainer, kind(), 3, callbacks=average()).save_checkpoint(tmp_path / "c")
    fit(make_trainer, resumed, 6, tmp_path / "c", callbacks=average())
    for name, array in weights(whole).items():
        np.testing.assert_array_equal(array, weights(resumed)[name], err_msg=name)


@pytest.mark.parametrize("held", [(nn.Linear(8, 8), nn.Linear(8, 8)), (mx.ones(8),), [(mx.ones(8),)]], ids=str)
def test_a_tuple_of_layers_or_arrays_is_refused_by_its_name(make_trainer, held):
    module = Net()
    module.backbone.extra = held if isinstance(held, tuple) else held[0]
    with pytest.raises(UserError, match=r"Net.backbone.extra is a tuple.*make it a list"):
        fit(make_trainer, module)
    module.backbone.extra, module.backbone._constants = (1, 2), (mx.ones(2),)
    fit(make_trainer, module)


class Shared(Net):
    def build(self):
        self.a = nn.Linear(8, 8)
        self.z = self.a

    def between(self, hidden):
        return self.z(mx.tanh(self.a(hidden)))


@pytest.mark.parametrize("name", ["a", "z", ("a", "z")])
def test_a_part_with_two_names_is_trained_by_either(make_trainer, name):
    found = moved(make_trainer, Shared(), callbacks=[FreezeSchedule({0: name})])
    assert found == {"a.weight", "a.bias", "z.weight", "z.bias"}


class Buffers(Net):
    def build(self):
        self.order, self.mask = mx.arange(8), mx.array([True] * 8)

    def between(self, hidden):
        return mx.where(self.mask, mx.take(hidden, self.order, axis=1), 0)


def test_integers_and_booleans_are_never_trained(make_trainer):
    found = moved(make_trainer, Buffers(), callbacks=[EMAWeightAveraging()])
    assert found == {"backbone.weight", "backbone.bias", "head.weight", "head.bias"}
    with pytest.raises(UserError, match="'order' matches no parameter to train"):
        fit(make_trainer, Buffers(), callbacks=[FreezeSchedule({0: ("head", "order")})])
    module = Buffers()
    module.freeze()
    module.unfreeze(keys=["order", "mask"], recurse=False)
    with pytest.raises(UserError, match="nothing in Buffers is trainable"):
        fit(make_trainer, module)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.order = nn.Linear(8, 8), nn.BatchNorm(8), mx.arange(8)

    def __call__(self, x):
        return mx.take(mx.tanh(self.norm(self.linear(x))), self.order, axis=1)


class Deep(Net):
    def build(self):
        self.layers = [Block(), Block()]

    def between(self, hidden):
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


def test_gradient_checkpointing_keeps_running_statistics(make_trainer):
    plain, recomputed = Deep(), Deep()
    recomputed.update(plain.parameters())
    fit(make_trainer, plain, callbacks=[FreezeSchedule({0: ("layers", "head")})])
    fit(make_trainer, recomputed, callbacks=[FreezeSchedule({0: ("layers", "head")})], gradient_checkpointing=True)
    for name, array in weights(plain).items():
        np.testing.assert_allclose(weights(recomputed)[name], array, atol=1e-6, err_msg=name)
    assert np.abs(weights(recomputed)["layers.1.norm.running_mean"]).max() > 1e-3


def test_gradcache_keeps_running_statistics_of_its_chunks():
    def statistics(whole: bool):
        mx.random.seed(3)
        block, x = Block(), mx.random.normal((6, 8))

        def loss(parameters):
            block.update(parameters)
            return call_in_chunks(block, lambda part, chunk: part(chunk), x, 3).sum()

        if whole:
            block(x[:3])
            block(x[3:])
        else:
            mx.eval(mx.grad(loss)({"linear": block.linear.trainable_parameters()}), block.parameters())
        return np.array(block.norm.running_mean)

    np.testing.assert_allclose(statistics(whole=False), statistics(whole=True), atol=1e-6)
    assert np.abs(statistics(whole=False)).max() > 1e-3


class Annealed(Net):
    def build(self):
        self.beta, self.settings, self.drop = 0.0, {"scale": [1.0]}, nn.Dropout(0.0)

    def training_step(self, batch):
        scale = self.settings["scale"][0]
        return super().training_step(batch) | {"beta": self.beta, "scale": scale, "p": 1 - self.drop._p_1}

    def validation_step(self, batch):
        return self.training_step(batch)

    def configure_optimizers(self):
        return optim.SGD(0.0, momentum=0.0, weight_decay=0.5)


class Anneal(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, module, batches):
        step = float(trainer.global_step)
        module.beta, module.settings["scale"][0], module.drop._p_1 = step, step + 5, 1 - step / 4 - 0.1

    def on_train_batch_end(self, trainer, module, metrics, batches):
        self.seen.append([float(metrics[name]) for name in ("beta", "scale", "p")])

    def on_validation_end(self, trainer, module, metrics):
        self.seen.append([metrics[f"val/{name}"] for name in ("beta", "scale", "p")])


def test_a_compiled_step_sees_attributes_that_a_callback_changes(make_trainer):
    anneal = Anneal()
    trainer = make_trainer(max_steps=2, callbacks=[anneal], num_sanity_val_steps=0)
    with pytest.warns(UserWarning, match=r"Annealed.\w+ has changed, and the step is compiled again"):
        trainer.fit(Annealed(), train_dataloaders=DistinctBatches(), val_dataloaders=DistinctBatches(1))
    np.testing.assert_allclose(anneal.seen, [[i, i + 5, i / 4 + 0.1] for i in (0, 1, 1)], atol=1e-6)


def test_what_hooks_keep_in_a_module_does_not_compile_a_step_again(make_trainer):
    class Keeps(Net):
        def build(self):
            self.outputs, self.count = [], 0

        def on_train_batch_end(self, metrics, batches):
            self.outputs.append(1.0)
            self.count += 1

        def training_step(self, batch):
            self.num_traces = getattr(self, "num_traces", 0) + 1
            return super().training_step(batch)

    module = Keeps()
    make_trainer(max_steps=4).fit(module, train_dataloaders=DistinctBatches())
    assert module.count == 4 and module.num_traces == 1


class Swap(Callback):
    def __init__(self, **parts):
        self.parts = parts

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            mx.random.seed(9)
            self.before = {}
            for name, make in self.parts.items():
                module[name] = make()
            self.before = weights(module)


def frozen_head():
    head = nn.Linear(8, 1)
    head.freeze()
    return head


@pytest.mark.parametrize(
    ("parts", "still"),
    [
        ({"head": lambda: nn.Linear(8, 1)}, set()),
        ({"head": frozen_head}, {"head.weight", "head.bias"}),
        ({"head": lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))}, set()),
        ({"backbone": lambda: nn.Linear(4, 16), "head": lambda: nn.Linear(16, 1)}, set()),
    ],
    ids=["same shape", "frozen", "deeper", "wider"],
)
@pytest.mark.parametrize("optimizer", [lambda: AdamW(0.05), lambda: grouped(AdamW(0.05), head=AdamW(0.01))])
def test_a_part_that_is_replaced_between_epochs_is_trained_with_new_moments(make_trainer, parts, still, optimizer):
    class Replaced(Net):
        def configure_optimizers(self):
            return optimizer()

    swap, module = Swap(**parts), Replaced()
    callbacks = [swap, EMAWeightAveraging(0.9), FreezeSchedule({0: ("backbone", "head")})]
    make_trainer(max_epochs=2, callbacks=callbacks[: 2 if still else 3], compile=False).fit(
        module, train_dataloaders=DistinctBatches(3)
    )
    now = weights(module)
    assert {name for name, array in swap.before.items() if np.array_equal(array, now[name])} == still


def grouped_by_us(default, head):
    return grouped(default, head=head)


def grouped_by_mlx(default, head):
    return optim.MultiOptimizer([head, default], [lambda name, array: name.startswith("head.")])


@pytest.mark.parametrize("make", [grouped_by_us, grouped_by_mlx])
@pytest.mark.parametrize("closed", ["layers[:1]", "layers[1:]"])
def test_groups_of_rates_go_with_a_schedule_that_closes_layers(make_trainer, tmp_path, make, closed):
    class Grouped(Deep):
        def configure_optimizers(self):
            return make(AdamW(0.05), AdamW(0.01))

    def run(max_steps, ckpt_path=None):
        module = Grouped()
        schedule = FreezeSchedule({0: ("layers", "head"), 2: (closed, "head"), 4: ("layers", "head")}, unit="step")
        return fit(make_trainer, module, max_steps, ckpt_path, callbacks=[schedule]), module

    mx.random.seed(5)
    _, whole = run(6)
    mx.random.seed(5)
    run(3)[0].save_checkpoint(tmp_path / "c")
    mx.random.seed(5)
    _, resumed = run(6, tmp_path / "c")
    for name, array in weights(whole).items():
        np.testing.assert_array_equal(array, weights(resumed)[name], err_msg=name)


@pytest.mark.parametrize(
    "schedule",
    [lambda step: 0.1 if step < 2 else 0.01, lambda step: 0.1 * float(step) / 10, lambda step: 0.1 * step.item()],
)
def test_a_schedule_in_plain_python_is_refused_in_one_line_or_runs_uncompiled(make_trainer, schedule):
    class Scheduled(Net):
        def configure_optimizers(self):
            return AdamW(schedule)

    with pytest.raises(UserError, match=r"Scheduled.configure_optimizers: the schedule of learning_rate reads"):
        make_trainer(max_steps=3).fit(Scheduled(), train_dataloaders=DistinctBatches())
    trainer = fit(make_trainer, Scheduled())
    assert trainer.optimizer.learning_rate.item() == pytest.approx(schedule(mx.array(2)))


def test_a_constant_schedule_is_a_rate(make_trainer):
    class Scheduled(Net):
        def configure_optimizers(self):
            return AdamW(lambda step: 0.1)

    trainer = make_trainer(max_steps=3)
    trainer.fit(Scheduled(), train_dataloaders=DistinctBatches())
    assert trainer.optimizer.learning_rate.item() == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("backbone.1", "matches no parameter to train in Net: did you mean backbone.layers.1\\?$"),
        ("backbone.1.bias", "matches no parameter to train in Net: did you mean backbone.layers.1.bias\\?$"),
        ("bakbone", "matches no parameter to train in Net: did you mean backbone\\?$"),
        ("backbone[1]", r"^'backbone\[1\]': backbone is no list of layers: write backbone.layers\[1\]$"),
        ("decoder", "matches no parameter to train in Net, whose parts are backbone, head$"),
    ],
)
def test_a_part_that_is_named_otherwise_is_answered_with_its_name(pattern, told):
    class Net(Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
            self.head = nn.Linear(2, 1)

    with pytest.raises(UserError, match=told):
        match_parameters(Net(), pattern)
