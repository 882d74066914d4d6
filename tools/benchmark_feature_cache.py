"""What CachedFeatures saves: an epoch over pictures with a ViT-B/32-shaped tower, from disk and without.

    python tools/benchmark_feature_cache.py

Prints the seconds of the second epoch (the first one compiles, and fills the cache) either way, and their ratio.
"""

import argparse
import io
import tempfile
import time
from pathlib import Path

import attrs
import datasets
import mlx.core as mx
import numpy as np
from PIL import Image

from mlxmm import Callback, CaptionDecoder, Trainer
from mlxmm.callbacks import CachedFeatures
from mlxmm.data.caption_data import CaptionData
from mlxmm.data.caption_source import CaptionDataConfig, open_source
from mlxmm.modules.caption_decoder import CaptionDecoderConfig
from mlxmm.networks.clip import CLIPVisionTower
from mlxmm.networks.towers import VisionConfig
from mlxmm.preprocessing.images import ImageProcessor
from mlxmm.preprocessing.tokenizers import train_tokenizer

WORDS = "red green blue small large round square old new open".split()
TOWER = VisionConfig(
    image_size=224, patch_size=32, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072
)


class Epochs(Callback):
    """The seconds of each epoch."""

    def __init__(self):
        self.seconds, self._start = [], 0.0

    def on_train_epoch_start(self, trainer, module):
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer, module):
        self.seconds.append(time.perf_counter() - self._start)


def write_pictures(path: Path, count: int) -> None:
    """JPEGs of Flickr30k's size, of noise as coarse as pictures are, with a few words each."""
    rng = np.random.default_rng(0)

    def jpeg() -> bytes:
        coarse = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)).resize((500, 375))
        coarse.save(data := io.BytesIO(), "JPEG", quality=90)
        return data.getvalue()

    split = ["train"] * count + ["val"] * 8 + ["test"] * 8
    rows = {
        "image": [{"bytes": jpeg(), "path": None} for _ in split],
        "caption": [" ".join(rng.choice(WORDS, 6)) for _ in split],
        "split": split,
    }
    datasets.Dataset.from_dict(rows).to_parquet(str(path))


def second_epoch(source: Path, *callbacks: Callback) -> float:
    mx.random.seed(0)
    tokenizer = train_tokenizer(WORDS, 300)
    config = CaptionDecoderConfig(layer=-2, max_new_tokens=16)
    tower = CLIPVisionTower(TOWER)
    module = CaptionDecoder(config, tower, attrs.asdict(TOWER), ImageProcessor.square(224), tokenizer)
    data = CaptionData(
        open_source(CaptionDataConfig(source=str(source), split_column="split", batch_size=32), 0),
        transform=module.transform,
    )
    epochs = Epochs()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary"), False)
    trainer = Trainer(max_epochs=2, num_sanity_val_steps=0, callbacks=[epochs, *callbacks], **quiet)
    trainer.fit(module, data)
    return epochs.seconds[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=256)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "pictures.parquet"
        write_pictures(source, arguments.pictures)
        plain = second_epoch(source)
        cached = second_epoch(source, CachedFeatures(Path(folder) / "features"))
    print(f"second epoch over {arguments.pictures} pictures: {plain:.2f} s, from cached features {cached:.2f} s")
    print(f"{plain / cached:.1f} times faster")


if __name__ == "__main__":
    main()
