"""CaptioningModule: the base of modules that caption images.

B images, P patches, E features of the vision tower, T caption tokens with their end, L positions, D features.
"""

from collections.abc import Callable, Iterator, Sequence

import attrs
import mlx.core as mx
import numpy as np

from mlxmm.compute import memory
from mlxmm.compute.precision import autocast
from mlxmm.errors import warn
from mlxmm.modules.token_metrics import PICKED_FROM, label_positions, trimmed
from mlxmm.networks.generation import DecoderInterface, GenerationConfig, cache_bytes, generate, sequence_keys, stream
from mlxmm.preprocessing.images import as_images
from mlxmm.preprocessing.tokenizers import plain_ids
from mlxmm.progress_bar import passing_bar
from mlxmm.training.module import Module, evaluating

BATCH = 256  # most sequences decoded at a time: images times beams
CACHE_BYTES = 512 * 2**20  # most that the cache of past positions may take, which decides how many are decoded


class CaptioningModule(Module):
    """A subclass sets `tokenizer` and `processor`, and implements the members below that raise NotImplementedError."""

    max_new_tokens = 32  # longest caption with its end, in tokens; a subclass may have it from its config
    trained_prompt = ""  # text between image and caption in training; a subclass may have it from its config

    @property
    def decoder(self) -> DecoderInterface:
        """The network that generates captions."""
        raise NotImplementedError

    @property
    def vocab_size(self) -> int:
        """How many logits a position has."""
        raise NotImplementedError

    @property
    def stop_id(self) -> int:
        """The token that ends a caption."""
        raise NotImplementedError

    def features(self, images: mx.array) -> mx.array:
        """Preprocessed images (B, H, W, 3) to the features of the frozen vision tower, (B, P, E)."""
        raise NotImplementedError

    def feature_settings(self) -> dict:
        """The settings that `features` depends on, as JSON values: part of the key of cached features.

        Raises `UserError` if the features change during training, so that they cannot be cached.
        """
        raise NotImplementedError

    def prefix(self, features: mx.array, prompt: str = "") -> mx.array:
        """(B, P, E) features to the embeddings (B, L, D) that the decoder reads before a caption."""
        raise NotImplementedError

    def image_features(self, batch: dict) -> mx.array:
        """Vision features (B, P, E): cached ones if the batch has them, else computed from its pixels."""
        if "features" in batch:
            return batch["features"]  # networks cast them to the dtype of their weights
        return self.features(self.processor.normalize(batch["pixels"]))

    def transform(self, row: dict, caption: str) -> dict:
        """An example: uint8 pixels (H, W, 3), tokens (T,) and a mask (T,), which is 0 where tokens are padding.

        T is `max_new_tokens`. A longer caption is truncated and still ends with the end token. A row with cached
        "features" (P, E) gives these instead of pixels; one with cached "pixels" is not decoded.
        """
        length = self.max_new_tokens
        ids = plain_ids(self.tokenizer, caption)[: length - 1] + [self.stop_id]
        tokens = np.full(length, self.stop_id, dtype=np.int32)
        tokens[: len(ids)] = ids
        mask = (np.arange(length) < len(ids)).astype(np.float32)
        if "features" in row:
            return {"features": row["features"], "tokens": tokens, "mask": mask}
        return {"pixels": self.processor.pixels_of(row), "tokens": tokens, "mask": mask}

    def collate(self, batch: dict) -> dict:
        """Cut padding that the whole batch shares; with a large vocabulary, add the "positions" that get logits."""
        batch = trimmed(batch)
        if self.vocab_size < PICKED_FROM:
            return batch
        return batch | {"positions": label_positions(batch["mask"])}

    def caption(self, images, prompt: str = "", **settings) -> list[str]:
        """One caption for each image, which is a PIL image or a path; one alone need not be in a list.

        `settings` are those of `GenerationConfig`, for example `num_beams=3`.
        Captions are as long as in training unless `max_new_tokens` is given. `prompt` replaces the text between image
        and caption that the module was trained with. Captions do not depend on how images are batched; a sampled
        caption depends on `seed` and on the index of its image. Warns of a prompt that the module was not trained with.
        Raises `UserError` if the prompt is too long.
        """
        return [self.text_of(row) for row in self.caption_tokens(as_images(images), prompt, **settings)]

    def caption_tokens(
        self, images: Sequence, prompt: str = "", *, indices: Sequence[int] | None = None, **settings
    ) -> list[list[int]]:
        """The tokens of each `caption`, without its end: fewer than `max_new_tokens` where it ended by itself.

        `indices` number the images for sampling, in place of 0, 1, 2, ….
        """
        config, rows = self._generation(settings, prompt), []
        indices = range(len(images)) if indices is None else indices
        num_rows = len(images) if config.num_beams == 1 else 1  # beams are not decoded in halves
        with evaluating(self, num_rows), autocast(self, "32"):
            size = self._num_at_once(images[:1], prompt, config)
            with passing_bar("captioning", len(images), "picture") as bar:
                for start in range(0, len(images), size):
                    chunk = images[start : start + size]
                    keys = sequence_keys(config.seed, indices[start : start + size])
                    prefix = self.prefix(self.features(self.processor(chunk)), prompt)
                    rows += generate(self.decoder, prefix, config, stop_id=self.stop_id, keys=keys)
                    bar.update(len(chunk))
        memory.give_back()
        return rows

    def _num_at_once(self, images: Sequence, prompt: str, config: GenerationConfig) -> int:
        """How many images to caption together, by the cache that one of them needs."""
        if not images:
            return 1
        prefix = self.prefix(self.features(self.processor(images)), prompt)
        return max(1, min(BATCH // config.num_beams, CACHE_BYTES // cache_bytes(self.decoder, prefix, config)))

    def stream_caption(self, image, prompt: str = "", **settings) -> Iterator[str]:
        """Yield the caption of one image, or path, piece by piece, each as soon as its token is generated."""
        for [caption] in self.stream_captions(as_images(image), prompt, **settings):
            if piece := caption.take():
                yield piece

    def stream_captions(
        self, images: Sequence, prompt: str = "", *, keys: mx.array | None = None, **settings
    ) -> Iterator[list["StreamedCaption"]]:
        """Caption PIL images together, and yield their captions, the same objects, after every token and at the end.

        `keys` are those of `generate`.
        """
        config, captions = self._generation(settings, prompt), [StreamedCaption(self.text_of) for _ in images]
        with evaluating(self, len(images)), autocast(self, "32"):
            prefix = self.prefix(self.features(self.processor(images)), prompt)
            for column in stream(self.decoder, prefix, config, stop_id=self.stop_id, keys=keys):
                for caption, token in zip(captions, column):
                    caption.add(token)
                yield captions
        for caption in captions:
            caption.finish_reason = caption.finish_reason or "length"
        yield captions

    def _generation(self, settings: dict, prompt: str) -> GenerationConfig:
        if prompt not in ("", self.trained_prompt):
            known = f"with {self.trained_prompt!r}" if self.trained_prompt else "without a prompt"
            warn(f"this captioner was trained {known}: what it says after another text may make no sense")
        config = GenerationConfig(**settings)
        if config.max_new_tokens is not None:
            return config
        return attrs.evolve(config, max_new_tokens=self.max_new_tokens)

    def text_of(self, tokens: list[int]) -> str:
        """The caption that these tokens are."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()


@attrs.define
class StreamedCaption:
    """A caption while it is generated."""

    text_of: Callable[[list[int]], str]
    tokens: list[int] = attrs.field(factory=list)
    finish_reason: str | None = None  # "stop" where it ended by itself, "length" where it was cut off
    _num_taken: int = 0  # letters

    def add(self, token: int | None) -> None:
        """Add the next token; None is the end."""
        if token is None:
            self.finish_reason = "stop"
        else:
            self.tokens.append(token)

    def take(self) -> str:
        """The text that is new since the last call, without a letter of which tokens are still missing."""
        text = self.text_of(self.tokens)
        if text.endswith("\ufffd") and self.finish_reason is None:
            return ""
        start, self._num_taken = self._num_taken, len(text)
        return text[start:]
