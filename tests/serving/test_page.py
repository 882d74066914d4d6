"""The page of `recipes.serve` in Chromium: `make test-browser`."""

import pytest
from chromium import browser  # noqa: F401  (a fixture)
from test_serve import PICTURES, module, start  # noqa: F401  (a fixture)

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def address(module):  # noqa: F811
    process, address = start(module[1])
    yield address
    process.kill()


@pytest.fixture
def open_page(browser, address):  # noqa: F811
    """Opens the page in a window of its own, whose errors fail the test."""
    errors = []

    def make():
        page = browser.new_page(viewport={"width": 1100, "height": 800})
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#model:not(:empty)")
        return page

    yield make
    assert errors == []


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number, picture in enumerate(PICTURES):
        picture.save(folder / f"{number}.png")
    (folder / "broken.png").write_bytes(b"not a picture")
    return folder


def test_a_picture_gets_its_caption_bars_and_a_heat_map(open_page, files, module):  # noqa: F811
    page = open_page()
    page.fill("#classes", "a red circle, a blue square")
    page.set_input_files("#file", files / "0.png")
    page.wait_for_selector(".bar")
    assert page.inner_text("#caption") == module[0].caption(PICTURES[:1])[0]
    shares = [float(text.removesuffix(" %")) for text in page.locator(".bar span:last-child").all_inner_texts()]
    assert len(shares) == 2 and shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(100, abs=0.2)
    page.click(".bar >> nth=0")
    page.wait_for_selector("#drop canvas")
    assert "fits less" in page.inner_text("#seen") and page.inner_text("#error") == ""


def test_a_broken_file_is_one_line_and_the_next_picture_works(open_page, files):
    page = open_page()
    page.set_input_files("#file", files / "broken.png")
    page.wait_for_selector("#error:not(:empty)")
    assert "not a picture" in page.inner_text("#error")
    page.set_input_files("#file", files / "1.png")
    page.wait_for_selector("#why:not([hidden])")
    assert page.inner_text("#error") == ""


def test_two_users_at_once_get_their_own_captions(open_page, files, module):  # noqa: F811
    first, second = open_page(), open_page()
    first.set_input_files("#file", files / "2.png")
    second.set_input_files("#file", files / "3.png")
    expected = module[0].caption(PICTURES[2:4])
    for page, caption in zip((first, second), expected):
        page.wait_for_selector("#why:not([hidden])")
        assert page.inner_text("#caption") == caption


def test_the_page_asks_nothing_of_other_machines(open_page, address):
    page = open_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.reload()
    page.wait_for_selector("#model:not(:empty)")
    assert asked and all(url.startswith((address, "data:")) for url in asked)
