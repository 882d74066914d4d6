"""Our forms of mlx-lm's layers: in our models, and in no other model of the process."""

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import activations, base, llama, qwen3
from mlx_lm.utils import _get_classes
from small_modules import tokenizer

from mlxmm.networks.language_model import Qwen3Config, build_language_model, load_language_model, save_language_model

SMALL = Qwen3Config(hidden_size=32, num_hidden_layers=2, intermediate_size=64)
TOKENS = mx.array([[1, 2, 3, 4]])


def plain_model(config: dict):
    """What mlx-lm makes of `config`, without us."""
    network, arguments = _get_classes(config)
    return network(arguments.from_dict(config))


def test_another_model_of_the_same_kind_runs_mlx_lms_own_code(tmp_path):
    config = SMALL.to_hub(tokenizer(False))
    theirs = plain_model(config)
    before = theirs(TOKENS)
    mx.eval(before)
    ours = build_language_model(config)
    save_language_model(tmp_path, ours, config)
    load_language_model(tmp_path)
    assert mx.array_equal(theirs(TOKENS), before)
    for module in (qwen3, llama):
        assert module.swiglu is activations.swiglu
        assert module.scaled_dot_product_attention is base.scaled_dot_product_attention
    assert type(plain_model(config).layers[0].mlp) is qwen3.MLP


def test_a_model_of_ours_computes_the_same_by_its_own_layers():
    config = SMALL.to_hub(tokenizer(False))
    ours, theirs = build_language_model(config), plain_model(config)
    theirs.load_weights(tree_flatten(ours.parameters()))
    np.testing.assert_allclose(np.array(ours(TOKENS)), np.array(theirs(TOKENS)), atol=1e-4)
    for layer in ours.layers:
        for part, base_class in ((layer.mlp, qwen3.MLP), (layer.self_attn, qwen3.Attention)):
            assert isinstance(part, base_class) and type(part) is not base_class
