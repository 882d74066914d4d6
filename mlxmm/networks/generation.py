"""Decoding from any network with a cache: greedy, sampled, or by beam search.

B sequences, K beams, L positions, D features, V vocabulary.
"""

from collections.abc import Iterator
from typing import Protocol

import attrs
import mlx.core as mx
import numpy as np
from attrs.validators import ge, gt, le, lt, optional
from mlx.utils import tree_map

from mlxmm.config import option
from mlxmm.errors import UserError
from mlxmm.networks.language_model import keep_likeliest


class DecoderInterface(Protocol):
    """What decoding needs of a network: three functions."""

    def make_cache(self) -> list:
        """An empty memory of the positions behind. The `state` of each entry can be read and set: a tree of
        arrays whose first axis is that of the sequences (beam search takes rows of it), and of numbers."""

    def embed(self, tokens: mx.array) -> mx.array:
        """(B, L) tokens to (B, L, D)."""

    def logits(self, embeddings: mx.array, cache: list) -> mx.array:
        """(B, L, D) of new positions, which join `cache`, to what follows the last of them: (B, V)."""


@attrs.frozen(kw_only=True)
class GenerationConfig:
    """How to choose tokens, under transformers' names and in its order: penalty, temperature, top-k, top-p."""

    max_new_tokens: int | None = option(
        None, "longest continuation with its end, in tokens; none: as in training", optional(ge(1))
    )
    num_beams: int = option(1, "continuations that beam search keeps; 1: no beam search", ge(1))
    temperature: float = option(0.0, "0: the likeliest token; above: draw, from logits divided by it", ge(0))
    top_k: int = option(0, "draw from this many of the likeliest tokens; 0: from all", ge(0))
    top_p: float = option(1.0, "draw from the fewest tokens that have this probability together", gt(0), le(1))
    repetition_penalty: float = option(1.0, "what makes tokens less likely that were generated before", gt(0))
    length_penalty: float = option(1.0, "beams compare log-probability / tokens ** this; above 0: longer ones")
    seed: int = option(0, "of all that is drawn", ge(0), lt(2**32))

    def __attrs_post_init__(self):
        if self.num_beams > 1 and self.temperature > 0:
            raise UserError("num_beams > 1 draws nothing: leave temperature at 0, or num_beams at 1")
        if (self.top_k > 0 or self.top_p < 1) and self.temperature == 0:
            raise UserError("top_k and top_p say what to draw from: set temperature above 0, 1.0 for example")


def sequence_keys(seed: int, start: int, stop: int) -> mx.array:
    """Random keys (stop - start, 2) of the sequences `start` to `stop`: each a function of (seed, its number)."""
    return mx.array([[seed, number] for number in range(start, stop)], dtype=mx.uint32)


def generate(
    network: DecoderInterface, prefix: mx.array, config: GenerationConfig, *, stop_id: int, keys: mx.array | None = None
) -> list[list[int]]:
    """Continue each (L, D) row of `prefix` (B, L, D) until `stop_id`, which is left out.

    Every prefix has the same length, so nothing is padded, and a batch gives what its rows give one by one: also
    when tokens are drawn, since each row has a key of its own in `keys` (B, 2), by default `sequence_keys`.
    """
    _require_length(config)
    if config.num_beams > 1:
        return beam_search(network, prefix, config, stop_id=stop_id)
    columns = list(_columns(network, prefix, config, stop_id, keys))
    return [_until(row, stop_id) for row in np.stack(columns, axis=1).tolist()]


def stream(
    network: DecoderInterface, prefix: mx.array, config: GenerationConfig, *, stop_id: int, keys: mx.array | None = None
) -> Iterator[int]:
    """The tokens that `generate` gives for a `prefix` (1, L, D), each as soon as it is chosen."""
    if config.num_beams > 1:
        raise UserError("beam search knows its first token only at its end: stream with num_beams=1")
    _require_length(config)
    for column in _columns(network, prefix, config, stop_id, keys):
        if column[0] != stop_id:
            yield int(column[0])


def _require_length(config: GenerationConfig) -> None:
    if config.max_new_tokens is None:
        raise UserError("a network alone does not know how long captions are: set max_new_tokens, to 32 for example")


def _columns(network, prefix, config, stop_id, keys) -> Iterator[np.ndarray]:
    """The next token of every row, (B,), until all have stopped; what a row has after its stop means nothing."""
    keys = sequence_keys(config.seed, 0, len(prefix)) if keys is None else keys
    cache, generated, running = network.make_cache(), None, np.ones(len(prefix), dtype=bool)
    logits = network.logits(prefix, cache)
    for length in range(1, config.max_new_tokens + 1):
        keys, drawn = mx.vmap(mx.random.split)(keys).swapaxes(0, 1)
        tokens = _choose(_penalised(logits, generated, config), config, drawn)
        column = np.array(tokens)
        yield column
        running &= column != stop_id
        if not running.any() or length == config.max_new_tokens:
            return
        generated = _with_tokens(generated, tokens, logits)
        logits = network.logits(network.embed(tokens[:, None]), cache)


def _choose(logits: mx.array, config: GenerationConfig, keys: mx.array) -> mx.array:
    if config.temperature == 0:
        return logits.argmax(-1)
    kept = keep_likeliest(logits.astype(mx.float32) / config.temperature, config.top_k, config.top_p)
    return mx.vmap(lambda row, key: mx.random.categorical(row, key=key))(kept, keys)


def _with_tokens(generated: mx.array | None, tokens: mx.array, logits: mx.array) -> mx.array:
    """Which of the vocabulary each row has had, (B, V): `generated` and `tokens` (B,)."""
    new = mx.arange(logits.shape[-1]) == tokens[:, None]
    return new if generated is None else generated | new


def _penalised(logits: mx.array, generated: mx.array | None, config: GenerationConfig) -> mx.array:
    """Logits (B, V) with those of generated tokens made smaller (CTRL, arXiv 1909.05858, section 4.1)."""
    if generated is None or config.repetition_penalty == 1:
        return logits
    penalty = config.repetition_penalty
    return mx.where(generated, mx.where(logits < 0, logits * penalty, logits / penalty), logits)


def _until(tokens: list[int], stop_id: int) -> list[int]:
    return tokens[: tokens.index(stop_id)] if stop_id in tokens else tokens


def beam_search(
    network: DecoderInterface, prefix: mx.array, config: GenerationConfig, *, stop_id: int
) -> list[list[int]]:
    """For each row of `prefix` (B, L, D) the continuation of highest log-probability / length ** length_penalty.

    transformers' beam search: of the best K candidates those that end are complete, the best K that do not end go on,
    and a row is done when it has K complete ones, none of which an open one would beat if it ended now
    (early_stopping=False; with True, improbable short ones would end the search). With one beam it is greedy.
    A repetition penalty acts on logits, as without beams (in transformers, on log-probabilities).
    """
    beams, cache = Beams(len(prefix), config, stop_id), network.make_cache()
    logits, generated = network.logits(prefix, cache), None
    rows = np.repeat(np.arange(len(prefix)), config.num_beams)  # the prefix was read once: a copy for each beam
    _take_rows(cache, mx.array(rows))
    logits = logits[mx.array(rows)]
    while True:
        rows = beams.step(_log_softmax(_penalised(logits, generated, config)))
        if beams.done:
            return beams.best()
        tokens, places = mx.array(beams.tokens[:, -1]), mx.array(rows)
        generated = _with_tokens(None if generated is None else generated[places], tokens, logits)
        _take_rows(cache, places)
        logits = network.logits(network.embed(tokens[:, None]), cache)


class Beams:
    """The K continuations of each of B rows that are still open, and those that are complete."""

    def __init__(self, num_rows: int, config: GenerationConfig, stop_id: int):
        self.config, self.stop_id, self.length = config, stop_id, 0
        self.tokens = np.zeros((num_rows * config.num_beams, 0), dtype=np.int64)  # (B * K, length)
        self.scores = np.full((num_rows, config.num_beams), -np.inf, dtype=np.float32)
        self.scores[:, 0] = 0  # all beams begin alike: one of them is enough
        self.complete = [[] for _ in range(num_rows)]  # the K best (score, tokens), best first
        self._finished = np.zeros(num_rows, dtype=bool)

    @property
    def done(self) -> bool:
        return self.length == self.config.max_new_tokens or bool(self._finished.all())

    def step(self, log_probabilities: mx.array) -> np.ndarray:
        """Lengthen the beams, given (B * K, V) of each next token: the rows (B * K,) that they continue."""
        (B, K), V = self.scores.shape, log_probabilities.shape[-1]
        totals = (mx.array(self.scores)[..., None] + log_probabilities.reshape(B, K, V)).reshape(B, K * V)
        scores, places = _largest(totals, min(2 * K, K * V))  # of 2 K candidates, K at least do not end
        rows, tokens = places // V + K * np.arange(B)[:, None], places % V
        self.length += 1
        ends = (tokens == self.stop_id) | (self.length == self.config.max_new_tokens)
        self._collect(scores[:, :K], rows[:, :K], tokens[:, :K], ends[:, :K])
        scores[ends] = -np.inf
        order = np.argsort(-scores, axis=1, kind="stable")[:, :K]
        self.scores = np.take_along_axis(scores, order, axis=1)
        rows, tokens = (np.take_along_axis(x, order, axis=1).reshape(-1) for x in (rows, tokens))
        self.tokens = np.concatenate([self.tokens[rows], tokens[:, None]], axis=1)
        self._finished |= [self._is_finished(b) for b in range(B)]
        return rows

    def _collect(self, scores, rows, tokens, ends) -> None:
        for b, k in np.argwhere(ends & np.isfinite(scores) & ~self._finished[:, None]):
            continuation = [*self.tokens[rows[b, k]].tolist(), int(tokens[b, k])]
            self.complete[b].append((scores[b, k] / self.length**self.config.length_penalty, continuation))
            self.complete[b] = sorted(self.complete[b], key=lambda pair: -pair[0])[: self.config.num_beams]

    def _is_finished(self, b: int) -> bool:
        if len(self.complete[b]) < self.config.num_beams:
            return False
        return self.complete[b][-1][0] >= self.scores[b].max() / self.length**self.config.length_penalty

    def best(self) -> list[list[int]]:
        """The best complete continuation of each row, without its end."""
        return [_until(complete[0][1], self.stop_id) for complete in self.complete]


def _largest(values: mx.array, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` largest of each row of (B, N), largest first, and their places: both (B, count)."""
    places = mx.argpartition(-values, kth=count - 1, axis=-1)[:, :count]
    largest, places = np.array(mx.take_along_axis(values, places, axis=-1)), np.array(places, dtype=np.int64)
    order = np.argsort(-largest, axis=1, kind="stable")
    return np.take_along_axis(largest, order, axis=1), np.take_along_axis(places, order, axis=1)


def _log_softmax(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _take_rows(cache: list, rows: mx.array) -> None:
    """Let sequence i of every cache entry be what sequence `rows[i]` was."""
    for entry in cache:
        entry.state = tree_map(lambda x: x[rows] if isinstance(x, mx.array) and x.ndim else x, entry.state)
