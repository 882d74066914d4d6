"""Towers: how they begin, what they refuse, what the presets build, and that SigLIP's loss is the paper's."""

import math
from pathlib import Path

import attrs
import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxmm import ContrastiveCLIP, Qwen3Aligner
from mlxmm.data.caption_source import CaptionDataConfig, open_source
from mlxmm.data.sources.shapes import ShapesConfig
from mlxmm.errors import UserError
from mlxmm.losses import siglip_loss
from mlxmm.modules.contrastive_clip import CLIPConfig
from mlxmm.modules.qwen3_aligner import Qwen3AlignerConfig
from mlxmm.networks import clip, siglip, vit
from mlxmm.networks.clip import CLIP, initialize
from mlxmm.networks.language_model import Qwen3Config, build_language_model, save_language_model
from mlxmm.networks.pretrained_vision import load_vision_tower
from mlxmm.networks.siglip import Siglip
from mlxmm.networks.towers import TextConfig, VisionConfig, VisionEmbeddings
from mlxmm.optimizers import OptimizerConfig
from mlxmm.preprocessing.images import ImageProcessor
from mlxmm.preprocessing.tokenizers import train_tokenizer
from recipes.parts.tower import TowerConfig, build
from recipes.train_clip import PRESETS

FIXTURES = Path(__file__).parents[1] / "fixtures"
WIDE = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 512}


def std(name: str, parameters: dict) -> float:
    arrays = [np.array(array).ravel() for key, array in parameters.items() if key.endswith(name)]
    return np.concatenate(arrays).std()


@pytest.fixture(scope="module")
def openai():
    mx.random.seed(0)
    network = CLIP(VisionConfig(image_size=96, **WIDE), TextConfig(max_position_embeddings=77, **WIDE), 96)
    initialize(network)
    return dict(tree_flatten(network.parameters()))


D, DEPTH = 128, 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("token_embedding.weight", 0.02),
        ("text_model.embeddings.position_embedding.weight", 0.01),
        ("text_projection.weight", D**-0.5),
        ("visual_projection.weight", D**-0.5),
        ("class_embedding", D**-0.5),
        ("vision_model.embeddings.position_embedding.weight", D**-0.5),
        ("patch_embedding.weight", (3 * 3 * 8 * 8) ** -0.5),
        *[(f"text_model.encoder.layers.0.self_attn.{part}_proj.weight", D**-0.5) for part in "qkv"],
        ("text_model.encoder.layers.1.self_attn.out_proj.weight", D**-0.5 * (2 * DEPTH) ** -0.5),
        ("text_model.encoder.layers.2.mlp.fc1.weight", (2 * D) ** -0.5),
        ("text_model.encoder.layers.0.mlp.fc2.weight", D**-0.5 * (2 * DEPTH) ** -0.5),
        *[(f"vision_model.encoder.layers.2.self_attn.{part}_proj.weight", (2 * D) ** -0.5) for part in "qkv"],
        ("vision_model.encoder.layers.0.self_attn.out_proj.weight", (3 * D) ** -0.5),
        ("vision_model.encoder.layers.1.mlp.fc1.weight", (3 * D) ** -0.5),
        ("vision_model.encoder.layers.1.mlp.fc2.weight", (3 * 4 * D) ** -0.5),
        ("bias", 0.0),
    ],
)
def test_weights_begin_with_the_standard_deviations_of_openais_code(openai, name, expected):
    tolerance = 0.2 if name.endswith("class_embedding") else 0.03
    assert std(name, openai) == pytest.approx(expected, rel=tolerance)


def test_the_configuration_chooses_the_initialisation():
    tokenizer = train_tokenizer(["a circle"], 300, adds_start_and_end=True)
    stds = []
    for initialization in ("small", "openai"):
        config = CLIPConfig(initialization=initialization)
        module = ContrastiveCLIP(config, tokenizer, ImageProcessor.square(32))
        stds.append(std("token_embedding.weight", dict(tree_flatten(module.parameters()))))
    assert stds == pytest.approx([0.1, 0.02], rel=0.05)


# Table 20 of the CLIP paper; parameters as OpenAI's checkpoints have them.
TABLE_20 = {
    "vit-b-32": (5e-4, 512, 224, 32, 12, 768, 12, 12, 512, 8, 151_277_313),
    "vit-b-16": (5e-4, 512, 224, 16, 12, 768, 12, 12, 512, 8, 149_620_737),
    "vit-l-14": (4e-4, 768, 224, 14, 24, 1024, 16, 12, 768, 12, 427_616_513),
    "vit-l-14-336px": (2e-5, 768, 336, 14, 24, 1024, 16, 12, 768, 12, 427_944_193),
}


def test_presets_are_the_rows_of_the_papers_table_and_the_small_one():
    assert set(PRESETS) == {"default", "tiny", *TABLE_20}


@pytest.mark.parametrize("name", TABLE_20)
def test_a_preset_is_what_the_paper_says(name):
    config = PRESETS[name].config
    module, optimizer = config.module, config.module.optimizer
    sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads")
    vision, text = ([getattr(part, size) for size in sizes] for part in (module.vision, module.text))
    row = (optimizer.learning_rate, module.projection_dim, module.vision.image_size, module.vision.patch_size)
    network = CLIP(module.vision, module.text, module.projection_dim)  # its arrays are never computed
    num_parameters = sum(array.size for _, array in tree_flatten(network.parameters()))
    assert (*row, *vision, *text, num_parameters) == TABLE_20[name]
    assert (config.data.batch_size, module.chunk_size) == (1_024, 64)  # in place of table 18's 32,768
    # Table 18.
    assert config.vocab_size == module.text.vocab_size == 49_408
    assert module.text.max_position_embeddings == config.max_tokens == 77
    assert config.trainer.max_epochs == (1 if name.endswith("336px") else 32)
    assert (optimizer.weight_decay, optimizer.warmup_steps) == (0.2, 2_000)
    assert optimizer.final_fraction == 0
    assert (optimizer.beta1, optimizer.beta2, optimizer.eps) == (0.9, 0.98, 1e-6)
    assert module.initialization == "openai" and module.vision.hidden_act == module.text.hidden_act == "quick_gelu"


def test_a_run_can_go_on_from_a_clip_at_another_image_size():
    how_trained = {"chunk_size": 4, "patch_dropout": 0.5, "mask_duplicates": True, "locked": "vision"}
    config = TowerConfig(
        pretrained=str(FIXTURES / "clip-gelu-patch8"), module=CLIPConfig(vision=VisionConfig(), **how_trained)
    )
    before = ContrastiveCLIP.from_pretrained(config.pretrained)
    images = mx.random.normal((2, 32, 32, 3))
    module = build(config, open_source(CaptionDataConfig(shapes=ShapesConfig()), 0), 0)
    assert module.config.vision.image_size == module.processor.image_size == 32
    assert len(module.vision.embeddings.position_embedding.weight) == 1 + 16
    assert mx.allclose(module.encode_image(images), before.encode_image(images), atol=1e-5)
    assert module.config.optimizer == config.module.optimizer
    assert {name: getattr(module.config, name) for name in how_trained} == how_trained


def test_the_loss_of_siglip_is_the_mean_over_images_of_the_sum_over_texts():
    logits = np.random.default_rng(0).normal(size=(4, 4)) * 5
    signs = 2 * np.eye(4) - 1
    expected = -np.log(1 / (1 + np.exp(-signs * logits))).sum() / 4
    assert siglip_loss(mx.array(logits, dtype=mx.float32)).item() == pytest.approx(expected, rel=1e-5)
    assert siglip_loss(mx.array([[90.0, -90.0], [-90.0, 90.0]])).item() < 1e-38
    assert siglip_loss(mx.array([[-90.0, -90.0], [-90.0, -90.0]])).item() == 90


def test_siglip_begins_with_the_papers_scale_and_bias_and_learns_pairs(make_trainer):
    texts = ["a small circle", "a large square", "a red triangle", "two green stars"]
    tokenizer = train_tokenizer(texts, 300, adds_start_and_end=True)
    text = TextConfig(vocab_size=len(tokenizer), max_position_embeddings=16)
    vision, optimizer = VisionConfig(num_hidden_layers=1), OptimizerConfig(learning_rate=4e-3, warmup_steps=5)
    config = CLIPConfig(model_type="siglip", projection_dim=64, vision=vision, text=text, optimizer=optimizer)
    mx.random.seed(3)
    module = ContrastiveCLIP(config, tokenizer, ImageProcessor.square(32))
    assert math.exp(module.network.logit_scale.item()) == pytest.approx(10)
    assert module.network.logit_bias.item() == -10
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    batch = {"pixels": mx.array(pixels), "tokens": module.tokenize(texts)}
    before = module.training_step(batch)["loss"].item()
    make_trainer(max_steps=30).fit(module, train_dataloaders=[batch] * 30)
    after = module.training_step(batch)
    assert after["loss"].item() < 0.1 * before and after["accuracy"].item() == 1


def test_settings_of_a_siglip_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="projection_dim=96 must be the width of the vision tower: 64"):
        CLIPConfig(model_type="siglip")
    with pytest.raises(ValueError, match="initialization=openai is for model_type=clip"):
        CLIPConfig(model_type="siglip", projection_dim=64, initialization="openai")


@pytest.mark.parametrize(
    ("network", "defaults"),
    [
        ("CLIPVisionConfig", clip.VISION_DEFAULTS),
        ("CLIPTextConfig", clip.TEXT_DEFAULTS),
        ("SiglipVisionConfig", siglip.VISION_DEFAULTS),
        ("SiglipTextConfig", siglip.TEXT_DEFAULTS),
        ("ViTConfig", vit.VISION_DEFAULTS),
    ],
)
def test_what_a_config_leaves_out_is_what_transformers_takes(network, defaults):
    import transformers

    theirs = getattr(transformers, network)()
    names = {"hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"}
    assert names | {"layer_norm_eps"} <= set(defaults)
    assert defaults == {name: getattr(theirs, name) for name in defaults}


def test_positions_of_the_configured_size_are_the_table_itself():
    embeddings = VisionEmbeddings(VisionConfig(image_size=32, patch_size=8), class_token=True, bias=False)
    table = embeddings.position_embedding.weight
    assert mx.array_equal(embeddings.positions(4, 4), table)
    larger = embeddings.positions(8, 6)
    assert larger.shape == (1 + 48, 64) and mx.array_equal(larger[0], table[0])


@pytest.mark.parametrize("network", [CLIP, Siglip])
def test_inputs_that_no_tower_can_take_are_one_clear_line(network):
    model = network(VisionConfig(), TextConfig(max_position_embeddings=5), 64)
    with pytest.raises(UserError, match="images are 7x40 pixels, smaller than a patch of 8x8"):
        model.encode_image(mx.zeros((1, 7, 40, 3)))
    with pytest.raises(UserError, match="texts of 6 tokens are longer than the 5"):
        model.encode_text(mx.zeros((1, 6), dtype=mx.int32))
    with pytest.raises(UserError, match="layer 4 of a tower with hidden states 0 to 3"):
        model.vision_model.hidden_states(mx.zeros((1, 32, 32, 3)), 4)


@pytest.mark.parametrize(("name", "num_patches"), [("clip-gelu-patch8", 4), ("siglip", 9), ("vit", 16)])
def test_the_aligner_reads_the_patches_of_every_tower(name, num_patches, tmp_path):
    tokenizer = train_tokenizer(["a small circle", "a large square"], 300)
    config = Qwen3Config(num_hidden_layers=1).to_hub(tokenizer)
    (tmp_path / "lm").mkdir()
    save_language_model(tmp_path / "lm", build_language_model(config), config)
    tokenizer.save_pretrained(str(tmp_path / "lm"))
    parts = Qwen3AlignerConfig(vision=str(FIXTURES / name), lm=str(tmp_path / "lm"), layer=-2, max_new_tokens=4)
    aligner = Qwen3Aligner.from_parts(parts)
    tower, _ = load_vision_tower(FIXTURES / name)
    size = aligner.processor.image_size
    images = mx.random.normal((2, size, size, 3))
    projected = aligner.projector(tower.hidden_states(images, -2)[:, -num_patches:])
    assert aligner.prefix(aligner.features(images)).shape == (2, num_patches, 64)
    assert mx.array_equal(aligner.prefix(aligner.features(images)), projected)
    (tmp_path / "checkpoint").mkdir()
    aligner.save_config(tmp_path / "checkpoint")
    mx.save_safetensors(str(tmp_path / "checkpoint/weights.safetensors"), dict(tree_flatten(aligner.parameters())))
    again = Qwen3Aligner.from_pretrained(tmp_path / "checkpoint")
    assert mx.array_equal(again.prefix(again.features(images)), projected) and again.config == attrs.evolve(parts)
