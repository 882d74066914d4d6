"""Classify images by class names alone, without training (zero-shot).

python -m recipes.zero_shot --classes "cat,dog" cat.jpeg dog.jpeg
python -m recipes.zero_shot --module runs/train_clip/mine/model --classes names.txt --templates imagenet-80 *.jpeg

The classifier of a list of names is built once and kept in the cache (~/.cache/mlxmm, or $MLXMM_CACHE).
"""

from collections.abc import Iterator
from pathlib import Path

import attrs
import numpy as np
from attrs.validators import ge

from mlxmm.cli import run_recipe
from mlxmm.config import Preset, checked, option, positional
from mlxmm.errors import UserError
from mlxmm.escaping import visible
from mlxmm.evaluation.prompt_templates import CHOICES, read_templates
from mlxmm.evaluation.zero_shot import ZeroShotClassifier
from mlxmm.modules.contrastive_clip import ContrastiveCLIP
from mlxmm.preprocessing.images import UndecodableImage, decode_image

from .parts.named_parts import check_parts


@attrs.frozen(kw_only=True, field_transformer=checked)
class Config:
    """Images, classes and a CLIP."""

    images: tuple[Path, ...] = positional((), "images to classify")
    classes: str = option("", "class names with commas between them, or a file with one on each line")
    module: str = option("openai/clip-vit-base-patch32", "CLIP or SigLIP: folder or Hub id")
    templates: str = option("photo", f"sentences that class names are put into: {CHOICES}")
    top: int = option(3, "classes to print for each image", ge(1))


def main(config: Config) -> None:
    names, templates = read_classes(config.classes), read_templates(config.templates)
    if not config.images:
        raise UserError("name at least one picture to classify")
    check_parts(clip=config.module)
    images = list(opened(config.images))
    clip = ContrastiveCLIP.from_pretrained(config.module)
    classifier = ZeroShotClassifier.from_cache(clip, names, templates)
    print(table(config.images, np.array(classifier.predict(images)), names, config.top))


def read_classes(classes: str) -> list[str]:
    """Class names from a file with one on each line, or from a list with commas."""
    if not classes:
        raise UserError("--classes wants class names with commas between them, or a file with one on each line")
    if _is_file(classes):
        try:
            return [line.strip() for line in Path(classes).read_text(encoding="utf-8-sig").splitlines()]
        except ValueError:
            raise UserError(f"--classes {classes}: not a file of text in UTF-8") from None
    if classes.endswith(".txt"):
        raise UserError(f"--classes {classes}: there is no such file")
    return [name.strip() for name in classes.split(",")]


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # too long for the name of one
        return False


def opened(paths: tuple[Path, ...]) -> Iterator:
    """The decoded images. Raises `UserError` that names a file that is not an image."""
    for path in paths:
        try:
            yield decode_image(path)
        except UndecodableImage as error:
            raise UserError(f"{path}: {error}") from None


def table(paths: tuple[Path, ...], probabilities: np.ndarray, names: list[str], top: int) -> str:
    """One line per image: its most likely classes, with their `probabilities` (B, C)."""
    width = max(map(len, map(visible, paths))) + 2
    lines = []
    for path, row in zip(paths, probabilities):
        likeliest = np.argsort(-row, kind="stable")[:top]
        lines.append(f"{visible(path):<{width}}" + "   ".join(f"{visible(names[i])} {row[i]:.4f}" for i in likeliest))
    return "\n".join(lines)


if __name__ == "__main__":
    run_recipe("zero_shot", main, {"default": Preset("", Config())})
