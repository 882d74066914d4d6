"""Export Qwen3Aligner as a LLaVA folder that transformers loads, and read it back.

LLaVA (arXiv 2310.03744) as `LlavaForConditionalGeneration` has it: a CLIP or SigLIP tower, two layers as wide as the
language model with an activation between them, and a Qwen3. Our `mlp` is that with GELU, narrower or wider than the
language model, so the one or the other gets features that are zero; `linear` is the first layer, with no activation and
the identity behind it. V vocabulary, D features of the tower, W of the projector, H of the language model.
"""

import json
import shutil
from pathlib import Path

import attrs
import mlx.core as mx
from mlx.utils import tree_flatten

from mlxmm.compute.precision import dtype_name
from mlxmm.errors import UserError
from mlxmm.export import model_card
from mlxmm.export.widening import narrow, widen, widened_config
from mlxmm.networks import pretrained_vision
from mlxmm.networks.language_model import dense_config, dense_weights, without_dtype
from mlxmm.preprocessing.tokenizers import start_tokens, with_image_token
from mlxmm.storage.atomic import write_json, write_text
from mlxmm.storage.pretrained import write_arrays

TOWERS = ("clip_vision_model", "siglip_vision_model")
ACTIVATIONS = {
    "mlp": "gelu",
    "linear": "linear",
}  # activation between the layers of each projector; "linear" means none
# Of Qwen3AlignerConfig, what captioning needs.
KEPT = ("layer", "projector", "projector_width", "prompt", "max_new_tokens")
# Its own, where LLaVA's has padding, and one dtype for all parts.
OF_LANGUAGE_MODEL = ("vocab_size", "dtype", "hidden_size", "rms_norm_eps")
OURS = "mlxmm"  # key in config.json of settings that LLaVA does not have; transformers ignores it
LINEAR = {
    "projector.layers.0": "multi_modal_projector.linear_1",
    "projector.layers.1": "multi_modal_projector.linear_2",
}
MLX_VLM_MODEL = "mlx_vlm_llava.py"  # from which mlx-vlm, whose own llava knows no Qwen3, takes the model
TABLES = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")  # (V, H)
TEMPLATE = (
    "{%- set said = namespace(text='') -%}{%- for message in messages -%}"
    "{%- if message['content'] is string -%}{%- set said.text = said.text + message['content'] -%}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- IMAGE -}}"
    "{%- elif part['type'] == 'text' -%}{%- set said.text = said.text + part['text'] -%}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{%- endfor -%}{{- said.text or PROMPT -}}"
)


def check(aligner) -> None:
    """Raise `UserError` if a part of `aligner` has no counterpart in LLaVA."""
    config, kind = aligner.config, _tower_kind(aligner)
    if kind not in TOWERS:
        raise UserError(f"LLaVA has no {kind} tower: a CLIP or SigLIP can be exported, by --module.vision")
    if config.projector not in ACTIVATIONS:
        raise UserError(f"LLaVA has no projector {config.projector}: --module.projector mlp or linear can be exported")
    if aligner.lm_config["model_type"] != "qwen3":
        raise UserError(f"a Qwen3 can be exported; this language model is a {aligner.lm_config['model_type']}")


def write(folder: Path, aligner, metrics: dict) -> None:
    """Write what `LlavaForConditionalGeneration` and `AutoProcessor` load, data.json,
    which says what `aligner` was trained on, and a model card with that and `metrics`.

    Raises `UserError` if a part of `aligner` has no counterpart in LLaVA.
    """
    check(aligner)
    tokenizer, image = with_image_token(aligner.tokenizer)
    _check_prompt(tokenizer, image, aligner)
    image_id = tokenizer.convert_tokens_to_ids(image)
    weights = _weights(aligner, num_tokens=image_id + 1)
    write_arrays(folder / "model.safetensors", weights, format="pt")
    files = {
        "config.json": _config(aligner, weights, image_id),
        "generation_config.json": _generation(aligner, image_id),
        "preprocessor_config.json": aligner.processor.to_hub(),
        "processor_config.json": _processor(aligner, image),
    }
    for name, values in files.items():
        write_json(folder / name, values)
    shutil.copyfile(Path(__file__).with_name(MLX_VLM_MODEL), folder / MLX_VLM_MODEL)
    prompt = json.dumps(aligner.config.prompt, ensure_ascii=False)  # which is a string of Jinja's too
    tokenizer.chat_template = TEMPLATE.replace("IMAGE", json.dumps(image)).replace("PROMPT", prompt)
    tokenizer.save_pretrained(str(folder))
    lineage = aligner.lineage.public()
    lineage.write(folder)
    write_text(folder / "README.md", model_card.captioner(aligner.config, image, metrics, lineage))


def own_values(values: dict, folder: Path) -> dict:
    """Convert a `config.json` that `write` made to that of our checkpoints. Raises `UserError` for other LLaVAs."""
    if OURS not in values:
        raise UserError(f"{folder} is a LLaVA that Qwen3Aligner.save_pretrained did not write")
    ours = dict(values[OURS])
    own = {name: ours.pop(name) for name in OF_LANGUAGE_MODEL if name in ours}
    language_model = values["text_config"] | own
    return {"aligner": ours, "vision": values["vision_config"], "language_model": language_model}


def own_weights(weights: dict[str, mx.array], aligner) -> dict[str, mx.array]:
    """Convert arrays that `write` wrote to the names and shapes of `aligner`'s, without the padding."""
    tower = {name.removeprefix("vision_tower."): a for name, a in weights.items() if name.startswith("vision_tower.")}
    arrays = {f"vision.{name}": a for name, a in pretrained_vision.from_hub(tower, aligner.vision_config).items()}
    arrays |= _own_language_model(weights, aligner)
    H, W = _text_width(aligner), aligner.config.projector_width
    for (ours, theirs), _ in zip(LINEAR.items(), aligner.projector.layers):
        arrays |= {f"{ours}.{kind}": weights[f"{theirs}.{kind}"] for kind in ("weight", "bias")}
    if aligner.config.projector == "linear":
        return arrays
    first, second = LINEAR
    cut = {name: arrays[name][:W] for name in (f"{first}.weight", f"{first}.bias")}
    return (
        arrays
        | cut
        | {f"{second}.weight": arrays[f"{second}.weight"][:H, :W], f"{second}.bias": arrays[f"{second}.bias"][:H]}
    )


def _own_language_model(weights: dict[str, mx.array], aligner) -> dict[str, mx.array]:
    theirs = {name: array for name, array in weights.items() if name.startswith("language_model.")}
    shapes = {name: array.shape for name, array in tree_flatten(aligner.parameters()) if name in theirs}
    return narrow(theirs, shapes, _text_width(aligner), theirs[TABLES[0]].shape[1])


def _weights(aligner, num_tokens: int) -> dict[str, mx.array]:
    """All arrays under transformers' names; a table of tokens has `num_tokens` rows at least."""
    own = widen(dense_weights(aligner.language_model), _text_width(aligner), _width(aligner))
    language_model = {f"language_model.{name}": array for name, array in own.items()}
    for name in TABLES:
        if name in language_model:
            # A tokenizer without a spare token gets a new one for the image, in the export only. The embedding of the
            # new token is never read, and `suppress_tokens` keeps it from being generated.
            table = language_model[name]
            language_model[name] = mx.pad(table, [(0, max(0, num_tokens - len(table))), (0, 0)])
    tower = {
        f"vision_tower.{name}": a for name, a in pretrained_vision.to_hub(aligner.vision, aligner.vision_config).items()
    }
    side = aligner.processor.image_size // aligner.vision.config.patch_size
    # transformers expects position embeddings for the processor's image size.
    tower["vision_tower.embeddings.position_embedding.weight"] = aligner.vision.embeddings.positions(side, side)
    return tower | _projector(aligner) | language_model


def _projector(aligner) -> dict[str, mx.array]:
    """Both layers as wide as LLaVA's language model. Features beyond W are zero before and after GELU."""
    one, two = LINEAR.values()
    if aligner.config.projector == "linear":
        (layer,), width = aligner.projector.layers, _text_width(aligner)
        identity = {f"{two}.weight": mx.eye(width), f"{two}.bias": mx.zeros(width)}
        return {f"{one}.weight": layer.weight, f"{one}.bias": layer.bias} | identity
    inside, after = (_width(aligner) - own for own in (aligner.config.projector_width, _text_width(aligner)))
    first, second = aligner.projector.layers
    return {
        f"{one}.weight": mx.pad(first.weight, [(0, inside), (0, 0)]),
        f"{one}.bias": mx.pad(first.bias, [(0, inside)]),
        f"{two}.weight": mx.pad(second.weight, [(0, after), (0, inside)]),
        f"{two}.bias": mx.pad(second.bias, [(0, after)]),
    }


def _config(aligner, weights: dict[str, mx.array], image_id: int) -> dict:
    is_tied, dtype = TABLES[1] not in weights, {"dtype": _dtype(weights)}
    size, kind = aligner.processor.image_size, _tower_kind(aligner)
    tower = aligner.vision_config | attrs.asdict(aligner.vision.config) | {"model_type": kind, "image_size": size}
    text = widened_config(dense_config(aligner.lm_config), _width(aligner))
    text |= {"vocab_size": len(weights[TABLES[0]]), "tie_word_embeddings": is_tied}
    kept = {name: getattr(aligner.config, name) for name in KEPT}
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        **dtype,
        "vision_config": without_dtype(tower) | dtype,
        "text_config": without_dtype(text) | dtype,
        "image_token_index": image_id,
        "image_seq_length": (size // aligner.vision.config.patch_size) ** 2,
        "vision_feature_layer": _layer(aligner),
        "vision_feature_select_strategy": _strategy(aligner),
        "projector_hidden_act": ACTIVATIONS[aligner.config.projector],
        "multimodal_projector_bias": True,
        "tie_word_embeddings": is_tied,
        "model_file": MLX_VLM_MODEL,
        OURS: kept | {name: aligner.lm_config[name] for name in OF_LANGUAGE_MODEL},
    }


def _generation(aligner, image_id: int) -> dict:
    """Greedy, as long as captions were in training."""
    stop = {"eos_token_id": aligner.stop_id, "pad_token_id": aligner.stop_id}
    return stop | {"do_sample": False, "max_new_tokens": aligner.max_new_tokens, "suppress_tokens": [image_id]}


def _processor(aligner, image: str) -> dict:
    return {
        "processor_class": "LlavaProcessor",
        "image_token": image,
        "patch_size": aligner.vision.config.patch_size,
        "num_additional_image_tokens": int(_has_class_token(aligner)),
        "vision_feature_select_strategy": _strategy(aligner),
    }


def _check_prompt(tokenizer, image: str, aligner) -> None:
    """Raise `UserError` if the tokenizer adds tokens around or between image and prompt other than the start token."""
    prompt = aligner.tokenizer(aligner.config.prompt, add_special_tokens=False)["input_ids"]
    wanted, read = (
        [*start_tokens(tokenizer), tokenizer.convert_tokens_to_ids(image), *prompt],
        tokenizer(image + aligner.config.prompt)["input_ids"],
    )
    if read != wanted:
        raise UserError(f"the tokenizer makes {read} of image and prompt together, but the module reads {wanted}")


def _tower_kind(aligner) -> str:
    return aligner.vision_config.get("model_type", TOWERS[0])


def _text_width(aligner) -> int:
    return aligner.projector.layers[-1].weight.shape[0]


def _width(aligner) -> int:
    """The features of LLaVA's language model: ours, or as many as the projector has."""
    return max(_text_width(aligner), aligner.config.projector_width if aligner.config.projector == "mlp" else 0)


def _has_class_token(aligner) -> bool:
    return "class_embedding" in aligner.vision.embeddings


def _layer(aligner) -> int:
    """The hidden states to read, counted from the last where they are the first: transformers 5.23 takes 0 for none."""
    return aligner.config.layer or -aligner.vision.config.num_hidden_layers - 1


def _strategy(aligner) -> str:
    """LLaVA's names for features without their first, and for all of them."""
    return "default" if _has_class_token(aligner) else "full"


def _dtype(weights: dict[str, mx.array]) -> str:
    """The widest of the floats: transformers takes one for the whole model."""
    return dtype_name(max((a.dtype for a in weights.values()), key=lambda dtype: dtype.size))
