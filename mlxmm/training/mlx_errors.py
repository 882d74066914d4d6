"""Notes on errors of MLX: what is meant, where its text speaks of something else. The errors stay as they are."""

import ast
import contextlib
import re
import types
from collections.abc import Iterator, Mapping

import mlx.core as mx
import mlx.nn as nn

from mlxmm.training import lightning_words, torch_words

TORCH_KEYWORDS = {
    "dim": "axis",
    "keepdim": "keepdims",
    "in_features": "input_dims",
    "out_features": "output_dims",
    "num_features": "dims",
}


@contextlib.contextmanager
def noted(batch=None) -> Iterator[None]:
    """Within the block, errors that MLX raises get a note. `batch` is the one that a step was given."""
    try:
        yield
    except Exception as error:
        if not hasattr(error, "__notes__") and (note := _note(error, batch)):
            error.add_note(note)
        raise


def _note(error: Exception, batch) -> str | None:
    match error:
        case KeyError() if isinstance(batch, Mapping):
            return f"The batch holds {', '.join(map(repr, batch))}."
        case AttributeError() if "no attribute 'requires_grad'" in str(error):  # set, which gives no `name`
            return "mlxmm: parameters() is a dict of arrays: write part.freeze(), or part.unfreeze()."
        case AttributeError(obj=owner, name=str() as name):
            return _of_attribute(owner, name)
        case TypeError():
            return _of_keywords(str(error))
        case ValueError() | RuntimeError():
            return _of_values(str(error))
    return None


def _of_attribute(owner, name: str) -> str | None:
    match owner:
        case mx.array():
            answers = lightning_words.TENSORS
        case nn.Module():
            answers = lightning_words.LAYERS
        case types.ModuleType(__name__=package):
            answers = torch_words.PACKAGES.get(package, {})
        case _:
            return None
    return f"mlxmm: {answers[name]}." if name in answers else None


def _of_keywords(text: str) -> str | None:
    """Of an argument that torch names otherwise: MLX lists all that it got, Python names the one that it refuses."""
    own = re.match(r"(?:\w+\.)*(\w+)\.__init__\(\)", text)
    if own and not hasattr(nn, own[1]):  # of a class of the user's, whose names are not MLX's
        return None
    given = re.findall(r"(\w+): ", text.partition("kwargs = {")[2]) + re.findall(r"keyword argument '(\w+)'", text)
    told = [f"{TORCH_KEYWORDS[name]}= in place of {name}=" for name in given if name in TORCH_KEYWORDS]
    return f"mlxmm: MLX has {', '.join(told)}." if told else None


def _of_values(text: str) -> str | None:
    if "indices" in text and ("must be integral" in text or text.endswith("indices type.")):
        return "mlxmm: labels and ids are integers: x.astype(mx.int32)."
    if "[conv]" not in text:
        return None
    if kind := re.search(r"input array with type (u?int\w*|bool)", text):
        return f"mlxmm: pixels are floats, these are {kind[1]}: x.astype(mx.float32) / 255."
    shapes = [ast.literal_eval(shape) for shape in re.findall(r"\(\d+(?:, ?\d+)+\)", text)]
    if len(shapes) == 2 and len(shapes[0]) == 4 and shapes[0][1] == shapes[1][-1]:
        return "mlxmm: pictures are (N, H, W, C), this looks like (N, C, H, W): x.transpose(0, 2, 3, 1)."
    return None
