"""The contact sheet: failures first, pictures in their proportions, marks that need no colour."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from mlxmm.evaluation import fonts
from mlxmm.evaluation.contact_sheet import COLUMNS, MARGIN, PICTURE, TITLE, Section, contact_sheet, failures_first
from mlxmm.evaluation.fonts import font_for


def rows(count, size=(32, 32)):
    return [{"image": Image.new("RGB", size, "blue"), "captions": [f"picture {i}", f"image {i}"]} for i in range(count)]


def test_failures_come_first_and_are_at_most_half():
    said = [f"image {i}" if i % 2 else "wrong" for i in range(12)]
    section = failures_first("test", rows(12), said, most=4)
    assert section.title == "test: 6 of 12 equal a reference"
    assert section.is_right == [False, False, True, True] and section.said[2] == "image 1"
    assert failures_first("test", rows(2), ["picture 0", "picture 1"], most=8).is_right == [True, True]


def test_a_picture_keeps_its_proportions():
    sheet = np.asarray(contact_sheet([Section("wide", rows(1, (400, 100)), ["picture 0"])]))
    blue = (sheet == (0, 0, 255)).all(axis=2)
    assert (blue.any(axis=0).sum(), blue.any(axis=1).sum()) == (PICTURE, PICTURE // 4)


def test_a_tick_and_a_cross_differ_without_their_colours():
    marks = []
    for said in ("picture 0", "picture_0"):  # the second row is right in both, so that marks are drawn
        sheet = contact_sheet([Section("one", rows(2), [said, "picture 1"])]).convert("L")
        left, top = PICTURE + 2 * MARGIN, 2 * TITLE + PICTURE // 2
        marks.append(np.asarray(sheet.crop((left, top, left + 12, top + 14))) < 250)
    assert marks[0].any() and marks[1].any() and (marks[0] != marks[1]).sum() > 10


def test_free_texts_are_not_marked_wrong():
    sheet = np.asarray(contact_sheet([Section("free", rows(2), ["something else", "entirely"])]))
    assert not (sheet == (178, 34, 34)).all(axis=2).any()  # firebrick


def test_a_sheet_has_every_section_that_has_pictures():
    sections = [Section("one", rows(1), ["x"]), Section("none", [], []), Section("three", rows(3), ["x"] * 3)]
    assert contact_sheet(sections).width == COLUMNS * 420
    assert contact_sheet(sections).height > contact_sheet(sections[:2]).height == contact_sheet(sections[:1]).height


def test_a_font_is_taken_that_has_the_letters():
    default = ImageFont.load_default(13)
    drawn = lambda font, text: bytes(font.getmask(text))
    assert drawn(font_for("plain", 13), "plain") == drawn(default, "plain")
    found = font_for("оранжевый", 13)  # Pillow's own has no Cyrillic letters
    assert drawn(found, "о") != drawn(default, "о") or drawn(default, "о") != drawn(default, "ж")


def test_letters_that_no_font_has_are_said_with_what_to_install():
    fonts._warn.cache_clear()
    with pytest.warns(UserWarning, match="pip install"):
        font_for("a private letter: \ue123", 13)
