"""ContrastiveCLIP: two towers trained so that matching images and texts agree.

B pairs, H x W pixels, L text tokens, E features of the shared space.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import attrs
import mlx.core as mx
import numpy as np
from attrs.validators import ge, in_, lt, optional
from mlx.utils import tree_flatten

from mlxmm.compute.dropout import PatchDropout
from mlxmm.compute.gradcache import chunked_calls
from mlxmm.config import checked, option, section
from mlxmm.distributed import collectives
from mlxmm.errors import UserError
from mlxmm.losses import clip_loss, duplicates, siglip_loss
from mlxmm.networks import clip, siglip
from mlxmm.networks.towers import TextConfig, VisionConfig, config_from_hub, tower_values
from mlxmm.optimizers import OptimizerConfig
from mlxmm.preprocessing.images import ImageProcessor, as_images
from mlxmm.preprocessing.tokenizers import (
    encode,
    load_tokenizer,
    lower_cased,
    require_rows,
    token_length,
    train_tokenizer,
)
from mlxmm.storage import checkpoint
from mlxmm.storage.hub import local_folder
from mlxmm.storage.lineage import Lineage
from mlxmm.storage.pretrained import read_config, read_weights, write_arrays, write_settings
from mlxmm.training.module import Module

TOWERS = ("vision", "text")
MAX_LOG_SCALE = math.log(100)  # the paper's bound on the temperature, section 2.5
KINDS = {"clip": clip, "siglip": siglip}
NETWORKS = {"clip": clip.CLIP, "siglip": siglip.Siglip}
LOSSES = {"clip": clip_loss, "siglip": siglip_loss}


@attrs.frozen(kw_only=True, field_transformer=checked)
class CLIPConfig:
    """Both towers and training."""

    model_type: str = option(
        "clip", "clip; siglip: SigLIP's towers, and its loss, which treats each pair by itself", in_(KINDS)
    )
    vision: VisionConfig = VisionConfig()
    text: TextConfig = section(TextConfig(), without=("vocab_size", "eos_token_id", "max_position_embeddings"))
    projection_dim: int = option(96, "features of the shared space; for siglip the width of the vision tower", ge(1))
    initialization: str = option(
        "small", "small: for narrow towers; openai: that of OpenAI's CLIP", in_(("small", "openai"))
    )
    chunk_size: int = option(0, "GradCache: pairs of a batch computed at a time, with the same gradient; 0: all", ge(0))
    patch_dropout: float = option(0.0, "fraction of an image's patches dropped in training", ge(0), lt(1))
    mask_duplicates: bool = option(False, "equal captions of a batch are no negatives of each other")
    locked: str | None = option(None, "frozen tower (LiT): vision, text or none", optional(in_(TOWERS)))
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=4e-3, warmup_steps=30, final_fraction=0.02, weight_decay=0.05
    )

    def __attrs_post_init__(self):
        if self.model_type == "siglip" and self.projection_dim != self.vision.hidden_size:
            raise UserError(
                f"for siglip, projection_dim={self.projection_dim} must be the width of the vision tower: "
                f"{self.vision.hidden_size}"
            )
        if self.model_type == "siglip" and self.initialization == "openai":
            raise UserError("initialization=openai is for model_type=clip: use small for siglip")


class ContrastiveCLIP(Module):
    """CLIP or SigLIP with its tokenizer and its image processor."""

    def __init__(self, config: CLIPConfig, tokenizer, processor: ImageProcessor):
        super().__init__()
        require_rows(tokenizer, config.text.vocab_size)
        if tokenizer.pad_token_id is None:
            raise UserError(f"the tokenizer {tokenizer.name_or_path or 'given'} has no padding token")
        self.config, self.tokenizer, self.processor = config, _as_trained(config, tokenizer), processor
        self.network = NETWORKS[config.model_type](config.vision, config.text, config.projection_dim)
        if config.initialization == "openai":
            clip.initialize(self.network)

    @classmethod
    def from_scratch(
        cls,
        config: CLIPConfig,
        captions: Sequence[str],
        *,
        vocab_size: int = 2_000,
        max_tokens: int = 77,
        processor: ImageProcessor | None = None,
    ) -> "ContrastiveCLIP":
        """Fresh weights, with a tokenizer that is trained on `captions`: of `vocab_size` tokens at most, for texts of
        `max_tokens` at most. Pictures are prepared as CLIP's are, unless by `processor`."""
        tokenizer = train_tokenizer(captions, vocab_size, adds_start_and_end=True)
        text = attrs.evolve(
            config.text,
            vocab_size=len(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
            max_position_embeddings=min(max_tokens, token_length(tokenizer, captions)),
        )
        processor = processor or ImageProcessor.square(config.vision.image_size)
        return cls(attrs.evolve(config, text=text), tokenizer, processor)

    @classmethod
    def from_pretrained(cls, path_or_id: str | Path, revision: str | None = None) -> "ContrastiveCLIP":
        """Load a CLIP or SigLIP folder or Hub id, at `revision` (a commit, tag or branch), or a checkpoint of a run.

        Raises `UserError` if it is none of these.
        """
        folder = local_folder(path_or_id, revision)
        module = cls(read_clip_config(folder), load_tokenizer(folder), ImageProcessor.from_pretrained(folder))
        if (folder / checkpoint.WEIGHTS).exists():
            checkpoint.load_weights(folder, module)
        else:
            weights = KINDS[module.config.model_type].from_hub(read_weights(folder))
            checkpoint.load_arrays(folder, weights, module.network)
        module.lineage = Lineage.read(folder)
        return module

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `transformers.CLIPModel` or `SiglipModel` loads, with the same outputs."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.save_config(folder)
        self.lineage.public().write(folder)
        weights = KINDS[self.config.model_type].to_hub(dict(tree_flatten(self.network.parameters())))
        write_arrays(folder / "model.safetensors", weights, format="pt")

    def save_config(self, folder: Path) -> None:
        kind, size = self.config.model_type, self.config.projection_dim
        tokens = {name: getattr(self.tokenizer, name) for name in ("bos_token_id", "pad_token_id")}
        values = {
            "architectures": [{"clip": "CLIPModel", "siglip": "SiglipModel"}[kind]],
            "model_type": kind,
            "vision_config": {"model_type": f"{kind}_vision_model"} | attrs.asdict(self.config.vision),
            "text_config": {"model_type": f"{kind}_text_model"} | tokens | attrs.asdict(self.config.text),
        }
        if kind == "siglip":
            values["text_config"]["projection_size"] = size
        else:
            values["projection_dim"] = size
            values["vision_config"]["projection_dim"] = values["text_config"]["projection_dim"] = size
        write_settings(folder, values, self.processor, self.tokenizer)

    @property
    def vision(self):
        """The vision tower: `vision.hidden_states(images, layer)` is what decoders read."""
        return self.network.vision_model

    def resize_images(self, image_size: int) -> None:
        """Change the image size to `image_size` pixels: the position embeddings are interpolated once."""
        if image_size == self.config.vision.image_size:
            return
        side = image_size // self.config.vision.patch_size
        positions = self.vision.embeddings.positions(side, side)
        self.vision.embeddings.position_embedding.weight = positions
        vision = attrs.evolve(self.config.vision, image_size=image_size)
        self.config, self.vision.config = attrs.evolve(self.config, vision=vision), vision
        resize = (image_size, image_size) if isinstance(self.processor.resize, tuple) else image_size
        self.processor = attrs.evolve(self.processor, image_size=image_size, resize=resize)

    def preprocess(self, images: Sequence) -> mx.array:
        """PIL images to (B, H, W, 3) floats."""
        return self.processor(images)

    def tokenize(self, texts: Sequence[str]) -> mx.array:
        """(B, L) int32 tokens with start and end, padded or truncated to the context of the text tower."""
        return mx.array(self._tokens(list(texts)))

    def _tokens(self, texts: list[str]) -> np.ndarray:
        length = self.config.text.max_position_embeddings
        encoded = encode(self.tokenizer, texts, padding="max_length", truncation=True, max_length=length)
        tokens = np.array(encoded["input_ids"], dtype=np.int32)
        full = tokens[:, -1] != self.tokenizer.pad_token_id
        tokens[full, -1] = (
            self.tokenizer.eos_token_id
        )  # a truncated text still ends: CLIP reads the state at its end token
        return tokens

    def transform(self, row: dict, caption: str) -> dict:
        """An example: uint8 pixels (H, W, 3) and tokens (L,)."""
        return {"pixels": self.processor.pixels_of(row), "tokens": self._tokens([caption])[0]}

    def encode_image(self, images) -> mx.array:
        """(B, H, W, 3) floats, or B PIL images or paths, to (B, E), unit length."""
        if not isinstance(images, mx.array):
            images = self.preprocess(as_images(images))
        return self.network.encode_image(images)

    def encode_text(self, tokens) -> mx.array:
        """(B, L) tokens, or B texts, to (B, E), unit length."""
        if not isinstance(tokens, mx.array):
            tokens = self.tokenize([tokens] if isinstance(tokens, str) else tokens)
        return self.network.encode_text(tokens)

    def __call__(self, images: mx.array, tokens: mx.array) -> mx.array:
        """Logits (B images, B texts), scaled."""
        return self.network(images, tokens)

    def setup(self, stage):
        """Freeze the locked tower (LiT, arXiv 2111.07991), but not its projection; add patch dropout."""
        if stage == "fit" and self.config.locked:
            self.network[f"{self.config.locked}_model"].freeze()
        if stage == "fit" and self.config.patch_dropout:
            embeddings = self.vision.embeddings
            embeddings.patch_dropout = PatchDropout(self.config.patch_dropout, int("class_embedding" in embeddings))

    def training_step(self, batch):
        """CLIP's or SigLIP's loss. Negatives come from one batch: accumulating gradients does not add any.

        In training the batch is gathered from all processes. In evaluation it is not: the processes' last batches may
        differ in size.
        """
        images, texts = self._features(batch["pixels"], batch["tokens"])
        tokens = batch["tokens"]
        if self.training:
            both = collectives.all_gather(mx.concatenate([images, texts], axis=1))
            images, texts = mx.split(both, 2, axis=1)
            tokens = collectives.all_gather(tokens)
        logits = self.network.logits(images, texts)
        # A text that two images share is right for both.
        hits = (tokens[logits.argmax(1)] == tokens).all(axis=1).mean()
        ignored = duplicates(tokens) if self.config.mask_duplicates else None
        loss = LOSSES[self.config.model_type](logits, ignored)
        return {"loss": loss, "accuracy": hits, "weight": mx.array(len(batch["pixels"]))}

    def _features(self, pixels: mx.array, tokens: mx.array) -> tuple[mx.array, mx.array]:
        """(B, H, W, 3) uint8 and (B, L) tokens to (B, E) each, unit length."""
        normalize, size = self.processor.normalize, self.config.chunk_size
        if not size:
            return self.encode_image(normalize(pixels)), self.encode_text(tokens)
        towers = {"vision": self.network.vision_model, "text": self.network.text_model}
        with chunked_calls(towers, size, prepare={"vision": normalize}):
            return self.encode_image(pixels), self.encode_text(tokens)

    def after_update(self):
        if self.config.model_type == "clip":
            self.network.logit_scale = mx.minimum(self.network.logit_scale, MAX_LOG_SCALE)

    def configure_optimizers(self):
        return self.config.optimizer.build(self.trainer.estimated_stepping_batches)


def _as_trained(config: CLIPConfig, tokenizer):
    """The tokenizer; that of SigLIP 2, Gemma's, with lower case, on which SigLIP 2 was trained."""
    is_siglip_2 = config.model_type == "siglip" and type(tokenizer).__name__.startswith("Gemma")
    return lower_cased(tokenizer) if is_siglip_2 else tokenizer


def read_clip_config(folder: Path) -> CLIPConfig:
    """The configuration of a CLIP or SigLIP folder. Raises `UserError` if it is none."""
    values = read_config(folder)
    kind = values.get("model_type", "clip")
    has = lambda tower: f"{tower}_config" in values or f"{tower}_config_dict" in values
    if kind not in KINDS or not all(map(has, TOWERS)):
        raise UserError(
            f"{folder} is neither a CLIP nor a SigLIP: its config.json says model_type {kind!r}, and must "
            "have vision_config and text_config"
        )
    vision, text = (tower_values(values, tower, folder) for tower in TOWERS)
    if not isinstance(text.get("eos_token_id"), int):  # of SigLIP, which reads a text's last position
        text = {name: value for name, value in text.items() if name != "eos_token_id"}
    defaults = KINDS[kind]
    return CLIPConfig(
        model_type=kind,
        vision=config_from_hub(VisionConfig, vision, defaults.VISION_DEFAULTS),
        text=config_from_hub(TextConfig, text, defaults.TEXT_DEFAULTS),
        projection_dim=_projection_dim(kind, values, text),
    )


def _projection_dim(kind: str, values: dict, text: dict) -> int:
    if kind == "clip":
        return values.get("projection_dim") or 512
    return text.get("projection_size") or text.get("hidden_size") or siglip.TEXT_DEFAULTS["hidden_size"]
