"""Half precision: where numbers are bfloat16, and where they stay float32."""

from collections.abc import Callable

import mlx.core as mx
from mlx.utils import tree_map

PRECISIONS = ("32", "bf16-mixed", "bf16-true")


def to_bfloat16(tree):
    """`tree` with its float32 arrays as bfloat16."""
    return tree_map(lambda x: x.astype(mx.bfloat16) if x.dtype == mx.float32 else x, tree)


def autocast(module, step: Callable, precision: str) -> Callable:
    """`step(batch)`, computed in bfloat16 from the module's float32 weights where `precision` is "bf16-mixed".

    Gradients come back in float32, to the float32 weights. Networks cast their inputs to the type of their weights.
    """
    if precision != "bf16-mixed":
        return step

    def run(batch):
        own = module.parameters()
        cast = to_bfloat16(own)
        module.update(cast)
        try:
            return step(batch)
        finally:
            # What the step itself wrote (running means) stays, in the type it had.
            keep = lambda now, cast, own: own if now is cast else now.astype(own.dtype)
            module.update(tree_map(keep, module.parameters(), cast, own))

    return run
