"""Load and save vision towers in the Hub's layout: of CLIP, SigLIP or ViT."""

from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxmm.errors import UserError
from mlxmm.networks import clip, siglip, vit
from mlxmm.networks.towers import VisionTower, tower_values
from mlxmm.storage import checkpoint
from mlxmm.storage.atomic import write_json
from mlxmm.storage.pretrained import read_config, read_weights, write_arrays

KINDS = {"clip_vision_model": clip, "siglip_vision_model": siglip, "vit": vit}
ARCHITECTURES = {"clip_vision_model": "CLIPVisionModel", "siglip_vision_model": "SiglipVisionModel", "vit": "ViTModel"}
PAIR = {"vision_config", "vision_config_dict"}  # one of which a config.json of two towers has
PREFIX = "vision_model."


def build_vision_tower(values: dict) -> VisionTower:
    """The tower of a `config.json`, or of its vision part, with fresh weights."""
    return _kind(values).vision_tower(values)


def load_vision_tower(folder: Path) -> tuple[VisionTower, dict]:
    """Load a vision tower and its Hub configuration from a CLIP, SigLIP or ViT folder, or a ContrastiveCLIP checkpoint.

    Raises `UserError` if there is no vision tower.
    """
    values = vision_values(read_config(folder), folder)
    tower = build_vision_tower(values)
    if (folder / checkpoint.WEIGHTS).exists():  # a checkpoint of ContrastiveCLIP
        weights = _under(f"network.{PREFIX}", checkpoint.read_weights(folder))
    else:
        weights = read_weights(folder)
        weights = from_hub(_under(PREFIX, weights) or weights, values)
    checkpoint.load_arrays(folder, weights, tower)
    return tower, values


def save_vision_tower(folder: Path, tower: VisionTower, values: dict) -> None:
    """Write a folder that transformers loads; a ViT is saved as ViTModel without its pooler."""
    folder.mkdir(parents=True, exist_ok=True)
    values = values | {"architectures": [ARCHITECTURES[values["model_type"]]]}
    write_json(folder / "config.json", values)
    write_arrays(folder / "model.safetensors", to_hub(tower, values), format="pt")


def to_hub(tower: VisionTower, values: dict) -> dict[str, mx.array]:
    """The arrays of a tower in transformers' layout; `values` is its configuration."""
    return _kind(values).to_hub(dict(tree_flatten(tower.parameters())))


def from_hub(weights: dict[str, mx.array], values: dict) -> dict[str, mx.array]:
    """The inverse of `to_hub`."""
    return _kind(values).from_hub(weights)


def vision_values(values: dict, folder: Path) -> dict:
    """The part of a `config.json` that describes a vision tower, its model_type filled in."""
    own = tower_values(values, "vision", folder) if PAIR & set(values) else values
    values = {"model_type": f"{values.get('model_type', 'clip')}_vision_model"} | own
    if values["model_type"] not in KINDS:
        raise UserError(
            f"{folder} has no vision tower of a known kind: its config.json says model_type "
            f"{values['model_type']!r}; known are {', '.join(KINDS)}, clip and siglip"
        )
    return values


def _kind(values: dict):
    return KINDS[values.get("model_type", "clip_vision_model")]


def _under(prefix: str, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    return {name.removeprefix(prefix): array for name, array in weights.items() if name.startswith(prefix)}
