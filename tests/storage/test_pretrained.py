"""Weights in folders of the Hub's layout: safetensors first, PyTorch's files where there are no others."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest

from mlxmm.errors import UserError
from mlxmm.storage.hub import is_hub_id, local_folder, split_revision
from mlxmm.storage.pretrained import read_weights, write_arrays

TORCH = Path(__file__).parents[1] / "fixtures" / "torch" / "zip.bin"


def test_pytorch_weights_are_read_where_there_are_no_others(tmp_path):
    shutil.copy(TORCH, tmp_path / "pytorch_model.bin")
    assert read_weights(tmp_path)["base"].shape == (6, 4)
    write_arrays(tmp_path / "model.safetensors", {"x": mx.ones(2)})
    assert set(read_weights(tmp_path)) == {"x"}


def test_shards_of_pytorch_weights_are_read_together(tmp_path):
    for i in (1, 2):
        shutil.copy(TORCH, tmp_path / f"pytorch_model-0000{i}-of-00002.bin")
    assert read_weights(tmp_path)["transposed"].shape == (4, 6)


def test_a_shard_that_the_index_names_and_that_is_missing_is_one_line(tmp_path):
    shards = {"x": "model-1.safetensors", "y": "model-2.safetensors"}
    write_arrays(tmp_path / "model-1.safetensors", {"x": mx.ones(2)})
    index = tmp_path / "model.safetensors.index.json"
    for text, message in [("[]", "list came"), ("{}", "no weight_map"), (json.dumps({"weight_map": shards}), "lacks")]:
        index.write_text(text)
        with pytest.raises(UserError, match=message):
            read_weights(tmp_path)
    write_arrays(tmp_path / "model-2.safetensors", {"y": mx.ones(2)})
    assert set(read_weights(tmp_path)) == {"x", "y"}
    index.unlink()
    (tmp_path / "model-2.safetensors").unlink()
    assert set(read_weights(tmp_path)) == {"x"}  # without an index, what is there


def test_a_folder_without_weights_says_what_was_expected(tmp_path):
    (tmp_path / "tf_model.h5").write_bytes(b"x")
    with pytest.raises(UserError, match="has neither model.safetensors nor pytorch_model.bin"):
        read_weights(tmp_path)


@pytest.mark.parametrize(
    ("name", "is_id"),
    [
        ("openai/clip-vit-base-patch32", True),
        ("openai/clip-vit-base-patch32@refs/pr/66", True),
        ("user/name@v1.0", True),
        ("name", False),
        ("a/b/c", False),
        ("./a/b", False),
        ("/a/b", False),
        ("~/a", False),
    ],
)
def test_a_hub_id_is_a_user_and_a_name_and_maybe_a_revision(name, is_id):
    assert is_hub_id(name) == is_id


def test_a_revision_stands_in_the_id_or_beside_it_but_not_in_both():
    pull_request = ("user/name", "refs/pr/66")
    assert split_revision("user/name@refs/pr/66") == split_revision("user/name", "refs/pr/66") == pull_request
    assert split_revision("user/name") == ("user/name", None)
    with pytest.raises(UserError, match="user/name@v1 names a revision already: leave out v2"):
        split_revision("user/name@v1", "v2")
    with pytest.raises(UserError, match="user/name@ names no revision after the @"):
        split_revision("user/name@")
    with pytest.raises(UserError, match="names a revision already"):
        local_folder("user/name@v1", "v2")


def test_a_folder_with_an_at_sign_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user" / "name@main").mkdir(parents=True)
    assert not is_hub_id("user/name@main") and local_folder("user/name@main") == Path("user/name@main")
