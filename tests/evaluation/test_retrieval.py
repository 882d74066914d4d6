"""Ranks, recall and chance against loops that are written out; the linear probe's sweep; callbacks that log them."""

import itertools
import json

import numpy as np
import pytest
from small_clip import pairs, small_clip

from callbacks import LinearProbe, RetrievalEvaluation, ZeroShotEvaluation
from mlxmm.data.sources.shapes import ShapesConfig, ShapesGrammar
from mlxmm.errors import UserError
from mlxmm.evaluation.clip_features import retrieve
from mlxmm.evaluation.linear_probe import best_exponent, linear_probe
from mlxmm.evaluation.retrieval import best_ranks, captions_of, chance_recall, class_labels, recall, retrieval, top_k
from mlxmm.training.loggers import JSONLLogger, TensorBoardLogger


def loop_ranks(scores, relevant):
    """For each query the ranks of its first relevant candidate in all orders of those of the same score."""
    ranks = []
    for row, right in zip(scores.tolist(), relevant.tolist()):
        best = max(score for score, is_right in zip(row, right) if is_right)
        before, equal = sum(score > best for score in row), [right[i] for i in range(len(row)) if row[i] == best]
        ranks.append([before + 1 + own[0] for own in itertools.combinations(range(len(equal)), sum(equal))])
    return ranks


@pytest.mark.parametrize("seed", range(8))
def test_ranks_and_recall_are_those_of_a_written_out_loop(seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 12, (300, 40)) / 4 if seed % 2 else rng.normal(size=(300, 40))  # with ties, without
    relevant = rng.random((300, 40)) < 0.08
    relevant[np.arange(300), rng.integers(0, 40, 300)] = True
    expected = loop_ranks(scores, relevant)
    ranks = best_ranks(scores, relevant)
    assert ranks.expected.tolist() == pytest.approx([np.mean(own) for own in expected])
    for k in (1, 5, 10):
        assert recall(ranks, k) == pytest.approx(np.mean([np.mean(np.array(own) <= k) for own in expected]))


def test_equal_scores_are_in_no_order():
    rng = np.random.default_rng(0)
    scores, relevant = rng.integers(0, 3, (40, 40)) / 2, np.eye(40, dtype=bool)
    order = rng.permutation(40)
    assert retrieval(scores, relevant) == pytest.approx(retrieval(scores[:, order], relevant[:, order]))
    shuffled = [recall(best_ranks(scores + rng.random((40, 40)) / 10, relevant), 5) for _ in range(400)]
    assert recall(best_ranks(scores, relevant), 5) == pytest.approx(np.mean(shuffled), abs=0.01)


def test_retrieval_counts_both_ways_with_many_texts_for_an_image():
    #                  texts of image 0  of 1   of 2
    scores = np.array([[0.9, 0.1, 0.0, 0.8], [0.8, 0.7, 0.6, 0.1], [0.3, 0.2, 0.1, 0.2]])
    texts, relevant = captions_of([["a", "b"], ["c"], ["d"]])
    metrics = retrieval(scores, relevant)
    assert texts == ["a", "b", "c", "d"]
    # Images find their best text at ranks 1, 3 and 2.5 (a tie); texts their image at 1, 2, 1, 2.
    assert metrics["image_to_text/recall_at_1"] == pytest.approx(1 / 3) and metrics["image_to_text/median_rank"] == 2.5
    assert metrics["text_to_image/recall_at_1"] == pytest.approx(2 / 4) and metrics["text_to_image/median_rank"] == 1.5
    assert metrics["image_to_text/recall_at_5"] == metrics["text_to_image/recall_at_5"] == 1
    assert metrics["image_to_text/recall_at_1_chance"] == pytest.approx((2 / 4 + 1 / 4 + 1 / 4) / 3)
    assert metrics["text_to_image/recall_at_1_chance"] == pytest.approx(1 / 3)


def test_a_caption_that_two_images_share_is_right_for_both():
    texts, relevant = captions_of([["a cat", "one cat"], ["a cat"]])
    assert texts == ["a cat", "one cat"] and relevant.tolist() == [[True, True], [True, False]]


def test_features_that_are_all_the_same_reach_chance_and_those_that_are_no_numbers_hit_nothing():
    relevant = np.eye(20, dtype=bool)
    same = retrieval(np.full((20, 20), 0.5), relevant)
    for way in ("image_to_text", "text_to_image"):
        for k in (1, 5, 10):
            assert same[f"{way}/recall_at_{k}"] == pytest.approx(k / 20) == same[f"{way}/recall_at_{k}_chance"]
    assert best_ranks(np.full((20, 20), np.nan), relevant).expected.tolist() == [20] * 20


def test_chance_is_what_all_orders_give_on_average():
    relevant = np.array([[True, False, False, False, False], [True, True, False, False, False]])
    for k in (1, 2, 3, 4, 5):
        hits = [
            [row[list(order[:k])].any() for row in relevant] for order in itertools.permutations(range(5))
        ]  # all 120
        assert chance_recall(relevant, k) == pytest.approx(np.mean(hits))
    assert chance_recall(np.eye(1_000, dtype=bool), 10) == pytest.approx(0.01)
    assert retrieval(np.eye(101), np.eye(101, dtype=bool))["text_to_image/median_rank_chance"] == 51


def test_top_k_is_the_share_of_labels_among_the_k_likeliest():
    scores = np.array([[3, 2, 1, 0, -1, -2, -3], [0, 1, 2, 3, 4, 5, 6]], dtype=np.float32)
    metrics = top_k(scores, class_labels("abcdefg", ["a", "b"]))
    assert metrics == {
        "top1": 0.5,
        "top1_chance": pytest.approx(1 / 7),
        "top5": 0.5,
        "top5_chance": pytest.approx(5 / 7),
    }


@pytest.mark.parametrize("peak", [-6, -3.375, 0.0, 2.5, 5.875, 6])
def test_the_sweep_finds_the_peak_to_an_eighth_of_a_decade_in_few_fits(peak):
    asked = []
    assert best_exponent(lambda e: asked.append(e) or -abs(e - peak)) == peak
    assert len(asked) == len(set(asked)) <= 15 and min(asked) >= -6 and max(asked) <= 6


def blobs(num, seed, spread=0.3):
    rng = np.random.default_rng(seed)
    labels = np.arange(num) % 3
    centres = np.array([[2, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0]])
    return centres[labels] + spread * rng.normal(size=(num, 4)), np.array(["red", "green", "blue"])[labels]


def test_a_linear_probe_separates_what_is_separable_and_not_noise():
    pytest.importorskip("sklearn")
    metrics = linear_probe(blobs(60, 0), blobs(30, 1), blobs(30, 2))
    assert metrics["accuracy"] == 1 and metrics["accuracy_chance"] == pytest.approx(1 / 3)
    assert 1e-6 <= metrics["C"] <= 1e6
    noise = [(np.random.default_rng(seed).normal(size=(60, 4)), blobs(60, 0)[1]) for seed in range(3)]
    assert linear_probe(*noise)["accuracy"] < 0.6


def test_the_probe_is_trained_on_validation_data_too_once_its_strength_is_known():
    pytest.importorskip("sklearn")
    (features, labels), test = blobs(60, 0), blobs(30, 2)
    known = labels != "blue"  # only validation pictures show blue
    train, val = (features[known], labels[known]), (features[~known], labels[~known])
    assert linear_probe(train, val, test)["accuracy"] == 1


def test_callbacks_log_retrieval_zero_shot_and_probe_to_tensorboard(make_trainer, tmp_path):
    pytest.importorskip("sklearn")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    grammar = ShapesGrammar(ShapesConfig(image_size=16), 0)
    rows = [grammar.rows(0)["val"][i] for i in range(12)]
    images, labels = [row["image"] for row in rows], ["cat", "dog"] * 6
    parts = [list(zip(images, labels))] * 3
    callbacks = [RetrievalEvaluation(rows), ZeroShotEvaluation(images, labels), LinearProbe(*parts)]
    trainer = make_trainer(
        max_steps=4,
        val_check_interval=2,
        callbacks=callbacks,
        logger=[TensorBoardLogger(tmp_path), JSONLLogger(tmp_path)],
    )
    clip = small_clip(patch_dropout=0.5)
    trainer.fit(clip, train_dataloaders=[pairs(8)] * 4, val_dataloaders=[pairs(8, 1)])
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    scalars = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    for tag in (
        "retrieval/image_to_text/recall_at_1",
        "retrieval/text_to_image/median_rank",
        "zero_shot/top1",
        "zero_shot/top5",
    ):
        assert scalars[tag] == [2, 4]
    assert scalars["linear_probe/accuracy"] == [4] and trainer.callback_metrics["zero_shot/top1_chance"] == 0.5
    last = retrieve(clip, rows)
    assert clip.training  # and judged as it is in evaluation: no patch was left out
    assert {name: trainer.callback_metrics[f"retrieval/{name}"] for name in last} == last
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert any("retrieval/image_to_text/recall_at_10" in line for line in lines)


def test_nothing_to_find_is_an_error():
    with pytest.raises(UserError, match="at least one image"):
        retrieve(small_clip(), [])
    with pytest.raises(ValueError, match="no relevant"):
        best_ranks(np.zeros((2, 3)), np.array([[True, False, False], [False] * 3]))


def test_rows_of_one_picture_are_retrieved_as_one_with_all_its_captions():
    clip, pictures = small_clip(), [scene["image"] for scene in scenes(6)]
    captions = [[f"thing {i}", f"object {i}"] for i in range(6)]
    as_lists = [{"image": image, "captions": own} for image, own in zip(pictures, captions)]
    as_rows = [{"image": row["image"].copy(), "captions": [text]} for row in as_lists for text in row["captions"]]
    assert retrieve(clip, as_rows) == retrieve(clip, as_lists)
    apart = as_rows[::2] + as_rows[1::2]  # a row for each caption, in another order
    assert retrieve(clip, apart) == pytest.approx(retrieve(clip, as_lists))


def scenes(number: int) -> list[dict]:
    rows = ShapesGrammar(ShapesConfig(), 0).rows(0)["train"]
    return [rows[i] for i in range(number)]
