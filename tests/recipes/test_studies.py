"""The studies of written captions: what is trained on, what filters keep, what is printed."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mlxmm.captioners.grammar_writer import GrammarWriter
from mlxmm.captioners.own_writer import OwnWriter
from mlxmm.data.sources.shapes import ShapesConfig
from tools.caption_study import (
    CaptionedScenes,
    clip_metrics,
    drawn_source,
    table,
    trained_captioner,
    trained_clip,
    true_pairs,
    write,
)
from tools.study_bootstrapping import MOVES, by_agreement, by_clip_score
from tools.study_filters import filter_metrics

ROOT = Path(__file__).parents[2]
SOURCE = drawn_source(ShapesConfig(max_objects=1, num_train=64, num_val=8, num_test=8), seed=0)
ROWS = SOURCE.rows["train"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A CLIP and a captioner after two updates, and the captioner's metrics."""
    folder = tmp_path_factory.mktemp("trained")
    train = CaptionedScenes(ROWS, true_pairs(ROWS, range(64)))
    clip = trained_clip(SOURCE, train, 2, 0, folder / "clip")
    return clip, *trained_captioner(SOURCE, train, folder / "clip", 2, 0, folder / "captioner")


@pytest.fixture
def written(tmp_path):
    return write(ROWS, range(10, 64), GrammarWriter(ROWS), tmp_path / "written")


def test_scenes_have_the_captions_and_moves_that_they_are_given():
    scenes = CaptionedScenes(ROWS, [(3, "one"), (5, "two")], MOVES)
    assert len(scenes) == 2 * 9 and [scenes[place]["captions"] for place in (8, 9)] == [["one"], ["two"]]
    assert np.array_equal(scenes[9]["image"], ROWS[5]["image"])  # the first of its copies is the picture as it is
    place = 9 + MOVES.index((2, -2))
    assert np.array_equal(np.asarray(scenes[place]["image"])[:-2, 2:], np.asarray(ROWS[5]["image"])[2:, :-2])


def test_only_the_scenes_asked_for_are_captioned(written):
    assert sorted(written.pairs) == true_pairs(ROWS, range(10, 64))


def test_training_and_writing_give_metrics_and_captions(trained, tmp_path):
    clip, captioner, metrics = trained
    assert metrics.keys() == {"exact_match", "exact_match_shuffled"}
    assert clip_metrics(clip, SOURCE, 0)["zero_shot_chance"] == pytest.approx(1 / 40)
    own = write(ROWS, range(4), OwnWriter(captioner, name="own", revision="0"), tmp_path / "own")
    expected = captioner.caption([ROWS[scene]["image"] for scene in range(4)])
    assert [text for _, text in sorted(own.pairs)] == expected


def test_of_the_same_captions_the_best_half_is_kept_by_agreement_and_then_by_clip_score(trained, written):
    clip = trained[0]
    agreement = [place % 3 for place in range(len(written.pairs))]
    scores = [verdict.scores["clip_score"] for verdict in written.judged(clip)]
    ranks = dict(zip(written.pairs, zip(agreement, scores)))
    kept = by_agreement(written, agreement, clip, 0.5)
    counts, all_counts = (Counter(text for _, text in pairs) for pairs in (kept, written.pairs))
    assert counts == {text: round(0.5 * count) for text, count in all_counts.items() if round(0.5 * count)}
    for text in counts:
        same = [pair for pair in written.pairs if pair[1] == text]
        dropped = [ranks[pair] for pair in same if pair not in kept]
        assert min(ranks[pair] for pair in same if pair in kept) >= max(dropped, default=(0, 0))
    assert len(by_clip_score(written, agreement, clip, 0.5)) == len(written.pairs) / 2


def test_a_filter_is_measured_beside_one_that_drops_as_many_at_random():
    is_lie, dropped = np.array([1, 1, 1, 0, 0, 0], dtype=bool), np.array([1, 1, 0, 1, 0, 0], dtype=bool)
    third = pytest.approx(2 / 3)
    expected = {"precision": third, "precision_chance": 0.5, "recall": third, "recall_chance": 0.5}
    assert filter_metrics(dropped, is_lie) == expected


def test_a_table_has_means_with_the_least_and_the_most():
    seeds = [{"few": {"n": 3, "x": 0.25}, "filter": {"y": 1.0}}, {"few": {"n": 3, "x": 0.75}, "filter": {"y": 1.0}}]
    rows = "|  | number | match |\n| --- | --- | --- |\n| few | 3 | 0.500 (0.250–0.750) |"
    assert table(seeds, {"n": "number", "x": "match"}) == rows


def run(study: str, *flags) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"tools.study_{study}", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=900)


def test_a_file_of_figures_is_never_overwritten(tmp_path):
    out = tmp_path / "out.json"
    out.write_text("mine")
    done = run("filters", "--out", out)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].endswith("name a new file, in a folder that exists")
    assert out.read_text() == "mine"
