"""Small sources for tests: pictures of one colour each, as parquet files."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import datasets
from PIL import Image

NUM = 20  # of pictures


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


def pictures(folder: Path, names=None) -> Path:
    """Pictures as files in a folder, by these names or as 0.png and so on."""
    for i, name in enumerate(names or [f"{i}.png" for i in range(NUM)]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(i))
    return folder


def write_tar(path: Path, numbers, **texts) -> None:
    """A tar of WebDataset: the pictures `numbers`, each with `texts`, by suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for i in numbers:
            for suffix, content in ({"jpg": png(i)} | {name: text(i) for name, text in texts.items()}).items():
                info = tarfile.TarInfo(f"{i:05}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


TEXT = {"txt": lambda i: f"a thing {i}".encode()}
JSON = {"json": lambda i: json.dumps({"caption": f"a thing {i}", "width": 20}).encode()}
