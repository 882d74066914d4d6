"""Half precision: where numbers are bfloat16, where they stay float32, and that training is nearly the same."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import DistinctBatches, TinyRegression
from mlx.utils import tree_flatten
from small_modules import small_aligner, small_batch, small_clip

from mlxmm.compute import functional as F
from mlxmm.compute.layer_calls import replaced_calls


def dtypes(tree):
    return {array.dtype for _, array in tree_flatten(tree) if mx.issubdtype(array.dtype, mx.floating)}


def weights(module):
    return {name: np.array(array.astype(mx.float32)) for name, array in tree_flatten(module.parameters())}


class Watching(TinyRegression):
    """Notes the types of its weights and activations while a step is computed."""

    def training_step(self, batch):
        x = batch["x"].astype(self.backbone.weight.dtype)
        self.seen.add((self.head.weight.dtype, self.backbone(x).dtype))
        return super().training_step(batch | {"x": x})


def fit(make_trainer, module, **settings):
    object.__setattr__(module, "seen", set())
    trainer = make_trainer(max_steps=8, **settings)
    trainer.fit(module, train_dataloaders=DistinctBatches())
    return trainer


@pytest.mark.parametrize("compiled", [True, False])
def test_mixed_steps_compute_in_bfloat16_and_keep_weights_and_moments_in_float32(make_trainer, compiled):
    module = Watching()
    trainer = fit(make_trainer, module, precision="bf16-mixed", compile=compiled)
    assert module.seen == {(mx.bfloat16, mx.bfloat16)}
    assert dtypes(module.parameters()) == dtypes(trainer.optimizer.state) == {mx.float32}


def test_mixed_training_ends_near_that_in_float32_but_is_not_it(make_trainer):
    mixed, full = Watching(dropout=0.0), Watching(dropout=0.0)
    fit(make_trainer, mixed, precision="bf16-mixed")
    fit(make_trainer, full)
    start = weights(TinyRegression())
    moved, apart = (
        sum(np.abs(other[n] - w).sum() for n, w in weights(full).items()) for other in (start, weights(mixed))
    )
    assert 0 < apart < 0.1 * moved


def test_mixed_validation_is_bfloat16_too_and_gives_the_weights_back(make_trainer):
    module = Watching()
    object.__setattr__(module, "seen", set())
    make_trainer(precision="bf16-mixed").validate(module, dataloaders=DistinctBatches(2))
    assert module.seen == {(mx.bfloat16, mx.bfloat16)} and dtypes(module.parameters()) == {mx.float32}


def test_an_exception_in_a_mixed_step_gives_the_float32_weights_back(make_trainer):
    class Fails(TinyRegression):
        def training_step(self, batch):
            raise RuntimeError("in the step")

    module = Fails()
    before = weights(module)
    for compiled in (True, False):
        with pytest.raises(RuntimeError, match="in the step"):
            fit(make_trainer, module, precision="bf16-mixed", compile=compiled)
        assert dtypes(module.parameters()) == {mx.float32}
        assert all(np.array_equal(before[name], array) for name, array in weights(module).items())


def test_true_bfloat16_has_weights_and_moments_in_it(make_trainer):
    module = Watching()
    trainer = fit(make_trainer, module, precision="bf16-true")
    assert module.seen == {(mx.bfloat16, mx.bfloat16)}
    assert dtypes(module.parameters()) == {mx.bfloat16}
    assert dtypes({k: v for k, v in trainer.optimizer.state.items() if isinstance(v, dict)}) == {mx.bfloat16}


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("make", [small_clip, small_aligner])
def test_every_layer_of_our_networks_gives_bfloat16_and_the_loss_is_float32(make_trainer, make, precision):
    outputs, module = {}, make()
    kind = type(module)

    class Watched(kind):
        def training_step(self, batch):
            measured = super().training_step(batch)
            outputs["loss"] = measured["loss"].dtype
            return measured

    def watch(name, call):
        def run(self, *args, **kwargs):
            result = call(self, *args, **kwargs)
            outputs[name] = result.dtype
            return result

        return run

    module.__class__ = Watched
    trainer = make_trainer(max_steps=1, precision=precision, compile=False)
    with replaced_calls({name: part for name, part in module.named_modules() if part is not module}, watch):
        trainer.fit(module, train_dataloaders=[small_batch(module)])
    assert len(outputs) > 20 and outputs.pop("loss") == mx.float32
    logits = {"network": mx.float32} if "network" in outputs else {}
    assert {name: dtype for name, dtype in outputs.items() if dtype != mx.bfloat16} == logits


@pytest.mark.parametrize("make", [small_clip, small_aligner])
def test_our_modules_lose_little_by_mixed_precision(make_trainer, make):
    losses = {}
    for precision in ("32", "bf16-mixed"):
        module = make()
        batch = small_batch(module)
        trainer = make_trainer(max_steps=6, precision=precision, compile=False, log_every_n_steps=1)
        trainer.fit(module, train_dataloaders=[batch])
        losses[precision] = trainer.callback_metrics["train/loss"]
    assert losses["bf16-mixed"] == pytest.approx(losses["32"], rel=0.05) and losses["bf16-mixed"] != losses["32"]


def test_features_of_bfloat16_have_length_one_to_float32():
    from mlxmm.networks.towers import l2_normalize

    features = mx.random.normal((8, 512), key=mx.random.key(0)).astype(mx.bfloat16)
    lengths = mx.linalg.norm(l2_normalize(features).astype(mx.float32), axis=-1)
    np.testing.assert_allclose(np.array(lengths), 1, rtol=1e-6)


def test_cross_entropy_of_bfloat16_logits_is_computed_in_float32():
    logits = mx.random.normal((64, 50), key=mx.random.key(0)).astype(mx.bfloat16)
    targets = mx.arange(64) % 50
    loss = F.cross_entropy(logits, targets)
    assert loss.dtype == mx.float32
    exact = F.cross_entropy(logits.astype(mx.float32), targets)
    np.testing.assert_allclose(np.array(loss), np.array(exact), rtol=1e-5)
