"""Lookups with a deterministic gradient: MLX's numbers, in one order of addition, wherever a module looks rows up."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import DistinctBatches
from mlx.utils import tree_flatten
from mlx_lm.tuner.dora import DoRAEmbedding
from mlx_lm.tuner.lora import LoRAEmbedding
from small_modules import small_aligner, small_batch, small_clip

from mlxmm import Module, losses
from mlxmm.compute import deterministic
from mlxmm.compute.deterministic import add_rows, deterministic_lookups, lookup, repeats_to_the_bit, sums_of_equal
from mlxmm.losses import linear_token_loss
from mlxmm.optimizers import OptimizerConfig

V, D = 11, 6


@pytest.fixture
def case():
    """Indices (4, 25) of 11 rows, so that each is there several times, and rows for them."""
    mx.random.seed(0)
    return mx.random.randint(0, V, (4, 25)), mx.random.normal((4, 25, D))


@pytest.fixture
def added(monkeypatch):
    """The shapes of the tables to which rows have been added."""
    shapes, add = [], deterministic.add_rows
    for module in (deterministic, losses):
        monkeypatch.setattr(module, "add_rows", lambda table, *rest: shapes.append(table.shape) or add(table, *rest))
    return shapes


@pytest.mark.parametrize("compiled", [False, True])
def test_the_gradient_is_mlx_s_and_repeats(case, compiled):
    indices, rows = case
    table = mx.random.normal((V, D))
    wrap = mx.compile if compiled else lambda f: f
    grad = lambda look: wrap(mx.grad(lambda table: (look(table, indices) * rows).sum()))(table)
    ours, theirs = grad(lookup), grad(lambda table, indices: table[indices])
    assert mx.array_equal(lookup(table, indices), table[indices])
    assert mx.abs(ours - theirs).max() < 1e-5 and mx.allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    assert mx.array_equal(ours, grad(lookup))


def test_the_order_in_which_a_gpu_adds_does_not_matter(case):
    """Atomic additions come in any order. Ours add one number that is not zero to each row."""
    indices, rows = (x.reshape(-1, *x.shape[2:]) for x in case)
    ends = {"rows": set(), "sums": set()}
    for name, (where, what) in {"rows": (indices, rows), "sums": sums_of_equal(indices, rows)}.items():
        for seed in range(8):
            order = np.random.default_rng(seed).permutation(len(where))
            table = np.ones((V, D), np.float32)
            np.add.at(table, np.array(where)[order], np.array(what)[order])
            ends[name].add(table.tobytes())
    assert len(ends["sums"]) == 1 < len(ends["rows"])


def test_half_precision_is_added_in_float32_and_rounded_once(case):
    indices, rows = case[0].reshape(-1), case[1].reshape(-1, D).astype(mx.bfloat16)
    ours = add_rows(mx.zeros((V, D), mx.bfloat16), indices, rows)
    exact = mx.zeros((V, D)).at[indices].add(rows.astype(mx.float32))
    assert ours.dtype == mx.bfloat16 and mx.allclose(ours.astype(mx.float32), exact, rtol=2**-8)


def test_no_index_and_a_single_one_and_a_table_of_numbers():
    table = mx.zeros((V, D))
    assert mx.array_equal(add_rows(table, mx.zeros(0, mx.int32), mx.zeros((0, D))), table)
    assert add_rows(table, mx.array([3]), mx.ones((1, D)))[3].tolist() == [1] * D
    assert add_rows(mx.zeros(3), mx.array([1, 1]), mx.array([2.0, 3.0])).tolist() == [0, 5, 0]


@pytest.mark.parametrize("kind", [nn.Embedding, LoRAEmbedding, DoRAEmbedding])
def test_embeddings_and_their_adapters_look_up_so_within_the_block_only(case, kind, added):
    indices, rows = case
    layer = kind(V, D)
    if kind is not nn.Embedding:
        layer.lora_b = mx.random.normal(layer.lora_b.shape)
    grads = lambda: dict(tree_flatten(nn.value_and_grad(layer, lambda: (layer(indices) * rows).sum())()[1]))
    plain, own = grads(), type(layer)
    assert not added
    with deterministic_lookups(layer):
        ours = grads()
    assert sorted(added) == sorted(array.shape for name, array in plain.items() if name != "lora_b")
    assert ours.keys() == plain.keys() and type(layer) is own
    for name in plain:
        np.testing.assert_allclose(np.array(ours[name]), np.array(plain[name]), rtol=1e-5, atol=1e-5, err_msg=name)


def test_the_fused_head_adds_the_rows_of_its_targets_so_always(case, added):
    targets, states = case
    loss = lambda weight: linear_token_loss(states, weight, targets, mx.ones(targets.shape))[0]
    mx.eval(mx.grad(loss)(mx.random.normal((V, D))))
    assert added == [(V, D)]


class Words(Module):
    def __init__(self):
        super().__init__()
        mx.random.seed(0)
        self.words = nn.Embedding(V, D)

    def training_step(self, batch):
        return {"loss": mx.square(self.words(mx.abs(10 * batch["x"]).astype(mx.int32) % V)).mean()}

    def configure_optimizers(self):
        return OptimizerConfig().build(100)


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_trainer_s_setting_decides(make_trainer, added, deterministic):
    module = Words()
    make_trainer(max_steps=2, deterministic=deterministic).fit(module, train_dataloaders=DistinctBatches())
    assert bool(added) == deterministic and type(module.words) is nn.Embedding


@pytest.mark.parametrize("make", [small_clip, small_aligner])
@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"detect_anomaly": True}])
def test_our_modules_train_so_as_without_and_repeat_to_the_bit(make_trainer, make, settings):
    def end(deterministic):
        module = make()
        trainer = make_trainer(max_steps=2, deterministic=deterministic, **settings)
        trainer.fit(module, train_dataloaders=[small_batch(module)])
        return {name: np.array(array) for name, array in tree_flatten(module.parameters())}

    ours, again, plain = end(True), end(True), end(False)
    for name in plain:
        np.testing.assert_array_equal(ours[name], again[name], err_msg=name)
        np.testing.assert_allclose(ours[name], plain[name], rtol=0, atol=2e-5, err_msg=name)


def test_it_works_in_mixed_precision_and_the_weights_stay_float32(make_trainer):
    module = small_aligner()
    settings = {"max_steps": 2, "deterministic": True, "precision": "bf16-mixed", "gradient_checkpointing": True}
    make_trainer(**settings).fit(module, train_dataloaders=[small_batch(module)])
    arrays = [array for _, array in tree_flatten(module.parameters())]
    assert {array.dtype for array in arrays} == {mx.float32} and all(mx.isfinite(array).all() for array in arrays)


def test_a_cpu_repeats_to_the_bit_and_a_gpu_if_it_is_told_to():
    cpu, gpu = mx.Device(mx.cpu), mx.Device(mx.gpu)
    assert [repeats_to_the_bit(device, told) for device in (cpu, gpu) for told in (False, True)] == [1, 1, 0, 1]


def test_cudnn_s_attention_is_warned_of_on_cuda_unless_it_is_off(monkeypatch, recwarn):
    def num_warnings():
        with deterministic_lookups(nn.Embedding(V, D)):
            return len(recwarn)

    monkeypatch.delenv("MLX_CUDA_USE_CUDNN_SDPA", raising=False)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: False)
    assert num_warnings() == 0
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)
    assert num_warnings() == 1 and "MLX_CUDA_USE_CUDNN_SDPA=0" in str(recwarn[0].message)
    monkeypatch.setenv("MLX_CUDA_USE_CUDNN_SDPA", "0")
    assert num_warnings() == 1
