"""Decoding from a language model with a cache.

B sequences, L positions, D features.
"""

import mlx.core as mx
import numpy as np

from mlxmm.networks.language_model import embed, head, hidden_states, make_cache


def greedy(model, prefix: mx.array, *, max_new_tokens: int, stop_id: int) -> list[list[int]]:
    """Continue each (L, D) row of `prefix` (B, L, D) with its likeliest tokens, until `stop_id`.

    Every prefix has the same length, so nothing is padded, and a batch gives what its rows give one by one.
    """
    cache, embeddings, columns = make_cache(model), prefix, []
    running = np.ones(len(prefix), dtype=bool)
    for _ in range(max_new_tokens):
        states = hidden_states(model, embeddings, cache)[:, -1:]
        tokens = head(model, states).argmax(-1)  # (B, 1)
        columns.append(np.array(tokens)[:, 0])
        running &= columns[-1] != stop_id
        if not running.any():
            break
        embeddings = embed(model, tokens)
    return [_until(row, stop_id) for row in np.stack(columns, axis=1).tolist()]


def _until(tokens: list[int], stop_id: int) -> list[int]:
    return tokens[: tokens.index(stop_id)] if stop_id in tokens else tokens
