"""EpochMeans: the means of an epoch's training metrics, gathered without a wait for the device in each update."""

from collections import Counter
from collections.abc import Mapping

import mlx.core as mx

PENDING = 64  # updates whose metrics are read at once


class EpochMeans:
    """Adds up the metrics of updates, as float64 and in their order: a resumed run has the same means to the bit."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: Counter[str] = Counter()
        self._pending: list[Mapping[str, mx.array]] = []

    def add(self, metrics: Mapping[str, mx.array]) -> None:
        """Count the metrics of an update, scalar arrays. Many updates are read at once, so that none waits for it."""
        self._pending.append(dict(metrics))
        if len(self._pending) == PENDING:
            self._read()

    def means(self) -> dict[str, float]:
        """The mean of each metric over the updates that had it."""
        self._read()
        return {name: total / self._counts[name] for name, total in self._sums.items()}

    def _read(self) -> None:
        for metrics in self._pending:
            for name, value in metrics.items():
                self._sums[name] = self._sums.get(name, 0.0) + float(value)
                self._counts[name] += 1
        self._pending = []

    def state_dict(self) -> dict:
        """Sums and counts as JSON values."""
        self._read()
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping) -> None:
        """Take back what `state_dict` gave; nothing is the beginning of an epoch."""
        self._sums, self._counts = dict(state.get("sums", {})), Counter(state.get("counts", {}))
        self._pending = []
