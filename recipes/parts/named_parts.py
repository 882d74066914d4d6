"""The parts that a command names by folder or Hub id: fetched and checked before data are opened.

Only small files are read, so that a mistake ends a run at once. Weights are read when a part is loaded.
"""

from collections.abc import Callable
from pathlib import Path

from mlxmm.distributed import collectives
from mlxmm.errors import UserError
from mlxmm.modules import contrastive_clip, loading
from mlxmm.networks.language_model import require_language_model
from mlxmm.networks.pretrained_vision import vision_values
from mlxmm.preprocessing.images import ImageProcessor
from mlxmm.preprocessing.tokenizers import end_token, load_tokenizer
from mlxmm.storage import checkpoint
from mlxmm.storage.hub import local_folder
from mlxmm.storage.pretrained import read_config, require_weights


def check_parts(**named: str | None) -> None:
    """Fetch and check the named parts, by their kind: one of `CHECKS`. None: not named.

    A collective call: rank 0 fetches first. Raises `UserError` that says what is wrong with the first bad one.
    """

    def check() -> None:
        for kind, path_or_id in named.items():
            if path_or_id is not None:
                CHECKS[kind](local_folder(path_or_id))

    collectives.rank_zero_first(check)


def _check_tower(folder: Path) -> None:
    vision_values(read_config(folder), folder)
    require_weights(folder)
    ImageProcessor.from_pretrained(folder)


def _check_language_model(folder: Path) -> None:
    require_language_model(folder)
    _check_tokenizer(folder)


def _check_tokenizer(folder: Path) -> None:
    end_token(load_tokenizer(folder))


def _check_clip(folder: Path) -> None:
    contrastive_clip.read_clip_config(folder)
    _check_tower(folder)
    load_tokenizer(folder)


def _check_captioner(folder: Path) -> None:
    if (kind := read_config(folder).get("model_type")) not in loading.KINDS:
        raise UserError(
            f"{folder} holds no captioner: its config.json says model_type {kind!r}, expected was one of "
            f"{', '.join(loading.KINDS)}; in a run's folder, checkpoints/best is one"
        )
    if kind == "llava":
        require_weights(folder)
    else:
        checkpoint.read_weights(folder)
    ImageProcessor.from_pretrained(folder)
    load_tokenizer(folder)


CHECKS: dict[str, Callable[[Path], None]] = {
    "tower": _check_tower,
    "language_model": _check_language_model,
    "tokenizer": _check_tokenizer,
    "clip": _check_clip,
    "captioner": _check_captioner,
}
