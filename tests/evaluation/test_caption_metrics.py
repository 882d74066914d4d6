"""Caption metrics against values worked out by hand, the published tools, and a reference written another way."""

import itertools
import json
import math
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxmm.errors import UserError
from mlxmm.evaluation import caption_metrics

# Made by tools/make_caption_metrics.py with pycocoevalcap 1.2 and Stanford's tokenizer.
PUBLISHED = json.loads((Path(__file__).parents[1] / "fixtures" / "caption_metrics.json").read_text())
SAID, WANTED, SCORES = PUBLISHED["hypotheses"], PUBLISHED["references"], PUBLISHED["scores"]


def test_words_are_those_of_the_published_tokenizer_but_for_the_differences_that_are_named():
    captions = [*SAID, *itertools.chain(*WANTED), *PUBLISHED["odd"]["texts"]]
    theirs = PUBLISHED["tokens"]
    tokens = [*theirs["hypotheses"], *itertools.chain(*theirs["references"]), *PUBLISHED["odd"]["tokens"]]
    different = {text for text, split in zip(captions, tokens) if caption_metrics.words(text) != split.split()}
    assert different == {
        "a man (left) and a dog",
        "rock 'n' roll",
        "cannot and gonna",
        "#1 fan @home",
        "Mr. Smith's car.",
        "the '90s",
    }


def test_scores_are_those_of_the_published_tools():
    assert caption_metrics.rouge_l(SAID, WANTED) == pytest.approx(100 * SCORES["rouge_l"], abs=1e-9)
    assert caption_metrics.cider_d(SAID, WANTED) == pytest.approx(100 * SCORES["cider_d"], abs=1e-9)
    assert caption_metrics.cider_d_scores(SAID, WANTED) == pytest.approx(
        [100 * s for s in SCORES["cider_d_each"]], abs=1e-9
    )
    assert list(caption_metrics.coco_bleu(SAID, WANTED).values()) == pytest.approx(
        [100 * s for s in SCORES["bleu"]], abs=1e-6
    )


def test_bleu_by_hand():
    # 3 of 4 words, 1 of 3 pairs; as long as the reference, so nothing is taken off.
    scores = caption_metrics.coco_bleu(["a red dog runs"], [["a red cat runs", "one bird flies over there"]])
    assert scores["bleu_1"] == pytest.approx(75) and scores["bleu_2"] == pytest.approx(100 * math.sqrt(3 / 4 / 3))
    assert scores["bleu_3"] == scores["bleu_4"] == 0
    short = caption_metrics.coco_bleu(["a red"], [["a red dog runs"]])
    assert short["bleu_1"] == pytest.approx(100 * math.exp(1 - 4 / 2))


def test_five_references_are_one_picture_and_not_five():
    five = [["a dog", "one dog", "a brown dog", "the dog", "dog"]]
    assert caption_metrics.coco_bleu(["one dog"], five)["bleu_2"] == pytest.approx(100)
    assert caption_metrics.coco_bleu(["one dog"] * 5, [[r] for r in five[0]])["bleu_2"] < 60  # as five rows it would be
    assert caption_metrics.exact_match(["one dog"], five) == 1


def test_rouge_by_hand():
    # "a b d" is common: precision 3/4, recall 3/3 of the second; the best of each, whichever reference it is from.
    precision, recall = 3 / 4, 1.0
    expected = (1 + 1.44) * precision * recall / (recall + 1.44 * precision)
    assert caption_metrics.rouge_l(["a b c d"], [["d c b a x y", "a b d"]]) == pytest.approx(100 * expected)
    assert caption_metrics.rouge_l(["x"], [["a b"]]) == caption_metrics.rouge_l([""], [["a b"]]) == 0


def test_cider_by_hand():
    # Two pictures. Every word is in one of them alone, so each counts ln 2, and the same text has cosine 1 in the
    # orders that it has n-grams of: of 4 orders, "a b" has 2, "c d e" has 3.
    assert caption_metrics.cider_d_scores(["a b", "c d e"], [["a b"], ["c d e"]]) == pytest.approx([500.0, 750.0])
    # One word too many: unigrams 2/(sqrt 3 sqrt 2), bigrams 1/(sqrt 2), and a length that differs by one.
    expected = 1000 * (2 / math.sqrt(6) + 1 / math.sqrt(2)) / 4 * math.exp(-1 / 72)
    assert caption_metrics.cider_d_scores(["a b x", "c"], [["a b"], ["c"]])[0] == pytest.approx(expected)
    assert caption_metrics.cider_d(["a b"], [["a b"]]) == 0  # a picture alone: nothing is rare


def count_vector(split, n, vocabulary, text):
    return np.array([split(text, n).count(g) for g in vocabulary], dtype=float)


def brute_force_cider(said, wanted):
    """CIDEr-D as vectors over every n-gram there is, from the paper's formulas."""
    split = lambda text, n: list(zip(*(caption_metrics.words(text)[i:] for i in range(n))))
    totals = np.zeros(len(said))
    for n in range(1, 5):
        vocabulary = sorted({g for text in [*said, *itertools.chain(*wanted)] for g in split(text, n)})
        counts = partial(count_vector, split, n, vocabulary)
        in_pictures = sum(np.clip(sum(counts(r) for r in refs), 0, 1) for refs in wanted)
        idf = np.log(len(wanted) / np.maximum(in_pictures, 1))
        for i, (text, refs) in enumerate(zip(said, wanted)):
            for ref in refs:
                a, b = counts(text) * idf, counts(ref) * idf
                lengths = np.linalg.norm(a) * np.linalg.norm(b)
                cosine = np.minimum(a, b) @ b / lengths if lengths else 0
                difference = max(len(caption_metrics.words(text)) - 1, 0) - max(len(caption_metrics.words(ref)) - 1, 0)
                totals[i] += 10 * cosine * math.exp(-(difference**2) / 72) / len(refs) / 4
    return 100 * totals


def test_cider_is_that_of_vectors_over_all_ngrams():
    rng = np.random.default_rng(0)
    text = lambda: " ".join(rng.choice(list("abcdefg"), size=rng.integers(1, 9)))
    said, wanted = [text() for _ in range(12)], [[text() for _ in range(rng.integers(1, 5))] for _ in range(12)]
    assert caption_metrics.cider_d_scores(said, wanted) == pytest.approx(brute_force_cider(said, wanted), abs=1e-9)


def test_distinct_ngrams_by_hand():
    assert caption_metrics.distinct(["a dog runs", "a dog"], 1) == 3 / 5  # a, dog, runs of five words
    assert caption_metrics.distinct(["a dog runs", "a dog"], 2) == 2 / 3
    assert caption_metrics.distinct(["dog"], 2) == 0


def test_perplexity_of_a_fair_die_is_six():
    assert caption_metrics.perplexity(10 * math.log(6), 10) == pytest.approx(6)


def test_clip_scores_by_hand():
    images = mx.array([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    said = mx.array([[3.0, 4.0], [0.0, 5.0], [-1.0, 0.0]])  # cosines .6, 1, -1
    assert caption_metrics.clip_score(images, said).tolist() == pytest.approx([1.5, 2.5, 0.0])
    references = mx.array([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 2.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]])
    present = mx.array([[True, False], [True, True], [True, True]])
    # .6 is left of the first's, 1 of the second's; the third's best cosine is 0.
    expected = [2 * 1.5 * 0.6 / 2.1, 2 * 2.5 / 3.5, 0.0]
    assert caption_metrics.ref_clip_score(images, said, references, present).tolist() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("cafe\u0301 noir", ["café", "noir"]),
        ("كِتَابٌ كبير", ["كِتَابٌ", "كبير"]),
        ("ที่นี่ มีแมว", ["ที่นี่", "มีแมว"]),
        ("می\u200cخواهم", ["می\u200cخواهم"]),
        ("İstanbul", ["i̇stanbul"]),
    ],
)
def test_a_word_keeps_its_combining_marks_in_every_script(text, expected):
    assert caption_metrics.words(text) == expected


METRICS = [caption_metrics.exact_match, caption_metrics.bleu, caption_metrics.rouge_l, caption_metrics.cider_d]


@pytest.mark.parametrize("metric", [*METRICS, lambda *texts: caption_metrics.coco_bleu(*texts)["bleu_2"]])
def test_accents_in_one_code_or_in_two_measure_the_same(metric):
    import unicodedata

    captions = ["un café à la crème est là", "une forêt où des élèves vont"]
    references = [["un café à la crème est là"], ["des élèves vont où ils sont"]]
    apart = [unicodedata.normalize("NFD", caption) for caption in captions]
    references_apart = [[unicodedata.normalize("NFD", text) for text in texts] for texts in references]
    wanted = metric(captions, references)
    assert wanted > 0
    assert metric(apart, references) == metric(captions, references_apart) == pytest.approx(wanted)


@pytest.mark.parametrize("metric", METRICS)
def test_no_captions_are_one_line(metric):
    with pytest.raises(UserError, match="there are no captions to measure"):
        metric([], [])
