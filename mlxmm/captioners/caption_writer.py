"""Who writes captions: one protocol, whatever model is behind it."""

from collections.abc import Sequence
from typing import Protocol

import attrs
from attrs.validators import ge, gt, le, lt
from PIL import Image

from mlxmm.config import checked, option


@attrs.frozen(kw_only=True, field_transformer=checked)
class Sampling:
    """How captions are drawn. It is part of what a caption is found again by."""

    temperature: float = option(0.0, "0: take the most likely token; above 0: sample", ge(0))
    top_p: float = option(1.0, "sample from the fewest tokens whose probabilities sum to this", gt(0), le(1))
    max_tokens: int = option(64, "longest caption, in tokens", ge(1))
    seed: int = option(0, "random seed of sampling", ge(0), lt(2**32))


@attrs.frozen(kw_only=True, field_transformer=checked)
class WrittenCaption:
    """A caption as its writer gave it."""

    text: str
    num_tokens: int
    finish_reason: str  # "stop"; "length": cut off at `max_tokens`
    width: int = 0  # of the image that the writer read, in pixels; 0: that of the file
    height: int = 0


@attrs.frozen
class CaptionFailure:
    """Why one image has no caption. Other images of its batch may have theirs; asking again would not help."""

    reason: str  # one line


class WriterFailed(Exception):
    """A writer cannot write now, and not because of the images; the message says why in one line.

    No image of the batch is to blame, so none is noted as failed: a job ends here, and goes on when it is resumed.
    """


class CaptionWriter(Protocol):
    """Writes captions of images."""

    name: str  # what wrote: a Hub id, a folder, "shapes"
    revision: str  # which version of it: a commit, a checksum of its weights
    batch_size: int  # most images of a call

    def write(
        self, images: Sequence[Image.Image], prompts: Sequence[str], sampling: Sampling
    ) -> list[WrittenCaption | CaptionFailure]:
        """For each image a caption by the prompt of the same place, or why there is none. Raises `WriterFailed`."""

    def close(self) -> None:
        """Give back what the writer holds: processes, connections."""
