"""Settings say the truth: every flag counts, means the same everywhere, and `--help` fits on two screens."""

import importlib
import json
import math
import re
from pathlib import Path

import attrs
import pytest

from mlxmm.cli import flags_of, help_text, parse_config
from mlxmm.config import Preset, from_json, internal, option, section, to_json
from mlxmm.data.caption_config import CaptionDataConfig
from mlxmm.data.sources.shapes import ShapesConfig
from mlxmm.errors import UserError
from recipes.parts.next_steps import data_flags

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py") if path.stem != "__init__")
TRAINING = ("align_qwen3", "train_captioner", "train_clip", "train_language_model")
SET_BY_THE_PROGRAM = {
    "trainer.seed",
    "trainer.default-root-dir",
    "module.text.vocab-size",
    "module.text.eos-token-id",
    "module.text.max-position-embeddings",
    "module.decoder.vocab-size",
    "module.decoder.max-position-embeddings",
    "module.max-tokens",
}


def recipe(name: str):
    return importlib.import_module(f"recipes.{name}")


def presets(name: str) -> dict[str, Preset]:
    module = recipe(name)
    return getattr(module, "PRESETS", {"default": Preset("", module.Config())})


def flags(name: str):
    return list(flags_of(presets(name)["default"].config))


@pytest.mark.parametrize("name", RECIPES)
def test_help_shows_at_most_60_flags_on_two_screens_and_about_ten_first(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    text = help_text(name, presets(name)["default"].config, presets(name), everything=False)
    shown = re.findall(r"^  (?:--(?!preset)[\w.-]+|[A-Z]+\b)", text, re.MULTILINE)
    first = re.search(r"most used:\n(.*?)(\n\n|\Z)", text, re.DOTALL)[1]
    assert 0 < len(shown) <= 60 and len(text.splitlines()) <= 100 and max(map(len, text.splitlines())) <= 120
    assert len(re.findall(r"^  \S", first, re.MULTILINE)) <= 11
    everything = help_text(name, presets(name)["default"].config, presets(name), everything=True)
    assert all(f"--{flag.name}" in everything or flag.name.upper() in everything for flag in flags(name))


@pytest.mark.parametrize("name", TRAINING)
def test_no_flag_is_overwritten_and_the_demos_small_parts_are_no_flags(name):
    names = {flag.name for flag in flags(name)}
    assert not names & SET_BY_THE_PROGRAM
    assert not [flag for flag in names if flag.startswith(("tower.", "language-model."))]
    with pytest.raises(UserError, match="Unrecognized options: --trainer.seed"):
        parse_config(name, presets(name), ["--trainer.seed", "3"])


@pytest.mark.parametrize("name", TRAINING)
def test_max_steps_batch_size_and_lr_mean_the_same_in_every_recipe(name):
    config = parse_config(name, presets(name), ["--max-steps", "7", "--batch-size", "5", "--lr", "0.25"])
    size = config.batch_size if name == "train_language_model" else config.data.batch_size
    assert (config.trainer.max_steps, size, config.module.optimizer.learning_rate) == (7, 5, 0.25)
    assert parse_config(name, presets(name), ["--trainer.max-steps", "7"]).trainer.max_steps == 7


def other(value, kind: str):
    """Some other value of a flag, as text, which its checks are likely to allow."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return str(value + 1 if isinstance(value, int) else value / 2 + 0.125)
    return "other" if value is None and "str" in kind else None


@pytest.mark.parametrize("name", RECIPES)
def test_every_flag_changes_the_setting_of_its_name_and_nothing_else(name):
    start, tried = parse_config(name, presets(name), []), 0
    for flag in flags(name):
        text = other(flag.default, str(flag.field.type))
        if text is None or flag.name == "resume" or flag.field.metadata.get("positional"):
            continue
        try:
            config = parse_config(name, presets(name), [f"--{flag.name}", text])
        except UserError as error:  # a value that its own checks refuse
            assert re.search("must be|does not divide|projection_dim|choose|sampl|in \\(", str(error)), error
            continue
        before, after = to_json(start), to_json(config)
        tried += 1
        for part in flag.path[:-1]:
            before, after = before[part], after[part]
        was, now = before.pop(flag.path[-1]), after.pop(flag.path[-1])
        assert before == after and was != now and (str(now) == text or math.isclose(float(now), float(text)))
    assert tried


@pytest.mark.parametrize("name", RECIPES)
def test_settings_survive_json_for_every_preset(name):
    for preset in presets(name).values():
        assert from_json(type(preset.config), json.loads(json.dumps(to_json(preset.config)))) == preset.config


@attrs.frozen(kw_only=True)
class Inner:
    rate: float = option(0.5, "a rate", flag="--rate")
    own: int = option(1, "set by the program")
    rarely: int = option(2, "seldom needed", rare=True)


@attrs.frozen(kw_only=True)
class Outer:
    """Settings of a test."""

    inner: Inner = section(Inner(), without=("own",))
    parts: Inner = internal(Inner(rate=0.25))
    where: Path | None = option(None, "a path")
    names: tuple[str, ...] = option((), "some names")


OUTER = {"default": Preset("as it is", Outer()), "other": Preset("another", Outer(inner=Inner(own=5)))}


def test_what_is_internal_or_left_out_is_kept_from_the_preset_and_is_no_flag():
    config = parse_config("x", OUTER, ["--preset", "other", "--rate", "0.75", "--where", "a/b", "--names", "x", "y"])
    assert config == Outer(inner=Inner(rate=0.75, own=5), where=Path("a/b"), names=("x", "y"))
    for flag in ("--inner.own", "--parts.rate"):
        with pytest.raises(UserError, match="Unrecognized"):
            parse_config("x", OUTER, [flag, "3"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inner": {"rate": "fast"}}, "expected float @ settings.inner.rate"),
        ({"inner": {"own": 1.5}}, "expected int @ settings.inner.own"),
        ({"inner": {"own": True}}, "expected int @ settings.inner.own"),
        ({"inner": {"other": 1}}, "extra fields found (other) @ settings.inner"),
        ({"inner": 3}, "settings.inner"),
        ({"where": 3}, "settings.where"),
        ({"names": [1]}, "settings.names"),
    ],
)
def test_a_config_file_that_was_edited_wrongly_is_one_line_that_names_the_setting(change, message):
    with pytest.raises(UserError) as error:
        from_json(Outer, to_json(Outer()) | change)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert from_json(Outer, {"inner": {"rate": 1}}) == Outer(inner=Inner(rate=1.0))


def test_the_page_of_environment_variables_names_those_that_are_read_and_one_file_reads_them():
    read = lambda path: re.findall(r'(?:environ(?:\.get\(|\.setdefault\(|\[)|_number\()"(\w+)"', path.read_text())
    own = {name for name in read(ROOT / "mlxmm/environment.py")} | {"OPENBLAS_NUM_THREADS"}
    page = (ROOT / "docs/environment.md").read_text().split("Libraries read others")[0]
    assert own == set(re.findall(r"`([A-Z][A-Z_]+)`", page))
    sources = [path for part in ("mlxmm", "callbacks", "recipes") for path in (ROOT / part).rglob("*.py")]
    assert [path.name for path in sources if "os.environ" in path.read_text()] == ["environment.py"]


def test_the_data_of_a_suggested_command_are_those_of_the_run():
    given = {"source": ("a b.parquet", "c.parquet"), "caption_column": ("one", "two"), "where": ("clip_score>=0.6",)}
    data = CaptionDataConfig(**given, split_column="split")
    argv = ["--module", "model", *data_flags(data, 3)]
    config = parse_config("evaluate_clip", presets("evaluate_clip"), argv)
    assert (config.data, config.seed) == (data, 3)


def test_what_is_drawn_is_no_part_of_the_command_for_pictures_of_ones_own():
    drawn = CaptionDataConfig(shapes=ShapesConfig(num_train=64))
    assert data_flags(drawn, 0) == ["--data.shapes.num-train", "64"]
    assert data_flags(attrs.evolve(drawn, source="pics"), 0) == ["--data.source", "pics"]


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--epochs", "--trainer.max-epochs"),
        ("--learning-rate", "--lr"),
        ("--max-step", "--max-steps"),
        ("--batch", "--batch-size"),
    ],
)
def test_a_flag_that_is_not_there_comes_with_the_one_that_was_meant(flag, meant):
    with pytest.raises(UserError, match=f": {flag}; did you mean {meant}\\?$"):
        parse_config("align_qwen3", presets("align_qwen3"), [flag, "2"])


@pytest.mark.parametrize(
    ("recipe", "words", "told"),
    [
        ("caption", "--modul runs/x holiday", "Unrecognized options: --modul; did you mean --module?"),
        ("caption", "--modul=runs/x holiday", "Unrecognized options: --modul; did you mean --module?"),
        ("caption", "--model runs/x", "Unrecognized options: --model; did you mean --module?"),
        ("train_captioner", "--data pics", "Unrecognized options: --data; did you mean --data.source?"),
        ("train_captioner", "pics", "Unrecognized options: pics; pictures are named by --data.source"),
        (
            "evaluate_captions",
            "--model x --data pics",
            "Unrecognized options: --model, --data; did you mean --module or --data.source?",
        ),
        ("train_captioner", "--max-steps ten", "--max-steps/--trainer.max-steps: a whole number is wanted, not 'ten'"),
    ],
)
def test_a_flag_that_is_not_there_is_named_alone_with_the_one_that_was_meant(recipe, words, told):
    config = importlib.import_module(f"recipes.{recipe}").Config()
    with pytest.raises(UserError) as caught:
        parse_config(recipe, {"default": Preset("", config)}, words.split())
    assert str(caught.value) == told
