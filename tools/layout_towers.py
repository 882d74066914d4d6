"""The files of towers on the Hub, as their repositories have them: CLIP, SigLIP, ViT.

`tiny` narrows the networks; then a `config.json` also names the sizes that the real one leaves out, since they are no
defaults any more. Pictures, patches and vocabularies stay as they are.
"""

import math
from typing import Any

from tools.layout_weights import Array

STD = 0.02
CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
HALF = [0.5, 0.5, 0.5]
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
CLIP_TEXT = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_hidden_layers": 12}
# What transformers 4.16 wrote into every part of a configuration.
OLD_DEFAULTS: dict[str, Any] = {
    "_name_or_path": "",
    "add_cross_attention": False,
    "architectures": None,
    "bad_words_ids": None,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "decoder_start_token_id": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "finetuning_task": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_decoder": False,
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "prefix": None,
    "problem_type": None,
    "pruned_heads": {},
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "return_dict": True,
    "return_dict_in_generate": False,
    "sep_token_id": None,
    "task_specific_params": None,
    "temperature": 1.0,
    "tie_encoder_decoder": False,
    "tie_word_embeddings": True,
    "tokenizer_class": None,
    "top_k": 50,
    "top_p": 1.0,
    "torch_dtype": None,
    "torchscript": False,
    "transformers_version": "4.16.0.dev0",
    "use_bfloat16": False,
}


# ---- config.json


def clip_config(tiny: bool, *, hidden_act: str) -> dict:
    """CLIP ViT-B/32. The end token 2 stands for the highest id, as in the first configurations."""
    shared = {"attention_dropout": 0.0, "dropout": 0.0, "hidden_act": hidden_act, "initializer_factor": 1.0}
    shared |= {"initializer_range": 0.02, "layer_norm_eps": 1e-05, "projection_dim": 16 if tiny else 512}
    text = {"model_type": "clip_text_model", "vocab_size": 49_408, "max_position_embeddings": 77}
    text |= {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1} | (TINY if tiny else CLIP_TEXT)
    vision = {"model_type": "clip_vision_model", "image_size": 224, "patch_size": 32}
    vision |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None} | (TINY if tiny else BASE)
    return {
        "architectures": ["CLIPModel"],
        "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592,
        "model_type": "clip",
        "projection_dim": shared["projection_dim"],
        "text_config": dict(sorted((OLD_DEFAULTS | shared | text).items())),
        "text_config_dict": None,
        "transformers_version": None,
        "vision_config": dict(sorted((OLD_DEFAULTS | shared | vision).items())),
        "vision_config_dict": None,
    }


def siglip_config(tiny: bool, **text) -> dict:
    """SigLIP B/16, which leaves out what is a default: nearly everything. `text` is what it says of the texts."""
    sizes = TINY if tiny else {}
    return {
        "architectures": ["SiglipModel"],
        "initializer_factor": 1.0,
        "model_type": "siglip",
        "text_config": {"model_type": "siglip_text_model"} | text | sizes,
        "torch_dtype": "float32",
        "vision_config": {"model_type": "siglip_vision_model"} | sizes,
    }


def vit_config(tiny: bool) -> dict:
    """ViT B/16 of ImageNet-21k."""
    return {
        "_name_or_path": "google/vit-base-patch16-224-in21k",
        "architectures": ["ViTModel"],
        "attention_probs_dropout_prob": 0.0,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "image_size": 224,
        "initializer_range": 0.02,
        "layer_norm_eps": 1e-12,
        "model_type": "vit",
        "num_channels": 3,
        "patch_size": 16,
        "qkv_bias": True,
        "transformers_version": "4.13.0.dev0",
        **(TINY if tiny else BASE),
    }


# ---- preprocessor_config.json


def clip_preprocessing() -> dict:
    """As before 2023: sizes are numbers, and the class is a feature extractor."""
    values = {"crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True}
    values |= {"feature_extractor_type": "CLIPFeatureExtractor", "image_mean": CLIP_MEAN, "image_std": CLIP_STD}
    return values | {"resample": 3, "size": 224}


def siglip_preprocessing(**settings) -> dict:
    values = settings | {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": HALF,
        "image_std": HALF,
    }
    values |= {"image_processor_type": "SiglipImageProcessor", "processor_class": "SiglipProcessor"}
    return values | {"rescale_factor": 0.00392156862745098, "size": {"height": 224, "width": 224}}


def vit_preprocessing() -> dict:
    values = {"do_normalize": True, "do_resize": True, "feature_extractor_type": "ViTFeatureExtractor"}
    return values | {"image_mean": HALF, "image_std": HALF, "resample": 2, "size": 224}


# ---- arrays, in the order of a state dict


def clip_arrays(config: dict) -> dict[str, Array]:
    """With the position ids that transformers before 4.31 saved."""
    text, vision, size = config["text_config"], config["vision_config"], config["projection_dim"]
    width, num_positions, patch = vision["hidden_size"], _num_patches(vision) + 1, vision["patch_size"]
    arrays = {"logit_scale": Array((), mean=config["logit_scale_init_value"])}
    arrays |= _text_embeddings(text, position_ids=True) | _encoder("text_model", text)
    arrays |= _norm("text_model.final_layer_norm", text["hidden_size"])
    embeddings = {
        "class_embedding": Array((width,), STD),
        "position_ids": _position_ids(num_positions),
        "patch_embedding.weight": Array((width, 3, patch, patch), STD),
        "position_embedding.weight": Array((num_positions, width), STD),
    }
    arrays |= _under("vision_model.embeddings", embeddings) | _norm("vision_model.pre_layrnorm", width)
    arrays |= _encoder("vision_model", vision) | _norm("vision_model.post_layernorm", width)
    projections = {"visual_projection": vision["hidden_size"], "text_projection": text["hidden_size"]}
    return arrays | {f"{name}.weight": Array((size, width), STD) for name, width in projections.items()}


def siglip_arrays(config: dict) -> dict[str, Array]:
    """Two towers, the vision tower with its pooling head."""
    sizes = BASE | {"vocab_size": 32_000, "max_position_embeddings": 64, "image_size": 224, "patch_size": 16}
    text, vision = sizes | config["text_config"], sizes | config["vision_config"]
    width, patch = vision["hidden_size"], vision["patch_size"]
    arrays = {"logit_bias": Array((1,), mean=-10.0), "logit_scale": Array((1,), mean=math.log(10))}
    arrays |= _text_embeddings(text) | _encoder("text_model", text)
    arrays |= _norm("text_model.final_layer_norm", text["hidden_size"])
    arrays |= _linear("text_model.head", text["hidden_size"], width)
    embeddings = {
        "patch_embedding.weight": Array((width, 3, patch, patch), STD),
        "patch_embedding.bias": Array((width,)),
        "position_embedding.weight": Array((_num_patches(vision), width), STD),
    }
    arrays |= _under("vision_model.embeddings", embeddings)
    arrays |= _encoder("vision_model", vision) | _norm("vision_model.post_layernorm", width)
    return arrays | _under("vision_model.head", _pooling_head(width, vision["intermediate_size"]))


def vit_arrays(config: dict) -> dict[str, Array]:
    """A ViTModel with its pooler."""
    width, inner, patch = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    arrays = {
        "embeddings.cls_token": Array((1, 1, width), STD),
        "embeddings.position_embeddings": Array((1, _num_patches(config) + 1, width), STD),
        "embeddings.patch_embeddings.projection.weight": Array((width, 3, patch, patch), STD),
        "embeddings.patch_embeddings.projection.bias": Array((width,)),
    }
    for i in range(config["num_hidden_layers"]):
        layer: dict[str, Array] = {}
        for name in ("query", "key", "value"):
            layer |= _linear(f"attention.attention.{name}", width, width)
        layer |= _linear("attention.output.dense", width, width)
        layer |= _linear("intermediate.dense", width, inner) | _linear("output.dense", inner, width)
        layer |= _norm("layernorm_before", width) | _norm("layernorm_after", width)
        arrays |= _under(f"encoder.layer.{i}", layer)
    return arrays | _norm("layernorm", width) | _linear("pooler.dense", width, width)


def _text_embeddings(config: dict, *, position_ids: bool = False) -> dict[str, Array]:
    width, length = config["hidden_size"], config["max_position_embeddings"]
    ids = {"position_ids": _position_ids(length)} if position_ids else {}
    tables = {"token_embedding": config["vocab_size"], "position_embedding": length}
    weights = {f"{name}.weight": Array((rows, width), STD) for name, rows in tables.items()}
    return _under("text_model.embeddings", ids | weights)


def _encoder(tower: str, config: dict) -> dict[str, Array]:
    """The blocks of CLIP and SigLIP."""
    width, inner, arrays = config["hidden_size"], config["intermediate_size"], {}
    for i in range(config["num_hidden_layers"]):
        layer: dict[str, Array] = {}
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            layer |= _linear(f"self_attn.{name}", width, width)
        layer |= _norm("layer_norm1", width)
        layer |= _linear("mlp.fc1", width, inner) | _linear("mlp.fc2", inner, width)
        arrays |= _under(f"{tower}.encoder.layers.{i}", layer | _norm("layer_norm2", width))
    return arrays


def _pooling_head(width: int, inner: int) -> dict[str, Array]:
    """PyTorch's attention, whose queries, keys and values are one matrix."""
    arrays = {"probe": Array((1, 1, width), STD)}
    arrays |= {
        "attention.in_proj_weight": Array((3 * width, width), STD),
        "attention.in_proj_bias": Array((3 * width,)),
    }
    arrays |= _linear("attention.out_proj", width, width) | _norm("layernorm", width)
    return arrays | _linear("mlp.fc1", width, inner) | _linear("mlp.fc2", inner, width)


def _linear(name: str, num_in: int, num_out: int) -> dict[str, Array]:
    return {f"{name}.weight": Array((num_out, num_in), STD), f"{name}.bias": Array((num_out,))}


def _norm(name: str, width: int) -> dict[str, Array]:
    return {f"{name}.weight": Array((width,), mean=1.0), f"{name}.bias": Array((width,))}


def _position_ids(length: int) -> Array:
    return Array((1, length), dtype="I64")


def _num_patches(config: dict) -> int:
    return (config["image_size"] // config["patch_size"]) ** 2


def _under(prefix: str, arrays: dict[str, Array]) -> dict[str, Array]:
    return {f"{prefix}.{name}": array for name, array in arrays.items()}
