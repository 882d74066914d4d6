"""Language models of each family against a forward pass of transformers, which is stored.

`tools/make_language_model_fixtures.py` wrote the numbers.
"""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from transformers import AutoConfig

from mlxmm.errors import UserError
from mlxmm.networks.language_model import (
    build_language_model,
    embed,
    head,
    hidden_states,
    load_language_model,
    require_language_model,
    save_language_model,
)
from mlxmm.networks.language_model_config import DEFAULTS, complete, context_length
from mlxmm.storage.pretrained import write_arrays
from tools.make_language_model_fixtures import fill

STORED = json.loads((Path(__file__).parents[1] / "fixtures" / "language_models.json").read_text())
TOKENS = mx.array([STORED.pop("tokens")])
LLAMA = STORED["llama"]["config"]


def write(folder: Path, name: str, config: dict | None = None) -> Path:
    case = STORED[name]
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or case["config"]))
    weights = {key: mx.array(array) for key, array in fill(case["shapes"]).items()}
    write_arrays(folder / "model.safetensors", weights, format="pt")
    return folder


def assert_logits(model, name: str) -> None:
    wanted = np.array(STORED[name]["logits"])
    logits = head(model, hidden_states(model, embed(model, TOKENS)))[0, -len(wanted) :]
    assert np.abs(np.array(logits) - wanted).max() < 2e-4 * np.abs(wanted).max()


def flat(config: dict) -> dict:
    """As transformers 4 wrote it."""
    rope = dict(config["rope_parameters"])
    theta, scaling = rope.pop("rope_theta"), rope if rope["rope_type"] != "default" else None
    kept = {key: value for key, value in config.items() if key != "rope_parameters"}
    return kept | {"rope_theta": theta, "rope_scaling": scaling}


@pytest.mark.parametrize("layout", [dict, flat], ids=["transformers 5", "transformers 4"])
@pytest.mark.parametrize("name", STORED)
def test_logits_are_those_of_transformers_in_both_layouts(name, layout, tmp_path):
    model, _ = load_language_model(write(tmp_path / "lm", name, layout(STORED[name]["config"])))
    assert_logits(model, name)


def test_every_family_that_is_taken_has_a_stored_forward_pass():
    assert {case["config"]["model_type"] for case in STORED.values()} == set(DEFAULTS)


@pytest.mark.parametrize("name", STORED)
def test_an_export_says_the_same_rope_to_transformers_and_to_mlx_lm(name, tmp_path):
    model, config = load_language_model(write(tmp_path / "lm", name))
    (tmp_path / "out").mkdir()
    save_language_model(tmp_path / "out", model, config)
    before, after = (AutoConfig.from_pretrained(tmp_path / folder).rope_parameters for folder in ("lm", "out"))
    assert before == after
    import mlx_lm.utils

    network, _ = mlx_lm.utils.load_model(tmp_path / "out")  # alone, as its users run it
    wanted = np.array(STORED[name]["logits"])
    assert np.abs(np.array(network(TOKENS))[0, -len(wanted) :] - wanted).max() < 2e-4 * np.abs(wanted).max()


def test_settings_that_a_file_leaves_out_are_those_of_transformers():
    for name, case in STORED.items():
        config = {"model_type": case["config"]["model_type"], "num_attention_heads": 2}
        if name == "smollm3":
            config["num_hidden_layers"] = 36
        ours, theirs = complete(config), AutoConfig.for_model(**config)
        own = {"rope_theta": theirs.rope_parameters["rope_theta"]}
        kept = {key: ours[key] for key in (*DEFAULTS[config["model_type"]], "num_key_value_heads")}
        windowed = {"sliding_window": kept.get("sliding_window")} if "use_sliding_window" in kept else {}
        assert kept == {key: getattr(theirs, key, None) for key in kept} | own | windowed, name


def test_a_head_that_is_not_tied_is_read_where_the_file_does_not_say_so(tmp_path):
    config = {key: value for key, value in LLAMA.items() if key != "tie_word_embeddings"}
    model, _ = load_language_model(write(tmp_path / "lm", "llama", config))
    assert_logits(model, "llama")


@pytest.mark.parametrize("names", [["num_key_value_heads"], ["head_dim"], ["layer_types", "rope_scaling"]])
def test_a_null_is_a_setting_that_is_left_out(names, tmp_path):
    case = STORED["smollm2"]
    config = case["config"] | {"num_key_value_heads": 1} | dict.fromkeys(names)
    if "num_key_value_heads" in names:
        assert complete(config)["num_key_value_heads"] == config["num_attention_heads"]
    else:
        assert_logits(load_language_model(write(tmp_path / "lm", "smollm2", config))[0], "smollm2")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope_type is 'longrope'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "rope_parameters has truncate"),
        ({"rope_parameters": {"rope_type": "linear"}}, "lacks the factor of 'linear'"),
        ({"rope_parameters": "linear"}, "must be an object, 'linear' came"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', and mlx-lm computes silu"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"vocab_size": None}, "lacks 'vocab_size'"),
        ({"model_type": "gpt2", "vocab_size": 20}, "lacks 'n_ctx', 'n_embd', 'n_head', 'n_layer', "),
        ({"model_type": "olmo"}, "it wants a package that is not there"),
        ({"model_type": None}, "Model type None not supported"),
    ],
)
def test_a_config_that_mlx_lm_does_not_compute_is_one_line(changes, message, tmp_path, capsys):
    folder = write(tmp_path / "lm", "llama", LLAMA | changes)
    for check in (load_language_model, require_language_model):
        with pytest.raises(UserError, match=message) as error:
            check(folder)
        assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_a_network_that_turns_otherwise_than_its_file_says_is_refused(tmp_path, monkeypatch):
    import mlx_lm.models.llama

    plain = mlx_lm.models.llama.initialize_rope
    monkeypatch.setattr(mlx_lm.models.llama, "initialize_rope", lambda dims, base, *rest: plain(dims, 10_000, *rest))
    with pytest.raises(UserError, match="whose RoPE mlx-lm does not compute as transformers"):
        load_language_model(write(tmp_path / "lm", "llama"))


def test_a_family_that_was_not_compared_is_refused(tmp_path):
    config = LLAMA | {"model_type": "mixtral", "num_local_experts": 2, "rope_theta": 1e4, "rope_parameters": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    network = build_language_model(config)
    write_arrays(tmp_path / "model.safetensors", dict(tree_flatten(network.parameters())), format="mlx")
    with pytest.raises(UserError, match="holds a mixtral, which was not compared with transformers"):
        load_language_model(tmp_path)


def test_a_window_that_mlx_lm_does_not_have_is_the_context():
    mistral = complete(STORED["mistral"]["config"])
    assert context_length(mistral) == 64
    assert context_length(mistral | {"sliding_window": 24}) == 24
    qwen = complete(STORED["qwen2"]["config"]) | {"sliding_window": 24}
    assert (context_length(qwen), context_length(qwen | {"use_sliding_window": True})) == (64, 24)
