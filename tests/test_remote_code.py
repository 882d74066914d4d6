"""Python that a folder of a model brings is not run, not even after a `y` on the terminal."""

import ast
import builtins
import json
from pathlib import Path

import mlx.core as mx
import pytest

from mlxmm.captioners import mlx_vlm_writer
from mlxmm.errors import UserError
from mlxmm.export import llava
from mlxmm.networks.language_model import Qwen3Config, load_language_model
from mlxmm.preprocessing.tokenizers import load_tokenizer, train_tokenizer

ROOT = Path(__file__).parents[1]
EVIL = """
from pathlib import Path
Path({marker!r}).touch()
class Evil: pass
class Model: pass
class ModelArgs: pass
"""


@pytest.fixture
def brings_code(tmp_path, monkeypatch):
    """A folder of a model with code of its own, and the file that the code makes if it is run."""
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    folder, marker = tmp_path / "model", tmp_path / "was_run"
    train_tokenizer(["a red circle"], 300).save_pretrained(str(folder))
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
    code = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil"}, "model_type": "evil"}
    values = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(values | code | {"tokenizer_class": "Evil"}))
    (folder / "config.json").write_text(json.dumps(code | {"model_file": "evil.py", "vision_config": {}}))
    return folder, marker


def test_a_tokenizer_that_needs_code_of_its_folder_is_refused_in_one_line(brings_code):
    folder, marker = brings_code
    with pytest.raises(UserError, match="holds no tokenizer: .* custom code") as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value) and not marker.exists()


def test_a_language_model_that_needs_code_of_its_folder_is_refused(brings_code):
    folder, marker = brings_code
    values = Qwen3Config().to_hub(train_tokenizer(["a red circle"], 300)) | {"model_file": "evil.py"}
    (folder / "config.json").write_text(json.dumps(values))
    mx.save_safetensors(str(folder / "model.safetensors"), {"a": mx.zeros(1)})
    with pytest.raises(UserError, match="language model .* custom module"):
        load_language_model(folder)
    assert not marker.exists()


def test_a_model_for_mlx_vlm_may_bring_the_code_of_our_exports_and_no_other(brings_code):
    folder, marker = brings_code
    with pytest.raises(UserError, match="brings code, evil.py"):
        mlx_vlm_writer._require_vision(folder, "somebody/model")
    with pytest.raises(UserError, match="brings code, evil.py"):
        mlx_vlm_writer._require_vision(folder, str(folder))
    own = Path(llava.__file__).with_name(llava.MLX_VLM_MODEL)
    (folder / "evil.py").write_bytes(own.read_bytes())
    mlx_vlm_writer._require_vision(folder, "somebody/model")
    assert not marker.exists()


def test_whoever_loads_by_transformers_or_its_like_says_that_code_is_not_run():
    loads = {"AutoTokenizer.from_pretrained", "load_model"}
    for path in [*(ROOT / "mlxmm").rglob("*.py"), *(ROOT / "recipes").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called in loads or called.startswith("Auto") or (called == "load" and path.name == "mlx_vlm_child.py"):
                assert "trust_remote_code=False" in ast.unparse(node), f"{path}: {called}"
