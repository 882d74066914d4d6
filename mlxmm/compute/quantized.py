"""Quantized layers that unpack their weights for each product, on Linux CPUs.

D features in, E features out. MLX's Linux wheels multiply packed weights one number at a time. Unpacking the whole
matrix and multiplying by BLAS takes a thirtieth of the time; the unpacked matrix is freed after the product.
"""

import mlx.core as mx
import mlx.nn as nn

from mlxmm.compute import functional as F
from mlxmm.compute.cores import custom_function

PACKED = ("weight", "scales", "biases")


class UnpackingLinear(nn.QuantizedLinear):
    def __call__(self, x: mx.array) -> mx.array:
        if not F.uses_fast_forms(x):
            return super().__call__(x)
        y = product(self, x)
        return y + self.bias if "bias" in self else y


class UnpackingEmbedding(nn.QuantizedEmbedding):
    def as_linear(self, x: mx.array) -> mx.array:
        return product(self, x) if F.uses_fast_forms(x) else super().as_linear(x)


UNPACKING = {nn.QuantizedLinear: UnpackingLinear, nn.QuantizedEmbedding: UnpackingEmbedding}


def use_unpacking(model: nn.Module) -> None:
    """Let the quantized layers of `model` multiply as above; names and weights do not change."""
    for part in model.modules():
        part.__class__ = UNPACKING.get(type(part), type(part))


def unpacked(layer: nn.Module) -> mx.array:
    """The weights (E, D) of a quantized layer, in the type of its scales."""
    return _dequantized(_packed(layer), layer)


def product(layer: nn.Module, x: mx.array) -> mx.array:
    """(..., D) to (..., E). The backward pass keeps neither the unpacked weights nor `x`."""

    @custom_function
    def multiply(x, *packed):
        return x @ _unpack(packed, layer, after=x).T

    @multiply.vjp
    def _(primals, cotangent, _):
        _, *packed = primals
        return (cotangent @ _unpack(packed, layer, after=cotangent), *map(mx.zeros_like, packed))

    return multiply(x, *_packed(layer))


def _packed(layer: nn.Module) -> list[mx.array]:
    return [layer[name] for name in PACKED if layer.get(name) is not None]


def _unpack(packed, layer: nn.Module, after: mx.array) -> mx.array:
    """Unpack once `after` is computed. Without it MLX unpacks all layers at once, and mx.compile keeps the results."""
    return _dequantized(mx.depends(list(packed), [after]), layer)


def _dequantized(packed, layer: nn.Module) -> mx.array:
    return mx.dequantize(*packed, group_size=layer.group_size, bits=layer.bits, mode=layer.mode)


def is_quantized(part: nn.Module) -> bool:
    """Whether this layer's weights are packed integers, which have no gradients."""
    return "scales" in part
