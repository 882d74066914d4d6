"""The child process of `MlxVlmWriter`: it holds the model, and writes captions of the images that it is sent.

This is the only file that imports mlx-vlm. Call `main` in a process of its own, with the model's folder as argument.
"""

import os
import queue
import sys
import threading
from typing import BinaryIO

from PIL import Image

from mlxmm.captioners.messages import read_message, write_message


def main() -> None:
    """Answer messages until standard input is closed: by the parent, or because the parent has died."""
    requests, answers = sys.stdin.buffer, _take_stdout()
    received: queue.Queue = queue.Queue()
    threading.Thread(target=_receive, args=(requests, received), daemon=True).start()
    try:
        model, processor = load(sys.argv[1])
    except Exception as error:  # mlx-vlm and transformers raise a dozen kinds
        write_message(answers, {"error": _line(error)})
        return
    write_message(answers, {"ready": True})
    while True:
        write_message(answers, _answer(model, processor, *received.get()))


def _take_stdout() -> BinaryIO:
    """Standard output for messages alone: what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return answers


def _receive(requests: BinaryIO, received: queue.Queue) -> None:
    """In a thread, so that the process ends at once with its parent, also in the middle of a batch."""
    while (message := read_message(requests)) is not None:
        received.put(message)
    os._exit(0)


def load(folder: str):
    """The model and its processor."""
    from mlx_vlm import load

    model, processor = load(folder)
    processor.detokenizer = CountingDetokenizer(processor.detokenizer)
    return model, processor


def _answer(model, processor, request: dict, blobs: list[bytes]) -> dict:
    """{"captions": [(text, number of tokens)]}, or {"error": one line}."""
    images = [Image.frombytes("RGB", tuple(size), blob) for size, blob in zip(request["sizes"], blobs)]
    try:
        return {"captions": write_captions(model, processor, images, request["prompts"], request["sampling"])}
    except Exception as error:
        return {"error": _line(error)}


def write_captions(model, processor, images: list[Image.Image], prompts: list[str], sampling: dict):
    """(text, number of tokens) of each image, by the prompt of the same place."""
    import mlx.core as mx

    mx.random.seed(sampling["seed"])
    captions: list = [None] * len(images)
    for size in dict.fromkeys(image.size for image in images):  # a batch has one size, so that nothing is padded
        places = [place for place, image in enumerate(images) if image.size == size]
        written = _write_group(model, processor, [images[p] for p in places], [prompts[p] for p in places], sampling)
        for place, caption in zip(places, written):
            captions[place] = caption
    return captions


def _write_group(model, processor, images, prompts, sampling: dict) -> list[tuple[str, int]]:
    from mlx_vlm import batch_generate
    from mlx_vlm.sample_utils import make_sampler

    processor.detokenizer.counts.clear()
    written = batch_generate(
        model,
        processor,
        images=images,
        prompts=prompts,  # as they are: batch_generate applies the chat template
        max_tokens=sampling["max_tokens"],
        sampler=make_sampler(temp=sampling["temperature"], top_p=sampling["top_p"]),
        group_by_shape=True,
    )
    return list(zip(written.texts, processor.detokenizer.counts, strict=True))


class CountingDetokenizer:
    """A detokenizer that counts the tokens of each text, which `batch_generate` does not return."""

    def __init__(self, detokenizer):
        self._detokenizer, self._count = detokenizer, 0
        self.counts: list[int] = []  # of every text that was finished

    def reset(self) -> None:
        self._count = 0
        self._detokenizer.reset()

    def add_token(self, token, **options) -> None:
        self._count += 1
        self._detokenizer.add_token(token, **options)

    def finalize(self) -> None:
        self.counts.append(self._count)
        self._detokenizer.finalize()

    def __getattr__(self, name: str):
        return getattr(self._detokenizer, name)


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
