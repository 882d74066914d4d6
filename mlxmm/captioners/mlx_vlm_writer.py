"""Captions by a vision-language model of mlx-vlm, as Qwen2.5-VL, in a child process."""

import hashlib
import importlib.util
from pathlib import Path

import attrs
from attrs.validators import ge, gt

from mlxmm.captioners.child_process import ChildFailed, ChildProcess, child_command
from mlxmm.captioners.child_writer import ChildWriter
from mlxmm.config import checked, option
from mlxmm.errors import UserError
from mlxmm.export import llava
from mlxmm.storage.atomic import sha256
from mlxmm.storage.hub import is_hub_id, local_folder, split_revision
from mlxmm.storage.pretrained import read_config, weight_files


@attrs.frozen(kw_only=True, field_transformer=checked)
class MlxVlmConfig:
    """Which model of mlx-vlm writes captions, and in what portions."""

    model: str = option(
        "Qwen/Qwen2.5-VL-3B-Instruct", "vision-language model that mlx-vlm reads: a folder or a Hub id", first=True
    )
    batch_size: int = option(8, "images at once; less after the model ran out of memory", ge(1))
    max_pixels: int = option(602_112, "larger images are made smaller: 602,112 pixels are 768 tokens", ge(28 * 28))
    timeout_seconds: float = option(600.0, "a batch, or loading the model, that takes longer has failed", gt(0))


class MlxVlmWriter(ChildWriter):
    """A `CaptionWriter`. Raises `UserError` if mlx-vlm, the model or a part of it is missing.

    With temperature 0 a caption does not depend on the images beside it, to within rounding. With sampling, captions
    are a function of the batch and the seed.
    """

    def __init__(self, config: MlxVlmConfig):
        if importlib.util.find_spec("mlx_vlm") is None:
            raise UserError("captions by a vision-language model need mlx-vlm: pip install 'mlxmm[vlm]'")
        folder = local_folder(config.model)
        self.quantization = _quantization(_require_vision(folder, config.model))
        name, revision = _name_and_revision(config.model, folder)
        sizes = {"batch_size": config.batch_size, "max_pixels": config.max_pixels}
        try:
            child = ChildProcess(child_command("mlx_vlm_child", folder), config.timeout_seconds)
            super().__init__(child, name=name, revision=revision, **sizes)
        except ChildFailed as failure:
            raise UserError(f"{config.model} cannot be loaded by mlx-vlm: {failure}") from None


def _require_vision(folder: Path, model: str) -> dict:
    """The model's config.json. Raises `UserError` if it reads no images, or is a stranger's code."""
    settings = read_config(folder)
    if not isinstance(settings.get("vision_config"), dict):
        raise UserError(f"{model} reads no images: its config.json has no vision_config. Name a vision-language model")
    if (name := settings.get("model_file")) and not _is_ours(folder / str(name)):
        raise UserError(f"{model} brings code, {name}, which mlx-vlm would run: models are read, but not run")
    return settings


def _is_ours(code: Path) -> bool:
    """Whether this is the code that our own exports bring, letter for letter."""
    return code.is_file() and sha256(code) == sha256(Path(llava.__file__).with_name(llava.MLX_VLM_MODEL))


def _name_and_revision(model: str, folder: Path) -> tuple[str, str]:
    """Hub id and commit, as the cache names its folder; of a local folder its name and a checksum of its files."""
    if is_hub_id(model):
        return split_revision(model)[0], folder.name
    files = [*weight_files(folder), *sorted(folder.glob("*.json")), *sorted(folder.glob("*.jinja"))]
    digest = hashlib.sha256("".join(f"{path.name} {sha256(path)}\n" for path in files).encode())
    return folder.resolve().name, digest.hexdigest()[:16]


def _quantization(settings: dict) -> str:
    """As "4 bits, groups of 64"; "" of a model that is not quantized."""
    values = settings.get("quantization") or settings.get("quantization_config") or {}
    if "bits" not in values:
        return ""
    return (
        f"{values['bits']} bits, groups of {values['group_size']}"
        if "group_size" in values
        else f"{values['bits']} bits"
    )
