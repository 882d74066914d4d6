"""Load a captioner from its folder, whichever module wrote it."""

from pathlib import Path
from typing import Any

from mlxmm.errors import UserError
from mlxmm.modules import caption_decoder, qwen3_aligner
from mlxmm.modules.captioning_module import CaptioningModule
from mlxmm.storage.hub import local_folder
from mlxmm.storage.pretrained import read_config

KINDS: dict[str, Any] = {
    qwen3_aligner.MODEL_TYPE: qwen3_aligner.Qwen3Aligner,
    caption_decoder.MODEL_TYPE: caption_decoder.CaptionDecoder,
    "llava": qwen3_aligner.Qwen3Aligner,
}


def load_captioner(path_or_id: str | Path, revision: str | None = None) -> CaptioningModule:
    """Load the CaptionDecoder or Qwen3Aligner of a checkpoint, folder or Hub id. Raises `UserError`."""
    folder = local_folder(path_or_id, revision)
    kind = read_config(folder).get("model_type")
    if kind not in KINDS:
        raise UserError(
            f"{folder} holds no captioner: its config.json says model_type {kind!r}, expected was one of "
            f"{', '.join(KINDS)}; in a run's folder, checkpoints/best is one"
        )
    return KINDS[kind].from_pretrained(folder)
