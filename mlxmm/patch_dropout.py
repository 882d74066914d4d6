"""Patch dropout (FLIP, arXiv 2212.00794): each picture is trained on with a random part of its patches.

B pictures, L positions, D features.
"""

import mlx.core as mx
import mlx.nn as nn


class PatchDropout(nn.Module):
    """Leaves out a `fraction` of the patches, others of each picture; in evaluation mode none.

    The `num_first` first positions are no patches (a class token) and stay. One patch at least is kept.
    """

    def __init__(self, fraction: float, num_first: int = 0):
        super().__init__()
        self.fraction, self.num_first = fraction, num_first

    def __call__(self, x: mx.array, key: mx.array | None = None) -> mx.array:
        """(B, L, D) to (B, fewer, D), drawn from `key`, or from the global one."""
        if not self.training or self.fraction == 0:
            return x
        first, patches = x[:, : self.num_first], x[:, self.num_first :]
        num_kept = max(1, round(patches.shape[1] * (1 - self.fraction)))
        order = mx.argsort(mx.random.uniform(shape=patches.shape[:2], key=key), axis=1)
        kept = mx.take_along_axis(patches, order[:, :num_kept, None], axis=1)
        return mx.concatenate([first, kept], axis=1)
