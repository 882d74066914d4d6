"""A trained aligner as others run it: in transformers, in mlx-lm, from the Hub.

`tools/make_llava_fixture.py` wrote what transformers saves; where torch is installed, it computes too.
"""

import copy
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import attrs
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from local_hub import LocalHub
from mlx.utils import tree_flatten, tree_map
from PIL import Image
from small_modules import tokenizer

from mlxmm import Qwen3Aligner, seed_everything
from mlxmm.errors import UserError
from mlxmm.export import llava, model_card
from mlxmm.modules.qwen3_aligner import Qwen3AlignerConfig
from mlxmm.networks.language_model import build_language_model, head, hidden_states
from mlxmm.networks.pretrained_vision import build_vision_tower
from mlxmm.preprocessing.images import ImageProcessor, decode_image
from mlxmm.storage import hub
from mlxmm.storage.lineage import Lineage

ROOT = Path(__file__).parents[2]
CASES = json.loads((Path(__file__).parents[1] / "fixtures" / "llava.json").read_text())
live = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
TOKEN = "hf_never_to_be_seen"
TINY = "--preset tiny --max-steps 2 --trainer.val-check-interval 2 --unfreeze-step 1".split()
SETTINGS = [
    {},
    {"projector_width": 5},
    {"projector_width": 24},
    {"projector_width": 64},
    {"projector": "linear"},
    {"vocab_size": 286},
    {"image_size": 20},
]
QUOTES = 'it\'s a "\\" 🦔\n{{'  # which no template may take for its own


def aligner_of(case: str, *, vocab_size: int = 300, image_size: int = 16, **settings) -> Qwen3Aligner:
    """An aligner of the sizes of `case`, with random weights that all show in the captions."""
    seed_everything(5)
    values = CASES[case]
    text, processor = values["text"] | {"vocab_size": vocab_size}, ImageProcessor.square(image_size)
    config = {"layer": values["layer"], "projector_width": 16, "prompt": "a red", "max_new_tokens": 6} | settings
    tower, lm = build_vision_tower(values["vision"]), build_language_model(text)
    parts = tower, values["vision"], processor, lm, text, tokenizer(False)
    aligner = Qwen3Aligner(Qwen3AlignerConfig(**config), *parts)
    aligner.update(tree_map(lambda x: x + 0.3 * mx.random.normal(x.shape), aligner.parameters()))
    return aligner


def pictures(count: int = 3) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(25, 17), (10, 31), (16, 16)]
    return [Image.fromarray(rng.integers(0, 256, (*sizes[i % 3], 3), dtype=np.uint8)) for i in range(count)]


def logits_of(aligner: Qwen3Aligner, images: list | None = None) -> np.ndarray:
    prefix = aligner.prefix(aligner.features(aligner.processor(images or pictures())))
    return np.array(head(aligner.language_model, hidden_states(aligner.language_model, prefix)))


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def arrays_of(folder: Path) -> dict[str, mx.array]:
    return mx.load(str(folder / "model.safetensors"))


@pytest.mark.parametrize("projector", ["mlp", "linear"])
@pytest.mark.parametrize("case", CASES)
def test_arrays_are_those_that_transformers_saves(case, projector, tmp_path):
    aligner_of(case, projector=projector).save_pretrained(tmp_path / "to")
    assert {name: list(array.shape) for name, array in arrays_of(tmp_path / "to").items()} == CASES[case]["arrays"]


@pytest.mark.parametrize("case", CASES)
def test_settings_are_those_that_transformers_writes(case, tmp_path):
    aligner_of(case).save_pretrained(tmp_path / "to")
    ours, theirs = read_json(tmp_path / "to" / "config.json"), CASES[case]["config"]
    own = tokenizer(False)
    assert (
        ours.pop("mlxmm")
        and ours.pop("model_file") == "mlx_vlm_llava.py"
        and ours.pop("image_token_index") == len(own) < 300
    )
    assert set(ours) | {"image_token_index"} == set(theirs)
    for name in set(ours) - {"vision_config", "text_config"}:
        assert ours[name] == theirs[name], name
    for part, named in [("vision_config", CASES[case]["vision"]), ("text_config", CASES[case]["text"])]:
        assert named.items() <= ours[part].items() and ours[part]["dtype"] == "float32"
    assert read_json(tmp_path / "to" / "processor_config.json") == CASES[case]["processor_config"]
    generation = {"eos_token_id": own.eos_token_id, "pad_token_id": own.eos_token_id, "do_sample": False}
    generation |= {"max_new_tokens": 6, "suppress_tokens": [len(own)]}
    assert read_json(tmp_path / "to" / "generation_config.json") == generation


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_a_folder_written_is_read_as_the_same_captioner(case, settings, tmp_path):
    aligner = aligner_of(case, **settings)
    aligner.save_pretrained(tmp_path / "one")
    again = Qwen3Aligner.from_pretrained(tmp_path / "one")
    assert np.abs(logits_of(again) - logits_of(aligner)).max() < 1e-5
    assert again.caption(pictures()) == aligner.caption(pictures())
    for name in llava.KEPT:
        assert getattr(again.config, name) == getattr(aligner.config, name)
    again.save_pretrained(tmp_path / "two")
    for name in ("config.json", "tokenizer.json", "chat_template.jinja", "README.md"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()
    one, two = arrays_of(tmp_path / "one"), arrays_of(tmp_path / "two")
    rounding = 2e-7 if settings.get("projector_width") == 24 else 0  # scaled by sqrt(16 / 24), and back
    assert set(one) == set(two) and all(mx.allclose(one[name], two[name], rtol=rounding, atol=0) for name in one)


def test_a_linear_projector_is_written_with_the_identity_behind_it(tmp_path):
    aligner = aligner_of("clip", projector="linear")
    aligner.save_pretrained(tmp_path / "to")
    weights, (layer,) = arrays_of(tmp_path / "to"), aligner.projector.layers
    written = [weights[f"multi_modal_projector.linear_{i}.{kind}"] for i in (1, 2) for kind in ("weight", "bias")]
    for array, expected in zip(written, [layer.weight, layer.bias, mx.eye(16), mx.zeros(16)]):
        assert mx.array_equal(array, expected)
    assert read_json(tmp_path / "to" / "config.json")["projector_hidden_act"] == "linear"


@pytest.mark.parametrize("case", ["clip", "clip-untied"])
def test_a_vocabulary_without_a_token_to_spare_gets_one_in_the_folder_only(case, tmp_path):
    aligner = aligner_of(case, vocab_size=286)
    assert len(tokenizer(False)) == 286
    aligner.save_pretrained(tmp_path / "to")
    table = dict(tree_flatten(aligner.language_model.parameters()))["model.embed_tokens.weight"]
    assert len(table) == 286 == len(aligner.tokenizer) == aligner.lm_config["vocab_size"]
    weights = arrays_of(tmp_path / "to")
    for name in set(llava.TABLES) & set(weights):
        assert weights[name].shape == (287, 16) and not weights[name][286].any()
    assert mx.array_equal(weights[llava.TABLES[0]][:286], table)
    config = read_json(tmp_path / "to" / "config.json")
    assert config["text_config"]["vocab_size"] == 287 and config["image_token_index"] == 286
    assert read_json(tmp_path / "to" / "generation_config.json")["suppress_tokens"] == [286]


def test_qwens_own_image_token_is_taken(tmp_path):
    aligner = aligner_of("clip", vocab_size=286 + 2)
    aligner.tokenizer = copy.deepcopy(aligner.tokenizer)
    aligner.tokenizer.add_tokens(["<|vision_start|>", "<|image_pad|>"], special_tokens=True)
    aligner.save_pretrained(tmp_path / "to")
    config = read_json(tmp_path / "to" / "config.json")
    assert config["image_token_index"] == 287 and config["text_config"]["vocab_size"] == 288
    assert read_json(tmp_path / "to" / "processor_config.json")["image_token"] == "<|image_pad|>"
    assert "'<|image_pad|>a red'" in (tmp_path / "to" / "README.md").read_text()


@pytest.mark.parametrize("prompt", ["", "a red", QUOTES])
def test_the_chat_template_is_image_then_prompt(prompt, tmp_path):
    from transformers import AutoTokenizer

    aligner = aligner_of("clip", prompt=prompt)
    aligner.save_pretrained(tmp_path / "to")
    written = AutoTokenizer.from_pretrained(str(tmp_path / "to"))
    image, question = {"type": "image"}, {"type": "text", "text": "what?"}
    say = lambda content: written.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    assert say([image]) == "<image>" + prompt and say([image, question]) == "<image>what?"
    assert say("no image") == "no image"
    ids = written("<image>" + prompt)["input_ids"]
    assert ids == [286, *aligner.tokenizer(prompt, add_special_tokens=False)["input_ids"]]


REFUSED = [
    (
        {"projector": "pixel_shuffle"},
        {},
        "no projector pixel_shuffle: --module.projector mlp or linear can be exported",
    ),
    ({}, {"vision_config": {"model_type": "vit"}}, "no vit tower: a CLIP or SigLIP can be exported"),
    ({}, {"lm_config": {"model_type": "llama"}}, "a Qwen3 can be exported; this language model is a llama"),
]


@pytest.mark.parametrize(("settings", "parts", "message"), REFUSED)
def test_what_no_llava_has_is_one_clear_line(settings, parts, message, tmp_path):
    aligner = aligner_of("clip", **settings)
    for name, value in parts.items():
        setattr(aligner, name, getattr(aligner, name) | value)
    with pytest.raises(UserError, match=message) as caught:
        aligner.save_pretrained(tmp_path / "to")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_tokenizer_that_adds_what_the_module_does_not_read_is_refused(tmp_path):
    aligner = aligner_of("clip")
    aligner.tokenizer = tokenizer(True)
    with pytest.raises(UserError, match="the tokenizer makes .* but the module reads"):
        aligner.save_pretrained(tmp_path / "to")
    assert not list(tmp_path.iterdir())


def test_nothing_that_is_there_is_written_over(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    for save in (aligner_of("clip").save_pretrained, aligner_of("clip").save_language_model):
        with pytest.raises(UserError, match="exists and is not empty"):
            save(tmp_path)
        with pytest.raises(UserError, match="exists and is not empty"):
            save(tmp_path / "thesis.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_anothers_llava_is_one_clear_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(UserError, match="is a LLaVA that Qwen3Aligner.save_pretrained did not write"):
        Qwen3Aligner.from_pretrained(tmp_path)


def adapt(aligner: Qwen3Aligner, change: str) -> None:
    """Put LoRA layers into the language model, or quantise it, or both."""
    from mlx_lm.tuner.lora import LoRALinear

    if change != "lora":
        nn.quantize(aligner.language_model, group_size=32, bits=4, class_predicate=lambda _, m: wide(m))
        aligner.lm_config["quantization"] = {"group_size": 32, "bits": 4}
    if change != "quantised":
        for layer in aligner.language_model.model.layers:
            for part, name in [(layer.self_attn, "o_proj"), (layer.mlp, "up_proj")]:
                part[name] = LoRALinear.from_base(part[name], r=2)
                part[name].lora_b = mx.random.normal(part[name].lora_b.shape)


def wide(part: nn.Module) -> bool:
    return hasattr(part, "to_quantized") and part.weight.shape[-1] % 32 == 0


@pytest.mark.parametrize("change", ["lora", "quantised", "both"])
def test_lora_is_merged_and_quantised_layers_are_written_in_full(change, tmp_path):
    aligner = aligner_of("clip")
    before = logits_of(aligner)
    adapt(aligner, change)
    changed, names = logits_of(aligner), [name for name, _ in aligner.named_modules()]
    assert np.abs(changed - before).max() > 1e-3
    aligner.save_pretrained(tmp_path / "to")
    assert {name: list(array.shape) for name, array in arrays_of(tmp_path / "to").items()} == CASES["clip"]["arrays"]
    assert np.abs(logits_of(Qwen3Aligner.from_pretrained(tmp_path / "to")) - changed).max() < 1e-4
    assert "quantization" not in (tmp_path / "to" / "config.json").read_text()
    assert [name for name, _ in aligner.named_modules()] == names and np.array_equal(logits_of(aligner), changed)


@pytest.mark.parametrize("change", [None, "lora", "both"])
@pytest.mark.parametrize("case", ["clip", "clip-untied"])
def test_the_language_model_alone_is_one_of_mlx_lm(case, change, tmp_path):
    import mlx_lm

    aligner = aligner_of(case)
    if change:
        adapt(aligner, change)
    aligner.save_language_model(tmp_path / "to")
    model, words = mlx_lm.load(str(tmp_path / "to"))
    tokens = mx.array([words.encode("a small red circle")])
    assert np.abs(np.array(model(tokens) - aligner.language_model(tokens))).max() < 1e-4


def test_the_card_says_how_to_run_it_and_names_no_folder_of_this_machine(tmp_path):
    import yaml

    aligner = aligner_of("clip")
    aligner.config = attrs.evolve(aligner.config, vision=str(tmp_path), lm="Qwen/Qwen3-0.6B-Base@main", prompt="")
    aligner.save_pretrained(tmp_path / "to", {"test/bleu": 0.25, "data/skipped_rows": [1]})
    card = (tmp_path / "to" / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata["base_model"] == ["Qwen/Qwen3-0.6B-Base"] and metadata["library_name"] == "transformers"
    assert "| test/bleu | 0.2500 |" in card and "skipped" not in card
    compile(card.split("```python\n")[1].split("```")[0], "card", "exec")
    assert not [path for path in (tmp_path / "to").iterdir() if str(tmp_path).encode() in path.read_bytes()]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_cards_lines_open_a_picture_as_training_does_whatever_its_exif_says(orientation, tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = orientation
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.arange(480).reshape(16, 10, 3).astype(np.uint8)).save("picture.jpg", exif=exif)
    code = model_card.captioner(Qwen3AlignerConfig(), "<image>", {}, Lineage()).split("```python\n")[1].split("```")[0]
    own = [line for line in code.splitlines() if "PIL" in line or line.startswith("picture =")]
    names: dict = {}
    exec("\n".join(own), names)
    assert np.array_equal(names["picture"].convert("RGB"), decode_image(Path("picture.jpg").read_bytes()))


def test_the_card_names_the_data_their_versions_and_who_wrote_the_captions(tmp_path):
    import yaml

    writers = [{"captioner": "Qwen/Qwen2.5-VL-3B-Instruct", "revision": "abc", "quantization": None, "captions": 7}]
    own = {"config_name": None, "fingerprint": 64 * "1", "weight": 1.0, "rows": {"train": 9}, "where": {}}
    plain = own | {"source": str(tmp_path / "pictures"), "revision": None, "captioners": [], "filters": {}}
    made = {"config_name": "refresh-2", "weight": 0.5, "where": {"a|b>=0.6": 3}, "filters": {"refusal": 4}}
    written = own | made | {"source": "alice/captions@main", "revision": "0123", "captioners": writers}
    aligner = aligner_of("clip")
    aligner.lineage = Lineage((plain, written))
    aligner.save_pretrained(tmp_path / "to")
    card = (tmp_path / "to" / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["datasets"] == ["alice/captions"]
    assert f"| pictures | 9 | fingerprint {16 * '1'} |" in card
    assert (
        "| alice/captions@main | 9 | revision 0123; configuration refresh-2; weight 0.5; "
        "where a\\|b>=0.6 (3 rows left out); filtered by refusal (4 dropped); "
        f"captions by Qwen/Qwen2.5-VL-3B-Instruct at abc (7 captions); fingerprint {16 * '1'} |"
    ) in card
    assert str(tmp_path) not in card + (tmp_path / "to" / "data.json").read_text()
    again = Qwen3Aligner.from_pretrained(tmp_path / "to")
    assert again.lineage == Lineage((plain | {"source": "pictures"}, written))


@pytest.fixture(scope="module")
def small_hub(tmp_path_factory):
    with LocalHub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def align(*flags, cache, endpoint="http://127.0.0.1:9", token=TOKEN):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE"))}
    environment |= {"MLXMM_CACHE": str(cache), "PYTHONPATH": str(ROOT), "HF_HOME": str(cache), "HF_ENDPOINT": endpoint}
    environment |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, "-m", "recipes.align_qwen3", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=240)


@pytest.fixture(scope="module")
def pushed(small_hub, cache, tmp_path_factory):
    """A finished run that went to the hub."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    flags = [*TINY, "--run-dir", folder, "--push-to", "alice/tiny"]
    done = align(*flags, cache=cache, endpoint=small_hub.endpoint)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, list(small_hub.posts)


def test_a_run_is_pushed_in_one_commit_to_a_private_repository(pushed):
    folder, output, requests = pushed
    (created,) = [json.loads(body) for path, body, _ in requests if path == "/api/repos/create"]
    assert created["name"] == "tiny" and created["organization"] == "alice"
    assert created.get("visibility") == "private" or created.get("private") is True
    (commit,) = [body for path, body, _ in requests if "/commit/" in path]
    lines = [json.loads(line) for line in commit.splitlines()]
    sent = {line["value"]["path"] for line in lines if line["key"] == "file"}
    assert sent == {path.name for path in (folder / "export").iterdir()} and "model.safetensors" in sent
    assert "uploaded: http://127.0.0.1/alice/tiny/commit/ccc" in output
    bleu = read_json(folder / "summary.json")["test/bleu"]
    assert f"| test/bleu | {bleu:.4f} |" in (folder / "export" / "README.md").read_text()


def test_the_token_goes_into_the_headers_and_nowhere_else(pushed, cache):
    folder, output, requests = pushed
    assert {authorization for *_, authorization in requests} == {f"Bearer {TOKEN}"}
    assert TOKEN not in output and not [body for _, body, _ in requests if TOKEN in body]
    files = [path for root in (folder, cache) for path in root.rglob("*") if path.is_file()]
    assert len(files) > 20 and not [path for path in files if TOKEN.encode() in path.read_bytes()]


def test_what_was_pushed_is_the_run_that_was_judged(pushed):
    last = Qwen3Aligner.from_pretrained(pushed[0] / "checkpoints" / "last")
    again = Qwen3Aligner.from_pretrained(pushed[0] / "export")
    images = [Image.effect_noise((32, 32), 64).convert("RGB") for _ in range(3)]
    assert again.caption(images) == last.caption(images) and again.config.prompt == last.config.prompt


def test_a_hub_that_refuses_is_one_line_and_the_results_stay(pushed, small_hub, cache):
    folder = pushed[0]
    (folder / "summary.json").unlink()
    shutil.rmtree(small_hub.root / "alice" / "tiny")  # what is there already is not sent again
    small_hub.commit_status = 403
    done = align("--run-dir", folder, "--resume", "last", cache=cache, endpoint=small_hub.endpoint)
    line = done.stderr.splitlines()[-1]
    assert (
        done.returncode == 2 and line.startswith("error: not uploaded to alice/tiny: 403 ") and "no room left" in line
    )
    assert line.endswith(f"to try again: hf upload alice/tiny {folder / 'export'} . --private")
    assert "Traceback" not in done.stderr and TOKEN not in done.stderr + done.stdout
    assert "test/bleu" in read_json(folder / "summary.json") and (folder / "export" / "model.safetensors").exists()


def test_no_network_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (tmp_path / "file.txt").write_text("here")
    with pytest.raises(UserError, match="not uploaded to alice/tiny: .*offline.*; to try again: hf upload alice/tiny"):
        hub.upload(tmp_path, "alice/tiny")


@pytest.mark.parametrize(
    ("flags", "token", "message"),
    [
        (["--push-to", "alice/tiny"], None, "nothing can be uploaded to alice/tiny without a token: hf auth login"),
        (["--push-to", "tiny"], TOKEN, "'tiny' is not a repository name: it needs a user, user/name"),
        (["--push-to", "alice/t--y"], TOKEN, "'alice/t--y' is not a repository name, user/name"),
    ],
)
def test_a_push_that_cannot_be_is_refused_before_the_run(flags, token, message, cache, tmp_path):
    done = align(*flags, "--run-dir", tmp_path / "run", cache=cache, token=token)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_projector_that_cannot_be_exported_is_refused_before_training(pushed, cache, tmp_path):
    flags = [*TINY, "--module.projector", "pixel_shuffle", "--run-dir", tmp_path / "run", "--push-to", "alice/tiny"]
    done = align(*flags, cache=cache)
    assert done.returncode == 2 and "LLaVA has no projector pixel_shuffle" in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


def transformers_of(folder: Path):
    """What transformers makes of a folder: model and processor."""
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(folder).eval(), _processor(folder)


def _processor(folder: Path):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder, backend="pil")  # torchvision, where it is there, resizes otherwise


def theirs(folder: Path, images: list, prompt: str) -> tuple[np.ndarray, list[str]]:
    """Logits over image and prompt, and greedy captions."""
    import torch

    model, processor = transformers_of(folder)
    inputs = processor(images=images, text=["<image>" + prompt] * len(images), return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits.numpy()
        tokens = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    return logits, [processor.decode(row, skip_special_tokens=True).strip() for row in tokens]


@live
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("layer", [0, 1, 3, -1, -2, -4])
@pytest.mark.parametrize("case", CASES)
def test_live_logits_and_captions_are_those_of_transformers(case, layer, settings, tmp_path):
    aligner = aligner_of(case, **{"layer": layer} | settings)
    aligner.save_pretrained(tmp_path / "to")
    logits, captions = theirs(tmp_path / "to", pictures(), aligner.config.prompt)
    ours = logits_of(aligner)
    assert np.abs(logits[..., : ours.shape[-1]] - ours).max() < 1e-3
    assert captions == aligner.caption(pictures())


@live
@pytest.mark.parametrize("projector", ["mlp", "linear"])
def test_live_a_run_trained_a_little_captions_50_pictures_as_transformers_does(projector, tmp_path, cache):
    from mlxmm.data.sources.shapes import ShapesConfig, ShapesGrammar

    steps = "--preset tiny --max-steps 80 --unfreeze-step 40"
    flags = "--data.batch-size 16 --data.shapes.num-train 640 --data.shapes.num-test 8"
    flags = [*steps.split(), *flags.split(), "--module.projector", projector]
    done = align(*flags, "--run-dir", tmp_path / "run", cache=cache)
    assert done.returncode == 0, done.stderr
    aligner = Qwen3Aligner.from_pretrained(tmp_path / "run" / "checkpoints" / "last")
    aligner.save_pretrained(tmp_path / "to")
    rows = ShapesGrammar(ShapesConfig(), 0).rows(0)["test"]
    images = [rows[i]["image"].resize((32 + i, 50 - i % 7)) for i in range(50)]
    logits, captions = theirs(tmp_path / "to", images, aligner.config.prompt)
    ours, said = logits_of(aligner, images), aligner.caption(images)
    print(f"{projector}: logits differ by {np.abs(logits[..., : ours.shape[-1]] - ours).max():.1e} at most,", end=" ")
    print(f"{sum(a == b for a, b in zip(captions, said))} of {len(said)} captions are the same")
    assert np.abs(logits[..., : ours.shape[-1]] - ours).max() < 1e-3
    assert captions == said and len(set(captions)) > 5
    assert Qwen3Aligner.from_pretrained(tmp_path / "to").caption(images) == captions


@pytest.mark.skipif(importlib.util.find_spec("mlx_vlm") is None, reason="mlx-vlm is not installed")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_mlx_vlm_loads_the_folder_and_writes_the_same_captions(case, settings, tmp_path):
    from mlx_vlm import generate, load

    # mlx-vlm raises for a token that its tokenizer does not have, which random weights may choose.
    aligner = aligner_of(case, **{"vocab_size": len(tokenizer(False))} | settings)
    aligner.save_pretrained(tmp_path / "to")
    model, processor = load(str(tmp_path / "to"))
    captions = []
    for i, picture in enumerate(pictures()):
        picture.save(tmp_path / f"{i}.png")
        prompt, image = "<image>" + aligner.config.prompt, [str(tmp_path / f"{i}.png")]
        captions.append(generate(model, processor, prompt=prompt, image=image, max_tokens=6, temperature=0.0).text)
    # mlx-vlm leaves out bytes that make no letter, and keeps special tokens.
    whole = lambda text: text.replace("\ufffd", "").replace("<|startoftext|>", "").strip()
    assert [whole(text) for text in captions] == [whole(text) for text in aligner.caption(pictures())]
