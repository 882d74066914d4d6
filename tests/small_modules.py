"""The two multimodal modules, as small as they come, and a batch for either."""

import functools
from pathlib import Path

import attrs
import numpy as np
from mlx.utils import tree_flatten
from PIL import Image

from mlxmm import ContrastiveCLIP, Qwen3Aligner, seed_everything
from mlxmm.modules.contrastive_clip import CLIPConfig
from mlxmm.modules.qwen3_aligner import Qwen3AlignerConfig
from mlxmm.networks.clip import CLIPVisionTower, TextConfig, VisionConfig
from mlxmm.networks.language_model import Qwen3Config, build_language_model
from mlxmm.preprocessing.images import ImageProcessor
from mlxmm.preprocessing.tokenizers import train_tokenizer
from mlxmm.storage.pretrained import write_arrays

CAPTIONS = ["a small red circle", "a large blue square", "a red square", "a blue circle"]
VISION = VisionConfig(hidden_size=32, num_hidden_layers=2, intermediate_size=64, image_size=16)


@functools.cache
def tokenizer(adds_start_and_end: bool):
    return train_tokenizer(CAPTIONS, 300, adds_start_and_end=adds_start_and_end)


def small_clip() -> ContrastiveCLIP:
    seed_everything(3)
    tokens = tokenizer(True)
    text = TextConfig(vocab_size=len(tokens), max_position_embeddings=8, eos_token_id=tokens.eos_token_id)
    return ContrastiveCLIP(CLIPConfig(vision=VISION, text=text), tokens, ImageProcessor.square(16))


def small_aligner() -> Qwen3Aligner:
    """All of it is trainable, so that gradients reach everything."""
    seed_everything(3)
    tokens = tokenizer(False)
    hub = Qwen3Config(hidden_size=32, num_hidden_layers=2, intermediate_size=64).to_hub(tokens)
    config = Qwen3AlignerConfig(projector_width=32, max_new_tokens=8, prompt="a")
    processor = ImageProcessor.square(16)
    tower = CLIPVisionTower(VISION)
    module = Qwen3Aligner(config, tower, {}, processor, build_language_model(hub), hub, tokens)
    module.unfreeze()
    return module


def save_aligner(folder: Path) -> None:
    """The folder of a checkpoint of a Qwen3Aligner, without what training needs."""
    aligner = small_aligner()
    folder.mkdir()
    aligner.vision_config = {"model_type": "clip_vision_model"} | attrs.asdict(VISION)
    aligner.save_config(folder)
    write_arrays(folder / "weights.safetensors", dict(tree_flatten(aligner.parameters())))


def small_batch(module) -> dict:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in CAPTIONS]
    examples = [module.transform({"image": image}, caption) for image, caption in zip(images, CAPTIONS)]
    return {name: np.stack([example[name] for example in examples]) for name in examples[0]}
