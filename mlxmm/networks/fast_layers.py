"""mlx-lm's layers with the attention and SwiGLU of `mlxmm.compute.functional`: half the time on a Linux CPU."""

import functools
import types

import mlx.core as mx
import mlx.nn as nn

from mlxmm.compute import functional as F


def use_fast_layers(model: nn.Module) -> None:
    """Let the layers of `model`, and of no other model, call our attention and SwiGLU where they call mlx-lm's."""
    for layer in model.modules():
        layer.__class__ = _fast_class(type(layer))


@functools.cache
def _fast_class(cls: type) -> type:
    """A subclass of `cls` whose `__call__` finds our functions under mlx-lm's names; `cls` if it uses none of them.

    mlx-lm's files import both functions by name. Replacing these names would change every mlx-lm model of the process,
    so the subclass runs mlx-lm's own code with a copy of its globals.
    """
    call = cls.__call__
    if not isinstance(call, types.FunctionType):  # a layer that is a container only has that of `type`
        return cls
    used = set(call.__code__.co_names) & set(FAST_FORMS) & set(call.__globals__)
    if not used:
        return cls
    ours = {name: FAST_FORMS[name](call.__globals__[name]) for name in used}
    fast = types.FunctionType(
        call.__code__, call.__globals__ | ours, call.__name__, call.__defaults__, call.__closure__
    )
    fast.__kwdefaults__ = call.__kwdefaults__
    return type(cls.__name__, (cls,), {"__call__": fast, "__module__": cls.__module__})


def _fast_swiglu(theirs):
    return lambda gate, x: F.silu(gate) * x


def _fast_attention(theirs):
    def attention(queries, keys, values, cache, scale, mask, sinks=None):
        # Quantized caches, attention sinks and arrays as masks are left to mlx-lm.
        is_plain = isinstance(keys, mx.array) and sinks is None and (mask is None or isinstance(mask, str))
        if is_plain and F.uses_fast_forms(queries):
            return F.attention(queries, keys, values, scale=scale, mask=mask)
        return theirs(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)

    return attention


FAST_FORMS = {"swiglu": _fast_swiglu, "scaled_dot_product_attention": _fast_attention}
