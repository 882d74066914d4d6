"""Pushes to the Hub: private, one commit, never over another, read back, repeated where that may help."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from local_hub import LocalHub
from PIL import Image

from mlxmm.export.dataset import CaptionRecord, PictureRecord, write_dataset
from mlxmm.export.dataset_card import CardFacts
from mlxmm.storage.dataset_push import merge_cards
from mlxmm.storage.retries import TRANSIENT, is_transient

ROOT = Path(__file__).parents[2]
TOKENS = {"hf_write": ("alice", "write"), "hf_read": ("alice", "read"), "hf_bob": ("bob", "write")}
CARD = """\
---
license: unknown
size_categories:
- {size}
tags:
- synthetic
configs:
{configs}
---

# Captions

## Configuration `{name}`

What {name} is.
"""
CONFIG = "- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*.parquet"


def written(folder, name="default", text="rows", size="n<1K"):
    """A folder as `write_dataset` makes it, whose files are no parquet: a push does not look into them."""
    names = (name, "dropped" if name == "default" else f"{name}-dropped")
    for part in names:
        (folder / part).mkdir(parents=True)
        (folder / part / "train-00000-of-00001.parquet").write_bytes(f"{text} of {part}".encode() * 5000)
    marked = "" if name == "default" else "\n  default: true"
    configs = CONFIG.format(name=names[0]) + marked + "\n" + CONFIG.format(name=names[1])
    (folder / "README.md").write_text(CARD.format(name=name, size=size, configs=configs))
    return folder


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with LocalHub(tmp_path_factory.mktemp("hub")) as hub:
        hub.tokens = TOKENS
        yield hub


@pytest.fixture(autouse=True)
def no_faults(request):
    yield
    if "hub" in request.fixturenames:
        request.getfixturevalue("hub").faults.clear()


def environment(hub, home):
    return hub.environment(home) | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | paths()


def paths():
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}


@pytest.fixture(scope="module")
def push(hub, tmp_path_factory):
    """Push in another process, which says the URL or the error."""
    worker = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("push_worker.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(hub, tmp_path_factory.mktemp("home")),
    )

    def ask(folder, repo_id, config_name="default", token="hf_write", **options):
        return answer({"folder": str(folder), "repo_id": repo_id, "config_name": config_name, "token": token} | options)

    def answer(job):
        print(json.dumps(job), file=worker.stdin, flush=True)
        return json.loads(worker.stdout.readline())

    ask.answer = lambda **job: answer(job | {"token": "hf_write"})
    ask.read = lambda source, **settings: answer({"read": {"source": source} | settings, "token": "hf_write"})
    yield ask
    worker.stdin.close()
    assert worker.wait(timeout=20) == 0


def head(hub, name):
    """The files of the newest commit of a data set."""
    return {path: file.read_bytes() for path, file in hub.files(hub.commit("datasets", name, "main")).items()}


def same(hub, name, folder):
    """Whether the parquet files of a folder are those of a data set, beside others."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.parquet")}
    return files.items() <= head(hub, name).items()


def test_a_data_set_goes_in_one_commit_to_a_private_repository(hub, push, tmp_path):
    folder = written(tmp_path / "set")
    answer = push(folder, "alice/first")
    (commit,) = hub.commits["alice/first"]
    assert answer == {"url": f"{hub.endpoint}/datasets/alice/first/commit/{commit}"}
    assert same(hub, "alice/first", folder) and hub.is_private["alice/first"]
    assert head(hub, "alice/first")["README.md"] == (folder / "README.md").read_bytes()


def test_a_public_repository_is_made_only_if_asked_and_keeps_its_visibility(hub, push, tmp_path):
    assert "url" in push(written(tmp_path / "one"), "alice/public", public=True)
    assert "url" in push(written(tmp_path / "two", "refresh-2"), "alice/public", "refresh-2")
    assert hub.is_private["alice/public"] is False


def test_a_refresh_is_a_configuration_beside_the_others(hub, push, tmp_path):
    first, second = written(tmp_path / "one"), written(tmp_path / "two", "refresh-2", size="1K<n<10K")
    assert "url" in push(first, "alice/two") and "url" in push(second, "alice/two", "refresh-2")
    assert same(hub, "alice/two", first) and same(hub, "alice/two", second) and len(hub.commits["alice/two"]) == 2
    card = head(hub, "alice/two")["README.md"].decode()
    metadata = yaml.safe_load(card.split("---\n")[1])
    names = ["default", "dropped", "refresh-2", "refresh-2-dropped"]
    assert [config["config_name"] for config in metadata["configs"]] == names
    assert not [config for config in metadata["configs"] if config.get("default")]
    assert metadata["size_categories"] == ["n<1K", "1K<n<10K"] and metadata["tags"] == ["synthetic"]
    assert card.count("# Captions") == 1 and card.index("What default is.") < card.index("What refresh-2 is.")


def test_a_configuration_is_never_overwritten_and_the_same_push_again_changes_nothing(hub, push, tmp_path):
    folder = written(tmp_path / "one")
    assert "url" in push(folder, "alice/again")
    assert push(folder, "alice/again")["url"].startswith(f"{hub.endpoint}/datasets/alice/again/tree/")
    assert len(hub.commits["alice/again"]) == 1
    answer = push(written(tmp_path / "other", text="others"), "alice/again")
    message = "write these captions under another name, as refresh-2"
    assert answer == {"error": f"alice/again has a configuration 'default' already: {message}"}
    assert same(hub, "alice/again", folder) and len(hub.commits["alice/again"]) == 1


def test_data_of_another_layout_are_left_alone(hub, push, tmp_path):
    hub.create("alice/old", private=True)
    hub.add_commit("alice/old", None, {"data/train.csv": b"a,b\n"})
    answer = push(written(tmp_path / "set"), "alice/old")
    assert answer == {"error": "alice/old holds data that its card does not name: push to another repository"}
    hub.create("alice/folder", private=True)
    hub.add_commit("alice/folder", None, {"default/notes.txt": b"mine"})
    assert "has a configuration 'default' already" in push(written(tmp_path / "two"), "alice/folder")["error"]


@pytest.mark.parametrize(
    ("token", "repo_id", "message"),
    [
        (None, "alice/no", "nothing can be uploaded to alice/no without a token: hf auth login, or set HF_TOKEN"),
        ("hf_wrong", "alice/no", "not pushed to alice/no: the token is not valid: hf auth login, or set HF_TOKEN"),
        ("hf_read", "alice/no", "not pushed to alice/no: the token may only read: hf auth login with a token that may"),
        ("hf_bob", "alice/no", "not pushed to alice/no: alice is not yours: this token belongs to bob"),
        ("hf_write", "no", "'no' is not a repository name: it needs a user, user/name"),
    ],
)
def test_a_token_that_cannot_push_is_one_line(hub, push, tmp_path, token, repo_id, message):
    error = push(written(tmp_path / "set"), repo_id, token=token)["error"]
    assert error.startswith(message) and "\n" not in error and (token is None or token not in error)
    assert "alice/no" not in hub.is_private


def test_a_token_that_cannot_push_to_a_repository_that_is_there_is_one_line(hub, push, tmp_path):
    assert "url" in push(written(tmp_path / "one"), "alice/mine")
    for token, message in (("hf_read", "the token may only read"), ("hf_bob", "alice is not yours")):
        error = push(written(tmp_path / token, "refresh-2"), "alice/mine", "refresh-2", token=token)["error"]
        assert error.startswith(f"not pushed to alice/mine: {message}") and len(hub.commits["alice/mine"]) == 1


@pytest.mark.parametrize(
    ("number", "fault"),
    list(
        enumerate(
            [
                ("POST", "/commit/", 503, 2),
                ("POST", "/commit/", 429, 1),
                ("POST", "/commit/", 409, 1),
                ("POST", "/commit/", 412, 2),
                ("POST", "/commit/", "cut", 2),
                ("POST", "/commit/", "lose", 1),
                ("POST", "/repos/create", 503, 2),
                ("PUT", "/lfs/", "cut", 1),
                ("PUT", "/lfs/", 503, 1),
                ("POST", "/validate-yaml", 503, 1),
                ("POST", "/validate-yaml", 429, 1),
                ("GET", "/api/datasets/", 503, 1),
                ("GET", "/tree/", 503, 1),
                ("GET", "/resolve/", 503, 1),
                ("GET", "/resolve/", "cut", 1),
            ]
        )
    ),
)
def test_what_may_pass_is_tried_again_and_ends_with_one_commit(hub, push, tmp_path, number, fault):
    folder, name = written(tmp_path / "set", text=f"{number}"), f"alice/fault-{number}"
    hub.fault(*fault)
    assert "url" in push(folder, name)
    assert same(hub, name, folder) and len(hub.commits[name]) == 1 and hub.is_private[name]
    assert [left for *_, left in hub.faults] == [0]


@pytest.mark.parametrize(
    ("fault", "message"),
    [(503, "the Hub answered 503: try again"), (400, "the Hub answered 400: try again"), ("cut", "")],
)
def test_what_does_not_pass_is_one_line_and_leaves_nothing(hub, push, tmp_path, fault, message):
    folder, name = written(tmp_path / "set", text=f"{fault} always"), f"alice/never-{fault}"
    hub.fault("POST", "/commit/", fault, times=100)
    error = push(folder, name)["error"]
    assert error.startswith(f"not pushed to {name}: {message}") and "\n" not in error
    assert 100 - hub.faults[0][3] == (1 if fault == 400 else 6) and name not in hub.commits
    hub.faults.clear()
    assert "url" in push(folder, name)


def picture(place):
    buffer = io.BytesIO()
    Image.effect_noise((8, 9 + place), 64).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def captioned(folder, word, name="default"):
    """A folder of forty pictures, each with a caption."""
    own = {"captioner": "alice/captioner", "captioner_revision": "1", "sampling": {}, "created_at": 0.0}
    caption = {"prompt": "short", "num_tokens": 2, "finish_reason": "stop"} | own
    where = {"width": 8, "source": "alice/pictures", "source_split": "train"}
    pictures = [
        PictureRecord(
            sha256=str(i), height=9 + i, row_id=f"row {i}", image=picture(i), **where,
            captions=[CaptionRecord(text=f"{word} {i}", **caption)],
        )
        for i in range(40)
    ]  # fmt: skip
    write_dataset(folder, pictures, CardFacts(), include_images=True, config_name=name)
    return folder


def test_what_was_pushed_is_a_source_like_any_other(hub, push, tmp_path):
    assert "url" in push(captioned(tmp_path / "one", "old"), "alice/read")
    assert "url" in push(captioned(tmp_path / "two", "new", "refresh-2"), "alice/read", "refresh-2")
    for settings, word in (({}, "old"), ({"config_name": "refresh-2"}, "new")):
        rows = push.read("alice/read", **settings)
        assert {split: len(part) for split, part in rows.items()} == {"train": 36, "val": 2, "test": 2}
        found = sorted(row for part in rows.values() for row in part)
        assert found == [[[8, 9 + i], [f"{word} {i}"]] for i in range(40)]
    error = push.read("alice/read", config_name="refresh-9")["error"]
    assert error.startswith("alice/read cannot be read: ") and "refresh-9" in error


def test_a_refresh_of_somebody_else_at_the_same_moment_is_kept(hub, push, tmp_path):
    name, theirs = "alice/both", written(tmp_path / "theirs", "refresh-2")
    assert "url" in push(written(tmp_path / "one"), name)
    merged = merge_cards(head(hub, name)["README.md"].decode(), (theirs / "README.md").read_text())
    files = {path.relative_to(theirs).as_posix(): path for path in theirs.rglob("*.parquet")}
    hub.fault("POST", "/commit/", lambda: hub.add_commit(name, None, files | {"README.md": merged.encode()}))
    mine = written(tmp_path / "mine", "refresh-3")
    assert "url" in push(mine, name, "refresh-3")
    assert same(hub, name, theirs) and same(hub, name, mine) and len(hub.commits[name]) == 3
    configs = yaml.safe_load(head(hub, name)["README.md"].decode().split("---\n")[1])["configs"]
    assert [config["config_name"] for config in configs][::2] == ["default", "refresh-2", "refresh-3"]


def test_a_file_that_is_another_on_the_hub_is_found(hub, push, tmp_path):
    folder, add_commit = written(tmp_path / "set", text="damaged"), hub.add_commit

    def damaged(name, parent, files):
        return add_commit(name, parent, {p: b"x" if p.startswith("dropped/") else f for p, f in files.items()})

    hub.add_commit = damaged
    try:
        assert "alice/damaged has other files at " in push(folder, "alice/damaged")["error"]
    finally:
        hub.add_commit = add_commit


def test_a_push_that_was_killed_may_be_repeated(hub, push, tmp_path):
    folder, name = written(tmp_path / "set", text="killed"), "alice/killed"
    reached, go = threading.Event(), threading.Event()
    hub.fault("PUT", "/lfs/", lambda: (reached.set(), go.wait(20)))
    worker = [sys.executable, Path(__file__).with_name("push_worker.py")]
    child = subprocess.Popen(worker, stdin=subprocess.PIPE, text=True, env=environment(hub, tmp_path / "home"))
    job = {"folder": str(folder), "repo_id": name, "config_name": "default", "token": "hf_write"}
    print(json.dumps(job), file=child.stdin, flush=True)
    assert reached.wait(60)
    child.send_signal(signal.SIGKILL)
    child.wait()
    go.set()
    assert name not in hub.commits and "url" in push(folder, name) and same(hub, name, folder)
    assert len(hub.commits[name]) == 1


def test_a_folder_without_this_configuration_is_refused(hub, push, tmp_path):
    folder = written(tmp_path / "set")
    error = push(folder, "alice/wrong", "refresh-2")["error"]
    assert error == f"{folder} holds default, dropped, and not 'refresh-2'"
    (tmp_path / "empty").mkdir()
    error = push(tmp_path / "empty", "alice/wrong")["error"]
    assert error == f"{tmp_path / 'empty'} holds no configuration, and not 'default'"


def test_no_token_is_in_what_is_sent(hub, push, tmp_path):
    assert "url" in push(written(tmp_path / "set", text="token"), "alice/secret")
    assert not [body for _, body, _ in hub.posts if "hf_write" in body]


def test_a_card_that_people_wrote_keeps_what_they_wrote():
    old = "---\nlicense: mit\ntags:\n- mine\n---\n# Mine\n\nBy hand.\n"
    new = CARD.format(name="default", size="n<1K", configs=CONFIG.format(name="default"))
    merged = merge_cards(old, new)
    metadata = yaml.safe_load(merged.split("---\n")[1])
    assert metadata["license"] == "mit" and metadata["tags"] == ["mine", "synthetic"]
    assert merged.count("# Mine\n\nBy hand.\n\n## Configuration `default`") == 1 and "# Captions" not in merged


def test_what_is_transient_is_told_by_status_and_by_kind():
    class Response:
        headers: dict = {}

        def __init__(self, status_code):
            self.status_code = status_code

    def refused(status):
        error = RuntimeError("refused")
        error.response = Response(status)
        return error

    wrapped = RuntimeError("while uploading")
    wrapped.__cause__ = refused(403)
    transient = [code for code in range(400, 600) if is_transient(refused(code))]
    assert transient == [*TRANSIENT, *range(500, 600)]
    assert is_transient(ConnectionResetError()) and is_transient(TimeoutError())
    assert not is_transient(wrapped) and not is_transient(ValueError("bad card"))


def exported(folder, text="weights"):
    """A folder as an export writes it, with what must not leave this machine beside it."""
    (folder / ".cache").mkdir(parents=True)
    (folder / "__pycache__").mkdir()
    (folder / "model.safetensors").write_bytes(text.encode() * 1000)
    (folder / "config.json").write_text("{}")
    (folder / "mlx_vlm_llava.py").write_text("# a model")
    (folder / "README.md").write_text(f"---\nlicense: unknown\n---\n# {text}\n")
    for name in (".env", ".cache/token", "__pycache__/a.pyc", "notes.md", "run.py", ".hidden.json"):
        (folder / name).write_text("secret")
    secret = folder.parent / "secret.json"
    secret.write_text("secret")
    (folder / "linked.json").symlink_to(secret)
    (folder / "model-linked.safetensors").symlink_to(secret)
    return folder


def test_only_what_an_export_wrote_is_uploaded(hub, push, tmp_path):
    before = len(hub.posts)
    push.answer(upload=str(exported(tmp_path / "export")), repo_id="alice/model")
    sent = sorted(path.name for path in (hub.root / "alice/model").rglob("*") if path.is_file())
    assert sent == ["README.md", "config.json", "mlx_vlm_llava.py", "model.safetensors"]
    assert not [body for _, body, _ in hub.posts[before:] if "secret" in body or ".env" in body]


MODEL_FAULTS = [
    *[("POST", path, status, 1) for path in ("/commit/", "/repos/create", "/validate-yaml") for status in (503, 429)],
    ("POST", "/commit/", 412, 1),
    ("POST", "/commit/", "cut", 1),
    ("POST", "/commit/", "lose", 1),
    ("POST", "/repos/create", "lose", 1),
    ("POST", "/preupload/", 503, 1),
]


@pytest.mark.parametrize("number", range(len(MODEL_FAULTS)))
def test_an_upload_that_failed_for_a_moment_ends_with_one_commit(hub, push, tmp_path, number):
    folder, name, before = (
        exported(tmp_path / "export", f"weights {number}"),
        f"alice/up-{number}",
        hub.num_model_commits,
    )
    hub.fault(*MODEL_FAULTS[number])
    answer = push.answer(upload=str(folder), repo_id=name)
    assert "url" in answer and hub.num_model_commits == before + 1, answer
    assert (hub.root / name / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert [left for *_, left in hub.faults] == [0]


READ_FAULTS = [
    *[("GET", path, status, 1) for path in ("/api/models/", "/tree/", "/resolve/") for status in (503, 429, "cut")],
    ("HEAD", "/resolve/", 503, 1),
]


@pytest.mark.parametrize("number", range(len(READ_FAULTS)))
def test_a_download_that_failed_for_a_moment_is_whole(hub, push, number):
    folder = hub.root / f"alice/down-{number}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(os.urandom(3000))
    hub.fault(*READ_FAULTS[number])
    answer = push.answer(fetch=f"alice/down-{number}")
    assert "folder" in answer, answer
    for path in folder.iterdir():
        assert (Path(answer["folder"]) / path.name).read_bytes() == path.read_bytes()
