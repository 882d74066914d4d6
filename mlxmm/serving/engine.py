"""Engine: the one thread that computes for all requests of a server. Captions that are waited for are made together.

MLX's arrays and random keys belong to the thread that computes; the threads of a server only hand in work and wait.
"""

import contextlib
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import attrs
import mlx.core as mx
from PIL import Image

from mlxmm.modules.captioning_module import CaptioningModule, StreamedCaption
from mlxmm.networks.generation import GenerationConfig, sequence_keys

MAX_BATCH = 16  # captions at once


@attrs.frozen
class Piece:
    """What came with a token of a caption, and at its end, once, why it ended."""

    text: str
    num_tokens: int  # of the caption so far
    finish_reason: str | None  # "stop", "length"


@attrs.define(eq=False)
class CaptionJob:
    """A caption that somebody waits for. `emit` gets its pieces, or what was raised."""

    image: Image.Image
    prompt: str
    config: GenerationConfig
    emit: Callable[[Piece | Exception], Any]
    is_over: bool = False  # it has ended, or nobody waits for it any more

    def goes_with(self, other: "CaptionJob") -> bool:
        """Whether both can be made together: they differ in picture and seed alone."""
        return self.prompt == other.prompt and attrs.evolve(self.config, seed=other.config.seed) == other.config


@attrs.define(eq=False)
class Task:
    """Anything else to compute, whose result is waited for."""

    compute: Callable[[], Any]
    future: Future = attrs.field(factory=Future)

    def run(self) -> None:
        """Compute the result, or note what was raised."""
        try:
            self.future.set_result(self.compute())
        except Exception as error:  # noqa: BLE001  (the one who waits gets it)
            self.future.set_exception(error)


class Engine:
    """Computes what other threads submit, in the thread that calls `run`."""

    def __init__(self):
        self._waiting: queue.Queue = queue.Queue()

    def submit(self, compute: Callable[[], Any]) -> Future:
        """The result of `compute()`, to be waited for."""
        task = Task(compute)
        self._waiting.put(task)
        return task.future

    def caption(self, job: CaptionJob) -> None:
        """Hand in a caption to be made."""
        self._waiting.put(job)

    @property
    def num_waiting(self) -> int:
        """How many captions and results are waited for, about."""
        return self._waiting.qsize()

    def stop(self) -> None:
        """Let `run` return, once what waits is done."""
        self._waiting.put(None)

    def run(self, captioner: CaptioningModule | None) -> None:
        """Compute until `stop` is called."""
        left: list = []
        while (work := left.pop(0) if left else self._waiting.get()) is not None:
            if isinstance(work, Task):
                work.run()
                continue
            left += self._drained()
            jobs = [work, *(each for each in left if isinstance(each, CaptionJob) and work.goes_with(each))][:MAX_BATCH]
            left = [each for each in left if each not in jobs]
            make_captions(captioner, [job for job in jobs if not job.is_over])

    def _drained(self) -> list:
        waiting = []
        with contextlib.suppress(queue.Empty):
            while True:
                waiting.append(self._waiting.get_nowait())
        return waiting


def make_captions(captioner: CaptioningModule | None, jobs: list[CaptionJob]) -> None:
    """Make the captions of jobs that go together. Whatever is raised goes to those who wait."""
    try:
        for captions in _streamed(captioner, jobs) if jobs else ():
            for job, caption in zip(jobs, captions, strict=True):
                _emit(job, caption)
            if all(job.is_over for job in jobs):
                return
    except Exception as error:  # noqa: BLE001  (the server goes on)
        for job in jobs:
            job.emit(error)


def _emit(job: CaptionJob, caption: StreamedCaption) -> None:
    if job.is_over:
        return
    job.is_over = caption.finish_reason is not None
    job.emit(Piece(caption.take(), len(caption.tokens), caption.finish_reason))


def _streamed(captioner: CaptioningModule, jobs: list[CaptionJob]) -> Iterator[list[StreamedCaption]]:
    """Sampled as each alone would be: a caption does not depend on what it is made with."""
    keys = mx.concatenate([sequence_keys(job.config.seed, [0]) for job in jobs])
    images, settings = [job.image for job in jobs], attrs.asdict(jobs[0].config)
    return captioner.stream_captions(images, jobs[0].prompt, keys=keys, **settings)
