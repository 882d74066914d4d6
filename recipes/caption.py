"""Caption images, token by token.

python -m recipes.caption --module runs/align_qwen3/mine holiday.jpg FOLDER
python -m recipes.caption --module runs/align_qwen3/mine FOLDER --to captions.csv

Folders are captioned with their subfolders. `--to FOLDER/metadata.csv` makes FOLDER a source to train on.
"""

import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import attrs
from attrs.validators import optional

from mlxmm.cli import run_recipe
from mlxmm.commands import command
from mlxmm.config import Preset, checked, option, positional, section
from mlxmm.distributed.signals import Ended
from mlxmm.errors import UserError
from mlxmm.escaping import visible
from mlxmm.modules.captioning_module import CaptioningModule
from mlxmm.modules.loading import load_captioner
from mlxmm.networks.generation import GenerationConfig
from mlxmm.preprocessing.images import SUFFIXES, UndecodableImage, decode_image
from mlxmm.preprocessing.picture_folder import files_below, is_picture, left_out
from mlxmm.storage.runs import model_of
from mlxmm.terminal import counted

from .parts.caption_table import CaptionTable
from .parts.named_parts import check_parts


def is_table(instance, attribute, value) -> None:
    """The name of a file whose kind is known."""
    if value.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"{attribute.name!r} must end in .csv or .jsonl: {value}")


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
    append: bool = option(False, "keep the captions that the table has, and skip their pictures", first=True)
    prompt: str = option("", "text between image and caption; none: the one that the model was trained with")
    generation: GenerationConfig = section(GenerationConfig())

    def __attrs_post_init__(self):
        if self.append and self.to is None:
            raise UserError("--append needs --to, which names the table")
        if self.to is not None and self.to.exists() and not self.append:
            raise UserError(f"{self.to} exists: name another file, or add --append, which captions what it lacks")


def main(config: Config) -> None:
    if config.module is None:
        raise UserError("--module is missing: name a checkpoint, for example runs/align_qwen3/mine/checkpoints/best")
    paths = find_images(config.images)
    module = model_of(config.module)
    check_parts(captioner=module)
    table = None if config.to is None else CaptionTable.open(config.to)
    if table is not None and table.captions:
        paths = without_captioned(paths, table)
    if paths:
        caption_all(paths, load_captioner(module), config, table)


def without_captioned(paths: Sequence[Path], table: CaptionTable) -> list[Path]:
    """The pictures that the table lacks; how many it has is printed."""
    missing = [path for path in paths if path not in table]
    print(f"{table.path} has {len(paths) - len(missing)} of {counted(len(paths), 'picture')}", file=sys.stderr)
    return missing


def caption_all(paths: Sequence[Path], captioner: CaptioningModule, config: Config, table: CaptionTable | None) -> None:
    """Print the caption of each picture, and write them into the table, also those made before a signal or a failure.

    Raises `UserError` if none can be captioned.
    """
    num_captions = 0
    try:
        for path in paths:
            try:
                caption = tell(path, pieces(captioner, decode_image(str(path)), config))
            except UndecodableImage as error:
                print(f"skipped, {visible(path)}: {visible(error)}", file=sys.stderr)
                continue
            num_captions += 1
            if table is not None:
                table.add(path, caption)
    except (KeyboardInterrupt, Ended) as error:
        if table is not None and table.num_added:
            error.add_note(f"kept {counted(table.num_added, 'caption')} in {table.path}; go on with: {go_on()}")
        raise
    finally:
        if table is not None:
            table.write()
    if not num_captions:
        raise UserError("none of these could be captioned")


def go_on() -> str:
    """The command that captions the pictures that are left."""
    return command("caption", *(word for word in sys.argv[1:] if word != "--append"), "--append")


def tell(path: Path, caption: Iterator[str]) -> str:
    """Print the caption of a file piece by piece; returns it. What is warned of comes before the line begins."""
    first = next(caption, "")
    print(f"{visible(path)}: ", end="", flush=True)
    text = ""
    for piece in chain([first], caption):
        print(visible(piece), end="", flush=True)
        text += piece
    print()
    return text


def pieces(captioner: CaptioningModule, image, config: Config) -> Iterator[str]:
    """The pieces of the caption of one image as they are generated; beam search returns one piece."""
    settings = attrs.asdict(config.generation)
    if config.generation.num_beams > 1:
        return iter(captioner.caption([image], config.prompt, **settings))
    return captioner.stream_caption(image, config.prompt, **settings)


def find_images(paths: Sequence[Path]) -> list[Path]:
    """The files in `paths`, and the images in its folders and in those below them, sorted by name. Names on standard
    error what these hold besides. Raises `UserError` if there are none."""
    if missing := [path for path in paths if not path.exists()]:
        raise UserError(f"{missing[0]} is not there")
    inside = {path: files_below(path) for path in paths if path.is_dir()}
    found = [file for path in paths for file in (filter(is_picture, inside[path]) if path in inside else [path])]
    if told := left_out([file for files in inside.values() for file in files]):
        print(visible(told), file=sys.stderr)
    if not found:
        where = f" in {', '.join(map(str, paths))}" if paths else ""
        raise UserError(f"no pictures{where}: name files, or folders that hold {', '.join(SUFFIXES)}")
    return found


if __name__ == "__main__":
    run_recipe("caption", main, {"default": Preset("", Config())})
