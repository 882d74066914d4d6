"""Load models and data by their Hub ids and from their folders, and print as JSON whether both are the same.

python load_from_hub.py ROOT    with the environment of a LocalHub that serves ROOT
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from PIL import Image

from mlxmm.data.caption_source import CaptionDataConfig, open_source
from mlxmm.errors import UserError
from mlxmm.networks.language_model import load_language_model
from mlxmm.networks.pretrained_vision import load_vision_tower
from mlxmm.preprocessing.images import ImageProcessor
from mlxmm.preprocessing.tokenizers import load_tokenizer
from mlxmm.storage.hub import local_folder

LANGUAGE_MODELS = ("Qwen/Qwen3-0.6B-Base", "HuggingFaceTB/SmolLM2-135M")
TOWERS = (
    "openai/clip-vit-base-patch32",
    "openai/clip-vit-base-patch32@refs/pr/1",
    "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    "google/siglip-base-patch16-224",
    "google/siglip2-base-patch16-224",
    "google/vit-base-patch16-224-in21k",
)


def tower(folder: Path) -> dict[str, mx.array]:
    """The arrays of a tower, and what it makes of a picture."""
    network, _ = load_vision_tower(folder)
    picture = Image.linear_gradient("L").resize((90, 60)).convert("RGB")
    pixels = ImageProcessor.from_pretrained(folder)([picture])
    return dict(tree_flatten(network.parameters())) | {"patches": network.patches(pixels, -2)}


def language_model(folder: Path) -> dict[str, mx.array]:
    """The arrays of a language model, and what it makes of a text."""
    network, _ = load_language_model(folder)
    tokens = mx.array([load_tokenizer(folder)("a young man is running")["input_ids"]])
    return dict(tree_flatten(network.parameters())) | {"logits": network(tokens)}


def same(one: dict[str, mx.array], other: dict[str, mx.array]) -> bool:
    return one.keys() == other.keys() and all(mx.array_equal(one[name], other[name]).item() for name in one)


def refusal(function, *arguments) -> str:
    try:
        return f"no error: {function(*arguments)}"
    except UserError as error:
        return str(error)


def main(root: Path) -> dict:
    settings = {"source": "nlphuji/flickr30k", "split_column": "split"}
    refused = {"main": refusal(open_source, CaptionDataConfig(**settings), 0)}
    for name in ("openai/nothing", "openai/clip-vit-base-patch32@refs/pr/2"):
        refused[name] = refusal(local_folder, name)
    loaders = {name: tower for name in TOWERS} | {name: language_model for name in LANGUAGE_MODELS}
    source = open_source(CaptionDataConfig(**settings, revision="refs/convert/parquet"), 0)
    rows = source.rows
    return {
        "same": {name: same(load(local_folder(name)), load(root / name)) for name, load in loaders.items()},
        "files": {name: sorted(path.name for path in local_folder(name).iterdir()) for name in loaders},
        "rows": {split: len(part) for split, part in rows.items()},
        "captions": {split: len(part[0]["captions"]) for split, part in rows.items()},
        "commits": [one["revision"] for one in source.lineage],
        "refused": refused,
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
