"""Caption metrics: pure functions of strings, and CLIPScore of arrays.

An image has one hypothesis and a list of references, of any length. BLEU, ROUGE-L and CIDEr-D are in
percent, as papers print them (the published tools give fractions). B images, R references, E features.
"""

import functools
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

import mlx.core as mx

from mlxmm.errors import UserError

Texts = Sequence[str]
References = Sequence[Sequence[str]]

CONTRACTION = re.compile(r"(?<=\w)(n't|'(?:s|re|ve|ll|d|m))\b")  # does n't, dog 's
WORD = (
    r"(?:[^\W\d_]\.){2,}"  # u.s.
    r"|LETTER+(?:(?:[-/.'&]|(?<=\d)[,:](?=\d))LETTER+)*"  # t-shirt, o'clock, 1,000, 10:30
    r"|'(?:s|re|ve|ll|d|m)\b"
    r"|[$%#&@*+=]"
)
MARKS = (range(0x300, 0x1_F000), range(0xE_0100, 0xE_01F0))  # where Unicode has its combining marks
JOINERS = "\u200c\u200d"  # within words of Persian and Hindi
MAX_ORDER = 4  # of n-grams, in BLEU and CIDEr
CIDER_SIGMA = 6.0  # words by which lengths may differ (CIDEr, arXiv 1411.5726, section 8)
ROUGE_BETA = 1.2  # recall counts for more than precision, as in coco-caption
CLIP_SCORE_WEIGHT = 2.5
CLIP_SCORE_PROMPT = "A photo depicts "  # before hypotheses and references (CLIPScore, arXiv 2104.08718)


def words(text: str) -> list[str]:
    """The words of a caption, split as coco-caption does with Stanford's PTBTokenizer, which needs Java: lower-cased,
    "n't" and "'s" split off, punctuation dropped.

    The differences are: brackets (theirs become "-lrb-", ours are dropped), "cannot" and "gonna" (theirs are two
    words), "Mr." (theirs keeps its period), "'90s", "'n'" and "@home" (theirs keep the sign).
    """
    return _word_pattern().findall(CONTRACTION.sub(r" \1", composed(text.lower()).replace("’", "'")))


@functools.cache
def _word_pattern() -> re.Pattern:
    """`WORD`, whose letters may be combining marks, as vowels of Hindi and Thai are: Python's `\\w` leaves them out."""
    codes = (chr(code) for codes in MARKS for code in codes)
    marks = "".join(letter for letter in codes if unicodedata.category(letter) in ("Mn", "Mc"))
    return re.compile(WORD.replace("LETTER", f"[\\w{re.escape(marks)}{JOINERS}]"))


def composed(text: str) -> str:
    """The text with one code for a letter and its accent where there is one (Unicode's NFC)."""
    return unicodedata.normalize("NFC", text)


def exact_match(hypotheses: Texts, references: References) -> float:
    """The fraction of hypotheses that equal one of their references, however their accents are written."""
    _require_texts(hypotheses)
    pairs = zip(map(composed, hypotheses), references, strict=True)
    return sum(h in map(composed, refs) for h, refs in pairs) / len(hypotheses)


def _require_texts(hypotheses: Texts) -> None:
    if not len(hypotheses):
        raise UserError("there are no captions to measure")


def bleu(hypotheses: Texts, references: References) -> float:
    """Corpus BLEU-4 (sacrebleu, tokenizer 13a, which keeps capitals and punctuation)."""
    return _corpus_bleu(list(map(composed, hypotheses)), [list(map(composed, refs)) for refs in references])


def coco_bleu(hypotheses: Texts, references: References) -> dict[str, float]:
    """Corpus BLEU-1 to BLEU-4 over `words`, not smoothed: "bleu_1" to "bleu_4" (coco-caption's)."""
    hypotheses, references = _joined(hypotheses), list(map(_joined, references))
    settings = {"tokenize": "none", "smooth_method": "none", "force": True}
    orders = range(1, MAX_ORDER + 1)
    return {f"bleu_{n}": _corpus_bleu(hypotheses, references, max_ngram_order=n, **settings) for n in orders}


def _joined(texts: Texts) -> list[str]:
    return [" ".join(words(text)) for text in texts]


def _corpus_bleu(hypotheses: Texts, references: References, **settings) -> float:
    from sacrebleu.metrics import BLEU

    _require_texts(hypotheses)
    most = max(map(len, references))
    # sacrebleu wants the first references of all, then the second of all; None where there is none.
    columns = [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]
    return BLEU(**settings).corpus_score(list(hypotheses), columns).score


def rouge_l(hypotheses: Texts, references: References) -> float:
    """The mean ROUGE-L: best precision and best recall of the longest common subsequence over all references."""
    _require_texts(hypotheses)
    scores = [_rouge_l(words(h), list(map(words, refs))) for h, refs in zip(hypotheses, references, strict=True)]
    return 100 * sum(scores) / len(scores)


def _rouge_l(hypothesis: list[str], references: list[list[str]]) -> float:
    common = [_longest_common(hypothesis, reference) for reference in references]
    precision = max(common) / max(1, len(hypothesis))
    recall = max(n / max(1, len(reference)) for n, reference in zip(common, references))
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def _longest_common(a: list[str], b: list[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = row
        row = [0]
        for j, other in enumerate(b):
            row.append(before[j] + 1 if word == other else max(before[j + 1], row[j]))
    return row[-1]


def cider_d(hypotheses: Texts, references: References) -> float:
    """The mean CIDEr-D (arXiv 1411.5726, section 8): similarity of n-grams, weighted by their rarity.

    Rarity is counted in the references of all images given, so the value of a split is not the mean over its
    batches, and that of a single image is always 0.
    """
    _require_texts(hypotheses)
    scores = cider_d_scores(hypotheses, references)
    return sum(scores) / len(scores)


def cider_d_scores(hypotheses: Texts, references: References) -> list[float]:
    """CIDEr-D of each image."""
    generated = [_ngrams(words(text)) for text in hypotheses]
    wanted = [[_ngrams(words(text)) for text in refs] for refs in references]
    num_images = Counter(ngram for refs in wanted for ngram in set().union(*refs))  # whose references have it
    rarity = lambda ngram: math.log(len(wanted) / max(1, num_images[ngram]))
    return [
        1000 * sum(_cider_d(h, ref, rarity) for ref in refs) / len(refs)
        for h, refs in zip(generated, wanted, strict=True)
    ]


def _ngrams(tokens: list[str]) -> Counter:
    spans = ((i, i + n) for n in range(1, MAX_ORDER + 1) for i in range(len(tokens) - n + 1))
    return Counter(tuple(tokens[start:end]) for start, end in spans)


def _cider_d(hypothesis: Counter, reference: Counter, rarity) -> float:
    dots, squares, wanted = ([0.0] * MAX_ORDER for _ in range(3))
    for ngram, count in hypothesis.items():
        weight = rarity(ngram) ** 2
        squares[len(ngram) - 1] += count**2 * weight
        dots[len(ngram) - 1] += min(count, reference[ngram]) * reference[ngram] * weight
    for ngram, count in reference.items():
        wanted[len(ngram) - 1] += (count * rarity(ngram)) ** 2
    cosines = [dot / math.sqrt(a * b) if a * b else dot for dot, a, b in zip(dots, squares, wanted)]
    # The published tool takes the number of bigrams as the length; the difference in words is the same.
    difference = sum(n for gram, n in hypothesis.items() if len(gram) == 2)
    difference -= sum(n for gram, n in reference.items() if len(gram) == 2)
    return sum(cosines) / MAX_ORDER * math.exp(-(difference**2) / (2 * CIDER_SIGMA**2))


def distinct(hypotheses: Texts, n: int) -> float:
    """The fraction of all n-grams that are different from each other (arXiv 1510.03055, section 5.2)."""
    ngrams = [ngram for text in hypotheses for ngram in _ngrams(words(text)).elements() if len(ngram) == n]
    return len(set(ngrams)) / max(1, len(ngrams))


def perplexity(loss_sum: float, num_tokens: float) -> float:
    """Perplexity from the summed cross-entropy, in nats, of `num_tokens` tokens."""
    return math.exp(loss_sum / num_tokens)


def clip_score(images: mx.array, hypotheses: mx.array) -> mx.array:
    """CLIPScore (B,) of features (B, E) of images and of their hypotheses, encoded after CLIP_SCORE_PROMPT."""
    return CLIP_SCORE_WEIGHT * mx.maximum((_unit(images) * _unit(hypotheses)).sum(-1), 0)


def ref_clip_score(images: mx.array, hypotheses: mx.array, references: mx.array, present: mx.array) -> mx.array:
    """RefCLIPScore (B,): the harmonic mean of CLIPScore and of the best cosine with a reference.

    `references` are (B, R, E); `present` (B, R) is false for padding.
    """
    cosines = (_unit(references) * _unit(hypotheses)[:, None]).sum(-1)
    best = mx.maximum(mx.where(present, cosines, -1).max(-1), 0)
    score = clip_score(images, hypotheses)
    return 2 * score * best / mx.maximum(score + best, 1e-12)


def _unit(x: mx.array) -> mx.array:
    return x / mx.linalg.norm(x, axis=-1, keepdims=True)
