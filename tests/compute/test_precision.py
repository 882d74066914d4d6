"""Half precision: where numbers are bfloat16, where they stay float32, and that training is nearly the same."""

import attrs
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import DistinctBatches, TinyRegression
from mlx.utils import tree_flatten
from small_modules import small_aligner, small_batch, small_clip

from callbacks import FreezeSchedule, ModelCheckpoint
from mlxmm import Callback, Qwen3Aligner, seed_everything
from mlxmm.compute import functional as F
from mlxmm.compute.layer_calls import replaced_calls
from mlxmm.networks.adapters import LoRAConfig
from mlxmm.networks.language_model import load_language_model, save_language_model
from mlxmm.optimizers import OptimizerConfig
from mlxmm.training.model_summary import summary


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


# ---- a language model in bfloat16, as the Hub has them, where a GPU leaves it so


@pytest.fixture
def bfloat16_folder(tmp_path, monkeypatch):
    """A small Qwen3 in bfloat16 in the Hub's layout; the CPU acts as a GPU."""
    monkeypatch.setenv("MLXMM_ACT_AS", "gpu")
    aligner = small_aligner()
    folder = tmp_path / "bf16"
    folder.mkdir()
    save_language_model(folder, aligner.language_model, aligner.lm_config | {"dtype": "bfloat16"})
    aligner.tokenizer.save_pretrained(str(folder))
    return folder


def aligner_on(folder, *, dtype=None, **config):
    base = small_aligner()
    model, values = load_language_model(folder, config.pop("bits", 0))
    if dtype is not None:
        model.set_dtype(dtype)
    config = attrs.evolve(base.config, optimizer=OptimizerConfig(learning_rate=3e-5, warmup_steps=0), **config)
    seed_everything(0)
    vision_config = attrs.asdict(base.vision.config) | {"model_type": "clip_vision_model"}
    return Qwen3Aligner(config, base.vision, vision_config, base.processor, model, values, base.tokenizer)


LAST = {0: "projector", 2: ("projector", "language_model.model.layers[-1:]")}
LORA = {0: "projector", 2: ("projector", "lora")}


class FeatureRowsOf:
    """Batches of one image batch, with pixels or with the float16 features that a cache would have."""

    def __init__(self, module, cached):
        self.batch = small_batch(module)
        if cached:
            features = module.features(module.processor.normalize(mx.array(self.batch.pop("pixels"))))
            self.batch["features"] = np.array(features.astype(mx.float16))

    def __len__(self):
        return 50

    def epoch(self, epoch, start=0):
        return (self.batch for _ in range(start, len(self)))


@pytest.mark.parametrize("cached", [False, True], ids=["pixels", "cached features"])
@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
@pytest.mark.parametrize("kind", ["last layer", "lora", "lora on 4 bits"])
def test_what_is_trained_of_a_bfloat16_model_is_float32_and_all_products_are_of_one_dtype(
    bfloat16_folder, make_trainer, kind, precision, cached
):
    rank, bits = (0 if kind == "last layer" else 4), (4 if "4 bits" in kind else 0)
    module = aligner_on(bfloat16_folder, lora=LoRAConfig(rank=rank), bits=bits)
    products, seen = {}, {nn.Linear, nn.QuantizedLinear}

    def watch(name, call):
        def run(self, x, *args, **kwargs):
            weight = self.scales if "scales" in self else self.weight
            products[name] = {x.dtype, weight.dtype}
            return call(self, x, *args, **kwargs)

        return run

    linears = {name: part for name, part in module.named_modules() if isinstance(part, tuple(seen))}
    trainer = make_trainer(
        max_steps=4, precision=precision, callbacks=[FreezeSchedule(LORA if rank else LAST, unit="step")]
    )
    with replaced_calls(linears, watch):
        trainer.fit(module, train_dataloaders=FeatureRowsOf(module, cached))
    assert len(products) > 12 and {len(kinds) for kinds in products.values()} == {1}
    trained, frozen = module.trainable_parameters(), module.language_model.model.layers[0].input_layernorm.weight
    assert dtypes(trained) == {mx.float32} and frozen.dtype == mx.bfloat16
    assert dtypes({k: v for k, v in trainer.optimizer.state.items() if isinstance(v, dict)}) == {mx.float32}
    assert all(
        np.abs(np.array(m)).max() > 0 for name, m in tree_flatten(trainer.optimizer.state) if name.endswith(".m")
    )


def test_a_part_frozen_again_and_resumed_is_as_if_never_stopped_and_its_dtypes_are_read_back(
    bfloat16_folder, make_trainer, tmp_path
):
    stages = LAST | {4: "projector"}

    class Stop(Callback):
        def on_train_batch_end(self, trainer, module, metrics, batches):
            trainer.should_stop = trainer.global_step == self.step

    def run(module, step, root, **options):
        stop = Stop()
        stop.step = step
        callbacks = [FreezeSchedule(stages, unit="step"), ModelCheckpoint(every_n_train_steps=1), stop]
        trainer = make_trainer(max_steps=6, callbacks=callbacks, default_root_dir=root)
        trainer.fit(module, train_dataloaders=FeatureRowsOf(module, False), **options)
        return module

    whole = run(aligner_on(bfloat16_folder), 6, tmp_path / "whole")
    for stop in (3, 5):
        root = tmp_path / f"stopped-{stop}"
        run(aligner_on(bfloat16_folder), stop, root)
        again = run(aligner_on(bfloat16_folder), 6, root, ckpt_path="last")
        for (name, a), (_, b) in zip(tree_flatten(whole.parameters()), tree_flatten(again.parameters())):
            assert a.dtype == b.dtype and mx.array_equal(a, b).item(), name
    read = Qwen3Aligner.from_pretrained(tmp_path / "whole" / "checkpoints" / "last")
    kinds = {name: array.dtype for name, array in tree_flatten(read.parameters())}
    assert kinds == {name: array.dtype for name, array in tree_flatten(whole.parameters())}
    loader = FeatureRowsOf(whole, False)
    tested = [make_trainer(limit_test_batches=1).test(module, dataloaders=loader) for module in (whole, read)]
    assert tested[0] == tested[1]


def test_a_bfloat16_model_whose_last_layer_is_trained_moves_as_its_float32_twin_does(bfloat16_folder, make_trainer):
    moves = []
    for dtype in (None, mx.float32):
        module = aligner_on(bfloat16_folder, dtype=dtype)
        before = weights(module.language_model)
        trainer = make_trainer(max_steps=40, callbacks=[FreezeSchedule({0: LAST[2]})])
        trainer.fit(module, train_dataloaders=FeatureRowsOf(module, False))
        after = weights(module.language_model)
        moves.append({name: after[name] - before[name] for name in after if name.startswith("model.layers.1.")})
    ours, exact = (np.concatenate([move.ravel() for move in some.values()]) for some in moves)
    assert np.linalg.norm(ours) == pytest.approx(np.linalg.norm(exact), rel=0.01)
    assert np.corrcoef(ours, exact)[0, 1] > 0.99
    assert all((move != 0).mean() > 0.99 for move in moves[0].values())


def test_the_summary_names_the_dtypes_of_each_part(bfloat16_folder):
    _, *lines = summary(aligner_on(bfloat16_folder)).splitlines()  # the first is the title
    assert lines[0].split()[-1] == "dtypes"
    ends = {line.split()[0]: line.split(None, 3)[3] for line in lines[1:]}
    assert ends["language_model"] == "bfloat16" and ends["vision"] == "float32"
    assert set(ends["total"].split(", ")) == {"bfloat16", "float32"}
