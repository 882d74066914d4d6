"""Write what transformers computes with small language models of each family: tests/fixtures/language_models.json.

    python tools/make_language_model_fixtures.py

Needs torch and transformers; the test that reads the file needs no torch. Weights are not stored: `fill` makes them of
a seed.
"""

import json
from pathlib import Path

import numpy as np

FILE = Path(__file__).parent.parent / "tests" / "fixtures" / "language_models.json"
SIZES = {"hidden_size": 16, "num_hidden_layers": 4, "intermediate_size": 24, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 1, "vocab_size": 20, "max_position_embeddings": 64, "hidden_act": "silu"}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PLAIN = {"rope_type": "default", "rope_theta": 500_000.0}
LINEAR = {"rope_type": "linear", "rope_theta": 20_000.0, "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 20_000.0, "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "rope_theta": 20_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
DEEP_YARN = YARN | {"mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 16, "beta_slow": 2}
CASES = {
    "llama": ("llama", {"rope_parameters": PLAIN}),
    "llama-linear": ("llama", {"rope_parameters": LINEAR}),
    "llama-dynamic": ("llama", {"rope_parameters": DYNAMIC}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-yarn-mscale": ("llama", {"rope_parameters": DEEP_YARN}),
    "smollm2": ("llama", {"rope_parameters": PLAIN | {"rope_theta": 100_000.0}, "tie_word_embeddings": True}),
    "smollm3": ("smollm3", {"rope_parameters": PLAIN | {"rope_theta": 5_000_000.0}}),
    "mistral": ("mistral", {"rope_parameters": PLAIN | {"rope_theta": 1_000_000.0}, "sliding_window": None}),
    "qwen2": ("qwen2", {"rope_parameters": PLAIN | {"rope_theta": 30_000.0}, "tie_word_embeddings": True}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {"rope_parameters": PLAIN | {"rope_theta": 30_000.0}, "head_dim": 12}),
    "qwen3-yarn": ("qwen3", {"rope_parameters": YARN, "head_dim": 8, "tie_word_embeddings": True}),
}
TOKENS = [3, 7, 7, 12, 19, 4, 5, 11, 6, 3, 18, 9, 14, 10, 3, 8, 17, 6, 13, 15]
LAST = 6  # positions whose logits are stored


def fill(arrays: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Weights of these names and shapes, large enough that every one shows in the logits."""
    rng, filled = np.random.default_rng(0), {}
    for name, shape in sorted(arrays.items()):
        noise = rng.standard_normal(shape)
        filled[name] = noise * 1.5 / shape[-1] ** 0.5 if len(shape) > 1 else 1 + 0.2 * noise
    return {name: array.astype(np.float32) for name, array in filled.items()}


def computed(kind: str, settings: dict) -> dict:
    """The config.json that transformers saves, the shapes of its arrays, and the last logits of TOKENS."""
    import torch
    import transformers

    config = transformers.AutoConfig.for_model(kind, **SIZES | settings)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    model.load_state_dict({name: torch.tensor(array) for name, array in fill(shapes).items()}, strict=False)
    model.tie_weights()
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS])).logits[0, -LAST:]
    saved = json.loads(model.config.to_json_string(use_diff=True))
    saved["architectures"] = [type(model).__name__]
    return {"config": saved, "shapes": shapes, "logits": logits.numpy().round(4).tolist()}


if __name__ == "__main__":
    values = {"tokens": TOKENS} | {name: computed(*case) for name, case in CASES.items()}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in values.items())
    FILE.write_text("{" + lines + "}\n")
    print(FILE.name, FILE.stat().st_size, "bytes")
