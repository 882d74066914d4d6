"""Caption images, token by token.

python -m recipes.caption --module runs/align_qwen3/mine/checkpoints/best holiday.jpg FOLDER
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs

from mlxmm.cli import run_recipe
from mlxmm.config import Preset, checked, option, positional, section
from mlxmm.errors import UserError
from mlxmm.escaping import visible
from mlxmm.modules.captioning_module import CaptioningModule
from mlxmm.modules.loading import load_captioner
from mlxmm.networks.generation import GenerationConfig
from mlxmm.preprocessing.images import SUFFIXES, UndecodableImage, decode_image

from .parts.named_parts import check_parts


@attrs.frozen(kw_only=True, field_transformer=checked)
class Config:
    """Model, images and decoding."""

    images: tuple[Path, ...] = positional((), "images, and folders of images")
    module: str | None = option(None, "checkpoint or folder of a Qwen3Aligner or CaptionDecoder, or its Hub id")
    prompt: str = option("", "text between image and caption; none: the one that the model was trained with")
    generation: GenerationConfig = section(GenerationConfig())


def main(config: Config) -> None:
    if config.module is None:
        raise UserError("--module is missing: name a checkpoint, for example runs/align_qwen3/mine/checkpoints/best")
    paths = find_images(config.images)
    check_parts(captioner=config.module)
    captioner = load_captioner(config.module)
    for path in paths:
        print(f"{visible(path)}: ", end="", flush=True)
        try:
            for piece in pieces(captioner, decode_image(str(path)), config):
                print(visible(piece), end="", flush=True)
            print()
        except UndecodableImage as error:
            print(f"skipped, {visible(error)}")


def pieces(captioner: CaptioningModule, image, config: Config) -> Iterator[str]:
    """The pieces of the caption of one image as they are generated; beam search returns one piece."""
    settings = attrs.asdict(config.generation)
    if config.generation.num_beams > 1:
        return iter(captioner.caption([image], config.prompt, **settings))
    return captioner.stream_caption(image, config.prompt, **settings)


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The files in `paths`, and the images in its folders, sorted by name. Raises `UserError` if there are none."""
    if missing := [path for path in paths if not path.exists()]:
        raise UserError(f"{missing[0]} is not there")
    inside = lambda folder: sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    found = [file for path in paths for file in (inside(path) if path.is_dir() else [path])]
    if not found:
        where = f" in {', '.join(map(str, paths))}" if paths else ""
        raise UserError(f"no pictures{where}: name files, or folders that hold {', '.join(SUFFIXES)}")
    return found


if __name__ == "__main__":
    run_recipe("caption", main, {"default": Preset("", Config())})
