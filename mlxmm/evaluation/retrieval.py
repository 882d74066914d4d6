"""Zero-shot and retrieval metrics and their values by chance, as pure functions of scores.

Q queries, N candidates. In zero-shot classification one candidate is relevant; in retrieval several may be.
"""

from collections.abc import Sequence

import numpy as np

from mlxmm.errors import UserError

ROWS = 256  # queries ranked at a time, to bound memory


def best_ranks(scores: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """For each query, (Q,), the rank of its best relevant candidate: 1 plus the irrelevant candidates ranked before it.

    `scores` is (Q, N), higher is better; `relevant` (Q, N) booleans, at least one true in each row. Equal scores and
    NaN rank before the relevant candidate, so a network whose features are all equal gets no hits. Raises
    `ValueError` if a query has no relevant candidate.
    """
    if not relevant.any(1).all():
        raise ValueError("a query has no relevant candidate")
    ranks = np.empty(len(scores), dtype=np.int64)
    for start in range(0, len(scores), ROWS):
        rows, right = scores[start : start + ROWS], relevant[start : start + ROWS]
        best = np.where(right, rows, -np.inf).max(1, keepdims=True)
        ranks[start : start + ROWS] = 1 + (~(rows < best) & ~right).sum(1)
    return ranks


def recall(ranks: np.ndarray, k: int) -> float:
    """The fraction of queries with a relevant candidate among the first `k`; of classes, top-k accuracy."""
    return float((ranks <= k).mean())


def chance_recall(relevant: np.ndarray, k: int) -> float:
    """The expected `recall` of candidates in random order."""
    num_candidates, num_wrong = relevant.shape[1], (~relevant).sum(1)  # (Q,)
    k = min(k, num_candidates)
    log_factorial = np.concatenate([[0.0], np.log(np.arange(1, num_candidates + 1)).cumsum()])
    ways = (
        log_factorial[num_wrong] - log_factorial[np.maximum(num_wrong - k, 0)]
    )  # to draw k irrelevant candidates, in order
    missed = np.exp(ways - log_factorial[num_candidates] + log_factorial[num_candidates - k]) * (num_wrong >= k)
    return float((1 - missed).mean())


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
        metrics |= {f"{name}/median_rank": float(np.median(ranks)), f"{name}/median_rank_chance": _median(right)}
    return metrics


def _median(relevant: np.ndarray) -> float:
    """The rank that half of all queries reach by chance: the first k at which `chance_recall` is one half."""
    low, high = 1, relevant.shape[1]
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if chance_recall(relevant, middle) >= 0.5 else (middle + 1, high)
    return float(low)
