"""The fast forms against MLX's own, in value and gradient; on macOS and GPUs both sides are MLX's own."""

import os
import time

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn

from mlxmm.compute import functional as F

ACTIVATIONS = [
    (F.gelu, nn.gelu),
    (F.gelu_tanh, nn.gelu_approx),
    (F.quick_gelu, nn.gelu_fast_approx),
    (F.silu, nn.silu),
    (F.softmax, lambda x: mx.softmax(x, axis=-1)),
]
every_activation = pytest.mark.parametrize(("fast", "own"), ACTIVATIONS, ids=lambda f: f.__name__)


def normal(*shape, scale=2.0, seed=0):
    return scale * mx.random.normal(shape, key=mx.random.key(seed))


def assert_close(actual, expected, tolerance):
    """Within `tolerance`, relative to values above 1."""
    actual, expected = np.array(actual), np.array(expected)
    np.testing.assert_allclose(actual, expected, atol=tolerance, rtol=tolerance)


def gradient(function, *inputs, cotangent):
    return mx.vjp(function, list(inputs), [cotangent])[1]


@every_activation
@pytest.mark.parametrize("shape", [(7,), (1, 5), (3, 50), (2, 3, 256), (1, 1)])
def test_value_and_gradient_are_mlx_own(fast, own, shape):
    x, g = normal(*shape), normal(*shape, seed=1)
    assert_close(fast(x), own(x), 2e-6)
    [actual], [expected] = gradient(fast, x, cotangent=g), gradient(own, x, cotangent=g)
    assert_close(actual, expected, 2e-6 * max(1, mx.abs(expected).max().item()))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu_tanh_gradient(x):
    t = np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)


def sigmoid_gradient(slope):
    return lambda x: sigmoid(slope * x) * (1 + slope * x * (1 - sigmoid(slope * x)))


@pytest.mark.parametrize(
    ("function", "exact"),
    [
        (F.gelu_tanh, gelu_tanh_gradient),
        (F.quick_gelu, sigmoid_gradient(1.702)),
        (F.silu, sigmoid_gradient(1.0)),
    ],
)
def test_gradient_is_that_of_float64(function, exact):
    x = np.linspace(-12, 12, 24_001, dtype=np.float32)
    [actual] = gradient(function, mx.array(x), cotangent=mx.ones(x.shape))
    assert_close(actual, exact(x.astype(np.float64)), 2e-6)


@pytest.mark.parametrize("function", [F.gelu, F.gelu_tanh, F.quick_gelu, F.silu])
def test_large_inputs_saturate_and_nan_stays(function):
    x = mx.array([-1e4, -100.0, 0.0, 100.0, 1e4, float("nan")])
    value, [slope] = np.array(function(x)), gradient(function, x, cotangent=mx.ones(6))
    np.testing.assert_allclose(value, [0, 0, 0, 100, 1e4, np.nan], atol=1e-3, rtol=1e-6)
    np.testing.assert_allclose(np.array(slope), [0, 0, 0.5, 1, 1, np.nan], atol=1e-3)


@pytest.mark.parametrize("masked", [-np.inf, -1e9])
def test_softmax_gives_masked_entries_no_weight(masked):
    weights = np.array(F.softmax(mx.array([[0.0, masked, 2.0, masked], [masked, masked, masked, -3.0]])))
    assert (weights[:, [1]] < 1e-25).all() and weights[1, 3] == 1
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)


def test_softmax_keeps_nan_in_its_row():
    weights = np.array(F.softmax(mx.array([[0.0, float("nan")], [0.0, 0.0]])))
    np.testing.assert_array_equal(weights, [[np.nan, np.nan], [0.5, 0.5]])


@pytest.mark.parametrize("V", [40, 2000])
@pytest.mark.parametrize("leading", [(6,), (2, 3), ()])
def test_cross_entropy_is_mlx_own(V, leading):
    logits = normal(*leading, V, scale=4.0)
    targets = mx.random.randint(0, V, leading, key=mx.random.key(2))
    g = normal(*leading, seed=3)
    own = nn.losses.cross_entropy
    assert_close(F.cross_entropy(logits, targets), own(logits, targets), 4e-6)
    [actual] = gradient(lambda x: F.cross_entropy(x, targets), logits, cotangent=g)
    [expected] = gradient(lambda x: own(x, targets), logits, cotangent=g)
    assert_close(actual, expected, 4e-6)


MASKS = {
    "none": None,
    "causal": "causal",
    "added": mx.where(mx.random.uniform(shape=(2, 1, 1, 9), key=mx.random.key(5)) < 0.3, -1e9, 0.0),
    "boolean": mx.random.uniform(shape=(2, 1, 1, 9), key=mx.random.key(6)) < 0.7,
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("L", [9, 3, 1])
def test_attention_is_mlx_own(mask, num_kv_heads, L):
    inputs = normal(2, 4, L, 8), normal(2, num_kv_heads, 9, 8, seed=1), normal(2, num_kv_heads, 9, 8, seed=2)
    options = {"scale": 8**-0.5, "mask": MASKS[mask]}
    g = normal(2, 4, L, 8, seed=3)
    fast = lambda *qkv: F.attention(*qkv, **options)
    own = lambda *qkv: mx.fast.scaled_dot_product_attention(*qkv, **options)
    assert_close(fast(*inputs), own(*inputs), 4e-6)
    for actual, expected in zip(gradient(fast, *inputs, cotangent=g), gradient(own, *inputs, cotangent=g), strict=True):
        assert_close(actual, expected, 4e-6 * max(1, mx.abs(expected).max().item()))


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(16, 32), nn.Linear(32, 40)

    def loss(self, x, y):
        return F.cross_entropy(self.outer(F.gelu(self.inner(x))), y).mean()


def test_training_is_the_same_compiled_eager_and_with_mlx_own(monkeypatch):
    model, x, y = Classifier(), normal(8, 16), mx.arange(8)
    step = nn.value_and_grad(model, model.loss)
    results = [step(x, y), mx.compile(lambda x, y: step(x, y))(x, y)]
    monkeypatch.setenv("MLXMM_FAST", "off")
    loss, grads = step(x, y)
    for fast_loss, fast_grads in results:
        assert_close(fast_loss, loss, 4e-6)
        assert_close(fast_grads["inner"]["weight"], grads["inner"]["weight"], 4e-6)
        assert_close(fast_grads["outer"]["weight"], grads["outer"]["weight"], 4e-6)


@every_activation
def test_grad_and_value_and_grad_agree_with_compile(fast, own):
    x = normal(4, 33)
    loss = lambda x: (fast(x) * fast(x)).sum()
    value, slope = mx.value_and_grad(loss)(x)
    assert_close(mx.compile(mx.grad(loss))(x), slope, 2e-6)
    assert_close(value, (own(x) ** 2).sum(), 1e-5)


@every_activation
def test_other_dtypes_are_mlx_own(fast, own):
    x = normal(3, 8).astype(mx.bfloat16)
    assert not F.uses_fast_forms(x)
    assert fast(x).dtype == mx.bfloat16
    assert mx.array_equal(fast(x), own(x))


def test_cross_entropy_of_bfloat16_is_float32():
    assert F.cross_entropy(normal(3, 8).astype(mx.bfloat16), mx.array([0, 1, 2])).dtype == mx.float32


def test_off_by_environment(monkeypatch):
    monkeypatch.setenv("MLXMM_FAST", "off")
    assert not F.uses_fast_forms(normal(1))


@pytest.mark.skipif(not F.uses_fast_forms(mx.zeros(1)), reason="the fast forms are for CPUs under Linux")
@pytest.mark.skipif(os.environ.get("MLX_DISABLE_COMPILE") is not None, reason="compares compiled functions")
@pytest.mark.parametrize(("fast", "own"), [ACTIVATIONS[0], ACTIVATIONS[4]], ids=["gelu", "softmax"])
def test_compiled_gradients_are_faster_than_mlx_own(fast, own):
    x = normal(32, 50, 128)
    steps = [mx.compile(lambda x, f=f: mx.vjp(f, [x], [x])[1][0]) for f in (fast, own)]
    seconds = [[], []]
    for _ in range(12):
        for step, taken in zip(steps, seconds, strict=True):
            start = time.perf_counter()
            mx.eval(step(x))
            taken.append(time.perf_counter() - start)
    assert 1.3 * min(seconds[0]) < min(seconds[1])


@pytest.mark.skipif(not F.uses_fast_forms(mx.zeros(1)), reason="products are widened on CPUs under Linux")
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_a_product_of_halves_is_the_float32_product_rounded_once_and_so_are_its_gradients(dtype):
    a, b, c = (
        mx.random.normal(shape, key=mx.random.key(len(shape))).astype(dtype) for shape in ((7, 64), (64, 9), (7, 9))
    )
    (product,), gradients = mx.vjp(lambda a, b: F.matmul(a, b), [a, b], [c])
    A, B, C = (x.astype(mx.float32) for x in (a, b, c))
    for ours, exact in zip((product, *gradients), (A @ B, C @ B.T, A.T @ C)):
        assert ours.dtype == dtype and mx.array_equal(ours, exact.astype(dtype)).item()
