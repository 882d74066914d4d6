"""Projectors: from features of a vision tower to embeddings of a language model.

B images, P patches, D features of the tower.
"""

import math

import mlx.core as mx
import mlx.nn as nn

from mlxmm.compute import functional as F
from mlxmm.compute.cores import in_halves
from mlxmm.errors import UserError

PROJECTORS = ("linear", "mlp", "pixel_shuffle")


class Projector(nn.Module):
    """(B, P, D) to (B, P, width_out), or with "pixel_shuffle" to (B, P / factor ** 2, width_out).

    "linear" is one layer, "mlp" two with GELU between (LLaVA 1.5, arXiv 2310.03744, section 3.3), "pixel_shuffle"
    one without bias over squares of `factor` x `factor` patches (SmolVLM, arXiv 2504.05299, section 2.2).
    """

    def __init__(self, kind: str, width_in: int, width: int, width_out: int, factor: int = 1):
        super().__init__()
        self.factor = factor if kind == "pixel_shuffle" else 1
        sizes = [width_in * self.factor**2, *([width] if kind == "mlp" else []), width_out]
        self.layers = [nn.Linear(*pair, bias=kind != "pixel_shuffle") for pair in zip(sizes, sizes[1:])]

    def __call__(self, x: mx.array) -> mx.array:
        return in_halves(self._projected, x)

    def _projected(self, x: mx.array) -> mx.array:
        x = x.astype(self.layers[0].weight.dtype)
        x = x if self.factor == 1 else pixel_shuffle(x, self.factor)
        for layer in self.layers[:-1]:
            x = F.gelu(layer(x))
        return self.layers[-1](x)


def pixel_shuffle(x: mx.array, factor: int) -> mx.array:
    """(B, P, D) to (B, P / factor ** 2, factor ** 2 * D): the patches of each square side by side, row by row.

    Raises `UserError` if the patches do not form a square whose side is a multiple of `factor`.
    """
    B, P, D = x.shape
    side = squares(P, factor)
    x = x.reshape(B, side, factor, side, factor, D).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, side * side, factor * factor * D)


def squares(num_patches: int, factor: int) -> int:
    """The number of `factor` x `factor` squares along a side of a square image of `num_patches` patches."""
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise UserError(f"pixel_shuffle wants patches in a square: {num_patches} is no square number")
    if side % factor:
        fitting = [n for n in range(1, side + 1) if side % n == 0]
        raise UserError(
            f"projector_factor {factor} does not divide the {side} patches of a side: "
            f"choose one of {', '.join(map(str, fitting))}"
        )
    return side // factor
