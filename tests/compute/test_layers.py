"""Gradient checkpointing and anomaly detection: what they compute, what they cost, and that they go again."""

import gc

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import DistinctBatches, TinyRegression
from mlx.utils import tree_flatten
from small_modules import small_aligner, small_batch, small_clip

from mlxmm import Callback, Module, seed_everything
from mlxmm.compute.dropout import dropout_from
from mlxmm.compute.gradient_checkpointing import recomputed_layers
from mlxmm.compute.layer_calls import replaced_calls
from mlxmm.optimizers import OptimizerConfig
from mlxmm.training.anomaly import AnomalyError


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.dropout, self.down = nn.Linear(width, 4 * width), nn.Dropout(0.5), nn.Linear(4 * width, width)

    def __call__(self, x):
        return x + self.down(self.dropout(nn.gelu(self.up(x))))


class Stack(Module):
    """Blocks with dropout inside, in a list called `layers`."""

    def __init__(self, num_layers=3, width=8):
        super().__init__()
        seed_everything(5)
        self.layers = [Block(width) for _ in range(num_layers)]

    def training_step(self, batch):
        x = batch["x"]
        for layer in self.layers:
            x = layer(x)
        return {"loss": mx.square(x).mean()}

    def configure_optimizers(self):
        return OptimizerConfig().build(100)


class Rows:
    def __init__(self, rows=6, width=8):
        self.batch = {"x": np.random.default_rng(0).normal(size=(rows, width)).astype(np.float32)}

    def __len__(self):
        return 100

    def epoch(self, epoch, start=0):
        return (self.batch for _ in range(100 - start))


def gradients(module, batch):
    """Loss and gradients of one step from a fixed random key."""
    seed_everything(1)
    batch = {name: mx.array(array) for name, array in batch.items()}
    loss, grads = nn.value_and_grad(module, lambda b: module.training_step(b)["loss"])(batch)
    return loss.item(), {name: np.array(grad) for name, grad in tree_flatten(grads)}


def assert_close(left, right, atol=1e-6):
    assert left.keys() == right.keys() and left
    for name in left:
        np.testing.assert_allclose(left[name], right[name], rtol=0, atol=atol, err_msg=name)


def kinds(module):
    return [type(part) for part in module.modules()]


def test_recomputed_gradients_are_those_of_the_same_dropout():
    """By finite differences: of the loss with the dropout of one key, in the direction of the gradient."""
    module, batch = Stack(), Rows().batch
    with recomputed_layers(module):
        _, grads = gradients(module, batch)
        length = np.sqrt(sum(np.square(grad).sum() for grad in grads.values()))
        own, losses = dict(tree_flatten(module.parameters())), []
        for step in (1e-2, -1e-2):
            module.load_weights([(name, array + step * grads[name] / length) for name, array in own.items()])
            losses.append(gradients(module, batch)[0])
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(length, rel=1e-2)


def test_recomputed_gradients_equal_those_without_given_the_same_masks():
    """`dropout_from` draws other masks than the global key: both sides are computed with it."""
    module, batch = Stack(), Rows().batch
    with recomputed_layers(module):
        recomputed = gradients(module, batch)
    layers = {f"layers.{i}": layer for i, layer in enumerate(module.layers)}
    with replaced_calls(layers, kept_with_key):
        kept = gradients(module, batch)
    assert recomputed[0] == pytest.approx(kept[0], abs=1e-6)
    assert_close(recomputed[1], kept[1])


def kept_with_key(name, call):
    def run(self, x):
        with dropout_from(self, mx.random.randint(0, 2**31 - 1, (2,), dtype=mx.uint32)):
            return call(self, x)

    return run


def test_mlx_checkpoint_alone_recomputes_with_other_dropout():
    """Why `recomputed_layers` gives every dropout an explicit key: MLX's global one has moved on by then."""

    def alone(name, call):
        def run(self, x):
            def inner(parameters, x):
                self.update(parameters)
                return call(self, x)

            return mx.checkpoint(inner)(self.trainable_parameters(), x)

        return run

    module, batch = Stack(num_layers=1), Rows().batch
    loss, grads = gradients(module, batch)
    with replaced_calls({"layers.0": module.layers[0]}, alone):
        loss_alone, grads_alone = gradients(module, batch)
    assert loss_alone == pytest.approx(loss, abs=1e-6)
    assert max(np.abs(grads[name] - grads_alone[name]).max() for name in grads) > 1e-3


@pytest.mark.parametrize(("make", "compiled"), [(small_clip, False), (small_aligner, False), (small_aligner, True)])
def test_our_modules_train_as_without_checkpointing(make_trainer, make, compiled):
    ends = []
    for recomputed in (True, False):
        module = make()
        own = kinds(module)
        trainer = make_trainer(max_steps=2, gradient_checkpointing=recomputed, compile=compiled)
        trainer.fit(module, train_dataloaders=[small_batch(module)])
        ends.append({name: np.array(array) for name, array in tree_flatten(module.parameters())})
        assert kinds(module) == own
    assert_close(*ends, atol=2e-5)
    grads = []
    module = make()
    batch = small_batch(module)
    with recomputed_layers(module):
        grads.append(gradients(module, batch)[1])
    grads.append(gradients(module, batch)[1])
    assert_close(*grads)


@pytest.mark.skipif(mx.cuda.is_available(), reason="cuBLAS takes tens of MiB for itself")
@pytest.mark.parametrize("compiled", [True, False])
def test_the_peak_of_memory_is_lower(make_trainer, compiled):
    peaks = []
    for recomputed in (True, False):
        gc.collect()  # or what earlier tests left is freed while this one measures
        module = Stack(num_layers=24, width=64)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        trainer = make_trainer(max_steps=2, gradient_checkpointing=recomputed, compile=compiled)
        trainer.fit(module, train_dataloaders=Rows(512, 64))
        peaks.append(mx.get_peak_memory() - before)
        del module, trainer
    assert peaks[0] < 0.4 * peaks[1], peaks


def test_classes_are_back_after_an_exception_and_a_second_fit_does_not_nest(make_trainer):
    class Depth(Callback):
        def on_train_batch_end(self, trainer, module, metrics, batches):
            depths.append(len(type(module.layers[0]).__mro__))
            if trainer.global_step == fails_at:
                raise InterruptedError

    module, depths = Stack(), []
    own = kinds(module)
    for fails_at in (1, None, None):
        trainer = make_trainer(max_steps=2, gradient_checkpointing=True, callbacks=[Depth()])
        try:
            trainer.fit(module, train_dataloaders=Rows())
        except InterruptedError:
            assert fails_at
        assert kinds(module) == own
    assert set(depths) == {len(Block.__mro__) + 1} and len(depths) == 5


@pytest.mark.parametrize("compiled", [True, False])
def test_mixed_precision_keeps_its_float32_weights_under_checkpointing(make_trainer, compiled):
    ends = []
    for recomputed in (True, False):
        module = Mixed()
        module.layers[1].freeze()
        settings = {"precision": "bf16-mixed", "gradient_checkpointing": recomputed, "compile": compiled}
        make_trainer(max_steps=2, **settings).fit(module, train_dataloaders=Rows())
        assert {array.dtype for _, array in tree_flatten(module.parameters())} == {mx.float32}
        ends.append({name: np.array(array) for name, array in tree_flatten(module.parameters())})
    assert_close(*ends)


class Mixed(Stack):
    """Without dropout, its input cast as networks do, and an exact type of what enters each layer."""

    def __init__(self):
        super().__init__()
        self.eval()

    def training_step(self, batch):
        return super().training_step({"x": batch["x"].astype(self.layers[0].up.weight.dtype)})


def test_a_frozen_layer_gets_no_gradient_and_the_layers_below_it_do():
    module, batch = Stack(), Rows().batch
    module.eval()
    module.layers[1].freeze()
    plain = gradients(module, batch)[1]
    with recomputed_layers(module):
        recomputed = gradients(module, batch)[1]
    assert not [name for name in recomputed if name.startswith("layers.1")]
    assert_close(plain, recomputed)


@pytest.mark.parametrize(("kind", "num_axes"), [(nn.Dropout, 1), (nn.Dropout2d, 2), (nn.Dropout3d, 3)])
def test_replayed_dropout_drops_as_mlx_does(kind, num_axes):
    dropout, x = kind(0.4), mx.ones((20, *(6, 5, 4)[:num_axes], 30))
    expected = dropout(x)
    with dropout_from(dropout, mx.random.key(3)):
        first, second = dropout(x), dropout(x)
    with dropout_from(dropout, mx.random.key(3)):
        again = dropout(x)
    assert mx.array_equal(first, again) and not mx.array_equal(first, second)
    assert set(np.unique(np.array(first)).round(4)) == set(np.unique(np.array(expected)).round(4))
    for axis in range(1, x.ndim):  # what is dropped as one is the same along it
        together = [mx.array_equal(y.min(axis), y.max(axis)).item() for y in (first, expected)]
        assert together[0] == together[1] == (axis < x.ndim - 1 and kind is not nn.Dropout)


class Overflows(TinyRegression):
    """A head whose output, or whose weight's gradient alone, is not finite."""

    def __init__(self, part):
        super().__init__(dropout=0.0)
        self.part = part
        if part == "output":
            self.head.weight = mx.full(self.head.weight.shape, mx.inf)

    def training_step(self, batch):
        outputs = super().training_step(batch)
        if self.part == "gradient":
            outputs["loss"] = outputs["loss"] + mx.sqrt(0 * self.head.bias).sum()
        return outputs


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("output", r"^the output of head is not finite"),
        ("gradient", r"^at step 0, the gradient \(head.bias\) is not finite"),
    ],
)
def test_detect_anomaly_names_the_part_or_the_parameter(make_trainer, part, message):
    module = Overflows(part)
    own = kinds(module)
    with pytest.raises(AnomalyError, match=message):
        make_trainer(max_steps=3, detect_anomaly=True).fit(module, train_dataloaders=DistinctBatches())
    assert kinds(module) == own


def test_detect_anomaly_changes_no_number_and_works_with_checkpointing(make_trainer):
    ends = []
    for detect in (True, False):
        module = Stack()
        trainer = make_trainer(max_steps=3, detect_anomaly=detect, gradient_checkpointing=True)
        trainer.fit(module, train_dataloaders=Rows())
        ends.append({name: np.array(array) for name, array in tree_flatten(module.parameters())})
    assert_close(*ends, atol=2e-6)
