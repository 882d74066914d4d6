"""The grammar of drawn scenes as a writer, which lies as often as it is told to: for experiments with filters."""

import hashlib
from collections.abc import Sequence

import numpy as np
from PIL import Image

from mlxmm.captioners.caption_writer import CaptionFailure, Sampling, WrittenCaption
from mlxmm.data.sources.shapes import ShapesRows


class GrammarWriter:
    """Writes the caption of the scene that a picture shows; in a fraction `lies` of pictures, that of another scene.

    Which pictures it lies about is a function of (seed, pixels). It knows the pictures of `rows` alone.
    """

    name = "shapes"

    def __init__(self, rows: ShapesRows, *, lies: float = 0.0, seed: int = 0, batch_size: int = 64):
        self.lies, self.seed, self.batch_size = lies, seed, batch_size
        self.revision = f"lies={lies},seed={seed}"
        self._captions = {_digest(row["image"]): row["captions"][0] for row in rows}
        self._texts = sorted(set(self._captions.values()))

    def write(
        self, images: Sequence[Image.Image], prompts: Sequence[str], sampling: Sampling
    ) -> list[WrittenCaption | CaptionFailure]:
        """The captions; prompts and sampling do not change them."""
        return [self._write(_digest(image)) for image in images]

    def close(self) -> None:
        """There is nothing to give back."""

    def is_lie(self, image: Image.Image) -> bool:
        """Whether the caption of this picture is that of another scene."""
        return self._rng(_digest(image)).random() < self.lies

    def _write(self, digest: str) -> WrittenCaption | CaptionFailure:
        if digest not in self._captions:
            return CaptionFailure("the grammar did not draw this picture")
        text, rng = self._captions[digest], self._rng(digest)
        if rng.random() < self.lies:
            text = str(rng.choice([other for other in self._texts if other != text]))
        return WrittenCaption(text=text, num_tokens=len(text.split()), finish_reason="stop")

    def _rng(self, digest: str) -> np.random.Generator:
        return np.random.default_rng([self.seed, int(digest[:16], 16)])


def _digest(image: Image.Image) -> str:
    return hashlib.sha256(image.tobytes()).hexdigest()
