"""Write repositories as the Hub has them, with random weights: the code that loads real models runs without a network.

    python -m tools.make_real_layouts --out FOLDER
    python -m tools.make_real_layouts --out FOLDER --tiny
    python -m tools.make_real_layouts --out FOLDER --only Qwen/Qwen3-0.6B-Base nlphuji/flickr30k --rows 600

A model lies in FOLDER/user/name, a data set in FOLDER/datasets/user/name, another revision than main in
user/name@revision. Names of files, settings and arrays, shapes and types of numbers are those of the repository.
`--tiny` writes the same files and names in seconds, with narrow networks of few layers. What mlxmm does not read is
short or left out: SigLIP has no spiece.model, SigLIP 2 a small tokenizer, open_clip's files hold one array each, and
there are no weights for TensorFlow and Flax.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import attrs

from tools import layout_flickr30k as flickr30k
from tools import layout_language_models as language_models
from tools import layout_tokenizers as tokenizers
from tools import layout_towers as towers
from tools.layout_weights import Array, write_safetensors, write_torch

ROWS, TINY_ROWS = 300, 96
PICTURE, TINY_PICTURE = (500, 375), (64, 48)  # width and height in pixels
SAFETENSORS, TORCH = "model.safetensors", "pytorch_model.bin"
WRITERS = {".safetensors": write_safetensors, ".bin": write_torch}


@attrs.frozen(kw_only=True)
class Model:
    """A repository: its settings by file, its weights by file, and its tokenizer."""

    settings: dict[str, dict]
    weights: dict[str, dict[str, Array]]
    write_tokenizer: Callable[[Path], None] | None = None

    @property
    def config(self) -> dict:
        return self.settings["config.json"]

    def write(self, folder: Path, seed: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name, values in self.settings.items():
            (folder / name).write_text(json.dumps(values, indent=2) + "\n")
        if self.write_tokenizer:
            self.write_tokenizer(folder)
        for name, arrays in self.weights.items():
            WRITERS[Path(name).suffix](folder / name, arrays, seed)


def clip(tiny: bool) -> Model:
    config = towers.clip_config(tiny, hidden_act="quick_gelu")
    return Model(
        settings={"config.json": config, "preprocessor_config.json": towers.clip_preprocessing()},
        weights={TORCH: towers.clip_arrays(config)},
        write_tokenizer=tokenizers.write_clip,
    )


def laion_clip(tiny: bool) -> Model:
    """open_clip's files lie beside those of transformers, in both formats."""
    config = towers.clip_config(tiny, hidden_act="gelu") | {"torch_dtype": "float32"}
    arrays, other = towers.clip_arrays(config), {"logit_scale": Array((), mean=2.6592)}
    return Model(
        settings={"config.json": config, "preprocessor_config.json": towers.clip_preprocessing()},
        weights={SAFETENSORS: arrays, TORCH: arrays}
        | {"open_clip_model.safetensors": other, "open_clip_pytorch_model.bin": other},
        write_tokenizer=tokenizers.write_clip,
    )


def siglip(tiny: bool) -> Model:
    config = towers.siglip_config(tiny) | {"transformers_version": "4.37.0.dev0"}
    return Model(
        settings={"config.json": config, "preprocessor_config.json": towers.siglip_preprocessing(resample=3)},
        weights={SAFETENSORS: towers.siglip_arrays(config)},
    )


def siglip2(tiny: bool) -> Model:
    config = towers.siglip_config(tiny, vocab_size=256_000)
    return Model(
        settings={
            "config.json": config,
            "preprocessor_config.json": towers.siglip_preprocessing(do_convert_rgb=None, resample=2),
        },
        weights={SAFETENSORS: towers.siglip_arrays(config)},
        write_tokenizer=tokenizers.write_gemma,
    )


def vit(tiny: bool) -> Model:
    config = towers.vit_config(tiny)
    arrays = towers.vit_arrays(config)
    return Model(
        settings={"config.json": config, "preprocessor_config.json": towers.vit_preprocessing()},
        weights={SAFETENSORS: arrays, TORCH: arrays},
    )


def qwen3(tiny: bool) -> Model:
    config = language_models.qwen3_config(tiny)
    generation = {"bos_token_id": 151_643, "do_sample": False, "eos_token_id": 151_643, "max_new_tokens": 2048}
    return Model(
        settings={"config.json": config, "generation_config.json": generation | {"transformers_version": "4.51.0"}},
        weights={SAFETENSORS: language_models.arrays(config)},
        write_tokenizer=tokenizers.write_qwen3,
    )


def smollm2(tiny: bool) -> Model:
    config = language_models.smollm2_config(tiny)
    generation = {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 0, "transformers_version": "4.40.1"}
    return Model(
        settings={"config.json": config, "generation_config.json": generation},
        weights={SAFETENSORS: language_models.arrays(config)},
        write_tokenizer=tokenizers.write_smollm2,
    )


MODELS: dict[str, Callable[[bool], Model]] = {
    "openai/clip-vit-base-patch32": clip,
    "laion/CLIP-ViT-B-32-laion2B-s34B-b79K": laion_clip,
    "google/siglip-base-patch16-224": siglip,
    "google/siglip2-base-patch16-224": siglip2,
    "google/vit-base-patch16-224-in21k": vit,
    "Qwen/Qwen3-0.6B-Base": qwen3,
    "HuggingFaceTB/SmolLM2-135M": smollm2,
}
NAMES = [*MODELS, flickr30k.NAME]


def make(root: Path, names: list[str], *, tiny: bool = False, rows: int | None = None, seed: int = 0) -> None:
    """Write the repositories `names` into `root`; the data set has `rows` pictures."""
    for name in names:
        if name in MODELS:
            MODELS[name](tiny).write(root / name, seed)
        else:
            picture = TINY_PICTURE if tiny else PICTURE
            flickr30k.write(root, rows=rows or (TINY_ROWS if tiny else ROWS), picture=picture, seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--tiny", action="store_true", help="the same files and names, narrow networks of few layers")
    parser.add_argument("--rows", type=int, help=f"pictures of the data set [{ROWS}; with --tiny {TINY_ROWS}]")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make(arguments.out, arguments.only, tiny=arguments.tiny, rows=arguments.rows, seed=arguments.seed)
    for name in arguments.only:
        print(arguments.out / name if name in MODELS else arguments.out / "datasets" / name)


if __name__ == "__main__":
    main()
