"""Small sources for tests: pictures of one colour each, as parquet files."""

import hashlib
import io
from pathlib import Path

import datasets
from PIL import Image


def png(number: int) -> bytes:
    """The file of a picture that no other number has."""
    file = io.BytesIO()
    Image.new("RGB", (20, 16), (number % 256, number // 256, 7)).save(file, "PNG")
    return file.getvalue()


def sha256(number: int) -> str:
    return hashlib.sha256(png(number)).hexdigest()


def write_source(path: Path, numbers, text="picture", **columns) -> str:
    """A parquet file of the pictures `numbers`, each with the caption "<text> <number>" unless `columns` say more."""
    rows = {
        "image": [{"bytes": png(i), "path": f"{i}.png"} for i in numbers],
        "caption": [f"{text} {i}" for i in numbers],
    }
    table = datasets.Dataset.from_dict(rows | columns).cast_column("image", datasets.Image(decode=False))
    table.to_parquet(path)
    return str(path)


def three_splits(num_train: int, num_held_out: int = 2) -> list[str]:
    """A split column: training rows first, then as many for val as for test."""
    return ["train"] * num_train + ["val"] * num_held_out + ["test"] * num_held_out
