"""What a user can get wrong with a captioner: one clear line each and exit code 2, in training and afterwards."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_modules import small_clip, tokenizer

from mlxmm import Qwen3Aligner
from mlxmm.errors import UserError
from mlxmm.modules.loading import load_captioner
from mlxmm.networks.language_model import Qwen3Config, build_language_model, save_language_model

CAPTIONS = ["a red square", "a blue circle", "a small red circle"] * 8
TRAINERS = ["align_qwen3", "train_captioner"]
SHORT = "--trainer.max-steps 3 --trainer.val-check-interval 3 --data.batch-size 8 --checkpoint-every 3".split()
GPT2 = {"model_type": "gpt2", "n_ctx": 64, "n_embd": 32, "n_head": 2, "n_layer": 1, "n_positions": 64}
GPT2 |= {"layer_norm_epsilon": 1e-5, "vocab_size": 300}


def write_rows(path: Path, captions: list, images: list | None = None) -> Path:
    import datasets

    rng = np.random.default_rng(0)
    images = images or [Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)) for _ in captions]
    table = datasets.Dataset.from_dict({"image": images, "caption": captions})
    table.cast_column("image", datasets.Image()).to_parquet(str(path))
    return path


def write_lm(folder: Path, config: dict | None = None) -> Path:
    folder.mkdir()
    small = Qwen3Config(hidden_size=32, num_hidden_layers=2, intermediate_size=64)
    config = config or small.to_hub(tokenizer(False))
    save_language_model(folder, build_language_model(config), config)
    tokenizer(False).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A folder with a tower, a language model and pictures that fit together."""
    root = tmp_path_factory.mktemp("parts")
    small_clip().save_pretrained(root / "clip")
    write_lm(root / "lm")
    write_rows(root / "good.parquet", CAPTIONS)
    return root


@pytest.fixture
def run(parts, tmp_path, capsys, monkeypatch):
    """Run a recipe as `python -m` does: its exit code, what it printed, and the last line of its errors."""

    def run(recipe, *flags, run_dir=tmp_path / "run"):
        own = ["--run-dir", run_dir] if recipe != "caption" else []
        monkeypatch.setattr(sys, "argv", [recipe, *map(str, (*flags, *own))])
        monkeypatch.delitem(sys.modules, f"recipes.{recipe}", raising=False)  # to be run as the main module
        capsys.readouterr()
        try:
            runpy.run_module(f"recipes.{recipe}", run_name="__main__")
            code = 0
        except SystemExit as exit:
            code = exit.code
        told = capsys.readouterr()
        return code, told.out, (told.err.splitlines() or [""])[-1]

    return run


@pytest.fixture
def train(parts, run):
    def train(recipe, *flags, vision=parts / "clip", lm=parts / "lm", source=parts / "good.parquet", **where):
        aligns = ["--module.lm", lm, "--unfreeze-step", 1, "--unfreeze-layers", 1] if recipe == "align_qwen3" else []
        return run(recipe, *SHORT, "--module.vision", vision, "--data.source", source, *aligns, *flags, **where)

    return train


def refused(result, message: str) -> None:
    code, _, line = result
    assert code == 2 and line.startswith("error: ") and message in line, line


@pytest.fixture(scope="module")
def trained(parts):
    """A checkpoint of each trainer, made when first asked for."""

    def checkpoint(recipe, train):
        if not (parts / recipe).exists():
            assert train(recipe, run_dir=parts / recipe)[0] == 0
        return parts / recipe / "checkpoints" / "last"

    return checkpoint


# ---- pictures and captions


@pytest.mark.parametrize("recipe", TRAINERS)
@pytest.mark.parametrize("empty", ["  ", None], ids=repr)
def test_an_empty_caption_is_named_before_the_run(train, recipe, empty, tmp_path):
    source = write_rows(tmp_path / "rows.parquet", [*CAPTIONS[:14], *[empty] * 6, *CAPTIONS[20:]])
    refused(train(recipe, source=source), "without a caption, more than one in a hundred and more than 5; fix them")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("recipe", TRAINERS)
def test_a_row_without_a_picture_is_named_before_the_run(train, recipe, tmp_path):
    images = [None if 14 <= i < 20 else Image.new("RGB", (20, 20), (i, 0, 0)) for i in range(24)]
    source = write_rows(tmp_path / "rows.parquet", CAPTIONS, images)
    refused(
        train(recipe, source=source),
        "6 of 24 pictures cannot be decoded, more than one in a hundred and more than 5; fix them or leave them out: "
        "row 14",
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("recipe", TRAINERS)
def test_pictures_without_captions_are_one_clear_line(train, recipe, tmp_path):
    (tmp_path / "pictures").mkdir()
    refused(train(recipe, source=tmp_path / "pictures"), "holds no pictures: a folder holds .bmp")
    Image.new("RGB", (20, 20)).save(tmp_path / "pictures" / "0.png")
    message = (
        "has no column 'caption'; it has image; a folder holds .bmp, .gif, .jpeg, .jpg, .png, .tif, .tiff, .webp, "
    )
    refused(
        train(recipe, source=tmp_path / "pictures"),
        message + "and a metadata.jsonl or .csv with the columns file_name and caption",
    )


@pytest.mark.parametrize("recipe", ["align_qwen3", "train_captioner"])
def test_captions_longer_than_the_context_are_cut_and_counted(train, recipe, tmp_path):
    flag = "--module.max-new-tokens"
    source = write_rows(tmp_path / "rows.parquet", [*CAPTIONS[:12], *["a red square " * 900] * 12])
    code, output, _ = train(recipe, source=source)
    assert code == 0 and f"captions do not end within 128 tokens, see {flag}" in output
    assert load_captioner(tmp_path / "run/checkpoints/last").max_new_tokens == 128
    code, output, _ = train(recipe, flag, 6, source=source, run_dir=tmp_path / "short")
    assert code == 0 and "captions do not end within 6 tokens" in output
    assert load_captioner(tmp_path / "short/checkpoints/last").max_new_tokens == 6
    assert "cut:" not in train(recipe, run_dir=tmp_path / "whole")[1]


def test_image_prompt_and_caption_that_the_language_model_has_no_room_for_are_refused(train, trained, run, tmp_path):
    refused(
        train("align_qwen3", "--module.max-new-tokens", 510, "--module.prompt", "a"),
        "reads 512 tokens: after image and prompt there is room for 508 of a caption, not for 510; "
        "set --module.max-new-tokens to 508 or less",
    )
    refused(train("align_qwen3", "--module.prompt", "a red " * 400, run_dir=tmp_path / "b"), "shorten --module.prompt")
    module = trained("align_qwen3", train)
    Image.new("RGB", (20, 20)).save(tmp_path / "0.png")
    said = run("caption", "--module", module, tmp_path / "0.png", "--prompt", "a red " * 400)
    refused(said, "the language model reads 512 tokens: shorten the prompt by ")
    aligner = Qwen3Aligner.from_pretrained(module)
    assert aligner._generation({"max_new_tokens": 9_999}, "").max_new_tokens == 512 - 4 - len(aligner._prompt) + 1


# ---- parts


@pytest.mark.parametrize(("recipe", "flag"), [("align_qwen3", "--module.lm"), ("train_captioner", "--tokenizer")])
def test_a_tokenizer_without_an_end_token_is_one_clear_line(train, parts, recipe, flag, tmp_path):
    shutil.copytree(parts / "lm", tmp_path / "lm")
    path = tmp_path / "lm" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token": None}))
    refused(train(recipe, flag, tmp_path / "lm"), f"{tmp_path / 'lm'} has no end token, and captions could not learn")


@pytest.mark.parametrize(("recipe", "flag"), [("align_qwen3", "--module.lm"), ("train_captioner", "--tokenizer")])
def test_a_folder_without_a_tokenizer_is_one_clear_line(train, parts, recipe, flag, tmp_path):
    shutil.copytree(parts / "lm", tmp_path / "lm", ignore=shutil.ignore_patterns("tokenizer*"))
    refused(train(recipe, flag, tmp_path / "lm"), "holds no tokenizer: tokenizer.json is missing")


def test_a_language_model_that_takes_no_embeddings_is_one_clear_line(train, tmp_path):
    lm = write_lm(tmp_path / "lm", GPT2)
    refused(train("align_qwen3", lm=lm), "holds a gpt2, to which mlx-lm cannot give embeddings: take a Qwen3 or Llama")


def test_a_projector_that_does_not_fit_is_one_clear_line(train, tmp_path):
    shuffled = ["--module.projector", "pixel_shuffle", "--module.projector-factor", 3]
    refused(
        train("align_qwen3", *shuffled), "projector_factor 3 does not divide the 2 patches of a side: choose one of"
    )
    assert train("align_qwen3", "--module.projector", "linear", run_dir=tmp_path / "linear")[0] == 0
    last = tmp_path / "linear" / "checkpoints" / "last"
    other = train("align_qwen3", "--module.projector", "mlp", "--resume", last, run_dir=tmp_path / "mlp")
    refused(other, "holds another model than Qwen3Aligner: ")


@pytest.mark.parametrize("part", ["clip", "lm"])
def test_weights_cut_short_are_one_clear_line(train, parts, part, tmp_path):
    shutil.copytree(parts / part, tmp_path / part)
    path = tmp_path / part / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1_000])
    refused(
        train("align_qwen3", **{"clip": {"vision": path.parent}, "lm": {"lm": path.parent}}[part]), str(path.parent)
    )


@pytest.mark.parametrize("recipe", TRAINERS)
def test_a_layer_that_the_tower_does_not_have_is_one_clear_line(train, recipe):
    message = "layer 7 of a tower with hidden states 0 to 2: choose one of these, or -1 to -3"
    refused(train(recipe, "--module.layer", 7), message)


def test_more_layers_than_the_language_model_has_are_one_clear_line(train):
    refused(train("align_qwen3", "--unfreeze-layers", 99), "--unfreeze-layers 99: the language model has 2 layers")


@pytest.mark.parametrize(
    ("recipe", "flags", "message"),
    [
        ("train_captioner", ["--module.layer", 99], "layer 99 of a tower with hidden states 0 to 3"),
        ("align_qwen3", ["--module.layer", 99], "layer 99 of a tower with hidden states 0 to 3"),
        ("align_qwen3", ["--unfreeze-layers", 99], "--unfreeze-layers 99: the language model has 4 layers"),
    ],
)
def test_layers_of_parts_that_a_recipe_trains_itself_are_checked_before_it_does(run, recipe, flags, message):
    refused(run(recipe, *flags), message)  # with the defaults: the parts would take minutes


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--module.lm-bits", 3], "'lm_bits' must be in (0, 4, 8) (got 3)"),
        (["--module.lm-bits", 5], "'lm_bits' must be in (0, 4, 8) (got 5)"),
        (["--module.lora.rank", -1], "'rank' must be >= 0: -1"),
        (["--module.projector", "mpl"], "'projector' must be in ('linear', 'mlp', 'pixel_shuffle') (got 'mpl')"),
        (["--unfreeze-layers", 0], "'unfreeze_layers' must be >= 1: 0"),
        (["--unfreeze-step", -1], "'unfreeze_step' must be >= 0: -1"),
        (["--checkpoint-every", 0], "'checkpoint_every' must be >= 1: 0"),
        (["--max-test", 0], "'max_test' must be >= 1: 0"),
    ],
    ids=str,
)
def test_a_number_that_cannot_be_is_one_clear_line(train, flags, message, tmp_path):
    refused(train("align_qwen3", *flags), message)
    assert not (tmp_path / "run").exists()


def test_a_rank_of_zero_is_no_adapters(train, tmp_path):
    assert train("align_qwen3", "--module.lora.rank", 0)[0] == 0
    aligner = Qwen3Aligner.from_pretrained(tmp_path / "run" / "checkpoints" / "last")
    assert not aligner.parameter_groups()["lora"]


# ---- a trained captioner


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:900])


def without(path: Path, name: str) -> None:
    values = json.loads(path.read_text())
    del values[name]
    path.write_text(json.dumps(values))


DAMAGE = {
    "weights cut": (lambda to: cut(to / "weights.safetensors"), "weights.safetensors is missing or damaged"),
    "weights gone": (lambda to: (to / "weights.safetensors").unlink(), "weights.safetensors is missing or damaged"),
    "config gone": (lambda to: (to / "config.json").unlink(), "holds no model: it has no config.json"),
    "config cut": (lambda to: (to / "config.json").write_text("{"), "config.json cannot be read: it is damaged"),
    "config a list": (lambda to: (to / "config.json").write_text("[]"), "a JSON object was expected, list came"),
    "part gone": (
        lambda to: without(to / "config.json", "vision"),
        "config.json is damaged: it does not describe vision",
    ),
    "kind gone": (
        lambda to: without(to / "config.json", "model_type"),
        "holds no captioner: its config.json says model_",
    ),
    "processor cut": (lambda to: (to / "preprocessor_config.json").write_text("{"), "it is damaged"),
    "tokenizer gone": (lambda to: (to / "tokenizer.json").unlink(), "holds no tokenizer: tokenizer.json is missing"),
}


@pytest.mark.parametrize("recipe", TRAINERS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_of_a_captioner_is_one_clear_line(train, trained, run, recipe, damage, tmp_path):
    change, message = DAMAGE[damage]
    Image.new("RGB", (20, 20)).save(tmp_path / "0.png")
    shutil.copytree(trained(recipe, train), tmp_path / "module")
    (tmp_path / "module" / "state.json").unlink()  # it has checksums, which other folders have not
    change(tmp_path / "module")
    refused(run("caption", "--module", tmp_path / "module", tmp_path / "0.png"), message)


def test_a_folder_of_another_kind_is_one_clear_line(train, trained, run, parts, tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "0.png")
    trained("align_qwen3", train)
    assert run("caption", "--module", parts / "align_qwen3", tmp_path / "0.png")[0] == 0  # of a run, its model
    for folder, kind in [("clip", "'clip'"), ("lm", "'qwen3'")]:
        message = f"{parts / folder} holds no captioner: its config.json says model_type {kind}, expected was one of"
        for recipe in ("caption", "evaluate_captions"):
            refused(run(recipe, "--module", parts / folder, *[tmp_path / "0.png"] * (recipe == "caption")), message)


@pytest.mark.parametrize("recipe", ["caption", "evaluate_captions"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--generation.num-beams", 0], "'num_beams' must be >= 1: 0"),
        (["--generation.max-new-tokens", 0], "'max_new_tokens' must be >= 1: 0"),
        (["--generation.temperature", -1], "'temperature' must be >= 0: -1.0"),
    ],
    ids=str,
)
def test_words_that_cannot_be_chosen_so_are_one_clear_line(run, recipe, flags, message):
    refused(run(recipe, "--module", "nowhere", *flags), message)


def test_a_folder_without_pictures_is_one_clear_line(train, trained, run, tmp_path):
    module, folder = trained("align_qwen3", train), tmp_path / "none"
    folder.mkdir()
    refused(
        run("caption", "--module", module, folder), f"no pictures in {folder}: name files, or folders that hold .bmp"
    )
    refused(run("evaluate_captions", "--module", module, "--data.source", folder), f"{folder} holds no pictures: ")


@pytest.mark.parametrize("recipe", TRAINERS)
def test_empty_captions_and_missing_pictures_are_named_when_a_captioner_is_judged(
    train, trained, run, recipe, tmp_path
):
    module = trained(recipe, train)
    empty = write_rows(tmp_path / "empty.parquet", [*CAPTIONS[:14], *[""] * 6, *CAPTIONS[20:]])
    refused(run("evaluate_captions", "--module", module, "--data.source", empty), "without a caption")
    images = [Image.new("RGB", (20, 20))] * 18 + [None] * 6
    bare = write_rows(tmp_path / "bare.parquet", CAPTIONS, images)
    refused(run("evaluate_captions", "--module", module, "--data.source", bare), "pictures cannot be decoded")


def test_a_language_model_of_a_kind_that_mlx_lm_does_not_have_is_one_clear_line():
    with pytest.raises(UserError, match="mlx-lm does not support: Model type nope not supported"):
        build_language_model({"model_type": "nope"})


def test_a_picture_is_required(tmp_path):
    from mlxmm.preprocessing.images import UndecodableImage, decode_image

    for nothing in (None, {"bytes": None, "path": None}):
        with pytest.raises(UndecodableImage, match="there is no picture"):
            decode_image(nothing)


def test_a_stream_without_a_language_model_is_refused_before_the_run(run, parts, tmp_path):
    flags = ["--data.source", parts / "good.parquet", "--data.streaming", "--trainer.max-steps", 3]
    refused(run("align_qwen3", *flags), "name one with --module.lm")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("recipe", TRAINERS)
def test_fsdp_on_one_process_is_refused_before_the_run(run, recipe, tmp_path):
    refused(run(recipe, "--trainer.strategy", "fsdp"), "there is only one")
    assert not (tmp_path / "run").exists()
