"""CaptionRefresh: new captions while training goes on, the same ones after a resume, and no failure that stops it."""

import threading

import pytest

from mlxmm.captioners.caption_writer import CaptionFailure, Sampling, WriterFailed, WrittenCaption
from mlxmm.captioners.grammar_writer import GrammarWriter
from mlxmm.captioners.refresh import CaptionRefresh
from mlxmm.data.sources.shapes import ShapesConfig, ShapesGrammar

ROWS = ShapesGrammar(ShapesConfig(num_train=40, num_val=8, num_test=8), 0).rows(0)["train"]
PROMPTS = {"describe": "Describe it."}


class Numbered:
    """Writes the seed of its sampling, and counts its calls."""

    name, revision, batch_size = "numbered", "1", 8

    def __init__(self, in_process=True):
        self.in_process, self.num_calls, self.may_write = in_process, 0, threading.Event()
        self.may_write.set()
        self.fails = False

    def write(self, images, prompts, sampling):
        self.may_write.wait()
        self.num_calls += 1
        if self.fails:
            raise WriterFailed("the server is down")
        text = f"version {sampling.seed}"
        return [WrittenCaption(text=text, num_tokens=2, finish_reason="stop") for _ in images]

    def close(self):
        pass


def texts(rows):
    return [row["captions"][0] for row in (rows.without_image(place) for place in range(len(rows)))]


def refresh(folder, writer, **settings):
    return CaptionRefresh(folder, ROWS, writer, PROMPTS, **({"weight": 1.0} | settings))


def test_each_version_is_written_once_and_every_n_epochs(tmp_path):
    writer = Numbered()
    make_rows = refresh(tmp_path, writer, every_n_epochs=2)
    seen = [set(texts(make_rows(epoch))) for epoch in range(6)]
    assert seen[:2] == [set(texts(ROWS))] * 2
    assert seen[2:] == [{"version 1"}, {"version 1"}, {"version 2"}, {"version 2"}]
    assert writer.num_calls == 2 * 5  # 40 pictures, 8 at a time


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5])
def test_a_share_of_the_rows_has_new_captions_others_keep_their_own(weight, tmp_path):
    rows = refresh(tmp_path, Numbered(), weight=weight)(1)
    new = [text == "version 1" for text in texts(rows)]
    assert abs(sum(new) / len(new) - weight) < 0.15 and texts(rows) == texts(rows)
    assert all(text == own for text, own, is_new in zip(texts(rows), texts(ROWS), new) if not is_new)
    assert list(rows.captions()) == texts(rows) and rows.fingerprint() == ROWS.fingerprint()


def test_a_resumed_run_trains_each_epoch_on_the_version_that_it_had(tmp_path):
    writer = Numbered(in_process=False)
    writer.may_write.clear()
    make_rows = refresh(tmp_path, writer)
    whole = [texts(make_rows(epoch)) for epoch in range(3)]  # the writer is slow: nothing is new yet
    writer.may_write.set()
    make_rows.wait()
    whole += [texts(make_rows(3))]
    assert whole[:3] == [texts(ROWS)] * 3 and set(whole[3]) == {"version 1"}
    again = refresh(tmp_path, Numbered(in_process=False))
    assert [texts(again(epoch)) for epoch in range(4)] == whole  # although all was complete from the start
    assert again.metrics["refresh/version"] == 1


def test_a_writer_that_fails_is_told_and_asked_again_and_training_goes_on(tmp_path, capsys):
    writer = Numbered()
    writer.fails = True
    make_rows = refresh(tmp_path, writer)
    assert texts(make_rows(1)) == texts(make_rows(2)) == texts(ROWS)
    assert make_rows.metrics == {"refresh/version": 0.0, "refresh/failed": 1.0}
    assert capsys.readouterr().out.count("the server is down") == 1
    writer.fails = False
    assert set(texts(make_rows(3))) == {"version 3"} and make_rows.metrics["refresh/failed"] == 0.0


def test_a_version_cut_short_goes_on_where_it_was(tmp_path):
    class Stops(Numbered):
        def write(self, images, prompts, sampling):
            if self.num_calls == 2:
                raise KeyboardInterrupt
            return super().write(images, prompts, sampling)

    with pytest.raises(KeyboardInterrupt):
        refresh(tmp_path, Stops())(1)
    writer = Numbered()
    assert set(texts(refresh(tmp_path, writer)(1))) == {"version 1"} and writer.num_calls == 3


def test_captions_that_a_filter_drops_or_that_failed_leave_a_row_its_own(tmp_path):
    class Some(Numbered):
        def write(self, images, prompts, sampling):
            first, *rest = super().write(images, prompts, sampling)
            return [CaptionFailure("no"), *rest]

    keep = lambda entries: (int(entry.image[0], 16) % 2 == 0 for entry in entries)
    rows = refresh(tmp_path, Some(), keep=keep)(1)
    new = [text == "version 1" for text in texts(rows)]
    assert 0 < sum(new) < 35
    assert all(text == own for text, own, is_new in zip(texts(rows), texts(ROWS), new) if not is_new)


def test_a_grammar_that_lies_lies_about_the_fraction_it_is_told_and_the_same_ones_again():
    writer = GrammarWriter(ROWS, lies=0.3, seed=1)
    images = [ROWS[place]["image"] for place in range(len(ROWS))]
    written = [caption.text for caption in writer.write(images, [""] * len(images), Sampling())]
    lies = [writer.is_lie(image) for image in images]
    assert 4 <= sum(lies) <= 20
    assert [text != own for text, own in zip(written, texts(ROWS))] == lies
    one_by_one = [writer.write([image], [""], Sampling())[0].text for image in images]
    assert one_by_one == written
