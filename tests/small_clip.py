"""A CLIP of two narrow blocks, and batches for it."""

import attrs
import mlx.core as mx
import numpy as np

from mlxmm.modules.contrastive_clip import CLIPConfig, ContrastiveCLIP
from mlxmm.networks.towers import TextConfig, VisionConfig
from mlxmm.optimizers import OptimizerConfig
from mlxmm.preprocessing.images import ImageProcessor
from mlxmm.preprocessing.tokenizers import train_tokenizer

WORDS = ["a red circle", "a blue square", "a photo of a green cross.", "cat", "dog"]
SIDE, LENGTH = 16, 8
SIGLIP = {"model_type": "siglip", "projection_dim": 16}  # settings of one


def small_clip(seed: int = 0, **settings) -> ContrastiveCLIP:
    tokenizer = train_tokenizer(WORDS, 300, adds_start_and_end=True)
    width = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=1)
    text = TextConfig(
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, max_position_embeddings=LENGTH, **width
    )
    vision = VisionConfig(image_size=SIDE, patch_size=4, num_hidden_layers=2, **width)
    config = CLIPConfig(vision=vision, text=text, projection_dim=12, optimizer=optimizer)
    mx.random.seed(seed)
    return ContrastiveCLIP(attrs.evolve(config, **settings), tokenizer, ImageProcessor.square(SIDE))


def pairs(num: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random pixels and tokens of `num` pairs."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, 250, (num, LENGTH)).astype(np.int32)
    tokens[:, -1] = 0  # the tokenizer's end
    return {"pixels": rng.integers(0, 256, (num, SIDE, SIDE, 3)).astype(np.uint8), "tokens": tokens}
