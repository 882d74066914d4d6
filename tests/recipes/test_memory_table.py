"""What each preset needs on the Mac that its line promises it for: the table of docs/on-a-mac.md."""

import os
from pathlib import Path

import pytest

from recipes.parts.alignment import FLICKR30K_PRESETS
from tools.memory_table import WORKING_SETS, need, needs, table

pytestmark = pytest.mark.slow  # the plans of all presets take ten seconds
PAGE = Path(__file__).parents[2] / "docs/on-a-mac.md"


@pytest.fixture(scope="module")
def found():
    before = os.environ.get("MLXMM_ACT_AS")
    try:
        yield needs()
    finally:
        os.environ.pop("MLXMM_ACT_AS", None)
        os.environ |= {"MLXMM_ACT_AS": before} if before else {}


def test_every_preset_fits_the_machine_that_its_line_promises(found):
    assert {need.machine for need in found.values()} == set(WORKING_SETS)
    assert [name for name, need in found.items() if not need.fits] == []


def test_the_page_for_macs_has_the_table_as_it_is_computed(found):
    assert table(found) in PAGE.read_text()


def test_the_weights_are_those_that_metal_holds(found):
    """Qwen3-0.6B has 596,049,920 parameters, in bfloat16; CLIP's vision tower 87,456,000, in float32 and bfloat16; the
    projector too, and the two unfrozen layers are float32."""
    plan = found["flickr30k"].plan
    projector = 768 * 1_024 + 1_024 + 1_024 * 1_024 + 1_024
    layer = 2 * 2_048 * 1_024 + 2 * 1_024 * 1_024 + 3 * 3_072 * 1_024 + 2 * 1_024 + 2 * 128
    assert plan.optimizer == 12 * (projector + 2 * layer)
    assert plan.weights == pytest.approx(596_049_920 * 2 + 87_456_000 * 6 + projector * 6 + 2 * layer * 2, rel=0.005)


def test_a_preset_that_does_not_fit_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("MLXMM_ACT_AS", "gpu")
    config = FLICKR30K_PRESETS["flickr30k-32gb"].config
    assert not need("for 8 GB", config, tmp_path).fits and need("for 16 GB", config, tmp_path).machine == 16
