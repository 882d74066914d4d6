"""CachedPixels: a picture is decoded once, its pixels are the same bytes from then on, and never those of another."""

import hashlib
import sys
from pathlib import Path

import attrs
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image
from small_clip import small_clip
from small_sources import pictures, three_splits, write_source

from callbacks import CachedFeatures, CachedPixels, FreezeSchedule, SyntheticRefresh
from mlxmm import Callback, Trainer
from mlxmm.captioners.refreshed_rows import RecaptionedRows
from mlxmm.data.caption_data import CaptionData
from mlxmm.data.caption_source import CaptionDataConfig, open_source
from mlxmm.data.pixel_cache import PixelRows, num_bytes
from mlxmm.data.sources.shapes import ShapesConfig
from mlxmm.errors import UserError
from mlxmm.preprocessing.images import ImageProcessor

SHAPES = ShapesConfig(image_size=24, num_train=32, num_val=8, num_test=4)


@attrs.frozen(kw_only=True)
class Counting(ImageProcessor):
    """Keeps a list of the pictures that it was given."""

    seen: list = attrs.field(factory=list, eq=False)

    def pixels(self, image):
        self.seen.append(image)
        return super().pixels(image)


class Losses(Callback):
    """The loss of each update, and of each validation."""

    def __init__(self):
        self.of_training, self.of_validation = [], []

    def on_train_batch_end(self, trainer, module, metrics, batches):
        self.of_training.append(metrics["loss"].item())

    def on_validation_end(self, trainer, module, metrics):
        self.of_validation.append(metrics["val/loss"])


def fit(*callbacks, module=None, max_epochs=2, max_steps=-1, processor=None, **settings):
    """The losses, and how often a picture was decoded and resized."""
    module = module or small_clip()
    module.processor = processor or Counting(image_size=16, resize=20)
    data = CaptionData(open_source(CaptionDataConfig(**{"shapes": SHAPES, "batch_size": 8} | settings), 0))
    losses = Losses()
    options = {"logger": False, "enable_checkpointing": False, "num_sanity_val_steps": 0}
    Trainer(max_epochs=max_epochs, max_steps=max_steps, callbacks=[*callbacks, losses], **options).fit(module, data)
    kinds = {type(rows) for rows in data.rows.values()}
    assert PixelRows not in kinds  # pictures are back
    return (losses.of_training, losses.of_validation, weights(module)), len(module.processor.seen)


def small_captioner():
    from test_captioner import make

    return make()


def weights(module) -> str:
    """A checksum of all weights."""
    arrays = (np.array(array).tobytes() for _, array in sorted(tree_flatten(module.parameters())))
    return hashlib.sha256(b"".join(arrays)).hexdigest()


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


@pytest.fixture
def parquet(tmp_path) -> dict:
    """The settings of a source of files."""
    path = write_source(tmp_path / "pictures.parquet", range(24), split=three_splits(16, 4))
    return {"source": path, "split_column": "split", "batch_size": 4}


@pytest.mark.parametrize("kind", ["shapes", "parquet", "captioner", "mixture"])
def test_training_with_kept_pixels_is_training_on_pictures_to_the_bit(tmp_path, kind, parquet):
    other = write_source(tmp_path / "other.parquet", range(30, 42), "a red square")
    mixture = {"source": ("shapes", other), "weights": (1, 0.5)}
    settings = {"parquet": parquet, "mixture": mixture}.get(kind, {})
    build = small_captioner if kind == "captioner" else small_clip
    plain, num_plain = fit(module=build(), **settings)
    first, num_first = fit(CachedPixels(tmp_path / "kept"), module=build(), **settings)
    again, num_again = fit(CachedPixels(tmp_path / "kept"), module=build(), **settings)
    assert plain == first == again
    assert num_first < num_plain and num_again < num_first / 2


def test_each_picture_is_decoded_once(tmp_path, parquet):
    assert fit(CachedPixels(tmp_path / "kept"), **parquet)[1] == 16 + 4
    assert len(files(tmp_path / "kept")) == 2  # of training and of validation
    assert fit(CachedPixels(tmp_path / "kept"), **parquet)[1] == 0


def test_the_pictures_of_a_folder_that_change_are_decoded_again(tmp_path):
    folder = pictures(tmp_path / "folder")
    lines = [f'{{"file_name": "{i}.png", "caption": "a {i}", "split": "{split}"}}' for i, split in SPLIT_OF_20]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    settings = {"source": str(folder), "split_column": "split", "batch_size": 4}
    fit(CachedPixels(tmp_path / "kept"), **settings)
    Image.new("RGB", (30, 30), "red").save(folder / "3.png")
    plain, _ = fit(**settings)
    kept, num_decoded = fit(CachedPixels(tmp_path / "kept"), **settings)
    assert kept == plain and num_decoded == 16  # validation has not changed


SPLIT_OF_20 = list(enumerate(three_splits(16)))


@pytest.mark.parametrize("change", [{"resize": 16}, {"resample": Image.Resampling.BILINEAR}, {"resize": (16, 16)}])
def test_another_processor_has_pixels_of_its_own(tmp_path, change, parquet):
    fit(CachedPixels(tmp_path / "kept"), **parquet)
    before = [file.read_bytes() for file in files(tmp_path / "kept")]
    other = lambda: Counting(**{"image_size": 16, "resize": 20} | change)
    plain, _ = fit(processor=other(), **parquet)
    kept, num_decoded = fit(CachedPixels(tmp_path / "kept"), processor=other(), **parquet)
    assert kept == plain and num_decoded == 20
    assert len(files(tmp_path / "kept")) == 4 and set(before) <= {
        file.read_bytes() for file in files(tmp_path / "kept")
    }


def test_random_crops_are_not_kept_and_validation_is(tmp_path, parquet):
    plain, num_plain = fit(random_crop=True, **parquet)
    kept, num_kept = fit(CachedPixels(tmp_path / "kept"), random_crop=True, **parquet)
    assert plain == kept and (num_plain, num_kept) == (2 * (16 + 4), 2 * 16 + 4)
    assert len(files(tmp_path / "kept")) == 1


def test_a_stream_is_trained_on_as_it_is(tmp_path, parquet):
    fit(CachedPixels(tmp_path / "kept"), streaming=True, max_epochs=1, max_steps=2, **parquet)
    assert len(files(tmp_path / "kept")) == 1  # of validation


def test_pictures_that_a_callback_draws_anew_are_not_kept_and_those_with_new_captions_are(tmp_path):
    source = open_source(CaptionDataConfig(shapes=SHAPES, batch_size=8), 0)
    fit(SyntheticRefresh(lambda epoch: source.fresh_rows(epoch + 1)), CachedPixels(tmp_path / "fresh"))
    assert len(files(tmp_path / "fresh")) == 1  # of validation
    new = lambda epoch: RecaptionedRows(source.rows["train"], {0: [f"new {epoch}"]}, 1.0, 0, epoch)
    plain, _ = fit(SyntheticRefresh(new))
    kept, num_decoded = fit(SyntheticRefresh(new), CachedPixels(tmp_path / "new"))
    assert kept == plain and num_decoded == 32 + 8


def test_pixels_are_kept_from_the_epoch_on_in_which_a_tower_with_features_is_opened(tmp_path, parquet):
    callbacks = lambda: (
        FreezeSchedule({0: "network", 1: ("network", "vision")}),
        CachedFeatures(tmp_path / "features"),
    )
    plain, num_plain = fit(*callbacks(), module=small_captioner(), max_epochs=3, **parquet)
    kept, num_kept = fit(
        *callbacks(), CachedPixels(tmp_path / "kept"), module=small_captioner(), max_epochs=3, **parquet
    )
    assert kept == plain and len(files(tmp_path / "kept")) == 2 and num_kept < num_plain


def test_what_does_not_fit_is_not_kept_which_one_line_says(tmp_path, capsys, parquet):
    plain, num_plain = fit(**parquet)
    small = CachedPixels(tmp_path / "kept", max_gib=1e-6)
    assert fit(small, **parquet) == (plain, num_plain)
    told = [line for line in capsys.readouterr().out.splitlines() if "pixels are not kept" in line]
    assert len(told) == 1 and "GiB would be more than" in told[0] and not files(tmp_path / "kept")
    assert fit(CachedPixels(tmp_path / "none", max_gib=0), **parquet) == (plain, num_plain)
    assert "not kept" not in capsys.readouterr().out and not (tmp_path / "none").exists()


def test_a_folder_that_cannot_be_made_costs_time_alone(tmp_path, capsys, parquet):
    (tmp_path / "file").touch()
    fit(CachedPixels(tmp_path / "file/kept"), **parquet)
    assert "pixels are not kept" in capsys.readouterr().out


def test_a_disk_that_is_full_costs_time_alone_and_the_rest_is_written_later(tmp_path, capsys, parquet, full_disk):
    plain, _ = fit(**parquet)
    full_disk(4 * num_bytes(1, 16) + 100)
    first, num_first = fit(CachedPixels(tmp_path / "kept"), **parquet)
    full_disk(None)
    told = [line for line in capsys.readouterr().out.splitlines() if "more pixels" in line]
    again, num_again = fit(CachedPixels(tmp_path / "kept"), **parquet)
    assert plain == first == again and 20 < num_first <= 40 and 0 < num_again <= 20
    assert len(told) == 1 and "the run goes on" in told[0] and str(tmp_path) in told[0]
    assert fit(CachedPixels(tmp_path / "kept"), **parquet)[1] == 0


def test_a_module_without_a_processor_is_refused(tmp_path, make_trainer):
    from conftest import DistinctBatches, TinyRegression

    with pytest.raises(UserError, match="a module with a processor"):
        make_trainer(callbacks=[CachedPixels(tmp_path)]).fit(TinyRegression(), DistinctBatches())


def test_features_and_pixels_in_the_wrong_order_are_refused(tmp_path):
    with pytest.raises(UserError, match="CachedFeatures comes before CachedPixels"):
        fit(CachedPixels(tmp_path), CachedFeatures(tmp_path), module=small_captioner())


def shared(folder: Path) -> None:
    """What each of two ranks does: it reads its share of the pictures, and keeps their pixels in one file for both."""
    plain, _ = fit()
    kept, num_decoded = fit(CachedPixels(folder / "kept"))
    assert kept == plain and num_decoded < 32 + 8  # of all pictures


@pytest.mark.slow
def test_two_ranks_fill_one_file_and_train_as_without(tmp_path, monkeypatch):
    from test_distributed import run_workers

    monkeypatch.setenv("HOSTFILES", str(tmp_path))
    ended, _ = run_workers(__file__, "shared", tmp_path)
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert len(files(tmp_path / "kept")) == 2


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
