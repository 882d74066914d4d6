"""Qwen3Aligner: features of a vision tower, projected to the embeddings of a language model (Qwen3, Llama, …).

B images, H x W pixels, P patches, T caption tokens with their end, N prompt tokens, V vocabulary,
D features of the language model.
"""

from collections.abc import Sequence
from pathlib import Path

import attrs
import mlx.core as mx
from attrs.validators import ge, gt, in_

from mlxmm.config import checked, from_json, option, to_json
from mlxmm.errors import UserError
from mlxmm.export import llava
from mlxmm.modules.captioning_module import CaptioningModule
from mlxmm.modules.token_metrics import token_metrics
from mlxmm.networks.adapters import LoRAConfig, adapter_names, add_adapters
from mlxmm.networks.generation import GenerationConfig
from mlxmm.networks.language_model import (
    CachedLanguageModel,
    build_language_model,
    embed,
    hidden_states,
    load_language_model,
    num_rows,
    quantize_as,
    save_language_model,
    set_dtype,
    unloaded_language_model,
    with_dtype,
)
from mlxmm.networks.language_model_config import context_length
from mlxmm.networks.pretrained_vision import build_vision_tower, load_vision_tower, vision_values
from mlxmm.networks.projector import PROJECTORS, Projector, squares
from mlxmm.networks.towers import VisionTower
from mlxmm.optimizers import OptimizerConfig, grouped
from mlxmm.preprocessing.images import ImageProcessor
from mlxmm.preprocessing.tokenizers import end_token, load_tokenizer, plain_tokens, require_rows, start_tokens
from mlxmm.storage import checkpoint
from mlxmm.storage.atomic import new_folder
from mlxmm.storage.hub import local_folder, settings_folder
from mlxmm.storage.lineage import Lineage
from mlxmm.storage.pretrained import read_config, read_weights, require_parts, write_settings
from mlxmm.training.trainable import match_parameters, set_trainable

MODEL_TYPE = "mlxmm_qwen3_aligner"


@attrs.frozen(kw_only=True, field_transformer=checked)
class Qwen3AlignerConfig:
    """Vision tower, projector, language model and training."""

    vision: str | None = option(
        None, "CLIP, SigLIP or ViT: folder or Hub id; none: a small CLIP is trained first", first=True
    )
    lm: str | None = option(None, "language model: folder or Hub id; none: a small one is trained first", first=True)
    lm_bits: int = option(0, "quantize the language model when it is loaded, to 4 or 8 bits; 0: do not", in_((0, 4, 8)))
    lora: LoRAConfig = LoRAConfig()
    layer: int = option(1, "hidden states of the tower to read, counted as transformers does")
    projector: str = option(
        "mlp", "linear, mlp (two layers, as LLaVA's), or pixel_shuffle (as SmolVLM's)", in_(PROJECTORS)
    )
    projector_factor: int = option(2, "pixel_shuffle merges squares with this many patches on a side", ge(1), rare=True)
    projector_width: int = option(256, "features inside the mlp", ge(1))
    prompt: str = option("", "text between image and caption")
    max_new_tokens: int = option(
        0,
        "longest caption with its end, in tokens, also when captions are generated; 0: as the data have it",
        ge(0),
        first=True,
    )
    lm_lr_scale: float = option(
        1.0, "learning rate of the language model, as a fraction of the projector's", gt(0), rare=True
    )
    optimizer: OptimizerConfig = OptimizerConfig(
        learning_rate=5e-3, warmup_steps=20, final_fraction=0.02, weight_decay=0.01
    )


class Qwen3Aligner(CaptioningModule):
    """A vision tower, a projector and a language model that reads the image as a prefix.

    The loss is on the caption and its end alone. Only the projector and the language model's adapters, if any, are
    trained; a `FreezeSchedule` unfreezes other parts ("lora" names the adapters).
    """

    def __init__(
        self,
        config: Qwen3AlignerConfig,
        vision: VisionTower,
        vision_config: dict,
        processor: ImageProcessor,
        lm,
        lm_config: dict,
        tokenizer,
    ):
        super().__init__()
        self.config, self.processor, self.tokenizer = config, processor, tokenizer
        self.vision_config, self.lm_config = vision_config, with_dtype(lm_config, lm)
        self.vision = vision
        require_rows(tokenizer, num_rows(lm))
        add_adapters(lm, config.lora)
        self.language_model = lm
        width_out = embed(lm, mx.array([[0]])).shape[-1]
        if config.projector == "pixel_shuffle":
            squares(vision.config.num_patches, config.projector_factor)
        self.projector = Projector(
            config.projector, vision.config.hidden_size, config.projector_width, width_out, config.projector_factor
        )
        self._stop_id = end_token(tokenizer)
        self._start, self._prompt = start_tokens(tokenizer), self._token_ids(config.prompt)
        self._check_context()
        set_trainable(self, [*match_parameters(self, "projector"), *self.parameter_groups()["lora"]])

    @classmethod
    def from_parts(cls, config: Qwen3AlignerConfig) -> "Qwen3Aligner":
        """Load tower and language model from `config.vision` and `config.lm`; the projector gets fresh weights.

        Raises `UserError` if a part cannot be loaded, or if image, prompt and caption exceed the context.
        """
        tower_folder, folder = local_folder(config.vision), local_folder(config.lm)
        vision, vision_config = load_vision_tower(tower_folder)
        processor = ImageProcessor.from_pretrained(tower_folder)
        lm, lm_config = load_language_model(folder, config.lm_bits)
        return cls(config, vision, vision_config, processor, lm, lm_config, load_tokenizer(folder))

    @classmethod
    def unloaded(cls, config: Qwen3AlignerConfig, *, offline: bool = False) -> "Qwen3Aligner":
        """Like `from_parts`, without reading weights: to plan memory. See `unloaded_language_model`.

        `offline` takes the cache of the Hub alone. Raises `UserError` if a part's settings are not to be had.
        """
        tower_folder, folder = (settings_folder(part, offline=offline) for part in (config.vision, config.lm))
        vision_config = vision_values(read_config(tower_folder), tower_folder)
        vision, processor = build_vision_tower(vision_config), ImageProcessor.from_pretrained(tower_folder)
        lm, lm_config = unloaded_language_model(folder, config.lm_bits)
        return cls(config, vision, vision_config, processor, lm, lm_config, load_tokenizer(folder))

    @classmethod
    def from_pretrained(cls, path_or_id: str | Path, revision: str | None = None) -> "Qwen3Aligner":
        """Load a checkpoint of a run, or a folder that `save_pretrained` wrote. Raises `UserError`."""
        folder = local_folder(path_or_id, revision)
        values = read_config(folder)
        is_llava = values.get("model_type") == "llava"
        if is_llava:
            values = llava.own_values(values, folder)
        elif values.get("model_type") != MODEL_TYPE:
            raise UserError(f"{folder} is not a Qwen3Aligner: its config.json says {values.get('model_type')!r}")
        require_parts(folder, values, "aligner", "vision", "language_model")
        module = cls(
            from_json(Qwen3AlignerConfig, values["aligner"]),
            build_vision_tower(values["vision"]),
            values["vision"],
            ImageProcessor.from_pretrained(folder),
            build_language_model(values["language_model"]),
            values["language_model"],
            load_tokenizer(folder),
        )
        weights = llava.own_weights(read_weights(folder), module) if is_llava else checkpoint.read_weights(folder)
        quantize_as(module, weights)
        set_dtype(module.language_model, values["language_model"])
        module.lm_config = with_dtype(module.lm_config, module.language_model)
        checkpoint.load_arrays(folder, weights, module)
        module.lineage = Lineage.read(folder)
        return module

    def save_pretrained(self, folder: str | Path, metrics: dict | None = None) -> None:
        """Write a new folder that `transformers.LlavaForConditionalGeneration` loads, with the same captions.

        The model card lists `metrics` and what it was trained on. LoRA layers are merged. Raises `UserError` if
        `folder` is not empty, or if a part of this module has no counterpart in LLaVA.
        """
        llava.check(self)
        with new_folder(Path(folder)) as temporary:
            llava.write(temporary, self, metrics or {})

    def save_language_model(self, folder: str | Path) -> None:
        """Write the language model alone into a new folder that `mlx_lm.load` and transformers load."""
        with new_folder(Path(folder)) as temporary:
            save_language_model(temporary, self.language_model, self.lm_config)
            self.tokenizer.save_pretrained(str(temporary))

    def save_config(self, folder: Path) -> None:
        values = {
            "model_type": MODEL_TYPE,
            "aligner": to_json(self.config),
            "vision": self.vision_config,
            "language_model": self.lm_config,
        }
        write_settings(folder, values, self.processor, self.tokenizer)

    def parameter_groups(self) -> dict[str, list[str]]:
        return {"lora": [f"language_model.{name}" for name in adapter_names(self.language_model)]}

    @property
    def decoder(self) -> CachedLanguageModel:
        return CachedLanguageModel(self.language_model)

    @property
    def vocab_size(self) -> int:
        return self.lm_config["vocab_size"]

    @property
    def stop_id(self) -> int:
        return self._stop_id

    @property
    def max_new_tokens(self) -> int:
        return self.config.max_new_tokens or CaptioningModule.max_new_tokens

    @property
    def trained_prompt(self) -> str:
        return self.config.prompt

    @property
    def prefix_length(self) -> int:
        """The positions of start, image and trained prompt, before a caption."""
        return self._num_before + len(self._prompt)

    @property
    def _num_image(self) -> int:
        return (self.processor.image_size // self.vision.config.patch_size) ** 2 // self.projector.factor**2

    @property
    def _num_before(self) -> int:
        """The positions before the prompt."""
        return len(self._start) + self._num_image

    def _room(self, prompt: Sequence[int]) -> int:
        """The most tokens that a caption may have after image and `prompt`; its end needs no position."""
        return context_length(self.lm_config) - self._num_before - len(prompt) + 1

    def _check_context(self) -> None:
        """Raise `UserError` if image, prompt and the longest caption exceed the language model's context."""
        room, wanted = self._room(self._prompt), self.config.max_new_tokens
        if room < max(1, wanted):
            raise UserError(
                f"the language model reads {context_length(self.lm_config)} tokens: after image and prompt "
                f"there is room for {max(0, room)} of a caption, not for {max(1, wanted)}; "
                + (f"set --module.max-new-tokens to {room} or less" if room > 0 else "shorten --module.prompt")
            )

    def _generation(self, settings: dict, prompt: str) -> GenerationConfig:
        config, room = super()._generation(settings, prompt), self._room(self._token_ids(prompt) or self._prompt)
        if room < 1:
            most = context_length(self.lm_config)
            raise UserError(f"the language model reads {most} tokens: shorten the prompt by {1 - room}")
        return attrs.evolve(config, max_new_tokens=min(config.max_new_tokens, room))

    def _token_ids(self, text: str) -> tuple[int, ...]:
        return tuple(plain_tokens(self.tokenizer, text))

    def features(self, images: mx.array) -> mx.array:
        return self.vision.patches(images, self.config.layer)

    def feature_settings(self) -> dict:
        return {"layer": self.config.layer, "processor": self.processor.to_hub(), "tower": self.vision_config}

    def prefix(self, features: mx.array, prompt: str = "") -> mx.array:
        """(B, P, E) features to (B, S + P + N, D): the start token if the language model has one (S is 1), projected
        patches, then the embedded `prompt` or the trained one."""
        prompt_ids = self._token_ids(prompt) if prompt else self._prompt
        start, after = self._embedded(self._start, len(features)), self._embedded(prompt_ids, len(features))
        return mx.concatenate([*start, self.projector(features), *after], axis=1)

    def _embedded(self, ids: Sequence[int], num_images: int) -> list[mx.array]:
        """The embeddings (B, N, D) of tokens, in a list; an empty one where there are none."""
        if not ids:
            return []
        embedded = embed(self.language_model, mx.array([ids]))
        return [mx.broadcast_to(embedded, (num_images, *embedded.shape[1:]))]

    def training_step(self, batch):
        return self._measure(self.prefix(self.image_features(batch)), batch)

    def validation_step(self, batch):
        """The loss, and "loss_shuffled", a control: the loss of the captions given other images of the batch."""
        prefix = self.prefix(self.image_features(batch))
        others = mx.roll(prefix, max(1, len(prefix) // 2), 0)
        return self._measure(prefix, batch) | {"loss_shuffled": self._measure(others, batch)["loss"]}

    def _measure(self, prefix: mx.array, batch: dict) -> dict:
        before = embed(self.language_model, batch["tokens"][:, :-1])
        states = hidden_states(self.language_model, mx.concatenate([prefix, before], axis=1))
        # The last position of the prefix predicts the first token.
        return token_metrics(self.language_model, states[:, prefix.shape[1] - 1 :], batch)

    def configure_optimizers(self):
        config, num_steps = self.config, self.trainer.estimated_stepping_batches
        optimizer = config.optimizer.build(num_steps)
        if config.lm_lr_scale == 1:
            return optimizer
        return grouped(optimizer, language_model=config.optimizer.build(num_steps, scale=config.lm_lr_scale))
