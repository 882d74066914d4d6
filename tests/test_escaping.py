"""Texts of others act nowhere: on terminals, in tables, cards and pictures of captions."""

import os
import sys
from pathlib import Path

import pytest
from PIL import Image

from mlxmm.errors import warn
from mlxmm.escaping import ACTING, markdown, visible
from mlxmm.evaluation.contact_sheet import Section, contact_sheet
from mlxmm.export.dataset_card import CardFacts, Tally, dataset_card
from mlxmm.export.model_card import _data
from mlxmm.storage.lineage import Lineage
from mlxmm.terminal import say
from mlxmm.training.logger import markdown_table

HOSTILE = {
    "colours": "\x1b[31mred\x1b[2J",
    "lines": "a\nerror: b\r\x0bc\u2028d",
    "columns": "a | b \\| c",
    "HTML": "<script>alert(1)</script><img src=x>",
    "links": "![a](http://127.0.0.1/x) [b](c)",
    "code": "`a` ```b",
    "no UTF-8": os.fsdecode(b"caf\xe9.png"),
    "zero bytes": "a\0b",
    "direction": "a\u202eb\u2066c",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_nothing_acts_on_a_terminal(text, capsys):
    say(f"skipped, {text}")
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and not ACTING.search(out[:-1]) and out.encode()


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_nothing_acts_in_a_warning(text):
    with pytest.warns(UserWarning) as warned:
        warn(f"{text} is not saved")
    assert not ACTING.search(str(warned[0].message)) and warned[0].filename == __file__


def test_ordinary_texts_stay_as_they_are():
    for text in ("a café, 東京 👩‍👩‍👧", "a/b c.png", "سلام", ""):
        assert visible(text) == markdown(text) == text


def test_a_terminal_without_a_letter_shows_its_escape(monkeypatch, tmp_path):
    with (tmp_path / "out").open("w", encoding="ascii") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        say("café")
        say("the next line")
    assert (tmp_path / "out").read_text() == "caf\\xe9\nthe next line\n"


def test_an_error_that_names_a_hostile_file_is_one_line(capsys):
    from mlxmm.cli import _end

    with pytest.raises(SystemExit):
        _end(f"error: {HOSTILE['lines']} {HOSTILE['no UTF-8']}", 2)
    assert capsys.readouterr().err == "error: a\\nerror: b\\r\\x0bc\\u2028d caf\\udce9.png\n"


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_cell_stays_a_cell(text):
    render = pytest.importorskip("markdown").markdown  # as TensorBoard does
    rendered = render(markdown_table(("", "caption"), [(0, text)]), extensions=["tables"])
    assert rendered.count("<td>") == 2 and rendered.count("<tr>") == 2
    assert not any(tag in rendered for tag in ("<script", "<img", "<a ", "<code"))


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_cards_show_hostile_texts_as_texts(text):
    facts = {"source": text, "config_name": text, "revision": None, "fingerprint": "f", "weight": 1}
    facts["rows"] = {"train": 1}
    source = facts | {"filters": {}, "where": {text: 1}, "captioners": []}
    tally = Tally(num_pictures=1, samples=[(text, "prompt", "captioner", "0")])
    cards = [_data(Lineage((source,))), dataset_card(tally, CardFacts(), {"default": ["train"]}, include_images=True)]
    for card in cards:
        assert markdown(text) in card and text not in card and not ACTING.search(card.replace("\n", ""))


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_contact_sheet_is_drawn(text):
    row = {"image": Image.new("RGB", (8, 8)), "captions": [text]}
    assert contact_sheet([Section(text, [row], [text])]).width


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_tensorboards_files_take_hostile_texts(tmp_path, text):
    from mlxmm import TensorBoardLogger

    logger = TensorBoardLogger(tmp_path)
    logger.log_table("captions", ("", "caption"), [(0, text)], 1)
    logger.finalize("success")
    assert sum(path.stat().st_size for path in Path(tmp_path).iterdir()) > 100
