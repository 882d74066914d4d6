"""A Qwen2.5-VL of two narrow layers with random weights, in the Hub's layout: some hundred kilobytes."""

import json
from pathlib import Path

from mlxmm.preprocessing.tokenizers import train_tokenizer

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' or 'image' in c or 'image_url' in c %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in c %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = {
    "model_type": "qwen2_5_vl",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "tie_word_embeddings": True,
}
VISION = {
    "model_type": "qwen2_5_vl",
    "depth": 2,
    "fullatt_block_indexes": [1],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_heads": 4,
    "out_hidden_size": 64,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "in_chans": 3,
}
PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.25, 0.25, 0.25],
}


def save_tiny_qwen_vl(folder: Path) -> Path:
    """Needs mlx-vlm."""
    tokenizer = train_tokenizer(["a red circle above a blue square", "what is this?"], 300)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(str(folder))
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL)))
    config = TEXT | {
        "vocab_size": len(tokenizer),
        "eos_token_id": ids["<|im_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_config": VISION,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    _save_weights(folder, config, [_can_be_written(tokenizer, token) for token in range(len(tokenizer))])
    return folder


def _can_be_written(tokenizer, token: int) -> bool:
    """Whether a token is letters, or ends the caption: of other bytes, readers make different text."""
    text = tokenizer.decode([token])
    return text == "<|im_end|>" or (text.isascii() and text.isprintable() and text not in tokenizer.all_special_tokens)


def _save_weights(folder: Path, config: dict, written: list[bool]) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_vlm.models.qwen2_5_vl import Model, ModelConfig, TextConfig
    from mlx_vlm.models.qwen2_5_vl import VisionConfig as Vision

    settings = ModelConfig.from_dict(config)
    settings.text_config, settings.vision_config = TextConfig.from_dict(config), Vision.from_dict(VISION)
    mx.random.seed(5)
    # Weights this large give each picture a caption of its own.
    weights = {
        name: mx.random.normal(array.shape) * (0.6 if array.ndim > 1 else 0.0) + (1.0 if array.ndim == 1 else 0.0)
        for name, array in tree_flatten(Model(settings).parameters())
    }
    # The embeddings are also the output layer: a token of zeros is never the most likely one.
    weights["language_model.model.embed_tokens.weight"] *= mx.array(written)[:, None]
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
