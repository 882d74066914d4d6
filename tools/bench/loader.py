"""An epoch over JPEGs of 500 x 375 pixels: decoded, resized, cropped to 224 and stacked by as many workers.

Ours keeps the pixels, as `train_clip` does: the first epoch writes them, the later ones read them.
"""

import os

from tools.bench.aligner import jpegs
from tools.bench.child import Case


def num_pictures(case: Case) -> int:
    return 96 if case.quick else 288


def ours(case: Case):
    epoch, path = _epoch(case)

    def turn() -> dict:
        os.truncate(path, 0)
        return epoch()

    return turn


def our_later_epoch(case: Case):
    return _epoch(case)[0]


def _epoch(case: Case):
    """A turn, and the file of the pixels, which it fills or reads."""
    import datasets

    from mlxmm.data.caption_data import CaptionData
    from mlxmm.data.caption_source import CaptionDataConfig, open_source
    from mlxmm.data.pixel_cache import PixelFile, PixelRows
    from mlxmm.preprocessing.images import ImageProcessor

    count = num_pictures(case)
    images = [{"bytes": data, "path": None} for data in jpegs(count + 2)]
    split = ["train"] * count + ["val", "test"]
    path = str(case.folder / "pictures.parquet")
    datasets.Dataset.from_dict({"image": images, "caption": split, "split": split}).to_parquet(path)
    config = CaptionDataConfig(source=path, split_column="split", batch_size=32, num_threads=case.threads)
    processor, file = ImageProcessor.square(224), PixelFile(case.folder / "pixels", 224)
    data = CaptionData(open_source(config, 0), transform=lambda row, caption: {"pixels": processor.pixels_of(row)})
    data.replace_rows("train", PixelRows(data.rows["train"], processor.pixels_of, file))
    loader = data.train_dataloader()
    return lambda: {"check": [sum(len(batch["pixels"]) for batch in loader.epoch(0))]}, file.path


def theirs(case: Case):
    from torch.utils.data import DataLoader

    from tools.bench.torch_side import decoded

    data = jpegs(num_pictures(case))

    class Pictures:
        def __len__(self):
            return len(data)

        def __getitem__(self, i):
            return decoded(data[i], 224)

    loader = DataLoader(Pictures(), batch_size=32, shuffle=True, drop_last=True, num_workers=case.threads)
    return lambda: {"check": [sum(len(batch) for batch in loader)]}
