"""The data set `nlphuji/flickr30k` as the Hub has it: a script on main, parquet files on refs/convert/parquet.

The parquet files are one split, "test", whose column `split` says train, val or test.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

NAME = "nlphuji/flickr30k"
REVISION = "refs/convert/parquet"
HELD_OUT = {"val": 1_014 / 31_014, "test": 1_000 / 31_014}
NUM_FILES = 3
NUM_CAPTIONS = 5
WHO = "a young man|two women|three children|an old woman|a brown dog|a group of people|a little girl|several workers"
WEAR = "in a green shirt|with a red hat|in blue jeans|with black hair|in a white dress|with sunglasses|in uniform"
DO = "is running|are standing|walks|sits on a bench|plays guitar|are talking|jumps|rides a bicycle|reads a book"
WHERE = "in the street|near a wooden fence|on a beach|in front of a building|at night|by the water|in a kitchen"
PARTS = [part.split("|") for part in (WHO, WEAR, DO, WHERE)]
FEATURES = {
    "image": {"_type": "Image"},
    "caption": {"feature": {"dtype": "string", "_type": "Value"}, "_type": "Sequence"},
    "sentids": {"feature": {"dtype": "string", "_type": "Value"}, "_type": "Sequence"},
    "split": {"dtype": "string", "_type": "Value"},
    "img_id": {"dtype": "string", "_type": "Value"},
    "filename": {"dtype": "string", "_type": "Value"},
}
TEXTS = pa.list_(pa.string())
SCHEMA = pa.schema(
    {
        "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "caption": TEXTS,
        "sentids": TEXTS,
        "split": pa.string(),
        "img_id": pa.string(),
        "filename": pa.string(),
    },
    metadata={"huggingface": json.dumps({"info": {"features": FEATURES}})},
)


def write(root: Path, *, rows: int, picture: tuple[int, int], seed: int) -> None:
    """The folders of both revisions under `root`; pictures are JPEGs of this width and height."""
    main = root / "datasets" / NAME
    main.mkdir(parents=True, exist_ok=True)
    (main / "README.md").write_text("---\nlicense: other\n---\n")
    (main / "flickr30k.py").write_text("raise RuntimeError('data sets are not loaded by scripts any more')\n")
    folder = root / "datasets" / f"{NAME}@{REVISION}" / "TEST" / "test"
    folder.mkdir(parents=True, exist_ok=True)
    for number, places in enumerate(np.array_split(np.arange(rows), NUM_FILES)):
        table = pa.Table.from_pylist(list(_rows(places, rows, picture, seed)), schema=SCHEMA)
        pq.write_table(table, folder / f"{number:04}.parquet", row_group_size=100)


def caption_words() -> list[str]:
    """A sentence of all words of the captions, and each word with a capital: what their tokenizers learn."""
    words = sorted({word for part in PARTS for text in part for word in text.split()})
    return [f"{word} {word.capitalize()} {word}." for word in words]


def split_counts(rows: int) -> dict[str, int]:
    """How many of `rows` each split has: the shares of Karpathy's splits, but four of a split at least."""
    held_out = {split: max(4, round(share * rows)) for split, share in HELD_OUT.items()}
    return {"train": rows - sum(held_out.values())} | held_out


def _rows(places: np.ndarray, rows: int, picture: tuple[int, int], seed: int) -> Iterator[dict]:
    splits = np.repeat(list(split_counts(rows)), list(split_counts(rows).values()))
    np.random.default_rng(seed).shuffle(splits)
    for place in map(int, places):
        rng = np.random.default_rng([seed, place])
        name = f"{10_000_000 + 9_973 * place}.jpg"
        yield {
            "image": {"bytes": _jpeg(rng, picture), "path": name},
            "caption": [_caption(rng) for _ in range(NUM_CAPTIONS)],
            "sentids": [str(NUM_CAPTIONS * place + i) for i in range(NUM_CAPTIONS)],
            "split": str(splits[place]),
            "img_id": str(place),
            "filename": name,
        }


def _jpeg(rng: np.random.Generator, size: tuple[int, int]) -> bytes:
    """Noise as coarse as pictures are."""
    coarse = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)).resize(size)
    coarse.save(data := io.BytesIO(), "JPEG", quality=90)
    return data.getvalue()


def _caption(rng: np.random.Generator) -> str:
    """A sentence of 8 to 16 words."""
    return " ".join(str(rng.choice(part)) for part in PARTS).capitalize() + "."
