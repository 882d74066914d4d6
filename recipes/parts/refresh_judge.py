"""What becomes of each refresh: its captions are filtered, measured, and pushed if asked."""

import contextlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs
import numpy as np
from PIL import Image

from mlxmm.captioners.caption_writer import CaptionWriter
from mlxmm.captioners.filters import Verdict, clip_scores
from mlxmm.captioners.refresh import Judged, WrittenVersion
from mlxmm.captioners.refresh_folder import COMPLETE
from mlxmm.data.caption_source import CaptionSource
from mlxmm.distributed import collectives
from mlxmm.modules.contrastive_clip import ContrastiveCLIP
from mlxmm.preprocessing.images import UndecodableImage
from mlxmm.storage.atomic import write_json
from mlxmm.storage.dataset_push import push_dataset
from mlxmm.terminal import say

from .captioners import provenance
from .publishing import Captions, Origin, judge, write_folder
from .refresh_config import RefreshConfig

DATASET, PUSHED = "dataset", "pushed.json"


@attrs.define
class RefreshJudge:
    """Filters the captions of a version, and writes the data set that is pushed, if one is."""

    config: RefreshConfig
    origin: str  # of the pictures
    source: CaptionSource
    writer: CaptionWriter | None
    _clip: ContrastiveCLIP | None = attrs.field(default=None, init=False)

    @property
    def in_process(self) -> bool:
        """Whether it computes with MLX, which belongs to the thread that trains."""
        return self.config.filters.clip is not None

    def __call__(self, written: WrittenVersion) -> Judged:
        by = provenance(self.writer, written.sampling)
        captions = Captions(written.entries, written.pictures, written.places, by)
        verdicts, counts = judge(self.config, captions, self._model(), self._evaluation_images())
        if self.config.push_to and counts["kept"]:
            name = f"{self.config.config_name}-{written.version}"
            named = attrs.evolve(self.config, config_name=name)
            write_folder(named, captions, Origin(self.origin, "train"), verdicts, counts, written.folder / DATASET)
        kept: dict[str, list[str]] = {}
        for entry, verdict in zip(written.entries, verdicts, strict=True):
            if verdict.kept:
                kept.setdefault(entry.image, []).append(verdict.text)
        return Judged(kept, self._metrics(written, verdicts, counts))

    def _metrics(self, written: WrittenVersion, verdicts: list[Verdict], counts: dict[str, int]) -> dict[str, float]:
        metrics = {"made": counts["captions"], "kept": counts["kept"]}
        metrics |= {f"dropped_{name}": n for name, n in counts.items() if name not in ("captions", "kept", "stripped")}
        return metrics | self._mean_scores(written, verdicts)

    def _mean_scores(self, written: WrittenVersion, verdicts: list[Verdict]) -> dict[str, float]:
        """The mean CLIPScore of the new captions that are kept, and of those that their pictures have now."""
        kept = [pair for pair in zip(written.entries, verdicts) if pair[1].kept and "clip_score" in pair[1].scores]
        if not kept:
            return {}
        scores = {"clip_score_after": float(np.mean([verdict.scores["clip_score"] for _, verdict in kept]))}
        old = {entry.image: text for entry, _ in kept if (text := written.caption_now(entry.image))}
        if old:
            images = lambda sha256: written.pictures[written.places[sha256]]
            parts = self._model(), images, list(old), list(old.values()), self.config.filters.clip_prompt
            scores["clip_score_before"] = float(clip_scores(*parts).mean())
        return scores

    def _model(self) -> ContrastiveCLIP | None:
        if self._clip is None and self.config.filters.clip is not None:
            self._clip = ContrastiveCLIP.from_pretrained(self.config.filters.clip)
        return self._clip

    def _evaluation_images(self) -> Iterable[Image.Image]:
        if self.config.filters.min_hash_distance is None:
            return
        for split, rows in self.source.rows.items():
            for place in range(len(rows)) if split != "train" else ():
                with contextlib.suppress(UndecodableImage):
                    yield rows[place]["image"]


@attrs.define
class RefreshPusher:
    """Pushes the data sets of complete versions, one after the other, in a thread; a failure is printed."""

    config: RefreshConfig
    folder: Path
    _pool: ThreadPoolExecutor = attrs.field(factory=lambda: ThreadPoolExecutor(1), init=False)

    def __call__(self) -> None:
        """Push what is not pushed yet; rank 0 does."""
        if self.config.push_to and collectives.rank() == 0:
            self._pool.submit(self._push_all)

    def close(self) -> None:
        """Wait until nothing is left to push."""
        self._pool.shutdown()

    def _push_all(self) -> None:
        for complete in sorted(self.folder.glob(f"version-*/{COMPLETE}")):
            version = complete.parent
            if (version / DATASET).exists() and not (version / PUSHED).exists():
                self._push(version)

    def _push(self, version: Path) -> None:
        name = f"{self.config.config_name}-{version.name.removeprefix('version-')}"
        try:
            url = push_dataset(version / DATASET, self.config.push_to, name, public=self.config.public)
            write_json(version / PUSHED, {"url": url})
            say(f"pushed: {url}")
        except Exception as error:  # training goes on; the next refresh, or a resumed run, tries again
            say(f"{name} was not pushed, training goes on: {error}")
