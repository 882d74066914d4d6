"""CaptioningModule: a module that says what is on pictures.

B pictures, L positions, D features.
"""

from collections.abc import Iterator, Sequence

import attrs
import mlx.core as mx
import numpy as np

from mlxmm.networks.generation import DecoderInterface, GenerationConfig, generate, sequence_keys, stream
from mlxmm.training.module import Module, evaluating

BUCKET = 8  # tokens between one length of a batch and the next
BATCH = 256  # sequences decoded at a time: pictures, times beams


class CaptioningModule(Module):
    """What `caption` needs beside a `tokenizer` and a `processor` of pictures:"""

    max_new_tokens = 32  # longest caption with its end, in tokens; a subclass may have it from its config

    @property
    def decoder(self) -> DecoderInterface:
        """The network that writes."""
        raise NotImplementedError

    @property
    def stop_id(self) -> int:
        """The token that ends a caption."""
        raise NotImplementedError

    def features(self, images: mx.array) -> mx.array:
        """(B, H, W, 3) floats to what the tower sees, (B, P, E)."""
        raise NotImplementedError

    def feature_settings(self) -> dict:
        """What `features` depends on beside the tower's weights and the pictures, as JSON values."""
        raise NotImplementedError

    def prefix(self, features: mx.array, prompt: str = "") -> mx.array:
        """(B, P, E) features to what the decoder reads before a caption, (B, L, D)."""
        raise NotImplementedError

    def image_features(self, batch: dict) -> mx.array:
        """The features (B, P, E) of a batch: of its pixels, or as it brings them from a cache."""
        if "features" in batch:
            return batch["features"].astype(mx.float32)
        return self.features(self.processor.normalize(batch["pixels"]))

    def transform(self, row: dict, caption: str) -> dict:
        """An example: pixels (H, W, 3), tokens (T,) with their end, and a mask (T,) of what is no padding.

        A row that has "features" (P, E) instead of an image gives those instead of pixels. T is `max_new_tokens`; a
        longer caption is cut before its end, which it keeps.
        """
        length = self.max_new_tokens
        ids = self.tokenizer(caption, add_special_tokens=False)["input_ids"][: length - 1] + [self.stop_id]
        tokens = np.full(length, self.stop_id, dtype=np.int32)
        tokens[: len(ids)] = ids
        mask = (np.arange(length) < len(ids)).astype(np.float32)
        if "features" in row:
            return {"features": row["features"], "tokens": tokens, "mask": mask}
        return {"pixels": self.processor.pixels(row["image"]), "tokens": tokens, "mask": mask}

    def collate(self, batch: dict) -> dict:
        """A batch of examples (NumPy arrays), cut where all of it is padding: to a multiple of `BUCKET` tokens.

        A step is compiled once for each length that comes: there are as many as T has buckets.
        """
        longest = int(np.flatnonzero(batch["mask"].any(axis=0))[-1]) + 1
        length = -(-longest // BUCKET) * BUCKET
        return batch | {name: batch[name][:, :length] for name in ("tokens", "mask")}

    def caption(self, images: Sequence, prompt: str = "", **settings) -> list[str]:
        """One caption for each PIL image. `settings` are those of `GenerationConfig`, for example `num_beams=3`.

        `prompt` takes the place of the text between image and caption that the module was trained with. A picture
        gets the caption it would get alone; a drawn one depends on `seed` and the picture's place in `images`.
        """
        config, rows = self._generation(settings, prompt), []
        size = max(1, BATCH // config.num_beams)
        with evaluating(self):
            for start in range(0, len(images), size):
                part = images[start : start + size]
                keys = sequence_keys(config.seed, start, start + len(part))
                prefix = self.prefix(self.features(self.processor(part)), prompt)
                rows += generate(self.decoder, prefix, config, stop_id=self.stop_id, keys=keys)
        return [self._text(row) for row in rows]

    def stream_caption(self, image, prompt: str = "", **settings) -> Iterator[str]:
        """The caption of one PIL image, piece by piece, each as soon as its token is chosen."""
        config, tokens, said = self._generation(settings, prompt), [], ""
        with evaluating(self):
            prefix = self.prefix(self.features(self.processor([image])), prompt)
            for token in stream(self.decoder, prefix, config, stop_id=self.stop_id):
                tokens.append(token)
                text = self._text(tokens)
                if not text.endswith("\ufffd"):  # a letter of several tokens is not whole yet
                    yield text[len(said) :]
                    said = text
        yield self._text(tokens)[len(said) :]

    def _generation(self, settings: dict, prompt: str) -> GenerationConfig:
        config = GenerationConfig(**settings)
        if config.max_new_tokens is not None:
            return config
        return attrs.evolve(config, max_new_tokens=self.max_new_tokens)

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
