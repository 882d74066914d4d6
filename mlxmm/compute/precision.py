"""Mixed precision: where numbers are bfloat16, and where they stay float32."""

import contextlib
from collections.abc import Iterator

import mlx.core as mx
from mlx.utils import tree_map

PRECISIONS = ("32", "bf16-mixed", "bf16-true")


def to_bfloat16(tree):
    """`tree` with its float32 arrays as bfloat16."""
    return tree_map(lambda x: x.astype(mx.bfloat16) if x.dtype == mx.float32 else x, tree)


@contextlib.contextmanager
def autocast(module, precision: str) -> Iterator[None]:
    """Within the block, where `precision` is "bf16-mixed", the module's float32 weights are bfloat16.

    Gradients come back in float32, to the float32 weights. Networks cast their inputs to the dtype of their weights.
    """
    if precision != "bf16-mixed":
        yield
        return
    own = module.parameters()
    cast = to_bfloat16(own)
    module.update(cast)
    try:
        yield
    finally:
        # What the block itself wrote (running means) stays, in the dtype it had.
        keep = lambda now, cast, own: own if now is cast else now.astype(own.dtype)
        module.update(tree_map(keep, module.parameters(), cast, own))
