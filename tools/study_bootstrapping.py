"""Whether a captioner that learned from few captions improves on captions of its own (BLIP, arXiv 2201.12086, 3.3).

    python -m tools.study_bootstrapping
    python -m tools.study_bootstrapping --quick
    python -m tools.study_bootstrapping --out bootstrapping.json

A CLIP, and a captioner over its vision tower, are trained on few captioned scenes ("few captions"). The captioner
writes captions of scenes that have none. A CLIP and a captioner with fresh weights are trained on the few captions and
on those that pass a filter, half of each; that is a round, and there are two. The exact match is measured on held-out
scenes. Every training sees each picture moved by two pixels in all directions too.

The filters are: none; CLIPScore, which keeps the best of all captions; agreement, which keeps of the pictures with the
same caption the best, by how many of their moved copies get that caption again, and then by CLIPScore. The CLIP of a
filter is the one that was trained with the writer. The controls: as many updates on the few captions alone, and true
captions of all scenes.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import attrs

from mlxmm.captioners.own_writer import OwnWriter
from mlxmm.data.caption_source import CaptionSource
from mlxmm.data.sources.shapes import ShapesConfig
from mlxmm.modules.caption_decoder import CaptionDecoder
from mlxmm.modules.contrastive_clip import ContrastiveCLIP
from tools.caption_study import (
    CaptionedScenes,
    Metrics,
    Pairs,
    Study,
    Written,
    drawn_source,
    run_command,
    say,
    trained_captioner,
    trained_clip,
    true_pairs,
    write,
)

MOVES = sorted(product((-2, 0, 2), repeat=2), key=lambda move: move != (0, 0))  # the picture as it is comes first
KEPT = (0.5, 0.7)  # of the captions, in each round
TEXT_FILTERS = {"min_words": 4, "drop_cut_off": True}  # no true caption is shorter


@attrs.frozen(kw_only=True)
class Sizes:
    """Scenes and updates. A scene shows one object."""

    num_few: int = 100  # scenes with true captions
    num_unlabelled: int = 1_900
    num_test: int = 512
    first_updates: tuple[int, int] = (150, 200)  # of the CLIP and of the captioner, on few captions
    updates: tuple[int, int] = (300, 300)  # in each round


QUICK = Sizes(num_unlabelled=700, num_test=256, updates=(200, 200))
COLUMNS = {
    "num_captions": "captions written and kept",
    "right": "right",
    "exact_match": "exact match",
    "exact_match_shuffled": "of other pictures",
}
Models = tuple[ContrastiveCLIP, CaptionDecoder]


@attrs.frozen
class Bench:
    """The scenes of one seed, and what is trained on them."""

    sizes: Sizes
    seed: int
    folder: Path
    source: CaptionSource
    few: Pairs
    rest: Pairs  # the other scenes, with true captions: to count with, and for the upper bound

    @classmethod
    def of(cls, sizes: Sizes, seed: int, folder: Path) -> "Bench":
        num_train = sizes.num_few + sizes.num_unlabelled
        shapes = ShapesConfig(max_objects=1, num_train=num_train, num_val=64, num_test=sizes.num_test)
        source = drawn_source(shapes, seed)
        pairs = true_pairs(source.rows["train"], range(num_train))
        return cls(sizes, seed, folder, source, pairs[: sizes.num_few], pairs[sizes.num_few :])

    def trained(self, name: str, new: Pairs, updates: Sequence[int]) -> tuple[Models, Metrics]:
        """Models trained on the few captions and on `new`, half of each, with their metrics."""
        say(f"seed {self.seed}: {name}")
        pairs = self.few * max(1, round(len(new) / len(self.few))) + new
        train, folder = CaptionedScenes(self.source.rows["train"], pairs, MOVES), self.folder / name
        clip = trained_clip(self.source, train, updates[0], self.seed, folder / "clip")
        captioner, metrics = trained_captioner(
            self.source, train, folder / "clip", updates[1], self.seed, folder / "captioner"
        )
        share = {"num_captions": len(new), "right": len({*new} & {*self.rest}) / len(new)} if new else {}
        return (clip, captioner), metrics | share

    def written(self, captioner: CaptionDecoder, name: str) -> tuple[Written, list[int]]:
        """The captions of scenes that have none, and of how many moved copies of each the caption is the same."""
        rows, writer = self.source.rows["train"], OwnWriter(captioner, name=name, revision="trained")
        plain = write(rows, (scene for scene, _ in self.rest), writer, self.folder / name / "plain")
        moved = CaptionedScenes(rows, plain.pairs, MOVES[1:])
        copies = write(moved, range(len(moved)), writer, self.folder / name / "moved")
        same = Counter(
            place // len(moved.moves)
            for place, text in copies.pairs
            if text == plain.pairs[place // len(moved.moves)][1]
        )
        return plain, [same[place] for place in range(len(plain.pairs))]


# ---- filters: of what was written, the fraction to train on


def unfiltered(written: Written, agreement: list[int], clip: ContrastiveCLIP, fraction: float) -> Pairs:
    """All captions."""
    return [pair for pair in written.pairs if pair[1]]


def by_clip_score(written: Written, agreement: list[int], clip: ContrastiveCLIP, fraction: float) -> Pairs:
    """The best of all captions by CLIPScore."""
    verdicts = written.judged(clip, keep_fraction=fraction, **TEXT_FILTERS)
    return [pair for pair, verdict in zip(written.pairs, verdicts) if verdict.kept]


def by_agreement(written: Written, agreement: list[int], clip: ContrastiveCLIP, fraction: float) -> Pairs:
    """Of the pictures with the same caption the best: captions that come easily do not crowd out the others."""
    verdicts = written.judged(clip, **TEXT_FILTERS)
    places = [place for place, verdict in enumerate(verdicts) if verdict.kept]
    places.sort(key=lambda place: (agreement[place], verdicts[place].scores["clip_score"]), reverse=True)
    same: dict[str, Pairs] = {}
    for place in places:
        same.setdefault(written.pairs[place][1], []).append(written.pairs[place])
    return [pair for pairs in same.values() for pair in pairs[: round(fraction * len(pairs))]]


FILTERS = {"unfiltered": unfiltered, "by CLIPScore": by_clip_score, "by agreement": by_agreement}


def study(sizes: Sizes, seed: int, folder: Path) -> dict[str, Metrics]:
    """The metrics of each arm."""
    bench = Bench.of(sizes, seed, folder)
    first, metrics = bench.trained("few captions", [], sizes.first_updates)
    arms = {"few captions": metrics}
    for number in range(1, len(KEPT) + 1):
        name = f"few captions, updates of {number} more round{'s' * (number > 1)}"
        updates = [few + number * more for few, more in zip(sizes.first_updates, sizes.updates)]
        arms[name] = bench.trained(name, [], updates)[1]
    for name, keep in FILTERS.items():
        models = first
        for number, fraction in enumerate(KEPT, 1):
            arm = f"{name}, round {number}"
            new = keep(*bench.written(models[1], arm), models[0], fraction)
            models, arms[arm] = bench.trained(arm, new, sizes.updates)
    arms["true captions"] = bench.trained("true captions", bench.rest, sizes.updates)[1]
    return arms


if __name__ == "__main__":
    run_command(Study(study, Sizes(), QUICK, (COLUMNS,)), __doc__)
