"""While a module is trained or asked, both halves of a batch are computed at once, and a product has one thread."""

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import DistinctBatches, TinyRegression, blas_threads, on_cores
from mlx.utils import tree_flatten

from mlxmm import Callback
from mlxmm.compute import cores, linux_blas
from mlxmm.compute import functional as F
from mlxmm.compute.compiled import Compiler
from mlxmm.networks.clip import CLIPVisionTower
from mlxmm.networks.generation import GenerationConfig, generate
from mlxmm.networks.language_model import (
    CachedLanguageModel,
    Qwen3Config,
    build_language_model,
    embed,
    hidden_states,
    num_rows,
)
from mlxmm.networks.towers import VisionConfig
from mlxmm.preprocessing.tokenizers import train_tokenizer
from mlxmm.training.module import evaluating

pytestmark = pytest.mark.skipif(linux_blas.num_threads() is None, reason="MLX has a BLAS of its own here")


@pytest.fixture
def two_threads():
    with blas_threads(2):
        yield


@pytest.mark.parametrize(
    ("width", "num_rows", "before", "within", "has_halves"),
    [
        (64, None, 2, 1, True),
        (64, None, 4, 1, True),
        (64, None, 1, 1, False),
        (1_500, None, 2, 1, True),  # 1,500 squared is more than 2,000,000
        (1_500, 1, 2, 2, False),
        (1_500, None, 4, 4, False),
    ],
)
def test_products_have_one_thread_where_rows_have_two_cores(width, num_rows, before, within, has_halves):
    with blas_threads(before):
        with evaluating(nn.Linear(width, width), num_rows):
            assert linux_blas.num_threads() == within
            assert len(cores.halves(mx.zeros((5, 2)))) == 1 + has_halves
        assert linux_blas.num_threads() == before
        assert len(cores.halves(mx.zeros((5, 2)))) == 1


def test_a_module_is_trained_in_halves(make_trainer, two_threads):
    class Seen(Callback):
        def on_train_batch_end(self, trainer, module, *_):
            self.found = linux_blas.num_threads(), len(cores.halves(mx.zeros((4, 2))))

    seen = Seen()
    make_trainer(max_steps=1, callbacks=[seen]).fit(TinyRegression(), DistinctBatches())
    assert seen.found == (1, 2) and linux_blas.num_threads() == 2


def test_another_block_within_changes_nothing(two_threads):
    with evaluating(nn.Linear(2, 2)):
        with evaluating(nn.Linear(2, 2)):
            assert len(cores.halves(mx.zeros((4, 2)))) == 2
        assert len(cores.halves(mx.zeros((4, 2)))) == 2 and linux_blas.num_threads() == 1


def test_each_half_has_a_stream_of_its_own_and_rows_keep_their_order():
    seen = []

    def double(x, y):
        seen.append((len(x), mx.default_stream(mx.cpu)))
        return 2 * x + y

    x, y = mx.arange(15).reshape(5, 3), mx.arange(5)[:, None]
    assert mx.array_equal(on_cores(2, lambda: cores.in_halves(double, x, y)), 2 * x + y)
    assert [count for count, _ in seen] == [3, 2]
    assert len({str(stream) for _, stream in seen} | {str(mx.default_stream(mx.cpu))}) == 3


def test_the_gradient_of_our_functions_is_computed_in_the_stream_of_the_function():
    seen = []

    @cores.custom_function
    def square(x):
        return x * x

    @square.vjp
    def _(x, g, _):
        seen.append(str(mx.default_stream(mx.cpu)))
        return 2 * x * g

    x = mx.arange(6.0).reshape(3, 2)
    grad = on_cores(2, lambda: mx.grad(lambda x: cores.in_halves(square, x).sum())(x))
    assert mx.array_equal(grad, 2 * x)
    assert len(set(seen) | {str(mx.default_stream(mx.cpu))}) == 3


@pytest.fixture
def language_model():
    mx.random.seed(0)
    tokenizer = train_tokenizer(["red green blue"], 300)
    return build_language_model(Qwen3Config(num_hidden_layers=2).to_hub(tokenizer))


def loss_and_gradients(language_model, is_compiled: bool = True) -> list:
    tokens = mx.random.randint(0, num_rows(language_model), (5, 9), key=mx.random.key(0))

    def loss(tokens):
        states = hidden_states(language_model, embed(language_model, tokens))
        return F.gelu(states).square().mean()

    function = nn.value_and_grad(language_model, loss)
    found = Compiler(is_compiled, 8)(function, state=[language_model.state])(tokens)
    mx.eval(found)
    return tree_flatten(found)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_loss_and_its_gradients_are_those_of_the_whole(language_model, is_compiled):
    whole = loss_and_gradients(language_model, is_compiled)
    halved = on_cores(2, lambda: loss_and_gradients(language_model, is_compiled))
    for (name, one), (_, other) in zip(whole, halved, strict=True):
        assert mx.allclose(one, other, rtol=1e-4, atol=1e-6), name


def test_they_are_the_same_to_the_bit_on_any_number_of_cores(language_model):
    two, four = (on_cores(count, lambda: loss_and_gradients(language_model)) for count in (2, 4))
    assert all(mx.array_equal(one, other) for (_, one), (_, other) in zip(two, four, strict=True))


def test_the_states_of_all_layers_are_those_of_the_whole():
    tower, images = CLIPVisionTower(VisionConfig(image_size=16, patch_size=8)), mx.random.normal((5, 16, 16, 3))
    whole, halved = tower.all_hidden_states(images), on_cores(2, lambda: tower.all_hidden_states(images))
    assert len(whole) == len(halved) == len(tower.encoder.layers) + 1
    assert all(mx.allclose(one, other, rtol=1e-4, atol=1e-5) for one, other in zip(whole, halved))


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 1.0}, {"repetition_penalty": 1.5}, {"num_beams": 3}, {"max_new_tokens": 1}]
)
def test_rows_get_the_same_tokens_in_halves(language_model, settings):
    prefix, config = mx.random.normal((7, 3, 64)), GenerationConfig(**{"max_new_tokens": 12} | settings)

    def decode(stop_id):
        return generate(CachedLanguageModel(language_model), prefix, config, stop_id=stop_id)

    never_stopped = decode(stop_id=1_000)
    for stop_id in (1_000, *{row[len(row) // 2] for row in never_stopped}):  # rows, and halves, end at different times
        assert on_cores(2, partial(decode, stop_id)) == decode(stop_id)
