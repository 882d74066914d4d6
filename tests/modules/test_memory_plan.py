"""The plan of memory: near what training takes, and told before it starts."""

import gc

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxmm.compute import memory
from mlxmm.modules.memory_plan import GIB, MemoryPlan, plan_memory
from mlxmm.modules.qwen3_aligner import Qwen3Aligner, Qwen3AlignerConfig
from mlxmm.networks.clip import CLIPVisionTower, VisionConfig
from mlxmm.networks.language_model import Qwen3Config, build_language_model
from mlxmm.preprocessing.images import ImageProcessor
from mlxmm.preprocessing.tokenizers import train_tokenizer
from mlxmm.training.trainable import match_parameters, set_trainable, trainable_names

NETWORK = Qwen3Config(
    hidden_size=256,
    num_hidden_layers=4,
    intermediate_size=768,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    rope_theta=1e6,
)
TOKENS, IMAGES = 32, 8


def aligner(half):
    tokenizer = train_tokenizer(["a red circle"], 300)
    hub = NETWORK.to_hub(tokenizer) | {"vocab_size": 40_000}
    model = build_language_model(hub)
    if half:
        model.set_dtype(mx.bfloat16)
    tower = VisionConfig(image_size=56, patch_size=8, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
    config = Qwen3AlignerConfig(max_new_tokens=TOKENS)
    module = Qwen3Aligner(config, CLIPVisionTower(tower), {}, ImageProcessor.square(56), model, hub, tokenizer)
    mx.eval(module.parameters())
    return module


def batch():
    rng = np.random.default_rng(0)
    return {
        "pixels": rng.integers(0, 256, (IMAGES, 56, 56, 3), dtype=np.uint8),
        "tokens": rng.integers(0, 40_000, (IMAGES, TOKENS), dtype=np.int32),
        "mask": np.ones((IMAGES, TOKENS), dtype=np.float32),
    }


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("half", "precision"),
    [(False, "bf16-mixed"), *(pytest.param(half, "32", marks=pytest.mark.slow) for half in (False, True))],
)
def test_a_plan_is_near_the_peak_and_not_below_it(half, precision, checkpointing, make_trainer, monkeypatch):
    if half:
        monkeypatch.setenv("MLXMM_ACT_AS", "gpu")
    gc.collect()  # of networks before this one
    others = mx.get_active_memory()
    module = aligner(half)
    set_trainable(module, match_parameters(module, "projector"))
    set_trainable(module, trainable_names(module) + match_parameters(module, "language_model.model.layers[-1:]"))
    settings = {"precision": precision, "gradient_checkpointing": checkpointing}
    trainer = make_trainer(max_steps=2, **settings)
    plan = plan_memory(module, trainable_names(module), trainer.config, batch_size=IMAGES)
    mx.reset_peak_memory()
    trainer.fit(module, train_dataloaders=[module.collate(batch())] * 2)
    peak = mx.get_peak_memory() - others
    assert peak <= plan.total - plan.kept <= 2.2 * peak  # what is kept is not in use


def test_weights_moments_and_features_are_counted_exactly(make_trainer):
    module = aligner(half=True)
    trained = match_parameters(module, "projector")
    config = make_trainer().config
    without, with_features = (
        plan_memory(module, trained, config, batch_size=1, num_cached_rows=number) for number in (0, 10)
    )
    arrays = dict(tree_flatten(module.parameters()))
    num_trained = sum(arrays[name].size for name in trained)
    assert without.weights == sum(array.nbytes for array in arrays.values())
    assert without.optimizer == num_trained * 12
    assert with_features.disk - without.disk == 10 * 49 * 64 * 2
    opened = plan_memory(module, match_parameters(module, "language_model"), config, batch_size=1)
    num_widened = sum(array.size for name, array in arrays.items() if name.startswith("language_model."))
    assert opened.weights - without.weights == 2 * num_widened


def test_what_a_machine_has_less_of_is_told_in_numbers(tmp_path, monkeypatch):
    fits = MemoryPlan(weights=1, optimizer=1, activations=1, kept=1, disk=1)
    assert fits.shortages(tmp_path) == []
    monkeypatch.setattr(memory, "working_set", lambda: 5 * GIB)
    needs = MemoryPlan(weights=3 * GIB, optimizer=2 * GIB, activations=GIB, kept=0, disk=2**60)
    of_memory, of_disk = needs.shortages(tmp_path)
    assert "5.0 GiB of memory" in of_memory and "6.0 GiB" in of_memory and "of free disk" in of_disk
