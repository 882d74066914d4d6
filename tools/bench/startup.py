"""From a parquet file of small JPEGs to data that are set up: 100,000 rows against 1,000.

Each start is a process of its own, as a run's is, of which the setup alone is measured: the first with an empty cache
of mlxmm's (`datasets` has converted the file), the others with what the first left. By hand, on any source:

    python -m tools.bench.startup SOURCE [SPLIT_COLUMN]
"""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from tools.bench.child import Case, clocked, peak_mb

SIDE = 64  # pixels


def start(source: str, split_column: str | None, threads: int) -> dict[str, float]:
    """Seconds of one setup, and the most memory that the process has held."""
    import datasets  # noqa: F401  a run imports it for whatever number of rows

    from mlxmm.data.caption_data import CaptionData
    from mlxmm.data.caption_source import CaptionDataConfig, open_source

    config = CaptionDataConfig(source=source, split_column=split_column, num_threads=threads)
    set_up = lambda: CaptionData(open_source(config, 0), transform=lambda row, caption: {}).setup("fit")
    return clocked(set_up)[1] | {"mb": peak_mb()}


def again_100_000(case: Case):
    return _turn(case, 100_000, is_first=False)


def again_1_000(case: Case):
    return _turn(case, 1_000, is_first=False)


def first_100_000(case: Case):
    return _turn(case, 100_000, is_first=True)


def first_1_000(case: Case):
    return _turn(case, 1_000, is_first=True)


def _turn(case: Case, count: int, *, is_first: bool):
    path, cache = case.folder / f"{count}.parquet", case.folder / f"cache-{count}-{is_first}"
    _write(path, count)
    command = [sys.executable, "-m", "tools.bench.startup", str(path), "split", str(case.threads)]

    def turn() -> dict:
        if is_first:
            shutil.rmtree(cache, ignore_errors=True)
        environment = os.environ | {"MLXMM_CACHE": str(cache)}
        return json.loads(subprocess.run(command, env=environment, capture_output=True, check=True).stdout.split()[-1])

    return turn


def _write(path: Path, count: int) -> None:
    from mlxmm.data.sources.tables import write_parquet

    split = ["train"] * (count - 2) + ["val", "test"]
    rows = [{"image": _jpeg(i), "caption": f"picture number {i}", "split": own} for i, own in enumerate(split)]
    write_parquet(path, rows, {"image": "image", "caption": "string", "split": "string"})


def _jpeg(seed: int) -> dict:
    from PIL import Image

    colors = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(colors).resize((SIDE, SIDE)).save(data := io.BytesIO(), "JPEG")
    return {"bytes": data.getvalue(), "path": f"{seed}.jpg"}


if __name__ == "__main__":
    source, column, threads = [*sys.argv[1:], None, None][:3]
    answer = json.dumps(start(source, column, int(threads or 1)), separators=(",", ":"))
    print(f"\n{answer}")
