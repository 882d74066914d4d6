"""Zero-shot and retrieval metrics and their values by chance, as pure functions of scores.

Q queries, N candidates. In zero-shot classification one candidate is relevant; in retrieval several may be.
"""

from collections.abc import Sequence

import attrs
import numpy as np

from mlxmm.errors import UserError

ROWS = 256  # queries ranked at a time, to bound memory


@attrs.frozen(eq=False)
class Ranks:
    """Where the best relevant candidate of each query stands, as counts (Q,).

    Candidates of equal score are in no order: recall and ranks are the means over all their orders. So features that
    are all equal reach what chance does, and the order in which rows are read changes nothing.
    """

    num_before: np.ndarray  # irrelevant candidates of higher scores
    num_tied: np.ndarray  # irrelevant ones of the same score
    num_relevant: np.ndarray  # relevant ones of that score, 1 at least

    @property
    def expected(self) -> np.ndarray:
        """(Q,) floats: 1 plus the irrelevant candidates before the first relevant one."""
        return 1 + self.num_before + self.num_tied / (self.num_relevant + 1)


def best_ranks(scores: np.ndarray, relevant: np.ndarray) -> Ranks:
    """The ranks of queries whose candidates have `scores`, (Q, N), higher is better; `relevant` is (Q, N) booleans.

    NaN ranks before the relevant candidate. Raises `ValueError` if a query has no relevant candidate.
    """
    if not relevant.any(1).all():
        raise ValueError("a query has no relevant candidate")
    counts = np.empty((3, len(scores)), dtype=np.int64)
    for start in range(0, len(scores), ROWS):
        rows, right = scores[start : start + ROWS], relevant[start : start + ROWS]
        best = np.where(right, rows, -np.inf).max(1, keepdims=True)
        equal = rows == best
        kinds = (~(rows <= best) & ~right, equal & ~right, equal & right)
        counts[:, start : start + ROWS] = [kind.sum(1) for kind in kinds]
    before, tied, own = counts
    return Ranks(before, tied, np.maximum(own, 1))


def recall(ranks: Ranks, k: int) -> float:
    """The fraction of queries with a relevant candidate among the first `k`; of classes, top-k accuracy."""
    num_wrong, num_equal = ranks.num_tied, ranks.num_tied + ranks.num_relevant  # (Q,)
    places = np.clip(k - ranks.num_before, 0, num_equal)  # that candidates of the best score fill
    log_factorial = np.concatenate([[0.0], np.log(np.arange(1, num_equal.max() + 1)).cumsum()])
    ways = log_factorial[num_wrong] - log_factorial[np.maximum(num_wrong - places, 0)]  # to fill them with wrong ones
    missed = np.exp(ways - log_factorial[num_equal] + log_factorial[num_equal - places]) * (num_wrong >= places)
    return float((1 - missed).mean())


def chance_recall(relevant: np.ndarray, k: int) -> float:
    """The expected `recall` of candidates in random order."""
    num_relevant = relevant.sum(1)
    return recall(Ranks(np.zeros_like(num_relevant), relevant.shape[1] - num_relevant, num_relevant), k)


def class_labels(names: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """(Q, N) booleans: which of the class `names` is each query's label. Raises `UserError` for one that is none."""
    places = {name: place for place, name in enumerate(names)}
    if unknown := sorted({str(label) for label in labels if label not in places}):
        raise UserError(f"{unknown[0]!r} is none of the {len(names)} classes; {len(unknown)} labels are not")
    return np.arange(len(names)) == np.array([places[label] for label in labels])[:, None]


def confusion(scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """(N, N) counts of Q queries: rows are their class, columns the class of their highest score."""
    counts = np.zeros((relevant.shape[1],) * 2, dtype=np.int64)
    np.add.at(counts, (relevant.argmax(1), scores.argmax(1)), 1)
    return counts


def top_k(scores: np.ndarray, relevant: np.ndarray) -> dict[str, float]:
    """Accuracy by the first and the first five of N classes: "top1", "top5", and chance for each."""
    ranks = best_ranks(scores, relevant)
    metrics = {}
    for k in (1, 5):
        metrics |= {f"top{k}": recall(ranks, k), f"top{k}_chance": chance_recall(relevant, k)}
    return metrics


def captions_of(captions: Sequence[Sequence[str]]) -> tuple[list[str], np.ndarray]:
    """The T distinct captions of all images, and booleans (images, T): which captions belong to which image.

    A caption that two images share is relevant to both.
    """
    texts = list(dict.fromkeys(text for of_image in captions for text in of_image))
    places = {text: place for place, text in enumerate(texts)}
    relevant = np.zeros((len(captions), len(texts)), dtype=bool)
    for image, of_image in enumerate(captions):
        relevant[image, [places[text] for text in of_image]] = True
    return texts, relevant


def retrieval(scores: np.ndarray, relevant: np.ndarray) -> dict[str, float]:
    """Recall at 1, 5 and 10 and median rank, of texts by image and of images by text, and chance for each.

    `scores` and `relevant` are (images, texts). A hit is any text of the image, or any image of the text.
    """
    metrics = {}
    for name, found, right in (("image_to_text", scores, relevant), ("text_to_image", scores.T, relevant.T)):
        ranks = best_ranks(found, right)
        for k in (1, 5, 10):
            metrics |= {
                f"{name}/recall_at_{k}": recall(ranks, k),
                f"{name}/recall_at_{k}_chance": chance_recall(right, k),
            }
        metrics |= {
            f"{name}/median_rank": float(np.median(ranks.expected)),
            f"{name}/median_rank_chance": _median(right),
        }
    return metrics


def _median(relevant: np.ndarray) -> float:
    """The rank that half of all queries reach by chance: the first k at which `chance_recall` is one half."""
    low, high = 1, relevant.shape[1]
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if chance_recall(relevant, middle) >= 0.5 else (middle + 1, high)
    return float(low)
