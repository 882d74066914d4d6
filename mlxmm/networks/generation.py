"""Decoding from any network with a cache: greedy, sampled, or by beam search.

B sequences, K beams, L positions, D features, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol

import attrs
import mlx.core as mx
import numpy as np
from attrs.validators import ge, gt, le, lt, optional
from mlx.utils import tree_flatten, tree_map

from mlxmm.compute import cores
from mlxmm.config import checked, option
from mlxmm.errors import UserError
from mlxmm.networks.language_model import keep_likeliest


class DecoderInterface(Protocol):
    """What decoding needs of a network: three functions."""

    def make_cache(self, num_positions: int = 1) -> list:
        """An empty cache of past positions, one entry a layer, that takes room for `num_positions` at a time.

        The `state` of an entry can be read and set: a tree of numbers and of arrays whose first axis is the batch,
        from which beam search selects rows.
        """

    def embed(self, tokens: mx.array) -> mx.array:
        """(B, L) tokens to (B, L, D)."""

    def logits(self, embeddings: mx.array, cache: list) -> mx.array:
        """Append new positions (B, L, D) to `cache`; return the logits (B, V) of the token after the last."""


MAX_BEAMS = 1_000  # rows of arrays: more end in no memory
MIN_TEMPERATURE = 1e-20  # what is divided by less has no place in float32


@attrs.frozen(kw_only=True, field_transformer=checked)
class GenerationConfig:
    """Decoding settings, with transformers' names, applied in its order: penalty, temperature, top-k, top-p."""

    max_new_tokens: int | None = option(
        None, "longest continuation with its end, in tokens; none: as in training", optional(ge(1))
    )
    num_beams: int = option(1, "beams of beam search; 1: no beam search", ge(1), le(MAX_BEAMS))
    temperature: float = option(
        0.0, "0: take the most likely token; above 0: sample from the logits divided by it", ge(0)
    )
    top_k: int = option(0, "sample from this many of the most likely tokens; 0: from all", ge(0))
    top_p: float = option(1.0, "sample from the fewest tokens whose probabilities sum to this", gt(0), le(1))
    repetition_penalty: float = option(1.0, "above 1: tokens already generated become less likely", gt(0))
    length_penalty: float = option(
        1.0, "beams are compared by log-probability / tokens ** this; larger values favour longer captions"
    )
    seed: int = option(0, "random seed of sampling", ge(0), lt(2**32))

    def __attrs_post_init__(self):
        if self.num_beams > 1 and self.temperature > 0:
            raise UserError("beam search does not sample: set temperature=0 or num_beams=1")
        if (self.top_k > 0 or self.top_p < 1) and self.temperature == 0:
            raise UserError("top_k and top_p apply to sampling only: set temperature above 0, to 1.0 for example")


def sequence_keys(seed: int, indices: Sequence[int]) -> mx.array:
    """Random keys (B, 2) of the sequences with these indices: each is a function of (seed, index)."""
    return mx.array([[seed, index] for index in indices], dtype=mx.uint32)


def generate(
    network: DecoderInterface, prefix: mx.array, config: GenerationConfig, *, stop_id: int, keys: mx.array | None = None
) -> list[list[int]]:
    """Generate tokens after each row of `prefix` (B, L, D), until `stop_id`, which is not returned.

    A batch gives the same tokens as its rows one by one: prefixes have equal lengths, so nothing is padded, and when
    tokens are sampled each row has a random key of its own in `keys` (B, 2), by default `sequence_keys`. Raises
    `UserError` if `config.max_new_tokens` is not set.
    """
    _require_length(config)
    if config.num_beams > 1:
        return beam_search(network, prefix, config, stop_id=stop_id)
    columns = list(_columns(network, prefix, config, stop_id, keys))
    return [_until(row, stop_id) for row in np.stack(columns, axis=1).tolist()]


def stream(
    network: DecoderInterface, prefix: mx.array, config: GenerationConfig, *, stop_id: int, keys: mx.array | None = None
) -> Iterator[list[int | None]]:
    """Yield the tokens that `generate` returns, as soon as they are chosen: the next one of each row, or None for a row
    that has ended."""
    if config.num_beams > 1:
        raise UserError("beam search knows its first token only when it ends: set num_beams=1 to stream")
    _require_length(config)
    ended = np.zeros(len(prefix), dtype=bool)
    for column in _columns(network, prefix, config, stop_id, keys):
        ended |= column == stop_id
        yield [None if has_ended else int(token) for token, has_ended in zip(column, ended)]


def num_positions(prefix: mx.array, config: GenerationConfig) -> int:
    """The positions that are read when a `prefix` (B, L, D) is continued: the last token is not."""
    return prefix.shape[1] + config.max_new_tokens - 1


def cache_bytes(network: DecoderInterface, prefix: mx.array, config: GenerationConfig) -> int:
    """The bytes of the cache of one row of `prefix` (B, L, D) when it has been continued by the longest sequence.

    Nothing is computed, since MLX knows the shapes of arrays before their values.
    """
    cache = network.make_cache()
    network.logits(prefix[:1], cache)
    held = sum(getattr(leaf, "nbytes", 0) for _, leaf in tree_flatten([entry.state for entry in cache]))
    return config.num_beams * held * num_positions(prefix, config) // prefix.shape[1]


def _require_length(config: GenerationConfig) -> None:
    if config.max_new_tokens is None:
        raise UserError("a network alone does not know how long captions are: set max_new_tokens, to 32 for example")


def _columns(network, prefix, config, stop_id, keys) -> Iterator[np.ndarray]:
    """Yield the next token of every row, (B,), until all have stopped; a row that has stopped gets anything.

    The next step is dispatched before the last one is read, so that the device does not wait for Python.
    """
    keys = sequence_keys(config.seed, range(len(prefix))) if keys is None else keys
    parts = [_Decoding(network, config, stop_id, *half) for half in cores.halves(prefix, keys)]
    cores.in_streams(lambda part: part.start(), parts)
    mx.async_eval([part.tokens for part in parts])
    for length in range(1, config.max_new_tokens + 1):
        drawn = [part.tokens for part in parts]
        if length < config.max_new_tokens:
            cores.in_streams(lambda part: part.advance(), parts)
            mx.async_eval([part.tokens for part in parts])
        yield np.concatenate([part.read(tokens) for part, tokens in zip(parts, drawn)])
        cores.in_streams(lambda part: part.drop_stopped(), parts)
        if not any(part.rows.size for part in parts):
            return


class _Decoding:
    """Rows that are decoded together. Whenever half of them have stopped, the others go on without them."""

    def __init__(self, network, config, stop_id, prefix, keys):
        self.network, self.config, self.stop_id = network, config, stop_id
        self.prefix, self.keys, self.generated = prefix, keys, None
        self.column, self.rows = np.full(len(prefix), stop_id), np.arange(len(prefix))  # `rows` are still computed

    def start(self) -> None:
        """Read the prefix and draw `tokens` (B,), the first of each row."""
        self.cache = self.network.make_cache(num_positions(self.prefix, self.config))
        self._draw(self.network.logits(self.prefix, self.cache))

    def advance(self) -> None:
        """Append `tokens`, and draw the next ones."""
        if self.rows.size:
            logits = self.network.logits(self.network.embed(self.tokens[:, None]), self.cache)
            self.generated = _with_tokens(self.generated, self.tokens, logits)
            self._draw(logits)

    def _draw(self, logits: mx.array) -> None:
        self.keys, drawn = mx.vmap(mx.random.split)(self.keys).swapaxes(0, 1)
        self.tokens = _choose(_penalised(logits, self.generated, self.config), self.config, drawn)

    def read(self, tokens: mx.array) -> np.ndarray:
        """The newest token of every row, once `tokens` are computed."""
        if self.rows.size:
            self.column[self.rows] = np.array(tokens)
        return self.column.copy()

    def drop_stopped(self) -> None:
        """Take the rows that go on out of those that are computed, if they are half of them or less."""
        [running] = np.nonzero(self.column[self.rows] != self.stop_id)
        if 2 * running.size > self.rows.size:
            return
        self.rows, kept = self.rows[running], mx.array(running, dtype=mx.uint32)
        if running.size:
            _take_rows(self.cache, kept)
            self.tokens, self.keys = self.tokens[kept], self.keys[kept]
            self.generated = None if self.generated is None else self.generated[kept]


def _choose(logits: mx.array, config: GenerationConfig, keys: mx.array) -> mx.array:
    if config.temperature == 0:
        return logits.argmax(-1)
    logits = logits.astype(mx.float32) / max(config.temperature, MIN_TEMPERATURE)
    kept = keep_likeliest(logits, config.top_k, config.top_p)
    return mx.vmap(lambda row, key: mx.random.categorical(row, key=key))(kept, keys)


def _with_tokens(generated: mx.array | None, tokens: mx.array, logits: mx.array) -> mx.array:
    """Which tokens each row has generated, (B, V) booleans: `generated` and the new `tokens` (B,)."""
    new = mx.arange(logits.shape[-1]) == tokens[:, None]
    return new if generated is None else generated | new


def _penalised(logits: mx.array, generated: mx.array | None, config: GenerationConfig) -> mx.array:
    """Logits (B, V), lowered for tokens already generated (CTRL, arXiv 1909.05858, section 4.1)."""
    if generated is None or config.repetition_penalty == 1:
        return logits
    penalty = config.repetition_penalty
    return mx.where(generated, mx.where(logits < 0, logits * penalty, logits / penalty), logits)


def _until(tokens: list[int], stop_id: int) -> list[int]:
    return tokens[: tokens.index(stop_id)] if stop_id in tokens else tokens


def beam_search(
    network: DecoderInterface, prefix: mx.array, config: GenerationConfig, *, stop_id: int
) -> list[list[int]]:
    """For each row of `prefix` (B, L, D), the sequence with the highest log-probability / length ** length_penalty.

    This is transformers' beam search with early_stopping=False. Of the best K candidates, those that end are
    complete; the best K that do not end remain open. A row is done when it has K complete sequences and no open one
    would score higher if it ended now. One beam is greedy decoding. The repetition penalty acts on logits, as without
    beams; in transformers it acts on log-probabilities.
    """
    # Rows are copied for every token, so that room for later tokens would be of no use.
    beams, cache = Beams(len(prefix), config, stop_id), network.make_cache(num_positions=1)
    logits, generated = network.logits(prefix, cache), None
    rows = mx.repeat(mx.arange(len(prefix)), config.num_beams)  # the prefix is read once and copied for each beam
    _take_rows(cache, rows)
    logits = logits[rows]
    while True:
        rows = beams.step(_log_softmax(_penalised(logits, generated, config)))
        if beams.done:
            return beams.best()
        tokens, places = mx.array(beams.tokens[:, -1]), mx.array(rows)  # int32: GPUs lack kernels for 8-byte integers
        generated = _with_tokens(None if generated is None else generated[places], tokens, logits)
        _take_rows(cache, places)
        logits = network.logits(network.embed(tokens[:, None]), cache)


class Beams:
    """The K open sequences of each of B rows, and the complete ones."""

    def __init__(self, num_rows: int, config: GenerationConfig, stop_id: int):
        self.config, self.stop_id, self.length = config, stop_id, 0
        self.tokens = np.zeros((num_rows * config.num_beams, 0), dtype=np.int32)  # (B * K, length)
        self.scores = np.full((num_rows, config.num_beams), -np.inf, dtype=np.float32)
        self.scores[:, 0] = 0  # all beams start equal, so only the first may be extended
        self.complete = [[] for _ in range(num_rows)]  # the K best (score, tokens), best first
        self._finished = np.zeros(num_rows, dtype=bool)

    @property
    def done(self) -> bool:
        return self.length == self.config.max_new_tokens or bool(self._finished.all())

    def step(self, log_probabilities: mx.array) -> np.ndarray:
        """Extend the beams, given (B * K, V) of each next token; return the rows (B * K,) that they extend."""
        (B, K), V = self.scores.shape, log_probabilities.shape[-1]
        totals = (mx.array(self.scores)[..., None] + log_probabilities.reshape(B, K, V)).reshape(B, K * V)
        scores, places = _largest(totals, min(2 * K, K * V))  # at least K of 2 K candidates do not end
        rows, tokens = (places // V + K * np.arange(B)[:, None]).astype(np.int32), (places % V).astype(np.int32)
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
        """The best complete sequence of each row, without its end."""
        return [_until(complete[0][1], self.stop_id) for complete in self.complete]


def _largest(values: mx.array, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` largest values of each row of (B, N), largest first, and their indices: (B, count) each."""
    places = mx.argpartition(-values, kth=count - 1, axis=-1)[:, :count]
    largest, places = np.array(mx.take_along_axis(values, places, axis=-1)), np.array(places, dtype=np.int64)
    order = np.argsort(-largest, axis=1, kind="stable")
    return np.take_along_axis(largest, order, axis=1), np.take_along_axis(places, order, axis=1)


def _log_softmax(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _take_rows(cache: list, rows: mx.array) -> None:
    """Replace sequence i of every cache entry by sequence `rows[i]`."""
    for entry in cache:
        entry.state = tree_map(lambda x: x[rows] if isinstance(x, mx.array) and x.ndim else x, entry.state)
