"""The heat map, and the counts of which classes are taken for which."""

import numpy as np
import pytest
from PIL import Image

from mlxmm.evaluation.heat_map import SHADES, heat_map
from mlxmm.evaluation.retrieval import class_labels, confusion


def test_classes_are_counted_by_what_they_are_taken_for():
    scores = np.array([[0.9, 0.1, 0], [0.2, 0.3, 0.1], [0.5, 0.3, 0.1], [0, 0, 1]])
    relevant = class_labels(["a", "b", "c"], ["a", "b", "b", "c"])
    assert confusion(scores, relevant).tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]


def count(picture, colour):
    return int((np.asarray(picture) == colour).all(axis=2).sum())


def test_the_highest_value_is_dark_and_framed_and_a_row_of_equals_has_no_frame():
    plain = heat_map(np.zeros((4, 4)), list("abcd"), "", "{:.0f}")
    framed = heat_map(np.eye(4), list("abcd"), "", "{:.0f}")
    assert count(framed, SHADES[2]) > 500 > count(plain, SHADES[2])
    assert count(framed, (0, 0, 0)) > count(plain, (0, 0, 0)) + 4 * 100


@pytest.mark.parametrize("number", [2, 16, 100])
def test_any_number_of_rows_fits_with_pictures_labels_and_values_that_are_no_numbers(number):
    values = np.full((number, number), np.nan)
    values[0, 0] = 1.0
    pictures = [Image.new("RGB", (40, 10), "red")] * number
    picture = heat_map(values, ["a long caption " * 20] * number, "title", "{:.2f}", pictures)
    assert max(picture.size) < 2_000 and count(picture, (255, 0, 0)) > 0
