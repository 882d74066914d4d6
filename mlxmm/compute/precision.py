"""Mixed precision: computing in bfloat16 with float32 weights."""

from collections.abc import Callable

import mlx.core as mx
from mlx.utils import tree_map

PRECISIONS = ("32", "bf16-mixed", "bf16-true")


def to_bfloat16(tree):
    """Cast the float32 arrays of `tree` to bfloat16."""
    return tree_map(lambda x: x.astype(mx.bfloat16) if x.dtype == mx.float32 else x, tree)


def autocast(module, step: Callable, precision: str) -> Callable:
    """With `precision` "bf16-mixed", run `step(batch)` with the module's weights cast to bfloat16; else `step` itself.

    The weights stay float32 and so do their gradients. Networks cast their inputs to the type of their weights.
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
            # Arrays that the step itself changed (running means) keep their new value, in their old type.
            keep = lambda now, cast, own: own if now is cast else now.astype(own.dtype)
            module.update(tree_map(keep, module.parameters(), cast, own))

    return run
