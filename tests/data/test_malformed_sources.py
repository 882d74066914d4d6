"""Sources as they should not be: each is read right, or refused in one line with exit code 2 by recipes.look_at_data.

python -m pytest -m slow tests/data/test_malformed_sources.py
"""

import csv
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from small_sources import JSON, TEXT, pictures, png, write_source, write_tar

from mlxmm.cli import run_recipe
from mlxmm.config import Preset
from recipes import look_at_data

ROOT = Path(__file__).parents[2]
NUM = 24  # of pictures
NAMES = [f"{i}.png" for i in range(NUM)]
HOSTILE = ["\x1b[2J.png", "a\nb.png", "a\rb.png", "‮gnp.png", "é.png", "-rf.png", " .png", "a|b.png", "a,b\"c'.png"]
ROWS = [{"file_name": name, "caption": f"a thing {i}"} for i, name in enumerate(NAMES)]


def separated(rows, separator=",", columns=("file_name", "caption")) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, delimiter=separator, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


COCO = {
    "images": [{"id": i, "file_name": name} for i, name in enumerate(NAMES)],
    "annotations": [{"id": i, "image_id": i, "caption": f"a thing {i}"} for i in range(NUM)],
}
KARPATHY = {
    "images": [
        {
            "filename": name,
            "split": "train" if i < 16 else "val" if i < 20 else "test",
            "sentences": [{"raw": f"a {i}"}],
        }
        for i, name in enumerate(NAMES)
    ]
}
TEXTS = {
    "list.csv": separated(ROWS),
    "list.tsv": separated(ROWS, "\t"),
    "list.jsonl": lines(ROWS),
    "list.json": json.dumps(ROWS),
    "coco.json": json.dumps(COCO),
    "karpathy.json": json.dumps(KARPATHY),
    "metadata.csv": separated(ROWS),
    "metadata.jsonl": lines(ROWS),
}
# What becomes of the bytes of a list.
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda whole: b"",
    "one newline": lambda whole: b"\n",
    "cut in the middle": lambda whole: whole[: len(whole) // 2],
    "cut by a byte": lambda whole: whole.rstrip()[:-1],
    "its first line alone": lambda whole: whole.split(b"\n")[0] + b"\n" if b"\n" in whole else whole[:20],
    "UTF-16": lambda whole: whole.decode().encode("utf-16"),
    "Latin-1": lambda whole: whole.replace(b"a thing 1", "caf\xe9".encode("latin-1"), 1),
    "a mark of UTF-8": lambda whole: b"\xef\xbb\xbf" + whole,
    "zero bytes": lambda whole: whole.replace(b"thing", b"th\0ng"),
    "ESC in captions": lambda whole: whole.replace(b"a thing", b"a \\u001b[2J" if b"{" in whole else b"a \x1b[2J"),
    "deep nesting": lambda whole: b"[" * 100_000 + b"]" * 100_000,
    "a number": lambda whole: b"7",
    "null": lambda whole: b"null",
    "a text": lambda whole: b'"a text"',
    "binary": lambda whole: bytes(range(256)) * 8,
    "lines of Windows": lambda whole: whole.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"),
}


def changed(rows: list[dict], **values) -> list[dict]:
    return [row | values for row in rows]


# The rows of a list of names.
WRONG_ROWS: dict[str, list] = {
    "captions are null": changed(ROWS, caption=None),
    "captions are numbers": changed(ROWS, caption=3),
    "captions are objects": changed(ROWS, caption={"a": {"b": 1}}),
    "captions are empty": changed(ROWS, caption=""),
    "captions are spaces": changed(ROWS, caption=" \t"),
    "captions are lists of lists": changed(ROWS, caption=[["a"], ["b"]]),
    "names are null": changed(ROWS, file_name=None),
    "names are numbers": changed(ROWS, file_name=3),
    "names are lists": changed(ROWS, file_name=["a.png"]),
    "names are empty": changed(ROWS, file_name=""),
    "names are folders": changed(ROWS, file_name="."),
    "names have zero bytes": changed(ROWS, file_name="a\0.png"),
    "names are long": changed(ROWS, file_name="a" * 5000 + ".png"),
    "names climb": changed(ROWS, file_name="../secret.png"),
    "names are absolute": changed(ROWS, file_name="/etc/passwd"),
    "names are addresses": changed(ROWS, file_name="http://127.0.0.1:1/a.png"),
    "names of what is not there": changed(ROWS, file_name="not-there.png"),
    "no names": [{"caption": "a"}] * NUM,
    "no captions": [{"file_name": name} for name in NAMES],
    "other columns": [{"x": 1, "y": 2}] * NUM,
    "one row": ROWS[:1],
    "one name for all": changed(ROWS, file_name="0.png"),
    "rows are lists": [["0.png", "a"]] * NUM,
    "rows are null": [None] * NUM,
    "one row is null": [*ROWS, None],
    "a split that is none": changed(ROWS, split="blue"),
    "a split that is a list": changed(ROWS, split=["train"]),
    "a caption of a megabyte": [*ROWS[:-1], ROWS[-1] | {"caption": "a " * 500_000}],
}


def put(root: Path, name: str, content: bytes) -> Path:
    folder = pictures(root / "pics", NAMES)
    (folder / name).write_bytes(content)
    return folder if name.startswith("metadata") else folder / name


def parquet_of(root: Path, **columns) -> Path:
    parquet.write_table(pa.table(columns), root / "rows.parquet")
    return root / "rows.parquet"


def damaged_tar(root: Path, name: str) -> Path:
    write_tar(root / "a.tar", range(NUM), **TEXT)
    path, data = root / "a.tar", (root / "a.tar").read_bytes()
    path.write_bytes(
        {"empty": b"", "cut": data[: len(data) // 2], "garbage": b"x" * 4096, "zeros": bytes(10_240)}[name]
    )
    return path


def tar_with(root: Path, *members: tuple[str, bytes | None, bytes]) -> Path:
    """A whole tar, and members of other types in it."""
    write_tar(root / "a.tar", range(NUM), **TEXT)
    with tarfile.open(root / "a.tar", "a") as tar:
        for name, content, kind in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            info.size = len(content or b"")
            tar.addfile(info, io.BytesIO(content or b""))
    return root / "a.tar"


def folder_with(root: Path, change: Callable[[Path], None], text=True) -> Path:
    """A folder of pictures, each with a text beside it, and something else."""
    folder = pictures(root / "pics", NAMES)
    for name in NAMES if text else ():
        (folder / name).with_suffix(".txt").write_text("a thing")
    change(folder)
    return folder


def class_folders(root: Path, change: Callable[[Path], None]) -> Path:
    folder = pictures(root / "pics", [f"{'cat' if i % 2 else 'dog'}/{i}.png" for i in range(NUM)])
    change(folder)
    return folder


IMAGES = [{"bytes": png(i), "path": f"{i}.png"} for i in range(NUM)]
CAPTIONS = [f"a thing {i}" for i in range(NUM)]
FILE, LINK, FIFO, FOLDER = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE
OTHERS: dict[str, Callable[[Path], Path]] = {
    "parquet of no rows": lambda root: parquet_of(
        root, image=pa.array([], pa.binary()), caption=pa.array([], pa.string())
    ),
    "parquet without pictures": lambda root: parquet_of(root, caption=CAPTIONS),
    "parquet without captions": lambda root: parquet_of(root, image=IMAGES),
    "parquet of null pictures": lambda root: parquet_of(root, image=[None] * NUM, caption=CAPTIONS),
    "parquet of numbers as pictures": lambda root: parquet_of(root, image=list(range(NUM)), caption=CAPTIONS),
    "parquet of empty bytes": lambda root: parquet_of(root, image=[{"bytes": b"", "path": ""}] * NUM, caption=CAPTIONS),
    "parquet of garbage bytes": lambda root: parquet_of(root, image=[b"xyz"] * NUM, caption=CAPTIONS),
    "parquet of lists of pictures": lambda root: parquet_of(root, image=[[one] for one in IMAGES], caption=CAPTIONS),
    "parquet of numbers as captions": lambda root: parquet_of(root, image=IMAGES, caption=list(range(NUM))),
    "parquet of null captions": lambda root: parquet_of(root, image=IMAGES, caption=[None] * NUM),
    "parquet of one null caption": lambda root: parquet_of(root, image=IMAGES, caption=[None, *CAPTIONS[1:]]),
    "parquet of hostile captions": lambda root: parquet_of(
        root, image=IMAGES, caption=[f"\x1b[2J{i}\n" for i in range(NUM)]
    ),
    "parquet with paths that climb": lambda root: parquet_of(
        root, image=[{"bytes": None, "path": "../../etc/passwd"}] * NUM, caption=CAPTIONS
    ),
    "parquet that is cut": lambda root: cut(Path(write_source(root / "a.parquet", range(NUM)))),
    "parquet that is empty": lambda root: emptied(root / "a.parquet"),
    "parquet that is a folder": lambda root: made(root / "a.parquet"),
    "parquet that is text": lambda root: written(root / "a.parquet", b"file_name,caption\n"),
    "parquet of a split that is null": lambda root: parquet_of(
        root, image=IMAGES, caption=CAPTIONS, split=[None] * NUM
    ),
    **{
        f"tar that is {name}": (lambda root, name=name: damaged_tar(root, name))
        for name in ("empty", "cut", "garbage", "zeros")
    },
    "tar with a link": lambda root: tar_with(root, ("x.jpg", None, LINK), ("x.txt", b"a", FILE)),
    "tar with a FIFO": lambda root: tar_with(root, ("x.jpg", None, FIFO), ("x.txt", b"a", FILE)),
    "tar with a folder": lambda root: tar_with(root, ("x.jpg", None, FOLDER), ("x.txt", b"a", FILE)),
    "tar with names that climb": lambda root: tar_with(root, ("../x.jpg", png(99), FILE), ("../x.txt", b"a", FILE)),
    "tar with absolute names": lambda root: tar_with(root, ("/etc/x.jpg", png(99), FILE), ("/etc/x.txt", b"a", FILE)),
    "tar with a hostile name": lambda root: tar_with(
        root, ("\x1b[2J\n.jpg", png(99), FILE), ("\x1b[2J\n.txt", b"a", FILE)
    ),
    "tar with text that is no UTF-8": lambda root: tar_with(
        root, ("x.jpg", png(99), FILE), ("x.txt", b"caf\xe9", FILE)
    ),
    "tar with a picture alone": lambda root: tar_with(root, ("x.jpg", png(99), FILE)),
    "tar with a text alone": lambda root: tar_with(root, ("x.txt", b"a", FILE)),
    "tar with damaged JSON": lambda root: tar_with(root, ("x.jpg", png(99), FILE), ("x.json", b"{", FILE)),
    "tar of pictures alone": lambda root: tar_of(root, {}),
    "tar of JSON without captions": lambda root: tar_of(root, {"json": lambda i: b'{"x": 1}'}),
    "tar of JSON that is a list": lambda root: tar_of(root, {"json": lambda i: b"[1]"}),
    "tar of JSON that is null": lambda root: tar_of(root, {"json": lambda i: b"null"}),
    "tar of deep JSON": lambda root: tar_of(root, {"json": lambda i: b"[" * 50_000 + b"]" * 50_000}),
    "tar of empty texts": lambda root: tar_of(root, {"txt": lambda i: b""}),
    "tar of both": lambda root: tar_of(root, TEXT | JSON),
    "folder that is empty": lambda root: made(root / "a"),
    "folder of texts": lambda root: written(made(root / "a") / "a.txt", b"a").parent,
    "folder that is a file": lambda root: written(root / "a", b"a"),
    "folder that is not there": lambda root: root / "not-there",
    "name that no file can have": lambda root: root / ("a" * 5000),
    "folder of hostile names": lambda root: folder_with(root, hostile_names),
    "folder with a FIFO as a picture": lambda root: folder_with(root, lambda f: os.mkfifo(f / "x.png")),
    "folder with a FIFO as a text": lambda root: folder_with(
        root, lambda f: (f / "0.txt").unlink() or os.mkfifo(f / "0.txt")
    ),
    "folder with a folder as a picture": lambda root: folder_with(root, lambda f: made(f / "x.png")),
    "folder with a folder as a text": lambda root: folder_with(
        root, lambda f: (f / "0.txt").unlink() or made(f / "0.txt")
    ),
    "folder with a link out of it": lambda root: folder_with(root, lambda f: (f / "x.png").symlink_to("/etc/passwd")),
    "folder with a text that is a link out of it": lambda root: folder_with(
        root, lambda f: (f / "0.txt").unlink() or (f / "0.txt").symlink_to("/etc/passwd")
    ),
    "folder with a link that leads nowhere": lambda root: folder_with(
        root, lambda f: (f / "x.png").symlink_to("nowhere")
    ),
    "folder with a link to itself": lambda root: folder_with(root, lambda f: (f / "loop").symlink_to(f)),
    "folder with a picture that links to itself": lambda root: folder_with(
        root, lambda f: (f / "x.png").symlink_to("x.png")
    ),
    "folder with an empty picture": lambda root: folder_with(root, lambda f: emptied(f / "x.png")),
    "folder with a text as a picture": lambda root: folder_with(root, lambda f: written(f / "x.png", b"a")),
    "folder with a text that is no UTF-8": lambda root: folder_with(root, lambda f: written(f / "0.txt", b"caf\xe9")),
    "folder with a text in UTF-16": lambda root: folder_with(
        root, lambda f: written(f / "0.txt", "a".encode("utf-16"))
    ),
    "folder with an empty text": lambda root: folder_with(root, lambda f: emptied(f / "0.txt")),
    "folder with one text": lambda root: folder_with(root, lambda f: written(f / "0.txt", b"a"), text=False),
    "folder with a text of a megabyte": lambda root: folder_with(root, lambda f: written(f / "0.txt", b"a " * 500_000)),
    "folder with a zip": lambda root: folder_with(root, lambda f: written(f / "a.zip", b"PK")),
    "folder of deep folders": lambda root: folder_with(root, lambda f: pictures(f / "/".join("d" * 60), NAMES)),
    "folder of two metadata": lambda root: folder_with(root, two_metadata),
    "class folders, one empty": lambda root: class_folders(root, lambda f: made(f / "empty")),
    "class folders and a picture beside them": lambda root: class_folders(root, lambda f: pictures(f, ["x.png"])),
    "class folders of hostile names": lambda root: class_folders(
        root, lambda f: pictures(f, ["\x1b[2J\n/a.png", "é/b.png"])
    ),
    "class folders, one a link out": lambda root: class_folders(root, lambda f: (f / "x").symlink_to("/etc")),
    "class folder alone": lambda root: pictures(root / "a", [f"cat/{name}" for name in NAMES]).parent / "a",
}
for name, annotations in {
    "are missing": None,
    "are empty": [],
    "are an object": {"a": 1},
    "have no captions": [{"image_id": 0}],
    "name no picture": [{"image_id": 999, "caption": "a"}] * NUM,
    "have lists as ids": [{"image_id": [1], "caption": "a"}] * NUM,
    "are numbers": [1, 2, 3],
}.items():
    OTHERS[f"COCO whose annotations {name}"] = lambda root, own=annotations: put(
        root, "coco.json", json.dumps(COCO | {"annotations": own}).encode()
    )
for name, images in {
    "are missing": None,
    "are empty": [],
    "are numbers": [1],
    "have no names": [{"id": i} for i in range(NUM)],
    "have no ids": [{"file_name": name} for name in NAMES],
    "have one id": [{"file_name": name, "id": 0} for name in NAMES],
    "have names that climb": [{"file_name": "../x.png", "id": i} for i in range(NUM)],
    "have names that are numbers": [{"file_name": 1, "id": i} for i in range(NUM)],
}.items():
    OTHERS[f"COCO whose images {name}"] = lambda root, own=images: put(
        root, "coco.json", json.dumps(COCO | {"images": own}).encode()
    )
for name, change in {
    "no sentences": {"sentences": []},
    "sentences that are texts": {"sentences": ["a"]},
    "sentences without raw": {"sentences": [{"tokens": ["a"]}]},
    "sentences that are null": {"sentences": None},
    "a split of its own": {"split": "other"},
    "a split that is a number": {"split": 1},
    "no split": {"split": None},
    "names that climb": {"filename": "../x.png"},
    "names that are lists": {"filename": ["a"]},
}.items():
    OTHERS[f"Karpathy's with {name}"] = lambda root, own=change: put(
        root, "karpathy.json", json.dumps({"images": changed(KARPATHY["images"], **own)}).encode()
    )


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def emptied(path: Path) -> Path:
    return written(path, b"")


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def cut(path: Path) -> Path:
    return written(path, path.read_bytes()[:-100])


def tar_of(root: Path, texts: dict) -> Path:
    write_tar(root / "a.tar", range(NUM), **texts)
    return root / "a.tar"


def hostile_names(folder: Path) -> None:
    pictures(folder, HOSTILE)
    for name in HOSTILE:
        (folder / name).with_suffix(".txt").write_text("a hostile thing")


def two_metadata(folder: Path) -> None:
    (folder / "metadata.csv").write_text(TEXTS["metadata.csv"])
    (folder / "metadata.jsonl").write_text(TEXTS["metadata.jsonl"])


def sources() -> Iterator[tuple[str, Callable[[Path], Path]]]:
    """The name of each malformed source, and what makes it in a folder."""
    for file, text in TEXTS.items():
        for name, damage in DAMAGES.items():
            yield f"{file}, {name}", partial(put, name=file, content=damage(text.encode()))
    for name, rows in WRONG_ROWS.items():
        for file in ("list.jsonl", "list.json", "metadata.jsonl"):
            text = json.dumps(rows) if file == "list.json" else lines(rows)
            yield f"{file}, {name}", partial(put, name=file, content=text.encode())
    yield from OTHERS.items()


SOURCES = dict(sources())


def looked_at(source: Path, capsys, monkeypatch) -> tuple[int, str, str]:
    """The exit code of recipes.look_at_data, and what it told."""
    monkeypatch.setattr(sys, "argv", ["look_at_data", str(source), "--run-dir", str(source.parent / "report")])
    code = 0
    try:
        run_recipe("look_at_data", look_at_data.main, {"default": Preset("", look_at_data.Config())})
    except SystemExit as end:
        code = end.code
    told = capsys.readouterr()
    return code, told.out, told.err


def assert_right(code: int, out: str, err: str) -> None:
    """It was read, and counts its pictures; or it was refused in one line. Nothing acts on the terminal."""
    own = [line for line in err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in err and "\x1b" not in out + err and "\u202e" not in out + err
    assert (code, own) == (0, []) or (code == 2 and len(own) == 1 and err.endswith(f"{own[0]}\n")), (code, err)
    assert code == 2 or "pictures" in out


FEW = [name for number, name in enumerate(SOURCES) if number % 40 == 0]


@pytest.mark.parametrize("name", FEW)
def test_a_malformed_source_is_read_or_refused_in_one_line(tmp_path, capsys, monkeypatch, name):
    assert_right(*looked_at(SOURCES[name](tmp_path), capsys, monkeypatch))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SOURCES if name not in FEW])
def test_every_malformed_source_is_read_or_refused_in_one_line(tmp_path, capsys, monkeypatch, name):
    assert_right(*looked_at(SOURCES[name](tmp_path), capsys, monkeypatch))


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW[::3])
def test_the_command_ends_so_too(tmp_path, name):
    source = SOURCES[name](tmp_path)
    command = [sys.executable, "-m", "recipes.look_at_data", str(source), "--run-dir", str(tmp_path / "report")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert_right(done.returncode, done.stdout, done.stderr)


def test_there_are_at_least_150_sources():
    assert len(SOURCES) >= 150
