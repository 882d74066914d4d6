"""ContrastiveCLIP: two towers trained so that matching images and texts agree.

B pairs, H x W pixels, L text tokens, E features of the shared space.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import attrs
import mlx.core as mx
import numpy as np
from attrs.validators import ge, in_, lt, optional
from mlx.utils import tree_flatten

from mlxmm import checkpoint, distributed
from mlxmm.config import UserError, option
from mlxmm.data.images import ImageProcessor
from mlxmm.data.tokenizers import load_tokenizer
from mlxmm.gradcache import chunked_calls
from mlxmm.hub import local_folder, read_config, read_weights
from mlxmm.losses import clip_loss
from mlxmm.module import Module
from mlxmm.networks.clip import CLIP, TextConfig, VisionConfig, from_hub, to_hub
from mlxmm.optimizers import OptimizerConfig
from mlxmm.patch_dropout import PatchDropout

TOWERS = ("vision", "text")
MAX_LOG_SCALE = math.log(100)  # the paper's bound on the temperature, section 2.5


@attrs.frozen(kw_only=True)
class CLIPConfig:
    """Both towers and how they are trained."""

    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    projection_dim: int = option(96, "features of the shared space", ge(1))
    chunk_size: int = option(0, "pairs of a batch in memory at a time, with the same gradient; 0: all", ge(0))
    patch_dropout: float = option(0.0, "fraction of a picture's patches left out in training", ge(0), lt(1))
    locked: str | None = option(None, "tower that is not trained: vision, text or none", optional(in_(TOWERS)))
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=4e-3, warmup_steps=30, final_fraction=0.02, weight_decay=0.05
    )


class ContrastiveCLIP(Module):
    """CLIP, its tokenizer and its image processor in one."""

    def __init__(self, config: CLIPConfig, tokenizer, processor: ImageProcessor):
        super().__init__()
        self.config, self.tokenizer, self.processor = config, tokenizer, processor
        self.network = CLIP(config.vision, config.text, config.projection_dim)

    @classmethod
    def from_pretrained(cls, path_or_id: str | Path, revision: str | None = None) -> "ContrastiveCLIP":
        """Read a CLIP folder as the Hub has it, or a checkpoint of ours. Raises `UserError` where it is neither."""
        folder = local_folder(path_or_id, revision)
        values = read_config(folder)
        if "vision_config" not in values or "text_config" not in values:
            raise UserError(f"{folder} is no CLIP: its config.json has no vision_config and text_config")
        config = CLIPConfig(
            vision=_known(VisionConfig, VISION_DEFAULTS | values["vision_config"]),
            text=_known(TextConfig, TEXT_DEFAULTS | values["text_config"]),
            projection_dim=values.get("projection_dim", 512),
        )
        module = cls(config, load_tokenizer(folder), ImageProcessor.from_pretrained(folder))
        if (folder / checkpoint.WEIGHTS).exists():
            checkpoint.load_weights(folder / checkpoint.WEIGHTS, module)
        else:
            checkpoint.load_arrays(folder, from_hub(read_weights(folder)), module.network)
        return module

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what `transformers.CLIPModel` loads, with the same numbers."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.save_config(folder)
        weights = to_hub(dict(tree_flatten(self.network.parameters())))
        mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})

    def save_config(self, folder: Path) -> None:
        values = {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": self.config.projection_dim,
            "vision_config": {"model_type": "clip_vision_model", **attrs.asdict(self.config.vision)},
            "text_config": {"model_type": "clip_text_model", **attrs.asdict(self.config.text)},
        }
        for part in ("vision_config", "text_config"):
            values[part]["projection_dim"] = self.config.projection_dim
        tokens = {name: getattr(self.tokenizer, name) for name in ("bos_token_id", "pad_token_id")}
        values["text_config"] = tokens | values["text_config"]
        (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
        (folder / "preprocessor_config.json").write_text(json.dumps(self.processor.to_hub(), indent=2) + "\n")
        self.tokenizer.save_pretrained(str(folder))

    @property
    def vision(self):
        """The vision tower: `vision.hidden_states(images, layer)` is what decoders read."""
        return self.network.vision_model

    def preprocess(self, images: Sequence) -> mx.array:
        """PIL images to (B, H, W, 3) floats."""
        return self.processor(images)

    def tokenize(self, texts: Sequence[str]) -> mx.array:
        """(B, L) int32 tokens with start and end, padded to the length that the tower was made for."""
        return mx.array(self._tokens(list(texts)))

    def _tokens(self, texts: list[str]) -> np.ndarray:
        length = self.config.text.max_position_embeddings
        encoded = self.tokenizer(texts, padding="max_length", truncation=True, max_length=length)
        tokens = np.array(encoded["input_ids"], dtype=np.int32)
        full = tokens[:, -1] != self.tokenizer.pad_token_id
        tokens[full, -1] = self.tokenizer.eos_token_id  # a text that was cut still ends
        return tokens

    def encode(self, row: dict, caption: str) -> dict:
        """An example: uint8 pixels (H, W, 3) and tokens (L,)."""
        return {"pixels": self.processor.pixels(row["image"]), "tokens": self._tokens([caption])[0]}

    def encode_image(self, images: mx.array) -> mx.array:
        """(B, H, W, 3) floats to (B, E), unit length."""
        return self.network.encode_image(images)

    def encode_text(self, tokens: mx.array) -> mx.array:
        """(B, L) tokens to (B, E), unit length."""
        return self.network.encode_text(tokens)

    def __call__(self, images: mx.array, tokens: mx.array) -> mx.array:
        """Logits (B images, B texts), scaled."""
        return self.network(images, tokens)

    def setup(self, stage):
        """Freeze the locked tower (LiT, arXiv 2111.07991), its projection not; put in the patch dropout."""
        if stage == "fit" and self.config.locked:
            self.network[f"{self.config.locked}_model"].freeze()
        if stage == "fit" and self.config.patch_dropout:
            embeddings = self.vision.embeddings
            embeddings.patch_dropout = PatchDropout(self.config.patch_dropout, int("class_embedding" in embeddings))

    def training_step(self, batch):
        """The paper's loss. Its negatives are those of one batch: accumulating batches does not add any.

        In training they are those of all processes; in evaluation, where the last batches may differ, of each alone.
        """
        images, texts = self._features(batch["pixels"], batch["tokens"])
        if self.training:
            both = distributed.all_gather(mx.concatenate([images, texts], axis=1))
            images, texts = mx.split(both, 2, axis=1)
        logits = self.network.logits(images, texts)
        hits = (logits.argmax(1) == mx.arange(len(logits))).mean()
        return {"loss": clip_loss(logits), "accuracy": hits, "weight": mx.array(len(batch["pixels"]))}

    def _features(self, pixels: mx.array, tokens: mx.array) -> tuple[mx.array, mx.array]:
        """(B, H, W, 3) uint8 and (B, L) tokens to (B, E) each, unit length."""
        normalize, size = self.processor.normalize, self.config.chunk_size
        if not size:
            return self.encode_image(normalize(pixels)), self.encode_text(tokens)
        towers = {"vision": self.network.vision_model, "text": self.network.text_model}
        with chunked_calls(towers, size, prepare={"vision": normalize}):
            return self.encode_image(pixels), self.encode_text(tokens)

    def after_update(self):
        self.network.logit_scale = mx.minimum(self.network.logit_scale, MAX_LOG_SCALE)

    def configure_optimizers(self):
        return self.config.optimizer.build(self.trainer.estimated_stepping_batches)


# What transformers takes for settings that a config.json leaves out.
VISION_DEFAULTS = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12} | {
    "intermediate_size": 3072, "image_size": 224, "patch_size": 32
}  # fmt: skip
TEXT_DEFAULTS = {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8} | {
    "intermediate_size": 2048, "vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407
}  # fmt: skip


def _known(cls: type, values: dict):
    """`cls` from a config.json, which says more than the network needs."""
    names = {field.name for field in attrs.fields(cls)}
    return cls(**{name: value for name, value in values.items() if name in names})
