"""A captioner over a whole split: its metrics, and the control that gives its captions to other images."""

import numpy as np
from PIL import Image
from small_modules import CAPTIONS, small_aligner, small_clip

from mlxmm.evaluation.captions import evaluate, score, shuffled


def rows():
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in CAPTIONS]
    return [{"id": i, "image": x, "captions": [c, "x"]} for i, (x, c) in enumerate(zip(images, CAPTIONS))]


def test_a_split_is_captioned_once_and_each_metric_has_its_control():
    captioner, split = small_aligner(), rows()
    metrics, each = evaluate(captioner, split, clip=small_clip(), num_beams=2)
    captions = captioner.caption([row["image"] for row in split], num_beams=2)
    assert [(row["id"], row["caption"]) for row in each] == list(enumerate(captions))
    assert {"cider_d", "clip_score", "ref_clip_score"} <= set(each[0])
    controls = {name.removesuffix("_shuffled") for name in metrics if name.endswith("_shuffled")}
    assert controls == {name for name in metrics if not name.endswith("_shuffled")} - {"distinct_1", "distinct_2"}


def test_the_control_gives_every_caption_to_another_image():
    references = [row["captions"] for row in rows()]
    assert score(CAPTIONS, references)[0]["exact_match"] == 1
    assert score(shuffled(CAPTIONS), references)[0]["exact_match"] == 0
