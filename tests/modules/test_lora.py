"""Language models of the aligner: of several kinds, full or quantized, with adapters or without."""

import itertools
import json

import attrs
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image
from small_modules import VISION, small_batch, tokenizer
from test_resume import assert_equal, checkpoints

from callbacks import FreezeSchedule, ModelCheckpoint
from mlxmm import Qwen3Aligner, seed_everything
from mlxmm.compute import functional as F
from mlxmm.compute.quantized import use_unpacking
from mlxmm.errors import UserError
from mlxmm.modules import token_metrics
from mlxmm.modules.qwen3_aligner import Qwen3AlignerConfig
from mlxmm.modules.token_metrics import fuses_head
from mlxmm.networks.adapters import LoRAConfig
from mlxmm.networks.clip import CLIPVisionTower
from mlxmm.networks.language_model import (
    Qwen3Config,
    build_language_model,
    embed,
    head,
    head_weight,
    hidden_states,
    load_language_model,
)
from mlxmm.networks.pretrained_vision import save_vision_tower
from mlxmm.optimizers import OptimizerConfig
from mlxmm.preprocessing.images import ImageProcessor
from mlxmm.training.trainable import match_parameters, trainable_names
from recipes import align_qwen3

LAYERS = 2
SMALL = {"hidden_size": 64, "num_hidden_layers": LAYERS, "intermediate_size": 128, "num_attention_heads": 2}
QWEN3 = Qwen3Config(**SMALL, num_key_value_heads=1, head_dim=32)
LORA, DORA = LoRAConfig(rank=4, dropout=0.3), LoRAConfig(rank=2, dropout=0.3, dora=True)
KINDS = {  # the config.json of each, as the Hub has it
    "qwen3": QWEN3.to_hub(tokenizer(False)),
    "llama": QWEN3.to_hub(tokenizer(False)) | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},  # SmolLM2
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tower and a language model of each kind, in the Hub's layout."""
    root = tmp_path_factory.mktemp("hub")
    seed_everything(3)
    values = {"model_type": "clip_vision_model"} | attrs.asdict(VISION)
    save_vision_tower(root / "tower", CLIPVisionTower(VISION), values)
    (root / "tower" / "preprocessor_config.json").write_text(json.dumps(ImageProcessor.square(16).to_hub()))
    for kind, config in KINDS.items():
        write(root / kind, build_language_model(config), config)
        for bits in (4, 8):
            write(root / f"{kind}-{bits}bit", *quantized(root / kind, bits))
    return root


def write(folder, model, config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    tokenizer(False).save_pretrained(str(folder))


def quantized(folder, bits):
    from mlx_lm.utils import load_model, quantize_model

    return quantize_model(*load_model(folder), group_size=64, bits=bits)


def make(folders, lm="qwen3", **settings) -> Qwen3Aligner:
    seed_everything(5)
    config = Qwen3AlignerConfig(
        vision=str(folders / "tower"),
        lm=str(folders / lm),
        projector_width=32,
        max_new_tokens=8,
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0),
        **settings,
    )
    return Qwen3Aligner.from_parts(config)


def arrays(module) -> dict[str, np.ndarray]:
    return {name: np.array(array) for name, array in tree_flatten(module.parameters())}


def changed(before: dict, after: dict) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not np.array_equal(before[name], after[name])}


def lora_names(module) -> set[str]:
    return {name for name in arrays(module) if name.split(".")[-1] in ("lora_a", "lora_b", "m")}


def fit(make_trainer, module, num_steps=3, callbacks=(), ckpt_path=None, **settings):
    """Most tests run uncompiled: that is faster where every module is another one."""
    batch = module.collate(small_batch(module))
    settings = {"compile": False, "enable_progress_bar": False} | settings
    trainer = make_trainer(max_steps=num_steps, callbacks=callbacks, **settings)
    trainer.fit(module, train_dataloaders=Repeated(batch), ckpt_path=ckpt_path)
    return trainer


class Repeated:
    """A loader that gives the same batch for ever."""

    def __init__(self, batch: dict):
        self.batch = batch

    def epoch(self, epoch, start=0):
        return itertools.repeat(self.batch)


# ---- kinds of language models


@pytest.mark.parametrize("lm", ["qwen3", "llama", "qwen3-4bit", "llama-8bit"])
def test_a_language_model_reads_embeddings_as_it_reads_tokens(folders, lm):
    model, _ = load_language_model(folders / lm)
    tokens = mx.array([[5, 9, 2, 7]])
    own = model(tokens)
    assert mx.allclose(head(model, hidden_states(model, embed(model, tokens))), own, atol=1e-5)
    assert mx.abs(own).max() > 1e-2


@pytest.mark.parametrize(
    "other",
    [
        {"model_type": "phi3", "rope_theta": 1e4},  # takes tokens only
        {
            "model_type": "gear",
            "layer_types": ["full_attention"] * LAYERS,
        },  # scales the embeddings of tokens, but not those it is given
    ],
    ids=["tokens only", "scaled embeddings"],
)
def test_a_language_model_that_reads_embeddings_otherwise_is_one_clear_line(folders, tmp_path, other):
    config = KINDS["llama"] | other | {"architectures": None}
    write(tmp_path / "lm", build_language_model(config), config)
    with pytest.raises(UserError, match=f"lm holds a {other['model_type']}, to which mlx-lm cannot give embeddings"):
        make(folders, str(tmp_path / "lm"))


def test_no_row_of_the_embeddings_is_cut_where_the_tokenizer_has_fewer_tokens(folders, tmp_path, make_trainer):
    rows = 151_936  # of Qwen3, whose tokenizer has 151,669 tokens
    narrow = attrs.asdict(QWEN3) | {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8, "head_dim": 4}
    config = KINDS["qwen3"] | narrow | {"vocab_size": rows}
    write(tmp_path / "lm", build_language_model(config), config)
    module = make(folders, str(tmp_path / "lm"))
    table = np.array(module.language_model.model.embed_tokens.weight)
    assert len(module.tokenizer) < 400 and len(table) == rows and fuses_head(module.language_model)
    fit(make_trainer, module, 1).save_checkpoint(tmp_path / "c")
    again = Qwen3Aligner.from_pretrained(tmp_path / "c").language_model.model.embed_tokens.weight
    assert np.array_equal(np.array(again), table)


# ---- adapters


@pytest.mark.parametrize("lora", [LORA, DORA], ids=["lora", "dora"])
@pytest.mark.parametrize("lm", ["qwen3", "llama-4bit"])
def test_adapters_change_nothing_until_they_are_trained_and_then_they_alone_change(folders, make_trainer, lm, lora):
    plain, module = make(folders, lm), make(folders, lm, lora=lora)
    batch = {name: mx.array(array) for name, array in small_batch(module).items()}
    module.projector.update(plain.projector.parameters())
    plain.eval(), module.eval()
    assert mx.allclose(plain.training_step(batch)["loss"], module.training_step(batch)["loss"], atol=1e-4)
    module.train()
    opened = {name for name in arrays(module) if name.startswith("projector.")} | lora_names(module)
    assert set(trainable_names(module)) == opened
    assert len(lora_names(module)) == (3 if lora.dora else 2) * 7 * LAYERS
    before = arrays(module)
    fit(make_trainer, module)
    assert changed(before, arrays(module)) == opened


def test_plain_modules_keep_the_names_of_their_weights_and_adapters_add_theirs(folders):
    plain, adapted = arrays(make(folders)), arrays(make(folders, lora=LoRAConfig(rank=1, keys=("self_attn.q_proj",))))
    assert "language_model.model.layers.0.self_attn.q_proj.weight" in plain
    layers = [f"language_model.model.layers.{i}.self_attn.q_proj" for i in range(LAYERS)]
    added = {f"{layer}.{name}" for layer in layers for name in ("linear.weight", "lora_a", "lora_b")}
    assert set(adapted) - set(plain) == added
    assert set(plain) - set(adapted) == {f"{layer}.weight" for layer in layers}


def test_layers_and_keys_are_chosen_and_scale_and_dropout_arrive(folders):
    keys = ("self_attn.v_proj", "mlp.up_proj")
    module = make(folders, lora=LoRAConfig(rank=3, scale=7.0, dropout=0.25, num_layers=1, keys=keys))
    path = f"language_model.model.layers.{LAYERS - 1}"
    assert lora_names(module) == {f"{path}.{key}.{name}" for key in keys for name in ("lora_a", "lora_b")}
    adapter = module.language_model.model.layers[-1].mlp.up_proj
    assert adapter.lora_a.shape == (64, 3) and adapter.scale == 7.0 and adapter.dropout._p_1 == 0.75


@pytest.mark.parametrize(
    ("lm", "settings", "message"),
    [
        ("qwen3-4bit", {"keys": ("q_proj",)}, "no layer has q_proj; choose from mlp.down_proj, .*self_attn.v_proj"),
        ("qwen3", {"keys": ("self_attn",)}, "lora: Can't convert layer of type Attention"),
        ("qwen3-4bit", {"keys": ("model.embed_tokens",), "dora": True}, "no DoRA for quantized embeddings"),
    ],
)
def test_adapters_that_cannot_be_are_one_clear_line(folders, lm, settings, message):
    with pytest.raises(UserError, match=message):
        make(folders, lm, lora=LoRAConfig(rank=2, **settings))


@pytest.mark.parametrize("lm", ["qwen3", "qwen3-8bit"])
def test_an_adapted_embedding_is_read_and_makes_logits(folders, make_trainer, lm):
    module = make(folders, lm, lora=LoRAConfig(rank=2, keys=("model.embed_tokens",)))
    before = arrays(module)
    fit(make_trainer, module)
    moved = changed(before, arrays(module))
    assert lora_names(module) <= moved and len(lora_names(module)) == 2


# ---- what is open


def test_a_schedule_opens_the_adapters_by_one_name(folders, make_trainer):
    module = make(folders, lora=DORA)
    seen, before = {}, arrays(module)

    class See(FreezeSchedule):
        def on_train_batch_end(self, trainer, module, metrics, batches):
            seen[trainer.global_step] = changed(before, arrays(module))

    fit(make_trainer, module, 3, [See({0: "projector", 2: ("projector", "lora")}, unit="step")])
    projector = set(match_parameters(module, "projector"))
    assert seen == {1: projector, 2: projector, 3: projector | lora_names(module)}


def test_a_module_without_adapters_has_no_such_name(folders, make_trainer):
    with pytest.raises(UserError, match="'lora' matches no parameter to train in Qwen3Aligner, .* lora,"):
        fit(make_trainer, make(folders), 1, [FreezeSchedule({0: "lora"})])


def test_quantized_weights_stay_frozen_when_their_layer_is_opened(folders, make_trainer):
    module = make(folders, "qwen3-4bit", lora=LoRAConfig(rank=2, keys=("self_attn.q_proj",)))
    before = arrays(module)
    fit(make_trainer, module, 2, [FreezeSchedule({0: "language_model.model.layers[-1]"})])
    names = {name.split(f"layers.{LAYERS - 1}.")[-1] for name in changed(before, arrays(module))}
    norms = {"input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm"}
    assert names == {f"{norm}.weight" for norm in norms} | {"self_attn.q_proj.lora_a", "self_attn.q_proj.lora_b"}
    with pytest.raises(UserError, match="matches no parameter to train"):
        match_parameters(module, "language_model.model.layers[-1].mlp")


def test_the_language_models_rate_is_that_of_its_adapters(folders, make_trainer):
    lora = attrs.evolve(LORA, dropout=0.0)
    slow, module = make(folders, lora=lora, lm_lr_scale=1e-30), make(folders, lora=lora)
    before = arrays(slow)
    fit(make_trainer, slow, 1), fit(make_trainer, module, 1)
    far = lambda after: max(np.abs(after[name] - before[name]).max() for name in lora_names(slow))
    assert far(arrays(slow)) < 1e-20 and far(arrays(module)) > 1e-3
    assert changed(arrays(slow), arrays(module)) == lora_names(module)


def test_the_recipe_opens_adapters_where_there_are_any_and_layers_that_are_not_quantized(folders):
    def opened_of(lm, **settings):
        module = make(folders, lm, **settings)
        return align_qwen3.unfrozen_part(align_qwen3.Config(module=module.config), module)

    assert opened_of("qwen3") == "language_model.model.layers[-2:]"
    assert opened_of("qwen3", lora=LORA) == opened_of("qwen3-4bit", lora=LORA) == "lora"
    with pytest.raises(UserError, match="layers of a quantized language model cannot be trained"):
        opened_of("qwen3", lm_bits=4)
    assert align_qwen3.PRESETS["flickr30k-lora"].config.module.lora.rank == 8


@pytest.mark.skipif(mx.cuda.is_available(), reason="cuBLAS takes tens of MiB for itself")
def test_layers_below_the_lowest_open_part_keep_nothing_for_the_gradient():
    """Nor does anything compute gradients of frozen weights: there are none for the optimizer."""
    config = KINDS["qwen3"] | {"num_hidden_layers": 12}
    model = build_language_model(config)
    states = mx.random.normal((8, 64, 64))

    def peak(pattern, of_input):
        model.freeze()
        for layer in model.layers[pattern]:
            layer.unfreeze()
        loss = lambda x: mx.square(hidden_states(model, x)).mean()
        take = mx.value_and_grad(loss) if of_input else nn.value_and_grad(model, loss)
        mx.eval(model.parameters(), states)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(take(states))
        return mx.get_peak_memory() - before

    assert peak(slice(-2, None), False) < peak(slice(0, 0), True) / 2 < peak(slice(None), False) / 2


# ---- quantized


@pytest.mark.parametrize("bits", [4, 8])
def test_quantizing_on_loading_gives_the_folder_that_mlx_lm_quantized(folders, bits):
    there, here = make(folders, f"qwen3-{bits}bit"), make(folders, lm_bits=bits)
    assert not changed(arrays(there), arrays(here))
    assert arrays(here)["language_model.model.embed_tokens.weight"].dtype == np.uint32
    assert here.lm_config["quantization"]["bits"] == there.lm_config["quantization"]["bits"] == bits
    with pytest.raises(UserError, match=f"-{bits}bit is quantized already"):
        make(folders, f"qwen3-{bits}bit", lm_bits=4)


def test_unpacking_multiplies_as_mlx_does_forward_and_backward(folders, monkeypatch):
    model, _ = load_language_model(folders / "qwen3-4bit")
    layer, table = model.layers[0].mlp.up_proj, model.model.embed_tokens
    x = mx.random.normal((3, 5, 64), key=mx.random.key(0))

    def run():
        of = lambda f: mx.compile(mx.value_and_grad(lambda x: mx.sin(f(x)).sum()))(x)
        return layer(x), table.as_linear(x), *of(layer), *of(table.as_linear)

    ours = run()
    monkeypatch.setenv("MLXMM_FAST", "off")
    assert type(layer) is not nn.QuantizedLinear
    for mine, own in zip(ours, run(), strict=True):
        assert mx.allclose(mine, own, atol=1e-4) and mx.abs(own).max() > 0.1


@pytest.mark.skipif(not F.uses_fast_forms(mx.zeros(1)), reason="weights are unpacked on CPUs under Linux")
def test_unpacked_weights_are_not_kept_for_the_gradient():
    size, depth = 256, 32
    model = nn.Sequential(*(nn.Linear(size, size, bias=False) for _ in range(depth)))
    nn.quantize(model, 64, 4)
    use_unpacking(model)
    grad = mx.compile(mx.grad(lambda x: model(x).sum()))
    mx.eval(model.parameters(), grad(mx.ones((1, size))))
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(grad(mx.ones((1, size))))
    assert size * size * 4 < mx.get_peak_memory() - before < depth / 2 * size * size * 4


def test_the_loss_of_a_quantized_head_is_fused_and_the_same(folders, monkeypatch):
    model, _ = load_language_model(folders / "qwen3-8bit")
    model.freeze()
    assert head_weight(model).shape == (model.args.vocab_size, 64)
    key = mx.random.key(0)
    states = mx.random.normal((2, 3, 64), key=key)
    batch = {"tokens": mx.random.randint(0, 200, (2, 3), key=key), "mask": mx.ones((2, 3))}
    measure = lambda s: token_metrics.token_metrics(model, s, batch)["loss"]
    model.train()
    plain, d_plain = mx.value_and_grad(measure)(states)
    monkeypatch.setattr(token_metrics, "FUSED_FROM", 1)
    assert token_metrics.fuses_head(model)
    fused, d_fused = mx.value_and_grad(measure)(states)
    assert mx.allclose(plain, fused, atol=1e-5) and mx.allclose(d_plain, d_fused, atol=1e-5)
    assert mx.abs(d_plain).max() > 1e-3


# ---- checkpoints

VARIANTS = {
    "lora": ("qwen3", {"lora": LORA}),
    "dora": ("llama", {"lora": DORA}),
    "4bit": ("qwen3-4bit", {}),
    "4bit-lora": ("llama-4bit", {"lora": LORA}),
    "8bit-on-loading-dora": ("qwen3", {"lora": DORA, "lm_bits": 8}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_ends_as_the_whole_one_to_the_bit(folders, make_trainer, tmp_path, variant):
    lm, settings = VARIANTS[variant]
    opened = "lora" if "lora" in settings else "language_model.model.norm"

    def run(folder, ckpt_path=None):
        keep = ModelCheckpoint(every_n_train_steps=1, monitor="train/loss", save_top_k=-1, dirpath=folder)
        schedule = FreezeSchedule({0: "projector", 2: ("projector", opened)}, unit="step")
        module = make(folders, lm, **settings)
        fit(make_trainer, module, 4, [schedule, keep], ckpt_path, log_every_n_steps=1, compile=True)
        return module

    run(tmp_path / "whole")
    for stop in (1, 3):  # before the adapters are opened, and after
        run(tmp_path / f"resumed{stop}", tmp_path / "whole" / f"step={stop}")
        whole, resumed = checkpoints(tmp_path / "whole"), checkpoints(tmp_path / f"resumed{stop}")
        assert set(resumed) == set(range(stop + 1, 5))
        for step in resumed:
            assert_equal(whole[step], resumed[step])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_checkpoint_is_read_back_with_adapters_and_quantized_layers(folders, make_trainer, tmp_path, variant):
    lm, settings = VARIANTS[variant]
    module = make(folders, lm, **settings)
    fit(make_trainer, module, 2).save_checkpoint(tmp_path / "c")
    again = Qwen3Aligner.from_pretrained(tmp_path / "c")
    assert not changed(arrays(module), arrays(again)) and again.config == module.config
    assert trainable_names(again) == trainable_names(module)
    kinds = lambda m: {name: (type(part), part.get("bits")) for name, part in m.named_modules()}
    assert kinds(again) == kinds(module)
    pictures = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    assert again.caption(pictures) == module.caption(pictures)


@pytest.mark.parametrize("settings", [{"precision": "bf16-mixed"}, {"gradient_checkpointing": True}], ids=str)
@pytest.mark.parametrize(
    "lora", [attrs.evolve(LORA, dropout=0.0), attrs.evolve(DORA, dropout=0.0)], ids=["lora", "dora"]
)
def test_half_precision_and_recomputed_layers_take_adapters_on_quantized_layers(folders, make_trainer, lora, settings):
    exact, module = make(folders, "qwen3-4bit", lora=lora), make(folders, "qwen3-4bit", lora=lora)
    before = arrays(module)
    losses = [
        fit(make_trainer, m, 2, log_every_n_steps=1, **s).callback_metrics["train/loss"]
        for m, s in ((exact, {}), (module, settings))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert lora_names(module) <= changed(before, arrays(module))
