"""Faster forms of exp, gelu, silu, softmax and cross-entropy for Linux CPUs, with exact gradients."""

import math
from functools import partial

import mlx.core as mx

from mlxmm.compute.cores import custom_function

# exp2(x) on [-1/2, 1/2], lowest power first: exp2f of the Cephes library (S. Moshier). Relative error 2e-7.
EXP2 = (
    1.0,
    6.931472028550421e-1,
    2.402264791363012e-1,
    5.550332471162809e-2,
    9.618437357674640e-3,
    1.339887440266574e-3,
    1.535336188319500e-4,
)
LOG2_E = 1.4426950408889634
ROUNDER = 12582912.0  # 1.5 * 2**23: adding it to a float32 leaves no bits for a fraction
EXPONENT_BIAS, EXPONENT_UNIT = 127.0, 8388608.0  # IEEE 754: a float32 has its exponent + 127 in units of 2**23
MIN_EXPONENT = -60.0  # exp(-60) = 9e-27 counts as 0; far smaller ones would be denormal, which are slow
# erf(x) = x * P(x * x) / Q(x * x) for |x| < 3.8, lowest power first: erf of the Eigen library.
ERF_P = (
    -1.60960333262415e-02,
    -2.95459980854025e-03,
    -7.34990630326855e-04,
    -5.69250639462346e-05,
    -2.10102402082508e-06,
    2.77068142495902e-08,
    -2.72614225801306e-10,
)
ERF_Q = (
    -1.42647390514189e-02,
    -7.37332916720468e-03,
    -1.68282697437203e-03,
    -2.13374055278905e-04,
    -1.45660718464996e-05,
)
ERF_BOUND = 3.832506856900711  # where the ratio rounds to 1
SQRT_HALF = math.sqrt(1 / 2)
SQRT_2_OVER_PI = math.sqrt(2 / math.pi)
NORMAL_DENSITY_AT_0 = 1 / math.sqrt(2 * math.pi)
GELU_TANH_BOUND = 5.2  # the gradient is 0 or 1 to 1e-6 from here on; the slope times a rounding error is not
GELU_CUBIC = 0.044715  # Hendrycks and Gimpel, https://arxiv.org/abs/1606.08415, also for the next
QUICK_GELU_SLOPE = 1.702
# For eager calls (validation, decoding), any shape; within a compiled step or a gradient it changes nothing.
compiled = partial(mx.compile, shapeless=True)


def _polynomial(x: mx.array, coefficients: tuple) -> mx.array:
    """The sum of c[i] * x**i, in pairs, then pairs of pairs (Estrin's scheme).

    A chain of products (Horner's scheme) is deeper than the 11 operations mx.compile will fuse into one kernel.
    """
    terms = list(coefficients)
    while len(terms) > 1:
        odd = [terms.pop()] if len(terms) % 2 else []
        terms = [low + high * x for low, high in zip(terms[::2], terms[1::2], strict=True)] + odd
        x = x * x
    return terms[0]


def exp(x: mx.array) -> mx.array:
    """exp(x) for x <= 0: 2**n by its bits, times the 2**f that is left of it. Relative error 5e-6 at -60."""
    power_of_f, bits_of_n = _exp_parts(x)
    return power_of_f * mx.view(bits_of_n, mx.float32)


@compiled  # without mx.view, which has no shapeless form
def _exp_parts(x: mx.array) -> tuple[mx.array, mx.array]:
    y = mx.maximum(x, MIN_EXPONENT) * LOG2_E
    n = (y + ROUNDER) - ROUNDER
    return _polynomial(y - n, EXP2), ((n + EXPONENT_BIAS) * EXPONENT_UNIT).astype(mx.int32)


def _sigmoid(x: mx.array) -> mx.array:
    """From exp(-|x|), which keeps the small values of a negative x: they are multiplied by x, however large."""
    return _sigmoid_of_parts(x, *_exp_of_negative(x, 1.0))


def _times_sigmoid(x: mx.array, slope: float) -> mx.array:
    """x * sigmoid(slope * x), for a slope above 0."""
    return _product_with_sigmoid(x, *_exp_of_negative(x, slope))


def _exp_of_negative(x: mx.array, slope: float) -> tuple[mx.array, mx.array]:
    """Two factors of exp(-|slope * x|)."""
    power_of_f, bits_of_n = _exp_parts_of_negative(x, slope)
    return power_of_f, mx.view(bits_of_n, mx.float32)


@compiled
def _exp_parts_of_negative(x: mx.array, slope: float) -> tuple[mx.array, mx.array]:
    return _exp_parts(-mx.abs(x if slope == 1 else slope * x))


@compiled
def _product_with_sigmoid(x: mx.array, power_of_f: mx.array, power_of_n: mx.array) -> mx.array:
    return x * _sigmoid_of_parts(x, power_of_f, power_of_n)


@compiled
def _sigmoid_of_parts(x: mx.array, power_of_f: mx.array, power_of_n: mx.array) -> mx.array:
    e = power_of_f * power_of_n
    return mx.where(x < 0, e, 1.0) / (1.0 + e)


def _normal_cdf(x: mx.array) -> mx.array:
    x = mx.clip(x * SQRT_HALF, -ERF_BOUND, ERF_BOUND)
    square = x * x
    return 0.5 + 0.5 * x * _polynomial(square, ERF_P) / _polynomial(square, ERF_Q)


@custom_function
@compiled
def gelu(x):
    return x * _normal_cdf(x)


@gelu.vjp
def _gelu_vjp(x, g, _):
    density = NORMAL_DENSITY_AT_0 * exp(-0.5 * x * x)
    return g * (_normal_cdf(x) + x * density)


@custom_function
def gelu_tanh(x):
    return x * _sigmoid(_gelu_tanh_argument(x))


@gelu_tanh.vjp
def _gelu_tanh_vjp(x, g, _):
    x = mx.clip(x, -GELU_TANH_BOUND, GELU_TANH_BOUND)
    s = _sigmoid(_gelu_tanh_argument(x))
    slope = 2 * SQRT_2_OVER_PI * (1 + 3 * GELU_CUBIC * x * x)
    return g * (s + x * s * (1 - s) * slope)


def _gelu_tanh_argument(x):
    """sigmoid of this is (1 + tanh of half of it) / 2."""
    return 2 * SQRT_2_OVER_PI * x * (1 + GELU_CUBIC * x * x)


@custom_function
def silu(x):
    return _times_sigmoid(x, 1.0)


@silu.vjp
def _silu_vjp(x, g, _):
    return _gradient_of_product(x, g)


@custom_function
def quick_gelu(x):
    return _times_sigmoid(x, QUICK_GELU_SLOPE)


@quick_gelu.vjp
def _quick_gelu_vjp(x, g, _):
    return _gradient_of_product(QUICK_GELU_SLOPE * x, g)


def _gradient_of_product(x, g):
    """`g` times the slope of x * sigmoid(x), which is that of x * sigmoid(a * x) at x / a."""
    s = _sigmoid(x)
    return g * s * (1 + x * (1 - s))


@custom_function
def softmax(x):
    e = exp(x - x.max(axis=-1, keepdims=True))
    return e * (1 / e.sum(axis=-1, keepdims=True))


@softmax.vjp
def _softmax_vjp(_, g, y):
    return y * (g - (g * y).sum(axis=-1, keepdims=True))


def softmax_product(scores, values):
    """softmax(scores) @ values: (..., L, S) by (..., S, D). It is divided by the sums after the product, over D."""
    return _softmax_product(scores, values)[0]


@custom_function
def _softmax_product(scores, values):
    e = exp(scores - scores.max(axis=-1, keepdims=True))
    share = 1 / (e @ mx.ones((e.shape[-1], 1)))  # a product takes a quarter of the time of a sum
    return (e @ values) * share, e, share


@_softmax_product.vjp
def _softmax_product_vjp(primals, cotangents, outputs):
    (_, values), (mixed, e, share) = primals, outputs
    g = cotangents[0] * share
    return e * (g @ values.swapaxes(-1, -2) - (g * mixed).sum(axis=-1, keepdims=True)), e.swapaxes(-1, -2) @ g


@custom_function
def cross_entropy(logits, targets):
    top = logits.max(axis=-1, keepdims=True)
    log_sum = mx.log(exp(logits - top).sum(axis=-1, keepdims=True))
    return (log_sum + (top - _pick(logits, targets))).squeeze(-1)


@cross_entropy.vjp
def _cross_entropy_vjp(primals, g, loss):
    logits, targets = primals
    log_sum_exp = loss[..., None] + _pick(logits, targets)
    hit = mx.arange(logits.shape[-1]) == targets[..., None]
    return (exp(logits - log_sum_exp) - hit) * g[..., None], mx.zeros_like(targets)


def _pick(logits, targets):
    """The logit of each target: (..., V) and (...) to (..., 1)."""
    return mx.take_along_axis(logits, targets[..., None], axis=-1)
