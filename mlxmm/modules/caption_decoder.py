"""CaptionDecoder: a decoder, trained from scratch, over the hidden states of a frozen vision tower.

B images, H x W pixels, P patches, E features of the tower, T caption tokens with their end, V vocabulary.
"""

from pathlib import Path

import attrs
import mlx.core as mx
import mlx.nn as nn
from attrs.validators import ge, lt
from mlx.utils import tree_flatten

from mlxmm.compute.cores import in_halves
from mlxmm.config import checked, from_json, option, to_json
from mlxmm.errors import UserError
from mlxmm.losses import token_accuracy, token_loss
from mlxmm.modules.captioning_module import CaptioningModule
from mlxmm.modules.token_metrics import at_labels
from mlxmm.networks.decoder import CachedDecoder, Decoder, DecoderConfig
from mlxmm.networks.generation import GenerationConfig
from mlxmm.networks.pretrained_vision import build_vision_tower, load_vision_tower
from mlxmm.networks.towers import VisionTower
from mlxmm.optimizers import OptimizerConfig
from mlxmm.preprocessing.images import ImageProcessor
from mlxmm.preprocessing.tokenizers import end_token, load_tokenizer, plain_tokens
from mlxmm.storage import checkpoint
from mlxmm.storage.hub import local_folder
from mlxmm.storage.lineage import Lineage
from mlxmm.storage.pretrained import read_config, require_parts, write_arrays, write_settings

MODEL_TYPE = "mlxmm_caption_decoder"


@attrs.frozen(kw_only=True, field_transformer=checked)
class CaptionDecoderConfig:
    """Vision tower, decoder and training."""

    vision: str | None = option(
        None, "CLIP, SigLIP or ViT: folder or Hub id; none: a small CLIP is trained first", first=True
    )
    layer: int = option(1, "hidden states of the tower to read, counted as transformers does")
    mix_layers: bool = option(False, "read a learned mix of all hidden states instead")
    decoder: DecoderConfig = DecoderConfig()
    max_new_tokens: int = option(
        0,
        "longest caption with its end, in tokens, also when captions are generated; 0: as the data have it",
        ge(0),
        first=True,
    )
    label_smoothing: float = option(0.0, "fraction of each target that is spread evenly over all tokens", ge(0), lt(1))
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=3e-3, warmup_steps=50, final_fraction=0.02, weight_decay=0.05
    )


class LayerMix(nn.Module):
    """A learned weighted mean of normalised layers (ELMo, arXiv 1802.05365, equation 1)."""

    def __init__(self, num_states: int, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width, affine=False)
        self.weight, self.gain = mx.zeros(num_states), mx.array(1.0)

    def __call__(self, states: list[mx.array]) -> mx.array:
        """States of all layers, (B, P, E) each, to (B, P, E)."""
        weights = mx.softmax(self.weight)
        return self.gain * sum(weight * self.norm(state) for weight, state in zip(weights, states))


class CaptionDecoder(CaptioningModule):
    """A frozen vision tower and a decoder that reads it. The loss is on the caption and its end."""

    def __init__(
        self,
        config: CaptionDecoderConfig,
        vision: VisionTower,
        vision_config: dict,
        processor: ImageProcessor,
        tokenizer,
    ):
        super().__init__()
        self.config = config
        self.processor, self.tokenizer, self.vision_config = processor, tokenizer, vision_config
        self.vision, width = vision, vision.config.hidden_size
        if config.mix_layers:
            self.mix = LayerMix(1 + vision.config.num_hidden_layers, width)
        # The start token takes the first position; the end, being last, needs none.
        self.network = Decoder(
            config.decoder, image_width=width, vocab_size=len(tokenizer), max_positions=self.max_new_tokens
        )
        self._stop_id = end_token(tokenizer)
        self._start_id = self._stop_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        self.vision.freeze()

    @classmethod
    def from_parts(cls, config: CaptionDecoderConfig, tokenizer) -> "CaptionDecoder":
        """Load the tower from `config.vision`; the decoder gets fresh weights and the vocabulary of `tokenizer`."""
        folder = local_folder(config.vision)
        vision, vision_config = load_vision_tower(folder)
        return cls(config, vision, vision_config, ImageProcessor.from_pretrained(folder), tokenizer)

    @classmethod
    def from_pretrained(cls, path_or_id: str | Path, revision: str | None = None) -> "CaptionDecoder":
        """Load a checkpoint of a run, or a folder that `save_pretrained` wrote. Raises `UserError`."""
        folder = local_folder(path_or_id, revision)
        values = read_config(folder)
        if values.get("model_type") != MODEL_TYPE:
            raise UserError(f"{folder} is not a CaptionDecoder: its config.json says {values.get('model_type')!r}")
        require_parts(folder, values, "captioner", "vision")
        config, vision = from_json(CaptionDecoderConfig, values["captioner"]), build_vision_tower(values["vision"])
        processor = ImageProcessor.from_pretrained(folder)
        module = cls(config, vision, values["vision"], processor, load_tokenizer(folder))
        checkpoint.load_weights(folder, module)
        module.lineage = Lineage.read(folder)
        return module

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `from_pretrained` loads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.save_config(folder)
        self.lineage.public().write(folder)
        write_arrays(folder / checkpoint.WEIGHTS, dict(tree_flatten(self.parameters())))

    def save_config(self, folder: Path) -> None:
        values = {"model_type": MODEL_TYPE, "captioner": to_json(self.config), "vision": self.vision_config}
        write_settings(folder, values, self.processor, self.tokenizer)

    @property
    def decoder(self) -> CachedDecoder:
        return CachedDecoder(self.network, self.vision.config.num_patches)

    @property
    def vocab_size(self) -> int:
        return len(self.tokenizer)

    @property
    def stop_id(self) -> int:
        return self._stop_id

    @property
    def max_new_tokens(self) -> int:
        return self.config.max_new_tokens or CaptioningModule.max_new_tokens

    def _generation(self, settings: dict, prompt: str) -> GenerationConfig:
        config, before = super()._generation(settings, prompt), self._start(prompt)
        room = self.network.max_positions + 1 - len(before)
        return attrs.evolve(config, max_new_tokens=max(1, min(config.max_new_tokens, room)))

    def _start(self, prompt: str) -> list[int]:
        return [self._start_id, *plain_tokens(self.tokenizer, prompt)]

    def features(self, images: mx.array) -> mx.array:
        if self.config.mix_layers:
            return self.mix(self.vision.all_patches(images))
        return self.vision.patches(images, self.config.layer)

    def feature_settings(self) -> dict:
        if self.config.mix_layers:
            raise UserError("features cannot be cached with mix_layers: the mix changes with every update")
        return {"layer": self.config.layer, "processor": self.processor.to_hub(), "tower": self.vision_config}

    def prefix(self, features: mx.array, prompt: str = "") -> mx.array:
        """(B, P, E) features to (B, P + N, D): image positions, then N embedded tokens: the start and `prompt`."""
        embedded = self.network.token_embedding(mx.array([self._start(prompt)]))
        text = mx.broadcast_to(embedded, (len(features), *embedded.shape[1:]))
        return mx.concatenate([self.network.read(features), text], axis=1)

    def training_step(self, batch):
        image = self.network.read(self.image_features(batch))
        return self._measure(image, batch, smoothing=self.config.label_smoothing)

    def validation_step(self, batch):
        """The loss without smoothing, and "loss_shuffled", a control: the loss of the captions given other images."""
        image = self.network.read(self.image_features(batch))
        others = mx.roll(image, max(1, len(image) // 2), 0)
        return self._measure(image, batch) | {"loss_shuffled": self._measure(others, batch)["loss"]}

    def _measure(self, image: mx.array, batch: dict, smoothing: float = 0.0) -> dict:
        tokens = batch["tokens"]
        start = mx.full((len(tokens), 1), self._start_id, dtype=tokens.dtype)
        before = self.network.token_embedding(mx.concatenate([start, tokens[:, :-1]], axis=1))
        states, tokens, mask = at_labels(self.network.hidden_states(image, before), batch)
        logits = in_halves(self.network.head, states)
        return {
            "loss": token_loss(logits, tokens, mask, smoothing=smoothing),
            "accuracy": token_accuracy(logits, tokens, mask),
            "weight": mask.sum(),
        }

    def configure_optimizers(self):
        return self.config.optimizer.build(self.trainer.estimated_stepping_batches)
