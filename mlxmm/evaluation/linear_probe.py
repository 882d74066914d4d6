"""Linear probes: how well a linear classifier does on features, by the CLIP paper's protocol (appendix A.3).

N examples, D features. Needs scikit-learn: `pip install mlxmm[probe]`.
"""

import warnings
from collections.abc import Callable

import numpy as np

from mlxmm.errors import UserError

MAX_ITERATIONS = 1_000
MAX_EXPONENT = 6  # strengths from 1e-6 to 1e6
MIN_STEP = 1 / 8  # of a decade

Labelled = tuple[np.ndarray, np.ndarray]  # features (N, D) and labels (N,), strings or integers


def linear_probe(train: Labelled, val: Labelled, test: Labelled) -> dict[str, float]:
    """Accuracy on `test` of logistic regression by L-BFGS, trained on `train` and `val`, and chance for it.

    "C", the inverse of the regularisation, is the one that does best on `val` after training on `train`.
    """
    exponent = best_exponent(lambda exponent: accuracy(fit(train, 10**exponent), val))
    both = tuple(np.concatenate(parts) for parts in zip(train, val))
    commonest = np.unique(test[1], return_counts=True)[1].max() / len(test[1])
    score = accuracy(fit(both, 10**exponent), test)
    return {"accuracy": score, "accuracy_chance": float(commonest), "C": 10**exponent}


def best_exponent(score: Callable[[float], float]) -> float:
    """The exponent in [-6, 6] with the highest `score`; of equal ones the lowest.

    Every second integer is tried, then the neighbours of the best at steps of 1, 1/2, 1/4 and 1/8.
    """
    scores = {float(exponent): score(exponent) for exponent in range(-MAX_EXPONENT, MAX_EXPONENT + 1, 2)}
    best = lambda: max(scores, key=lambda exponent: (scores[exponent], -exponent))
    step = 1.0
    while step >= MIN_STEP:
        for exponent in (best() - step, best() + step):
            if abs(exponent) <= MAX_EXPONENT and exponent not in scores:
                scores[exponent] = score(exponent)
        step /= 2
    return best()


def fit(train: Labelled, C: float):
    """A `sklearn.linear_model.LogisticRegression` of `train`."""
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise UserError("linear probes need scikit-learn: pip install 'mlxmm[probe]'") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the protocol limits the iterations
        return LogisticRegression(C=C, max_iter=MAX_ITERATIONS, random_state=0).fit(*train)


def accuracy(classifier, examples: Labelled) -> float:
    """The fraction of examples that `classifier` labels correctly."""
    features, labels = examples
    return float((classifier.predict(features) == labels).mean())
