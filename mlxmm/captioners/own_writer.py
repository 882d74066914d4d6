"""A captioner of ours as a writer: captions for pictures that have none (BLIP's CapFilt, arXiv 2201.12086, 3.3)."""

import zlib
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mlxmm.captioners.caption_writer import Sampling, WrittenCaption
from mlxmm.modules.captioning_module import CaptioningModule
from mlxmm.modules.loading import load_captioner
from mlxmm.storage.atomic import sha256
from mlxmm.storage.checkpoint import WEIGHTS
from mlxmm.storage.checksums import checksum_of_values
from mlxmm.storage.frozen_weights import FROZEN
from mlxmm.storage.hub import local_folder


class OwnWriter:
    """A CaptionDecoder or Qwen3Aligner that was trained, or that is being trained.

    A sampled caption is a function of (seed, pixels): it does not depend on how pictures are batched.
    """

    in_process = True  # MLX's arrays and random key belong to the thread that trains

    def __init__(self, captioner: CaptioningModule, *, name: str, revision: str, batch_size: int = 64):
        self.captioner, self.name, self.revision, self.batch_size = captioner, name, revision, batch_size

    @classmethod
    def from_pretrained(cls, path_or_id: str, batch_size: int = 64) -> "OwnWriter":
        """Of a checkpoint, folder or Hub id; the revision is the checksum of its weights. Raises `UserError`."""
        folder = local_folder(path_or_id)
        return cls(load_captioner(folder), name=str(path_or_id), revision=checksum(folder), batch_size=batch_size)

    def write(self, images: Sequence[Image.Image], prompts: Sequence[str], sampling: Sampling) -> list[WrittenCaption]:
        """A caption for each image; those with one prompt are written together."""
        captions: dict[int, WrittenCaption] = {}
        for prompt in dict.fromkeys(prompts):
            places = [place for place, one in enumerate(prompts) if one == prompt]
            captions |= zip(places, self._write([images[place] for place in places], prompt, sampling))
        return [captions[place] for place in range(len(images))]

    def close(self) -> None:
        """There is nothing to give back."""

    def _write(self, images: Sequence[Image.Image], prompt: str, sampling: Sampling) -> list[WrittenCaption]:
        settings = {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed}
        settings |= {"max_new_tokens": min(sampling.max_tokens, self.captioner.max_new_tokens)}
        indices = [zlib.crc32(image.tobytes()) for image in images]
        rows = self.captioner.caption_tokens(images, prompt, indices=indices, **settings)
        size = self.captioner.processor.image_size
        ended = lambda row: "stop" if len(row) < settings["max_new_tokens"] else "length"
        return [
            WrittenCaption(
                text=self.captioner.text_of(row), num_tokens=len(row), finish_reason=ended(row), width=size, height=size
            )
            for row in rows
        ]


class TrainingWriter(OwnWriter):
    """The captioner that is being trained; its revision is how many updates it has had."""

    def __init__(self, captioner: CaptioningModule, batch_size: int = 64):
        self.captioner, self.name, self.batch_size = captioner, "itself", batch_size

    @property
    def revision(self) -> str:
        """As "step=1200"."""
        return f"step={self.captioner.trainer.global_step}"


def checksum(folder: Path) -> str:
    """Which version of a captioner is in `folder`: a checksum of its weights."""
    own = [path for name in (WEIGHTS, FROZEN) if (path := folder / name).exists()]
    sums = [sha256(path) for path in own or sorted(folder.glob("model*.safetensors"))[:1]]
    return (sums[0] if len(sums) == 1 else checksum_of_values(sums))[:16]
