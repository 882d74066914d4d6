"""Caption images, token by token.

python -m recipes.caption --module runs/align_qwen3/mine holiday.jpg FOLDER
python -m recipes.caption --module runs/align_qwen3/mine FOLDER --to captions.csv
"""

import csv
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import attrs
from attrs.validators import optional

from mlxmm.cli import run_recipe
from mlxmm.config import Preset, checked, option, positional, section
from mlxmm.distributed.signals import Ended
from mlxmm.errors import UserError
from mlxmm.escaping import visible
from mlxmm.modules.captioning_module import CaptioningModule
from mlxmm.modules.loading import load_captioner
from mlxmm.networks.generation import GenerationConfig
from mlxmm.preprocessing.images import SUFFIXES, UndecodableImage, decode_image
from mlxmm.storage.atomic import write_text
from mlxmm.storage.runs import model_of
from mlxmm.terminal import counted

from .parts.named_parts import check_parts


def is_table(instance, attribute, value) -> None:
    """The name of a new file whose kind is known."""
    if value.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"{attribute.name!r} must end in .csv or .jsonl: {value}")
    if value.exists():
        raise ValueError(f"{value} exists: name another file")


@attrs.frozen(kw_only=True, field_transformer=checked)
class Config:
    """Model, images and decoding."""

    images: tuple[Path, ...] = positional((), "images, and folders of images")
    module: str | None = option(
        None, "run, checkpoint or folder of a Qwen3Aligner or CaptionDecoder, or its Hub id", first=True
    )
    to: Path | None = option(
        None,
        "new table for the captions too, .csv or .jsonl, with file_name and caption",
        optional(is_table),
        first=True,
    )
    prompt: str = option("", "text between image and caption; none: the one that the model was trained with")
    generation: GenerationConfig = section(GenerationConfig())


def main(config: Config) -> None:
    if config.module is None:
        raise UserError("--module is missing: name a checkpoint, for example runs/align_qwen3/mine/checkpoints/best")
    paths = find_images(config.images)
    module = model_of(config.module)
    check_parts(captioner=module)
    captioner, captions = load_captioner(module), {}
    try:
        for path in paths:
            try:
                captions[path] = tell(path, pieces(captioner, decode_image(str(path)), config))
            except UndecodableImage as error:
                print(f"skipped, {visible(path)}: {visible(error)}", file=sys.stderr)
    except (KeyboardInterrupt, Ended) as error:
        if config.to is not None and captions:
            error.add_note(f"kept {counted(len(captions), 'caption')} in {config.to}")
        raise
    finally:
        if config.to is not None and captions:
            write_text(config.to, table_of(captions, config.to.suffix))
    if not captions:
        raise UserError("none of these could be captioned")


def tell(path: Path, caption: Iterator[str]) -> str:
    """Print the caption of a file piece by piece; returns it."""
    print(f"{visible(path)}: ", end="", flush=True)
    text = ""
    for piece in caption:
        print(visible(piece), end="", flush=True)
        text += piece
    print()
    return text


def table_of(captions: Mapping[Path, str], suffix: str) -> str:
    """CSV or JSON lines with the columns "file_name" and "caption"."""
    rows = [{"file_name": str(path), "caption": text.strip()} for path, text in captions.items()]
    if suffix == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    file = io.StringIO()
    writer = csv.DictWriter(file, ["file_name", "caption"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


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
