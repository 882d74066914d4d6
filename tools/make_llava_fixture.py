"""Write what transformers saves of small LLaVAs, without their weights: tests/fixtures/llava.json.

    python tools/make_llava_fixture.py

Needs torch and transformers; the tests that read the file need neither torch nor this file.
"""

import json
import tempfile
from pathlib import Path

import transformers
from safetensors import safe_open
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

FILE = Path(__file__).parent.parent / "tests" / "fixtures" / "llava.json"
VISION = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 32}
VISION |= {"image_size": 16, "patch_size": 4, "layer_norm_eps": 0.01}
TEXT = {"model_type": "qwen3", "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "head_dim": 8}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 64}
TEXT |= {"rope_theta": 5_000.0, "rms_norm_eps": 0.001, "hidden_act": "silu", "attention_bias": False}
CLIP = VISION | {"model_type": "clip_vision_model", "hidden_act": "gelu"}
SIGLIP = VISION | {"model_type": "siglip_vision_model"}
CASES = {  # tower, language model, layer
    "clip": (CLIP, TEXT | {"tie_word_embeddings": True}, -2),
    "clip-untied": (CLIP | {"hidden_act": "quick_gelu"}, TEXT | {"tie_word_embeddings": False}, 1),
    "siglip": (SIGLIP, TEXT | {"tie_word_embeddings": True}, -1),
    "siglip-headless": (SIGLIP | {"vision_use_head": False}, TEXT | {"tie_word_embeddings": True}, 2),
}


def saved(vision: dict, text: dict, layer: int) -> dict:
    """The settings of a model and a processor as transformers writes them, and the shapes of all arrays."""
    has_class_token = vision["model_type"] == "clip_vision_model"
    strategy = "default" if has_class_token else "full"
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=text["vocab_size"] - 1,
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
    )
    processor = transformers.LlavaProcessor(
        image_processor=CLIPImageProcessorPil(),
        tokenizer=_tokenizer(),
        patch_size=vision["patch_size"],
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(has_class_token),
    )
    with tempfile.TemporaryDirectory() as folder:
        transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
        processor.save_pretrained(folder)
        values = {
            name: json.loads((Path(folder) / f"{name}.json").read_text()) for name in ("config", "processor_config")
        }
        with safe_open(Path(folder) / "model.safetensors", "numpy") as file:
            values["arrays"] = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    del values["processor_config"]["image_processor"], values["config"]["transformers_version"]
    return {"vision": vision, "text": text, "layer": layer, **values}


def _tokenizer():
    import tokenizers

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<image>": 0}, unk_token="<image>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words)


if __name__ == "__main__":
    values = {name: saved(*case) for name, case in CASES.items()}
    FILE.write_text(json.dumps(values, indent=1) + "\n")
    print(FILE.name, FILE.stat().st_size, "bytes")
