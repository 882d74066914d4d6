"""gelu, silu, softmax, cross-entropy: MLX's own, or on Linux CPUs faster forms with exact gradients.

B sequences, H heads, L queries, S keys, D features of a head, V classes; (...) any leading dimensions.

MLX's Linux wheels take one exponential at a time (10-40 ns); sums and products go four at a time. So here the
transcendental functions are polynomials and ratios of polynomials, and each has its gradient written out, because
differentiating a polynomial costs more than the function it replaces. In a compiled step, forward and gradient take
1.5-6 ns an element, MLX's own 10-36. Outside of one the forward pass is faster too, but the gradients of silu,
quick_gelu and, often, gelu are slower than MLX's own. Intermediate arrays of some MB may cost up to 20 ns an element
more in page faults, when malloc returns them to the system. Float32 on the CPU only. MLXMM_FAST=off selects MLX's own
functions; it is read at each call, but a compiled function keeps the form it was traced with.
"""

import sys

import mlx.core as mx
from mlx import nn

from mlxmm import environment
from mlxmm.compute import linux_functions
from mlxmm.compute.precision import HALF


def uses_fast_forms(x: mx.array) -> bool:
    """Whether the functions below take their faster forms for `x`."""
    return x.dtype == mx.float32 and is_linux_cpu()


def widens_products(x: mx.array) -> bool:
    """Whether products with `x`, of half precision, are computed in float32: there is no BLAS for halves."""
    return x.dtype in HALF and is_linux_cpu()


def is_linux_cpu() -> bool:
    """Whether functions are to take the forms that are fast on Linux CPUs."""
    is_cpu = mx.default_device().type == mx.DeviceType.cpu
    return is_cpu and sys.platform.startswith("linux") and environment.uses_linux_functions()


def matmul(a: mx.array, b: mx.array) -> mx.array:
    """a @ b, both of one dtype: (..., L, D) by (..., D, E) to (..., L, E)."""
    if widens_products(a):
        return (a.astype(mx.float32) @ b.astype(mx.float32)).astype(a.dtype)
    return a @ b


def gelu(x: mx.array) -> mx.array:
    """x * Phi(x), with Phi the normal distribution, for (...). Within 2e-6 of nn.gelu, gradient too."""
    return linux_functions.gelu(x) if uses_fast_forms(x) else nn.gelu(x)


def gelu_tanh(x: mx.array) -> mx.array:
    """The tanh approximation of gelu (GPT-2, SigLIP), for (...). Within 2e-6 of nn.gelu_approx, gradient too."""
    return linux_functions.gelu_tanh(x) if uses_fast_forms(x) else nn.gelu_approx(x)


def quick_gelu(x: mx.array) -> mx.array:
    """x * sigmoid(1.702 x) (OpenAI's CLIP), for (...). Within 2e-6 of nn.gelu_fast_approx, gradient too."""
    return linux_functions.quick_gelu(x) if uses_fast_forms(x) else nn.gelu_fast_approx(x)


def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x), for (...). Within 2e-6 of nn.silu, gradient too."""
    return linux_functions.silu(x) if uses_fast_forms(x) else nn.silu(x)


def exp_of_negative(x: mx.array) -> mx.array:
    """exp(x) of x <= 0, for (...). Relative error 5e-6 at most; below -60 it is exp(-60)."""
    return linux_functions.exp(x) if uses_fast_forms(x) else mx.exp(x)


def softmax(x: mx.array) -> mx.array:
    """Over the last axis of (..., V). Within 1e-6 of mx.softmax; masked positions get 9e-27 or less, not 0."""
    return linux_functions.softmax(x) if uses_fast_forms(x) else mx.softmax(x, axis=-1)


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """-log softmax(logits)[target] of (..., V) logits and (...) targets: losses (...), float32.

    Within 4e-6 of nn.losses.cross_entropy; relative where the loss is above 1.
    """
    if uses_fast_forms(logits):
        return linux_functions.cross_entropy(logits, mx.stop_gradient(targets))
    return nn.losses.cross_entropy(logits.astype(mx.float32), targets)


def attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask=None) -> mx.array:
    """softmax(scale * q @ k.T + mask) @ v: (B, H, L, D) of queries, (B, H or fewer, S, D) of keys and values.

    `mask` is None, "causal" (the last query attends to every key), or an array broadcast to (B, H, L, S): booleans,
    true where a query attends to a key, or numbers added to the scores. Within 4e-6 of
    mx.fast.scaled_dot_product_attention for values around 1.
    """
    if not uses_fast_forms(q):
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    B, H, L, D = q.shape
    G, S = k.shape[1], k.shape[2]  # H / G query heads share a head of keys: its queries, one after another
    q = (q * scale).reshape(B, G, H // G * L, D)
    scores = (q @ k.swapaxes(-1, -2)).reshape(B, H, L, S)
    if isinstance(mask, str):
        mask = mx.arange(S) <= mx.arange(S - L, S)[:, None]
    if mask is not None:
        scores = mx.where(mask, scores, -mx.inf) if mask.dtype == mx.bool_ else scores + mask
    mixed: mx.array = linux_functions.softmax_product(scores.reshape(B, G, H // G * L, S), v)
    return mixed.reshape(B, H, L, -1)
