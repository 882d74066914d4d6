"""The Hugging Face Hub: folders of weights, here or there. `huggingface_hub` is used here only."""

import json
from pathlib import Path

import mlx.core as mx

from mlxmm.config import UserError

NEEDED = [
    "*.json",
    "*.safetensors",
    "*.txt",
    "*.model",
    "*.jinja",
]  # no pickles, no other frameworks' weights


def local_folder(path_or_id: str | Path, revision: str | None = None) -> Path:
    """The folder `path_or_id` if it is one, else the snapshot of that Hub repository, from the cache if offline."""
    path = Path(path_or_id)
    if path.is_dir():
        return path
    if path.is_absolute() or str(path_or_id).count("/") != 1 or str(path_or_id).startswith("."):
        raise UserError(f"{path_or_id} is not there: neither a folder nor a Hub id (user/name)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path_or_id), revision=revision, allow_patterns=NEEDED))
    except Exception as error:  # the client and the network raise a dozen kinds
        line = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"{path_or_id} is neither a folder nor to be had from the Hub: {line}") from error


def read_config(folder: Path) -> dict:
    """The `config.json` of a folder."""
    try:
        return json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be read: {error}") from None


def read_weights(folder: Path) -> dict[str, mx.array]:
    """The arrays of all model*.safetensors of a folder."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{folder} has no model.safetensors")
    return {name: array for file in files for name, array in mx.load(str(file)).items()}
