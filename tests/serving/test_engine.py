"""The engine: captions that are waited for together are those of each alone."""

import queue
import threading

import numpy as np
import pytest
from PIL import Image
from small_modules import small_aligner

from mlxmm.networks.generation import GenerationConfig
from mlxmm.serving.engine import CaptionJob, Engine, make_captions


def pictures(count):
    rng = np.random.default_rng(1)
    return [Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)) for _ in range(count)]


def jobs(count, **settings):
    """Jobs with the lists that get what they emit."""
    made = []
    for seed, image in enumerate(pictures(count)):
        pieces: list = []
        config = GenerationConfig(max_new_tokens=8, seed=seed, **settings)
        made.append((CaptionJob(image, "", config, pieces.append), pieces))
    return made


def text(pieces):
    return "".join(piece.text for piece in pieces)


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.0}], ids=str)
def test_captions_made_together_are_those_of_each_alone(settings):
    module, together, alone = small_aligner(), jobs(5, **settings), jobs(5, **settings)
    make_captions(module, [job for job, _ in together])
    for job, _ in alone:
        make_captions(module, [job])
    assert [text(pieces) for _, pieces in together] == [text(pieces) for _, pieces in alone]
    assert [pieces[-1] for _, pieces in together] == [pieces[-1] for _, pieces in alone]
    assert {pieces[-1].finish_reason for _, pieces in together} <= {"stop", "length"}


def test_a_caption_is_that_of_the_module_and_its_tokens_are_counted():
    module, [(job, pieces)] = small_aligner(), jobs(1)
    make_captions(module, [job])
    [tokens] = module.caption_tokens([job.image], max_new_tokens=8)
    assert text(pieces) == module.text_of(tokens) != "" and pieces[-1].num_tokens == len(tokens)
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)


def test_one_that_nobody_waits_for_any_more_emits_nothing_and_the_others_go_on():
    module, [(left, nothing), (stays, pieces)] = small_aligner(), jobs(2)
    left.is_over = True
    make_captions(module, [left, stays])
    assert nothing == [] and pieces[-1].finish_reason is not None


def test_what_is_raised_goes_to_those_who_wait_and_the_engine_goes_on():
    engine, answers = Engine(), queue.Queue()
    engine.caption(CaptionJob("no picture", "", GenerationConfig(max_new_tokens=4), answers.put))
    failed, computed = engine.submit(lambda: 1 / 0), engine.submit(lambda: 42)
    engine.stop()
    thread = threading.Thread(target=engine.run, args=(None,))
    thread.start()
    thread.join(20)
    assert isinstance(answers.get(timeout=1), Exception)
    assert isinstance(failed.exception(), ZeroDivisionError) and computed.result() == 42


def test_only_captions_with_the_same_settings_are_made_together():
    [(one, _), (other, _)] = jobs(2)
    assert one.goes_with(other)
    assert not one.goes_with(CaptionJob(other.image, "a prompt", other.config, print))
    longer = GenerationConfig(max_new_tokens=9)
    assert not one.goes_with(CaptionJob(other.image, "", longer, print))
