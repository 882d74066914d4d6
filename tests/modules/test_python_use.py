"""What people type first in Python: captions and features of what they have, and a fit without steps before it."""

import numpy as np
import pytest
from PIL import Image
from small_modules import CAPTIONS, small_aligner, small_clip

from mlxmm import Module, Trainer
from mlxmm.data.caption_data import CaptionData
from mlxmm.data.caption_source import CaptionSource
from mlxmm.errors import UserError

QUIET = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False)


@pytest.fixture
def pictures(tmp_path) -> list:
    """Two pictures, the second as a path."""
    rng = np.random.default_rng(0)
    first, second = (Image.fromarray(rng.integers(0, 255, (20, 16, 3), dtype=np.uint8)) for _ in range(2))
    second.save(tmp_path / "second.png")
    return [first, tmp_path / "second.png"]


def test_one_picture_or_path_is_captioned_as_in_a_list(pictures):
    aligner = small_aligner()
    together = aligner.caption(pictures)
    alone = [aligner.caption(picture)[0] for picture in (pictures[0], pictures[1], str(pictures[1]))]
    assert len(together) == 2 and alone == [*together, together[1]]
    assert "".join(aligner.stream_caption(pictures[1])) == together[1] and aligner.caption([]) == []


def test_pictures_and_texts_are_encoded_as_their_arrays(pictures):
    clip = small_clip()
    opened = [pictures[0], Image.open(pictures[1])]
    from_arrays = clip.encode_image(clip.preprocess(opened)), clip.encode_text(clip.tokenize(CAPTIONS[:2]))
    assert np.array_equal(clip.encode_image(pictures), from_arrays[0])
    assert np.array_equal(clip.encode_text(CAPTIONS[:2]), from_arrays[1])
    assert np.array_equal(clip.encode_image(pictures[1])[0], clip.encode_image(pictures[1:])[0])
    assert np.array_equal(clip.encode_text(CAPTIONS[0])[0], clip.encode_text(CAPTIONS[:1])[0])


def test_a_path_that_holds_no_picture_is_named(tmp_path):
    (tmp_path / "notes.png").write_text("no picture")
    for path in (tmp_path / "notes.png", tmp_path / "absent.png"):
        with pytest.raises(UserError, match=f"{path.name}: not a picture that can be decoded"):
            small_clip().encode_image(path)


def caption_source() -> CaptionSource:
    rng = np.random.default_rng(0)
    image = lambda: Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8))
    rows = [{"image": image(), "captions": [caption], "id": str(i)} for i, caption in enumerate(CAPTIONS)]
    return CaptionSource(rows={"train": rows, "val": rows[:2], "test": rows[:2]})


@pytest.mark.parametrize("make", [small_clip, small_aligner])
def test_captioned_pictures_are_fitted_without_a_step_in_between(make):
    trainer, explicit = Trainer(max_steps=1, **QUIET), Trainer(max_steps=1, **QUIET)
    data = CaptionData(caption_source())
    Trainer(max_steps=1, **QUIET).fit((small_aligner if make is small_clip else small_clip)(), data)  # makes others
    trainer.fit(make(), data)
    module = make()
    collate = getattr(module, "collate", None)
    explicit.fit(module, CaptionData(caption_source(), transform=module.transform, collate=collate))
    assert trainer.callback_metrics == explicit.callback_metrics and "val/loss" in trainer.callback_metrics


def test_a_module_that_makes_no_examples_is_named():
    class Bare(Module):
        def training_step(self, batch): ...

        def configure_optimizers(self): ...

    with pytest.raises(UserError, match=r"Bare has no transform\(row, caption\): give CaptionData one"):
        Trainer(max_steps=1, **QUIET).fit(Bare(), CaptionData(caption_source()))
