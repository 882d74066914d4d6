"""What a server answers beside captions: which of some texts fits a picture, and which parts of the picture say so.

S x S cells of a picture, C texts, P patches, E features of the vision tower.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from PIL import Image, ImageFilter

from mlxmm.compute.precision import autocast
from mlxmm.errors import UserError
from mlxmm.evaluation.zero_shot import ZeroShotClassifier
from mlxmm.modules.captioning_module import CaptioningModule
from mlxmm.modules.contrastive_clip import ContrastiveCLIP
from mlxmm.training.module import evaluating

CELLS = 7  # along each edge of a heat map
MAX_TEXTS = 100
GREY = (128, 128, 128)


def class_probabilities(model: ContrastiveCLIP | CaptioningModule, image: Image.Image, names: Sequence[str]) -> list:
    """The probability (C,) of each of `names`, each in place of {} of "a photo of a {}.".

    A CLIP compares features (section 3.1.2). A captioner says how much likelier each text is for this picture than for
    a grey one. Raises `UserError` for names that are empty, repeated, or too many.
    """
    if len(names) > MAX_TEXTS:
        raise UserError(f"{len(names)} classes: {MAX_TEXTS} are the most")
    if isinstance(model, ContrastiveCLIP):
        return np.array(ZeroShotClassifier.build(model, names, ["{}"]).predict([image]))[0].tolist()
    if not names or len(set(names)) < len(names) or not all(name.strip() for name in names):
        raise UserError("class names must be there, differ, and not be empty")
    grey = Image.new("RGB", image.size, GREY)
    gains = [np.subtract(*log_likelihoods(model, [image, grey], name)) for name in names]
    return np.array(mx.softmax(mx.array(gains))).tolist()


def heat_map(model: ContrastiveCLIP | CaptioningModule, image: Image.Image, text: str) -> np.ndarray:
    """How much less `text` fits once a cell of the picture is blurred, (S, S).

    Of a CLIP in cosines, of a captioner in log-likelihood. Occlusion: arXiv 1311.2901, section 4.2.
    """
    score = _cosines if isinstance(model, ContrastiveCLIP) else log_likelihoods
    whole, *rest = score(model, [image, *_occluded(image)], text)
    return (whole - np.array(rest)).reshape(CELLS, CELLS)


def log_likelihoods(captioner: CaptioningModule, images: Sequence[Image.Image], text: str) -> list[float]:
    """The log-likelihood of `text` as the caption of each image."""
    found = []
    with evaluating(captioner, 1), autocast(captioner, "32"):
        for image in images:  # one by one: a step gives the mean over its batch
            example = captioner.transform({"image": image}, text)
            batch = captioner.collate({name: array[None] for name, array in example.items()})
            metrics = captioner.training_step({name: mx.array(array) for name, array in batch.items()})
            found.append(-metrics["loss"] * metrics["weight"])
        mx.eval(found)
    return [value.item() for value in found]


def _cosines(clip: ContrastiveCLIP, images: Sequence[Image.Image], text: str) -> list[float]:
    return (
        ZeroShotClassifier.build(clip, [text], ["{}"])
        .cosines(clip.encode_image(clip.preprocess(images)))[:, 0]
        .tolist()
    )


def _occluded(image: Image.Image) -> list[Image.Image]:
    """The image with one cell blurred beyond recognition, for each cell, row by row."""
    blurred = image.filter(ImageFilter.GaussianBlur(max(image.size) / CELLS))
    columns, rows = ([round(edge * i / CELLS) for i in range(CELLS + 1)] for edge in image.size)
    boxes = [
        (left, top, right, bottom) for top, bottom in zip(rows, rows[1:]) for left, right in zip(columns, columns[1:])
    ]
    return [_pasted(image, blurred, box) for box in boxes]


def _pasted(image: Image.Image, other: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    copy = image.copy()
    if box[0] < box[2] and box[1] < box[3]:
        copy.paste(other.crop(box), box)
    return copy
