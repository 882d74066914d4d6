"""Decode damaged pictures: whatever a file holds, `decode_image` gives an RGB image or raises `UndecodableImage`.

    python tools/fuzz_pictures.py --files 20000 --seed 0

Files of every format and mode that Pillow writes here are damaged at random: bytes changed, cut, repeated, inserted or
swapped. The number of outcomes is printed, and each escape with its format, number and seed. Exits with 1 if there is
one, or if a file takes longer than `SECONDS`.
"""

import argparse
import collections
import io
import random
import time

import numpy as np
from PIL import Image

from mlxmm.preprocessing.images import UndecodableImage, decode_image

SECONDS = 5.0  # of one file
MODES = ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "I;16", "I", "F")
NO_PICTURES = {"PDF"}  # Pillow writes it, and nobody reads it back


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    counts, escapes = fuzz(arguments.files, arguments.seed)
    print(f"{arguments.files} files of {len(set(name for name, _ in whole_files()))} formats:", dict(counts))
    for escape in escapes:
        print(escape)
    raise SystemExit(bool(escapes))


def fuzz(num_files: int, seed: int) -> tuple[collections.Counter, list[str]]:
    """How many files were decoded and refused; and those that did neither, or took too long."""
    counts: collections.Counter = collections.Counter()
    escapes, files = [], whole_files()
    for number in range(num_files):
        name, data = files[number % len(files)]
        start = time.process_time()
        outcome = decoded(damaged(data, random.Random(f"{seed} {number}")))
        counts[outcome.partition(":")[0]] += 1
        if outcome not in ("decoded", "refused") or time.process_time() - start > SECONDS:
            escapes.append(f"file {number} of seed {seed}, {name}: {outcome}")
    return counts, escapes


def decoded(data: bytes) -> str:
    """What becomes of a file: "decoded", "refused", or the exception that escaped."""
    try:
        image = decode_image(data)
    except UndecodableImage as error:
        return "refused" if "\n" not in str(error) else f"two lines: {error}"
    except BaseException as error:  # as pyo3's panics, which are no `Exception`
        return f"escaped: {type(error).__name__}: {error}"
    return "decoded" if image.mode == "RGB" else f"escaped: mode {image.mode}"


def whole_files() -> list[tuple[str, bytes]]:
    """(format, file) of a small noisy picture in each format and mode that this Pillow writes."""
    Image.init()
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 3)).astype(np.uint8)
    files = []
    for name in sorted(Image.SAVE.keys() - NO_PICTURES):
        for mode in MODES:
            buffer = io.BytesIO()
            try:
                Image.fromarray(noise).convert("L" if mode == "I;16" else "RGB").convert(mode).save(buffer, name)
            except Exception:  # this format has no such mode
                continue
            files.append((name, buffer.getvalue()))
    return files


def damaged(data: bytes, rng: random.Random) -> bytes:
    """`data` with one to eight places changed, the first bytes more often: headers are there."""
    file = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        at = rng.randrange(min(len(file), 64) if rng.random() < 0.5 else len(file)) if file else 0
        match rng.randrange(6):
            case 0:
                file[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                file[at : at + 4] = rng.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\x27\x0f"))
            case 2:
                del file[at:]
            case 3:
                file[at:at] = file[at : at + rng.randrange(1, 64)]
            case 4:
                file[at:at] = rng.randbytes(rng.randrange(1, 16))
            case _:
                del file[at : at + rng.randrange(1, 16)]
    return bytes(file)


if __name__ == "__main__":
    main()
