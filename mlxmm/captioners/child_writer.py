"""Captions by a model in a child process, which may die or hang at any batch.

On Metal, running out of memory ends the process (an exception that no Python code can catch). So the model lives in a
child: if that dies or hangs, it is started again, and the batch is tried in halves.
"""

import hashlib
from collections.abc import Sequence

import attrs
from PIL import Image

from mlxmm.captioners.caption_writer import CaptionFailure, Sampling, WriterFailed, WrittenCaption
from mlxmm.captioners.child_process import ChildFailed, ChildProcess
from mlxmm.captioners.limit_pixels import limit_pixels

MAX_FAILURES_IN_A_ROW = 20  # of the child, without a caption in between: then no image is to blame


@attrs.frozen(kw_only=True)
class _Request:
    image: Image.Image
    prompt: str


class ChildWriter:
    """A `CaptionWriter` that asks `child`, which answers as `child_server.py` does. Raises `ChildFailed`."""

    def __init__(self, child: ChildProcess, *, name: str, revision: str, batch_size: int, max_pixels: int):
        self.child, self.name, self.revision = child, name, revision
        self.batch_size, self.max_pixels = batch_size, max_pixels
        self._failures_in_a_row, self._last_failure = 0, ""
        try:
            self.child.start()
        except BaseException:
            self.child.close()
            raise
        self._closed = False

    def write(
        self, images: Sequence[Image.Image], prompts: Sequence[str], sampling: Sampling
    ) -> list[WrittenCaption | CaptionFailure]:
        """For each image a caption by the prompt of the same place, or why there is none. Raises `WriterFailed`."""
        requests = [
            _Request(image=limit_pixels(image.convert("RGB"), self.max_pixels), prompt=prompt)
            for image, prompt in zip(images, prompts, strict=True)
        ]
        written: list[WrittenCaption | CaptionFailure] = []
        while part := requests[len(written) :][: self.batch_size]:
            written += self._write_part(part, sampling)
        return written

    def close(self) -> None:
        """End the child process. A thread that waits for it gets `WriterFailed`."""
        self._closed = True
        self.child.close()

    def batch_seed(self, sampling: Sampling, part: "Sequence[_Request]", blobs: Sequence[bytes]) -> int:
        """Of the contents of a batch, so that neither what was written before nor a restart changes its captions."""
        digest = hashlib.sha256(sampling.seed.to_bytes(4, "big"))
        for request, blob in zip(part, blobs):
            digest.update(f"{request.image.size} {request.prompt}".encode() + blob)
        return int.from_bytes(digest.digest()[:4], "big")

    def _write_part(self, part: list[_Request], sampling: Sampling) -> list[WrittenCaption | CaptionFailure]:
        """Captions of `part`, in halves if the child fails; the second failure of a single image is its own.

        A batch whose halves succeed was too large: batches stay as small as those from then on, because every attempt
        at more may cost loading the model again.
        """
        captions = self._attempt(part, sampling)
        if captions is not None:
            return captions
        if len(part) == 1:  # once more: something else on this machine may have taken the memory
            return self._attempt(part, sampling) or [CaptionFailure(self._last_failure)]
        half = (len(part) + 1) // 2
        written = self._write_part(part[:half], sampling) + self._write_part(part[half:], sampling)
        if all(isinstance(caption, WrittenCaption) for caption in written):
            self.batch_size = min(self.batch_size, half)
        return written

    def _attempt(self, part: list[_Request], sampling: Sampling) -> list[WrittenCaption] | None:
        """Captions of `part`; None if the child fails. Raises `WriterFailed` if it always does."""
        self._start()
        try:
            captions = self._ask(part, sampling)
        except ChildFailed as failure:
            self._failures_in_a_row, self._last_failure = self._failures_in_a_row + 1, str(failure)
            if self._failures_in_a_row < MAX_FAILURES_IN_A_ROW:
                return None
            raise WriterFailed(f"{self.name} failed {MAX_FAILURES_IN_A_ROW} times in a row: {failure}") from None
        self._failures_in_a_row = 0
        return captions

    def _start(self) -> None:
        if self._closed:
            raise WriterFailed(f"{self.name} was closed")
        try:
            self.child.start()
        except ChildFailed as failure:
            raise WriterFailed(f"{self.name} could not be loaded again: {failure}") from None

    def _ask(self, part: list[_Request], sampling: Sampling) -> list[WrittenCaption]:
        images = [request.image for request in part]
        blobs = [image.tobytes() for image in images]
        header = {
            "sizes": [image.size for image in images],
            "prompts": [request.prompt for request in part],
            "sampling": attrs.asdict(sampling) | {"seed": self.batch_seed(sampling, part, blobs)},
        }
        captions = self.child.ask(header, blobs)["captions"]
        return [_written(image, sampling, *caption) for image, caption in zip(images, captions, strict=True)]


def _written(image: Image.Image, sampling: Sampling, text: str, num_tokens: int, reason: str = "") -> WrittenCaption:
    """mlx-vlm does not say why a caption ends: one that does so by itself has fewer tokens than it may."""
    reason = reason or ("length" if num_tokens >= sampling.max_tokens else "stop")
    width, height = image.size
    return WrittenCaption(text=text.strip(), num_tokens=num_tokens, finish_reason=reason, width=width, height=height)
