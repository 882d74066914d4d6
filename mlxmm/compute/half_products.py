"""Products of half-precision numbers by the BLAS, on Linux CPUs: MLX's own take one at a time, 5 against 45 GFLOPS.

Both factors become float32 for the product, which is rounded back. That is what a GPU does: it multiplies halves and
adds in float32.
"""

import contextlib
from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn

from mlxmm.compute import functional as F
from mlxmm.compute.layer_calls import replaced_calls


@contextlib.contextmanager
def half_products(module: nn.Module) -> Iterator[None]:
    """Within the block, the linear layers of `module` multiply half-precision inputs as above, where it pays."""
    with replaced_calls({name: part for name, part in module.named_modules() if type(part) is nn.Linear}, _by_blas):
        yield


def _by_blas(name: str, call):
    def run(self, x: mx.array) -> mx.array:
        if not F.widens_products(x):
            return call(self, x)
        y = F.matmul(x, self.weight.T)
        return y + self.bias if "bias" in self else y

    return run
