"""Patch dropout (FLIP, arXiv 2212.00794), and dropout that a recomputed layer repeats.

B pictures, L positions, D features.
"""

import contextlib
from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn

from mlxmm.compute.layer_calls import replaced_calls


class PatchDropout(nn.Module):
    """Drops a random `fraction` of the patches of each image; in evaluation mode none.

    The first `num_first` positions are not patches (a class token) and are kept. At least one patch is kept.
    """

    def __init__(self, fraction: float, num_first: int = 0):
        super().__init__()
        self.fraction, self.num_first = fraction, num_first

    def __call__(self, x: mx.array, key: mx.array | None = None) -> mx.array:
        """(B, L, D) to (B, fewer, D); patches are drawn with `key`, by default the global one."""
        if not self.training or self.fraction == 0:
            return x
        first, patches = x[:, : self.num_first], x[:, self.num_first :]
        num_kept = max(1, round(patches.shape[1] * (1 - self.fraction)))
        order = mx.argsort(mx.random.uniform(shape=patches.shape[:2], key=key), axis=1)
        kept = mx.take_along_axis(patches, order[:, :num_kept, None], axis=1)
        return mx.concatenate([first, kept], axis=1)


DROPOUTS = {
    nn.Dropout: 0,
    nn.Dropout2d: 2,
    nn.Dropout3d: 3,
}  # trailing axes that are dropped together


@contextlib.contextmanager
def dropout_from(module: nn.Module, key: mx.array) -> Iterator[None]:
    """Within the block, every dropout under `module` draws from `key`, so that a recomputed layer drops the same.

    MLX's dropout draws from the global key, which has advanced by the time a layer is computed again.
    """
    keys = iter(_successors(key))

    def wrap(name, call):
        def run(self, x):
            if isinstance(self, PatchDropout):
                return call(self, x, next(keys))
            if not self.training or self._p_1 == 1:
                return x
            together = next(axes for kind, axes in DROPOUTS.items() if isinstance(self, kind))
            shape = (*x.shape[: x.ndim - 1 - together], *[1] * together, x.shape[-1])
            mask = mx.random.bernoulli(self._p_1, shape, key=next(keys))
            return (mask * x) * (1 / self._p_1)

        return run

    drops = {name: part for name, part in module.named_modules() if isinstance(part, (PatchDropout, *DROPOUTS))}
    with replaced_calls(drops, wrap):
        yield


def _successors(key: mx.array) -> Iterator[mx.array]:
    while True:
        key, drawn = mx.random.split(key)
        yield drawn
