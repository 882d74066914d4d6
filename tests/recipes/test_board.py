"""TensorBoard's page on tiny runs, in Chromium: `make test-browser`."""

import json
import re
import subprocess
import sys
import time
import urllib.request

import pytest
from chromium import browser  # noqa: F401  (a fixture)
from test_recipes import TINY, cache, run  # noqa: F401  (a fixture)

pytestmark = pytest.mark.browser
RUNS = {"clip", "captioner", "captioner/tower"}


@pytest.fixture(scope="module")
def address(cache, tmp_path_factory):  # noqa: F811
    """Where TensorBoard shows a CLIP, a captioner and its tower, on this machine alone; once it has read them."""
    folder = tmp_path_factory.mktemp("runs")
    for recipe, flags in {"captioner": [], "clip": ["--log-embeddings", 8]}.items():
        done = run(f"train_{recipe}", *TINY, *flags, "--run-dir", folder / recipe, cache=cache)
        assert done.returncode == 0, done.stderr
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--host", "127.0.0.1", "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    address = next(m[0] for line in process.stderr if (m := re.search(r"http://127\.0\.0\.1:\d+/", line)))
    while set(json.load(urllib.request.urlopen(f"{address}data/runs"))) < RUNS:
        time.sleep(0.2)
    yield address
    process.kill()


@pytest.fixture
def open_tab(browser, address, tmp_path):  # noqa: F811
    """Opens a tab and waits until it shows something that a selector names; leaves a picture of it."""
    pages = {}

    def make(name, selector):
        page = pages[name] = browser.new_page(viewport={"width": 1500, "height": 1100})
        page.goto(f"{address}#{name}")
        page.locator(selector).first.wait_for()
        return page

    yield make
    for name, page in pages.items():
        page.screenshot(path=tmp_path / f"{name}.png")


def test_curves_are_in_groups_and_what_the_machine_did_comes_last(open_tab):
    page = open_tab("timeseries", "card-view svg")
    page.locator("metrics-card-group-toolbar", has_text="vitals").wait_for()
    groups = page.locator("metrics-card-group-toolbar").all_inner_texts()
    assert [re.match(r"[a-z]+", text.strip())[0] for text in groups] == ["test", "train", "val", "vitals"]
    page.locator("metrics-card-group-toolbar button", has_text="test").click()  # closes it
    page.locator("card-view", has_text="/loss").locator("svg path").first.wait_for()


def test_pictures_are_drawn(open_tab):
    page = open_tab("images", "tf-image-loader img")
    page.wait_for_timeout(2_000)
    for tag in ("test/samples", "val/samples", "val/similarity", "val/zero_shot/confusion"):
        assert page.get_by_text(f"tag: {tag}").count(), tag
    widths = page.locator("tf-image-loader img").evaluate_all("images => images.map(image => image.naturalWidth)")
    assert len(widths) >= 6 and min(widths) > 500


def test_captions_are_a_table(open_tab):
    page = open_tab("text", "th:has-text('generated')")
    assert page.locator("th:has-text('expected')").count() and page.locator("td:has-text('a large red')").count()


def test_settings_stand_beside_metrics(open_tab):
    page = open_tab("hparams", "vaadin-grid :text('captioner/tower')")
    for column in ("data.source", "module.optimizer.learning_rate", "test/bleu", "val/loss"):
        assert page.get_by_text(column, exact=True).count(), column


def test_features_are_points(open_tab):
    frame = open_tab("projector", "iframe").frame_locator("iframe").frame_locator("iframe")
    frame.locator("canvas").first.wait_for()
    frame.locator(".numDataPoints:text-is('16')").first.wait_for()
