"""Whether pictures can be decoded is found once, in threads, and remembered in the cache for the pictures' bytes."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlxmm.data.caption_source import CaptionDataConfig, open_source
from mlxmm.data.sources import decodable, rows
from mlxmm.errors import UserError
from mlxmm.progress_bar import progress_bar


def picture(i: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def decoded(monkeypatch, tmp_path):
    """The pictures that were decoded, in a cache of this test's own."""
    monkeypatch.setenv("MLXMM_CACHE", str(tmp_path / "cache"))
    seen, decode = [], rows.decode_image
    monkeypatch.setattr(rows, "decode_image", lambda value: seen.append(value) or decode(value))
    return seen


@pytest.fixture
def write(tmp_path):
    def write(images: list[bytes | None], name="rows.parquet") -> CaptionDataConfig:
        import datasets

        cells = [image and {"bytes": image, "path": f"{i}.png"} for i, image in enumerate(images)]
        split = ["train"] * (len(images) - 2) + ["val", "test"]
        columns = {"image": cells, "caption": [f"number {i}" for i in range(len(images))], "split": split}
        table = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image(decode=False))
        table.to_parquet(str(tmp_path / name))
        return CaptionDataConfig(source=str(tmp_path / name), split_column="split")

    return write


def pictures(num: int = 202) -> list:
    """`num` pictures; number 7 is none."""
    return [picture(i) if i != 7 else picture(i)[:40] for i in range(num)]


def remembered(tmp_path):
    return sorted((tmp_path / "cache" / "undecodable").iterdir())


def test_a_second_start_decodes_nothing_and_skips_the_same_rows(write, decoded, tmp_path, capsys):
    config = write(pictures())
    first = open_source(config, 0)
    assert len(decoded) == 202 and first.skipped == ("7.png (row 7)",) and len(remembered(tmp_path)) == 3
    decoded.clear()
    capsys.readouterr()
    second = open_source(config, 0)
    assert decoded == [] and second.skipped == first.skipped and "cannot be decoded: 7.png" in capsys.readouterr().out
    assert np.array_equal(second.rows["train"].indices, first.rows["train"].indices)


def test_pictures_that_changed_are_decoded_again(write, decoded):
    open_source(write(pictures()), 0)
    decoded.clear()
    changed = [picture(500), *pictures()[1:7], None, *pictures()[8:]]
    assert open_source(write(changed, "changed.parquet"), 0).skipped == ("row 7",)
    assert len(decoded) == 200  # the val and test splits are the same


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: '{"undecodable": [8]}',
        lambda text: text.replace("7", "8", 1),
        lambda text: text.replace("[", "[[]", 1),
    ],
)
def test_a_damaged_file_of_the_cache_is_made_again(write, decoded, tmp_path, damage):
    config = write(pictures())
    open_source(config, 0)
    [path] = [path for path in remembered(tmp_path) if json.loads(path.read_text())["undecodable"]]
    whole = path.read_text()
    path.write_text(damage(whole))
    assert path.read_text() != whole
    decoded.clear()
    assert open_source(config, 0).skipped == ("7.png (row 7)",)
    assert len(decoded) == 200 and path.read_text() == whole


def test_an_unusable_source_is_refused_at_the_second_start_too(write, decoded):
    config = write([*pictures(100)[:90], *[b"no picture"] * 8, picture(1), picture(2)])
    for num_decoded in (100, 0):
        decoded.clear()
        with pytest.raises(UserError, match="9 of 100 pictures cannot be decoded, more than one in a hundred"):
            open_source(config, 0)
        assert len(decoded) == num_decoded


def test_images_in_files_are_found_by_size_and_time_and_a_missing_one_is_skipped(decoded, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(120):
        (folder / f"{i}.png").write_bytes(picture(i))
    lines = [json.dumps({"file_name": f"{i}.png", "caption": f"a {i}"}) for i in range(120)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    part = open_source(CaptionDataConfig(source=str(folder)), 0).rows["train"]
    before, path = part.fingerprint(), folder / Path(part.name(5).split(" (")[0]).name
    path.write_bytes(b"no picture")
    changed = part.fingerprint()
    path.unlink()
    assert len({before, changed, part.fingerprint()}) == 3
    decoded.clear()
    rest, skipped = part.without_undecodable(2)
    assert skipped == [f"{part.name(5)}, no such file"] and len(decoded) == len(part)


def test_a_cache_that_cannot_be_written_costs_time_only(write, decoded, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLXMM_CACHE", str(tmp_path / "file"))
    assert open_source(write(pictures()), 0).skipped == ("7.png (row 7)",)


def test_another_decoder_decodes_again(write, decoded, monkeypatch):
    config = write(pictures())
    open_source(config, 0)
    decoded.clear()
    monkeypatch.setattr(decodable, "DECODER", "another version")
    open_source(config, 0)
    assert len(decoded) == 202


@pytest.mark.parametrize(("is_terminal", "shown"), [(True, True), (True, False), (False, True)])
def test_a_bar_is_shown_where_it_is_wanted_and_a_line_where_there_is_no_terminal(monkeypatch, is_terminal, shown):
    err = io.StringIO()
    err.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stderr", err)
    assert list(progress_bar("checking pictures", 3, "picture", iter("abc"), shown=shown)) == list("abc")
    assert ("checking pictures: 100%" in err.getvalue()) == (is_terminal and shown)
    assert ("checking pictures: 3/3" in err.getvalue()) == (shown and not is_terminal)
    assert shown or not err.getvalue()
