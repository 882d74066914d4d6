"""From a parquet file of small PNGs to data that are set up, with an empty cache: 10,000 rows against 1,000."""

import io
import shutil

import numpy as np

from tools.bench.child import Case, clocked, peak_mb


def _png(rng) -> dict:
    from PIL import Image

    Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(data := io.BytesIO(), "PNG")
    return {"bytes": data.getvalue(), "path": None}


def _turn(case: Case, count: int):
    import datasets

    from mlxmm import environment
    from mlxmm.data.caption_data import CaptionData
    from mlxmm.data.caption_source import CaptionDataConfig, open_source

    rng = np.random.default_rng(0)
    split = ["train"] * (count - 2) + ["val", "test"]
    rows = {"image": [_png(rng) for _ in split], "caption": split, "split": split}
    path = str(case.folder / f"{count}.parquet")
    datasets.Dataset.from_dict(rows).to_parquet(path)
    del rows
    config = CaptionDataConfig(source=path, split_column="split", num_threads=case.threads)

    def start() -> None:
        CaptionData(open_source(config, 0), transform=lambda row, caption: {}).setup("fit")

    def turn() -> dict:
        shutil.rmtree(environment.cache_root(), ignore_errors=True)
        return clocked(start)[1] | {"mb": peak_mb()}

    return turn


def ours(case: Case):
    return _turn(case, 10_000)


def theirs(case: Case):
    return _turn(case, 1_000)
