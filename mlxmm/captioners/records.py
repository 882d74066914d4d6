"""From a journal's entries, by filters, to the records of a data set."""

from collections.abc import Sequence

import attrs

from mlxmm.captioners.caption_writer import Sampling
from mlxmm.captioners.filters import Candidate, Verdict
from mlxmm.captioners.journal import Entry
from mlxmm.config import to_json
from mlxmm.export.dataset import CaptionRecord


@attrs.frozen(kw_only=True)
class Provenance:
    """Who wrote the captions of a journal, and how."""

    captioner: str
    captioner_revision: str
    quantization: str | None = None
    sampling: Sampling


def candidates(entries: Sequence[Entry]) -> list[Candidate]:
    """What filters judge of each entry; captions that failed have no text, and count as failed."""
    return [Candidate(image=e.image, prompt=e.prompt, text=e.text, finish_reason=e.finish_reason) for e in entries]


def caption_records(
    entries: Sequence[Entry], verdicts: Sequence[Verdict], provenance: Provenance
) -> dict[str, list[CaptionRecord]]:
    """The records of all entries, dropped ones included, by the SHA-256 of their picture."""
    records: dict[str, list[CaptionRecord]] = {}
    for entry, verdict in zip(entries, verdicts, strict=True):
        records.setdefault(entry.image, []).append(_record(entry, verdict, provenance))
    return records


def _record(entry: Entry, verdict: Verdict, provenance: Provenance) -> CaptionRecord:
    return CaptionRecord(
        text=verdict.text,
        prompt=entry.prompt,
        captioner=provenance.captioner,
        captioner_revision=provenance.captioner_revision,
        quantization=provenance.quantization,
        sampling=to_json(provenance.sampling),
        num_tokens=entry.num_tokens,
        finish_reason=entry.finish_reason,
        clip_score=verdict.scores.get("clip_score"),
        stripped=verdict.stripped,
        created_at=entry.seconds,
        flags={"failed": entry.reason} if entry.reason else verdict.flags,
    )
