"""A captioning job: pictures times prompts, less what the journal has, batch by batch into the journal."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import attrs

from mlxmm.captioners.caption_writer import CaptionFailure, CaptionWriter, Sampling
from mlxmm.captioners.journal import Journal
from mlxmm.data.pictures import Pictures
from mlxmm.distributed import collectives
from mlxmm.errors import UserError
from mlxmm.preprocessing.images import UndecodableImage

HASH_THREADS = 8


@attrs.frozen
class Shard:
    """Part `number` of `count`, from 1: the pictures whose hash falls to it, wherever they stand."""

    number: int = 1
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Of "3/16". Raises `UserError`."""
        number, slash, count = text.partition("/")
        if not (slash and number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count)):
            raise UserError(f"--shard {text}: write it as 3/16, from 1/16 to 16/16")
        return cls(int(number), int(count))

    @classmethod
    def own(cls) -> "Shard":
        """That of this rank of `mlx.launch` or `mpirun`, or task of Slurm, which works alone; else the whole."""
        number, count = collectives.work_alone()
        return cls(number + 1, count)

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def holds(self, sha256: str) -> bool:
        """Whether the picture of this hash is in the shard."""
        return int(sha256[:8], 16) % self.count == self.number - 1


@attrs.frozen
class Request:
    """A caption to be written: of the picture at `place`, by the prompt with this id."""

    sha256: str
    place: int
    prompt: str


@attrs.define
class Progress:
    """What a job has done so far, for a progress bar."""

    num_captions: int = 0
    num_failed: int = 0
    num_tokens: int = 0
    _started: float = attrs.field(factory=time.perf_counter)

    def rates(self) -> dict[str, float]:
        """Captions and tokens per second since the start."""
        seconds = max(time.perf_counter() - self._started, 1e-9)
        return {"captions/s": self.num_captions / seconds, "tokens/s": self.num_tokens / seconds}


def hashes_of(pictures: Pictures, shard: Shard) -> dict[str, int]:
    """The SHA-256 of each picture of the shard with the first place where it stands: equal pictures count once."""
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        first: dict[str, int] = {}
        for place, digest in enumerate(pool.map(pictures.sha256, range(len(pictures)))):
            if shard.holds(digest):
                first.setdefault(digest, place)
    return first


def journal_name(shard: Shard) -> str:
    """The file of a shard's journal in the folder of a run."""
    return f"captions-{shard.number}-of-{shard.count}.sqlite"


def requests(hashes: Mapping[str, int], prompts: Mapping[str, str], written: set[tuple[str, str]]) -> list[Request]:
    """What is still to be written, picture by picture."""
    wanted = (Request(digest, place, prompt) for digest, place in hashes.items() for prompt in prompts)
    return [request for request in wanted if (request.sha256, request.prompt) not in written]


def write_captions(
    pictures: Pictures,
    wanted: Sequence[Request],
    prompts: Mapping[str, str],
    writer: CaptionWriter,
    journal: Journal,
    sampling: Sampling,
    on_progress: Callable[[Progress], None],
) -> Progress:
    """Write the captions of `wanted` into the journal. Stopped at any moment, at most the batch in hand is lost.

    A picture that cannot be decoded, or that the writer fails on, is noted in the journal with its reason. Raises
    `WriterFailed` where the writer gives up: what was written stays.
    """
    progress, start = Progress(), 0
    while start < len(wanted):
        batch = wanted[start : start + writer.batch_size]  # which a writer makes smaller when memory runs out
        start += len(batch)
        images, readable = _decoded(pictures, batch, journal, progress)
        if readable:
            _write(writer, images, readable, prompts, journal, sampling, progress)
        on_progress(progress)
    return progress


def _decoded(pictures: Pictures, batch: Sequence[Request], journal: Journal, progress: Progress) -> tuple[list, list]:
    images, readable = [], []
    for request in batch:
        try:
            images.append(pictures[request.place])
            readable.append(request)
        except UndecodableImage as error:
            journal.add_failure(request.sha256, request.prompt, f"the picture cannot be decoded: {error}")
            progress.num_failed += 1
    return images, readable


def _write(writer, images, batch, prompts, journal, sampling, progress: Progress) -> None:
    results = writer.write(images, [prompts[request.prompt] for request in batch], sampling)
    pairs = list(zip(batch, results, strict=True))
    failed = [(request, one) for request, one in pairs if isinstance(one, CaptionFailure)]
    written = [(request.sha256, request.prompt, one) for request, one in pairs if not isinstance(one, CaptionFailure)]
    journal.add(written)
    for request, failure in failed:
        journal.add_failure(request.sha256, request.prompt, failure.reason)
    progress.num_captions += len(written)
    progress.num_failed += len(failed)
    progress.num_tokens += sum(caption.num_tokens for *_, caption in written)
