"""CaptionRefresh: new captions while training goes on, the same ones after a resume, and no failure that stops it."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image
from small_server import SmallServer

from mlxmm.captioners.caption_writer import CaptionFailure, Sampling, WriterFailed, WrittenCaption
from mlxmm.captioners.grammar_writer import GrammarWriter
from mlxmm.captioners.refresh import CaptionRefresh, Judged
from mlxmm.data.pictures import RowPictures
from mlxmm.data.sources.shapes import ShapesConfig, ShapesGrammar
from mlxmm.errors import UserError

ROOT = Path(__file__).parents[2]
GRAMMAR = ShapesGrammar(ShapesConfig(num_train=40, num_val=8, num_test=8), 0)
ROWS = GRAMMAR.rows(0)["train"]
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
    assert make_rows(4) is make_rows(5) is not make_rows(3)  # features that are cached for them stay


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
    assert set(texts(make_rows(3))) == {"version 1"} and make_rows.metrics["refresh/failed"] == 0.0
    assert make_rows.metrics["refresh/made"] == 40


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

    def even(written):
        kept = {e.image: [e.text] for e in written.entries if e.text and int(e.image[0], 16) % 2 == 0}
        return Judged(kept, {"kept": len(kept)})

    make_rows = refresh(tmp_path, Some(), judge=even)
    rows = make_rows(1)
    new = [text == "version 1" for text in texts(rows)]
    assert 0 < sum(new) < 35 and make_rows.metrics["refresh/kept"] == sum(new)
    assert all(text == own for text, own, is_new in zip(texts(rows), texts(ROWS), new) if not is_new)


def test_unlabelled_pictures_are_added_by_weight_in_every_epoch_others(tmp_path):
    pictures = RowPictures(GRAMMAR.rows(0, epoch=7)["train"])
    make = lambda: refresh(tmp_path, Numbered(), pictures=pictures, weight=0.25, every_n_epochs=2)
    make_rows = make()
    epochs = [make_rows(epoch) for epoch in range(4)]
    assert [len(rows) for rows in epochs] == [40, 40, 50, 50]
    assert texts(epochs[2])[:40] == texts(ROWS) and set(texts(epochs[2])[40:]) == {"version 1"}
    assert epochs[2][45]["image"].size == (32, 32) and epochs[2][45]["id"] == epochs[2].name(45)
    assert list(epochs[2].captions()) == texts(epochs[2])
    drawn = [[rows.name(place) for place in range(40, 50)] for rows in epochs[2:]]
    assert drawn[0] != drawn[1] and len(set(drawn[0])) == 10
    assert epochs[2].fingerprint() != epochs[3].fingerprint()
    again = make()(2)
    assert [again.name(place) for place in range(40, 50)] == drawn[0]


def test_a_picture_of_the_evaluation_splits_is_never_captioned_into_training(tmp_path, capsys):
    test = RowPictures(GRAMMAR.rows(0)["test"])

    class Both(list):
        def sha256(self, place):
            return RowPictures.sha256(self, place)

        file, name = RowPictures.file, lambda self, place: str(place)

    pictures = Both([test[place] for place in range(8)] + [Image.new("RGB", (32, 32), "red")])
    writer = Numbered()
    rows = refresh(tmp_path, writer, pictures=pictures, held_out=[test])(1)
    assert [rows.name(place) for place in range(40, len(rows))] == ["8"] and writer.num_calls == 1
    assert "without new captions, as val or test has them too: 8 pictures\n" in capsys.readouterr().out


def test_a_version_that_is_due_by_updates_is_trained_on_from_the_next_epoch_on(tmp_path):
    writer = Numbered(in_process=False)
    make_rows = refresh(tmp_path, writer, every_n_train_steps=10)
    make_rows(0)
    for step in range(11):
        make_rows.advance(step)
    make_rows.wait()
    assert make_rows.folder.newest() == 1  # although the epoch goes on
    assert set(texts(make_rows(1))) == {"version 1"}
    between = refresh(tmp_path / "2", Numbered(), every_n_train_steps=10)
    seen = []
    for epoch, step in enumerate((0, 8, 16, 24)):
        between.advance(step)
        between(epoch)
        seen.append(between.metrics["refresh/version"])
    assert seen == [0, 0, 1, 2]


def test_what_a_thread_had_begun_is_gone_on_with_after_a_resume(tmp_path):
    class Stops(Numbered):
        def write(self, images, prompts, sampling):
            if self.num_calls == 2:
                raise WriterFailed("stopped")
            return super().write(images, prompts, sampling)

    make_rows = refresh(tmp_path, Stops(in_process=False))
    make_rows(0), make_rows(1)
    make_rows.wait()
    writer = Numbered(in_process=False)
    again = refresh(tmp_path, writer)
    assert texts(again(1)) == texts(ROWS)  # the epoch that had begun keeps its rows
    again.wait()
    assert writer.num_calls == 3 and set(texts(again(2))) == {"version 1"}


def test_a_version_that_a_checkpoint_names_must_be_there_as_it_was(tmp_path):
    make_rows = refresh(tmp_path, Numbered())
    make_rows(0), make_rows(1)
    state = make_rows.state_dict()
    assert state["version"] == 1 and len(state["sha256"]) == 64
    refresh(tmp_path, Numbered()).load_state_dict(state)
    complete = tmp_path / "version-1" / "complete.json"
    complete.write_text(complete.read_text().replace("version 1", "version 9", 1))
    with pytest.raises(UserError, match="complete.json has changed, and the checkpoint was trained on it"):
        refresh(tmp_path, Numbered()).load_state_dict(state)
    complete.unlink()
    with pytest.raises(UserError, match="complete.json is not there, and the checkpoint was trained on it"):
        refresh(tmp_path, Numbered()).load_state_dict(state)
    with pytest.raises(UserError, match="says that an epoch was trained on it"):
        refresh(tmp_path, Numbered())(1)


def test_the_epoch_of_a_checkpoint_is_replayed_on_its_version_though_the_schedule_was_lost(tmp_path):
    writer = Numbered()
    writer.fails = True
    make_rows = refresh(tmp_path, writer)
    make_rows(1)
    state = make_rows.state_dict()
    (tmp_path / "schedule.json").unlink()
    again = refresh(tmp_path, Numbered())
    again.load_state_dict(state)
    assert texts(again(1)) == texts(ROWS) and set(texts(again(2))) == {"version 1"}


def test_a_judge_that_computes_with_mlx_runs_in_the_thread_that_trains(tmp_path):
    class Judge:
        in_process = True
        threads = []

        def __call__(self, written):
            self.threads.append(threading.current_thread())
            return Judged({e.image: [e.text] for e in written.entries}, {})

    make_rows = refresh(tmp_path, Numbered(in_process=False), judge=Judge())
    make_rows(1)
    make_rows.wait()
    assert not Judge.threads and set(texts(make_rows(2))) == {"version 1"}
    assert Judge.threads == [threading.main_thread()]


def test_a_refresh_that_is_closed_stops_writing_at_once_and_keeps_what_it_has(tmp_path, capsys):
    writer = Numbered(in_process=False)
    writer.may_write.clear()
    make_rows = refresh(tmp_path, writer)
    make_rows(1)
    writer.close = writer.may_write.set
    make_rows.close()
    assert not make_rows._thread.is_alive() and writer.num_calls == 1 and not capsys.readouterr().out
    again = Numbered()
    assert set(texts(refresh(tmp_path, again)(2))) == {"version 1"} and again.num_calls == 4


SLOW_SERVER = """
import sys, time
from mlxmm.captioners import refresh
from mlxmm.captioners.server_writer import ServerConfig, ServerWriter
from mlxmm.data.sources.shapes import ShapesConfig, ShapesGrammar
rows = ShapesGrammar(ShapesConfig(num_train=40, num_val=8, num_test=8), 0).rows(0)["train"]
refresh.GRACE = 0.1
writer = ServerWriter(ServerConfig(urls=(sys.argv[1],), model="m"))
make_rows = refresh.CaptionRefresh(sys.argv[2], rows, writer, {"none": ""})
assert make_rows(1) is rows
while not writer._pool.places[0].busy:
    time.sleep(0.01)
time.sleep(0.5)  # until the server has the request
make_rows.close()
"""


def test_a_server_that_does_not_answer_does_not_keep_a_run_from_ending(tmp_path):
    pytest.importorskip("openai")
    asked = []
    server = SmallServer(lambda number, image: asked.append(number) or time.sleep(30) or 200)
    start = time.monotonic()
    command = [sys.executable, "-c", SLOW_SERVER, server.url, str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, timeout=25).returncode == 0
    assert asked and time.monotonic() - start < 25
    server.stop()


def test_samples_show_the_old_and_the_new_caption_where_a_version_is_new(tmp_path):
    make_rows = refresh(tmp_path, Numbered(), every_n_epochs=2)
    shown = []
    for epoch in range(5):
        make_rows(epoch)
        shown.append([(old, new) for _, old, new in make_rows.samples(3)])
    assert [len(samples) for samples in shown] == [0, 0, 3, 0, 3]
    assert {old for old, _ in shown[2]} <= set(texts(ROWS)) and {new for _, new in shown[2]} == {"version 1"}
    assert set(shown[4]) == {("version 1", "version 2")}


def test_a_grammar_that_lies_lies_about_the_fraction_it_is_told_and_the_same_ones_again():
    writer = GrammarWriter(ROWS, lies=0.3, seed=1)
    images = [ROWS[place]["image"] for place in range(len(ROWS))]
    written = [caption.text for caption in writer.write(images, [""] * len(images), Sampling())]
    lies = [writer.is_lie(image) for image in images]
    assert 4 <= sum(lies) <= 20
    assert [text != own for text, own in zip(written, texts(ROWS))] == lies
    one_by_one = [writer.write([image], [""], Sampling())[0].text for image in images]
    assert one_by_one == written
