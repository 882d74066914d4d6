"""A captioner from its folder, whichever module wrote it."""

from pathlib import Path

from mlxmm.hub import local_folder, read_config
from mlxmm.modules import caption_decoder
from mlxmm.modules.captioner import Captioner
from mlxmm.modules.qwen3_aligner import Qwen3Aligner


def load_captioner(path_or_id: str | Path, revision: str | None = None) -> Captioner:
    """The CaptionDecoder or Qwen3Aligner of a checkpoint, of a folder or of a Hub id. Raises `UserError`."""
    folder = local_folder(path_or_id, revision)
    is_decoder = read_config(folder).get("model_type") == caption_decoder.MODEL_TYPE
    return (caption_decoder.CaptionDecoder if is_decoder else Qwen3Aligner).from_pretrained(folder)
