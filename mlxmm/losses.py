"""Losses: pure functions of arrays.

B images or captions, L tokens, V vocabulary.
"""

import mlx.core as mx

from mlxmm import functional as F


def clip_loss(logits: mx.array) -> mx.array:
    """Ask each image for its text and each text for its image; average the two answers (CLIP, figure 3).

    `logits` is (B, B), images by texts, with the matching pairs on the diagonal.
    """
    labels = mx.arange(logits.shape[0])
    by_image = F.cross_entropy(logits, labels).mean()
    by_text = F.cross_entropy(logits.T, labels).mean()
    return (by_image + by_text) / 2


def siglip_loss(logits: mx.array) -> mx.array:
    """Ask of every pair by itself whether it matches (SigLIP, arXiv 2303.15343, algorithm 1).

    `logits` is (B, B) with the matching pairs on the diagonal. The sum over all pairs is divided by B, not B * B.
    """
    signs = 2 * mx.eye(len(logits)) - 1
    return mx.logaddexp(0, -signs * logits).sum() / len(logits)


def token_loss(logits: mx.array, targets: mx.array, mask: mx.array) -> mx.array:
    """The mean cross-entropy of (B, L, V) `logits` over the targets (B, L) that `mask` (B, L) counts."""
    losses = F.cross_entropy(logits, targets)  # (B, L)
    return (losses * mask).sum() / mx.maximum(mask.sum(), 1)


def token_accuracy(logits: mx.array, targets: mx.array, mask: mx.array) -> mx.array:
    """The fraction of counted targets that have the highest logit."""
    hits = (logits.argmax(-1) == targets) * mask
    return hits.sum() / mx.maximum(mask.sum(), 1)
