"""Losses: pure functions of arrays.

B images or captions, L tokens, D features, V vocabulary, N = B * L positions.
"""

from functools import partial, reduce

import mlx.core as mx

from mlxmm.compute import cores
from mlxmm.compute import functional as F
from mlxmm.compute.deterministic import add_rows

CHUNK_LOGITS = 2**24  # logits that `linear_token_loss` holds at a time: 64 MB in float32


def clip_loss(logits: mx.array, ignored: mx.array | None = None) -> mx.array:
    """Mean of the cross-entropies of images over texts and of texts over images (CLIP, figure 3).

    `logits` is (B, B), images by texts, with the matching pairs on the diagonal. Pairs off it that are `ignored`,
    (B, B) booleans, are no negatives.
    """
    if ignored is not None:
        logits = mx.where(ignored, -mx.inf, logits)
    labels = mx.arange(logits.shape[0])
    by_image = F.cross_entropy(logits, labels).mean()
    by_text = F.cross_entropy(logits.T, labels).mean()
    return (by_image + by_text) / 2


def siglip_loss(logits: mx.array, ignored: mx.array | None = None) -> mx.array:
    """Sigmoid loss: a binary classification of each pair (SigLIP, arXiv 2303.15343, algorithm 1).

    `logits` is (B, B) with the matching pairs on the diagonal. The sum over all pairs is divided by B, not B * B.
    Pairs off the diagonal that are `ignored`, (B, B) booleans, are not classified.
    """
    signs = 2 * mx.eye(len(logits)) - 1
    losses = mx.logaddexp(0, -signs * logits)
    return (losses if ignored is None else mx.where(ignored, 0, losses)).sum() / len(logits)


def duplicates(tokens: mx.array) -> mx.array:
    """(B, B) booleans of (B, L) texts: which pairs of different places have the same text."""
    others = ~mx.eye(len(tokens), dtype=mx.bool_)
    # Token by token, as (B, B, L) booleans of a large batch would take more memory than its towers.
    return reduce(lambda equal, own: equal & (own[:, None] == own), tokens.T, others)


def token_loss(logits: mx.array, targets: mx.array, mask: mx.array, *, smoothing: float = 0.0) -> mx.array:
    """The mean cross-entropy of (B, L, V) `logits` over the targets (B, L) where `mask` (B, L) is 1.

    `smoothing` is the fraction of each target spread over all V tokens (arXiv 1512.00567, section 7).
    """
    losses = F.cross_entropy(logits, targets)  # (B, L)
    if smoothing:
        picked = mx.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1)
        losses = losses + smoothing * (picked - logits.mean(-1))
    return (losses * mask).sum() / mx.maximum(mask.sum(), 1)


def token_accuracy(logits: mx.array, targets: mx.array, mask: mx.array) -> mx.array:
    """The fraction of targets where `mask` is 1 that have the highest logit."""
    hits = (logits.argmax(-1).astype(targets.dtype) == targets) * mask  # of two types, both would become int64
    return hits.sum() / mx.maximum(mask.sum(), 1)


def linear_token_loss(
    states: mx.array,
    weight: mx.array,
    targets: mx.array,
    mask: mx.array,
    *,
    for_states: bool = True,
    for_weight: bool = True,
) -> tuple[mx.array, mx.array]:
    """`token_loss` and `token_accuracy` of the logits states @ weight.T, which are never held all at once.

    `states` (..., D), `weight` (V, D), `targets` and `mask` (...). Positions are computed in chunks: logits, loss, and
    in the forward pass already its gradients, which the backward pass only scales. `for_states` and `for_weight` say
    which gradients are needed; the others are zero.
    """
    targets, mask = mx.stop_gradient(targets.reshape(-1)), mx.stop_gradient(mask.reshape(-1).astype(mx.float32))
    shares = mask / mx.maximum(mask.sum(), 1)
    fused = mx.custom_function(partial(_loss_and_gradients, for_states=for_states, for_weight=for_weight))

    @fused.vjp
    def _(primals, cotangents, outputs):
        zeros = mx.zeros_like
        states, weight = ((g * cotangents[0]).astype(g.dtype) if g.size else None for g in outputs[2:])
        return (
            zeros(primals[0]) if states is None else states,
            zeros(primals[1]) if weight is None else weight,
            zeros(primals[2]),
            zeros(primals[3]),
        )

    loss, accuracy, *_ = fused(states.reshape(-1, states.shape[-1]), weight, targets, shares)
    return loss, accuracy


def _loss_and_gradients(states, weight, targets, shares, *, for_states, for_weight):
    """Loss and accuracy of (N, D) states whose positions count by their `shares` (N,), and the loss's gradients
    with respect to `states` and `weight`; an empty array in place of one that is not wanted."""
    halves = cores.halves(states, targets, shares)
    size = max(1, CHUNK_LOGITS // len(halves) // len(weight))
    wanted = {"for_states": for_states, "for_weight": for_weight}
    found = cores.in_streams(lambda half: _in_chunks(size, half[0], weight, *half[1:], **wanted), halves)
    losses, hits, d_states, d_weights = zip(*found)
    return sum(losses), sum(hits), mx.concatenate(d_states), reduce(mx.add, d_weights)


def _in_chunks(size: int, states, weight, targets, shares, *, for_states, for_weight):
    """`_loss_and_gradients` of a part of the positions, `size` at a time."""
    parts, d_weight = [], None
    for start in range(0, len(states), size):
        # Each chunk waits for the one before; else MLX would hold the logits of all chunks at once.
        h = mx.depends(states[start : start + size], parts[-1]) if parts else states[start : start + size]
        t, share = targets[start : start + size], shares[start : start + size, None]
        losses, hits, e, scale = _softmax_parts(h, weight, t, share)
        part = [(losses * share).sum(), (hits * share).sum()]
        if for_states:
            part.append((F.matmul(e, weight) * scale - weight[t] * share).astype(states.dtype))
        if for_weight:
            d = F.matmul(e.T, (h * scale).astype(e.dtype))
            d_weight = d if d_weight is None else mx.depends(d_weight, part) + d
            part.append(d_weight)
        parts.append(part)
    d_states = mx.concatenate([part[2] for part in parts]) if for_states else mx.array([])
    if for_weight:
        d_weight = add_rows(d_weight, targets, -(states * shares[:, None]))
    return (
        sum(part[0] for part in parts),
        sum(part[1] for part in parts),
        d_states,
        d_weight if for_weight else mx.array([]),
    )


def _softmax_parts(h, weight, targets, share):
    """For (n, D) states: losses and hits (n, 1), and softmax * share as (n, V) and (n, 1) to be multiplied."""
    logits = F.matmul(h, weight.T)
    top = logits.max(axis=-1, keepdims=True)
    e = F.exp_of_negative(logits - top)
    ones = mx.ones((e.shape[-1], 1))
    total = e.astype(mx.float32) @ ones  # a product takes a quarter of the time of a sum; in float32, as it is large
    picked = mx.take_along_axis(logits, targets[:, None], axis=-1)
    return mx.log(total) + (top - picked), picked >= top, e, share / total
