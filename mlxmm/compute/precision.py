"""Precision: where numbers are bfloat16, and where they stay float32.

What is trained is float32, whatever it was loaded in: an update of less than 1/256 of a bfloat16 number is lost to
rounding. It enters products in the dtype it was loaded in, as the frozen parameters beside it do, so that both factors
of a product have one dtype (MLX would convert the whole matrix in every product).
"""

import contextlib
from collections import UserDict
from collections.abc import Iterator

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

from mlxmm.compute.named_arrays import put_arrays

PRECISIONS = ("32", "bf16-mixed", "bf16-true")
HALF = (mx.bfloat16, mx.float16)


class ComputeDtypes(UserDict):
    """Of parameters that are float32 because they are trained: the names of the dtypes in which they are computed
    with. Not a `dict`, which MLX would take for a part of the network; names, since a `Dtype` cannot be copied."""


def set_dtypes(module, precision: str) -> None:
    """Give parameters the dtype that `precision` trains them in; those that are frozen stay as they are, except with
    "bf16-true", where everything is bfloat16."""
    if precision == "bf16-true":
        module.compute_dtypes = ComputeDtypes()
        module.set_dtype(mx.bfloat16)
    else:
        widen(module, {name: a for name, a in tree_flatten(module.trainable_parameters()) if a.dtype in HALF})


def widen(module, arrays: dict[str, mx.array]) -> None:
    """Put `arrays`, by dotted names, into `module` as float32; it computes with them in the dtype it has now."""
    if arrays:
        own = dict(tree_flatten(module.parameters()))
        now = {name: dtype_name(own[name].dtype) for name in arrays}
        module.compute_dtypes = ComputeDtypes(now | dict(module.compute_dtypes))
        put_arrays(module, {name: array.astype(mx.float32) for name, array in arrays.items()})


def dtype_name(dtype: mx.Dtype) -> str:
    """ "bfloat16", as a `config.json` has it."""
    return str(dtype).removeprefix("mlx.core.")


def to_bfloat16(tree):
    """`tree` with its float32 arrays as bfloat16."""
    return tree_map(lambda x: x.astype(mx.bfloat16) if x.dtype == mx.float32 else x, tree)


@contextlib.contextmanager
def autocast(module, precision: str) -> Iterator[None]:
    """Within the block, the module has its weights as they enter products: those that were widened in the dtype they
    were loaded in, and with "bf16-mixed" all float32 ones in bfloat16.

    Gradients come back in float32, to the float32 weights. Networks cast their inputs to the dtype of their weights.
    """
    own, dtypes = module.parameters(), module.compute_dtypes
    if precision != "bf16-mixed" and not dtypes:
        yield
        return
    cast = tree_map_with_path(lambda name, x: x.astype(getattr(mx, dtypes[name])) if name in dtypes else x, own)
    module.update(to_bfloat16(cast) if precision == "bf16-mixed" else cast)
    cast = module.parameters()
    try:
        yield
    finally:
        # What the block itself wrote (running means) stays, in the dtype it had.
        keep = lambda now, cast, own: own if now is cast else now.astype(own.dtype)
        module.update(tree_map(keep, module.parameters(), cast, own))
