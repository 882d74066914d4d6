"""Files of a CLIP, a SigLIP or a language model are read as transformers reads them, or refused in one line."""

import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxmm import ContrastiveCLIP, Qwen3Aligner
from mlxmm.errors import UserError
from mlxmm.export import llava
from mlxmm.modules.contrastive_clip import read_clip_config
from mlxmm.networks.clip import TEXT_DEFAULTS
from mlxmm.networks.language_model import embed
from mlxmm.networks.pretrained_vision import load_vision_tower
from tests.preprocessing.test_tokenizers import with_start
from tests.small_modules import small_aligner, tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures"


def copied(name: str, folder: Path, **changes) -> Path:
    shutil.copytree(FIXTURES / name, folder)
    values = json.loads((folder / "config.json").read_text())
    for key, value in changes.items():
        part = values[key] if isinstance(values.get(key), dict) and isinstance(value, dict) else {}
        values[key] = part | value if isinstance(value, dict) else value
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_a_siglip_without_an_end_token_loads_with_the_same_numbers(tmp_path):
    folder = copied("siglip", tmp_path / "siglip", text_config={"eos_token_id": None, "bos_token_id": None})
    texts = ["a small red circle", "a blue square far above it"]
    stored = mx.load(str(FIXTURES / "siglip" / "expected.safetensors"))
    assert (
        np.abs(np.array(ContrastiveCLIP.from_pretrained(folder).encode_text(texts) - stored["text_embeds"])).max()
        < 1e-4
    )


def test_the_older_name_of_a_towers_settings_wins_as_in_transformers(tmp_path):
    from transformers import CLIPConfig

    name = "clip-gelu-patch8"
    values = json.loads((FIXTURES / name / "config.json").read_text())
    older = {"vision_config_dict": values["vision_config"], "text_config_dict": values["text_config"]}
    wrong = {"text_config": {"hidden_act": "quick_gelu"}, "vision_config": {"hidden_act": "quick_gelu"}}
    folder = copied(name, tmp_path / "both", **older, **wrong)
    clip = ContrastiveCLIP.from_pretrained(folder)
    theirs = CLIPConfig.from_pretrained(folder)
    for ours, part in ((clip.config.text, theirs.text_config), (clip.config.vision, theirs.vision_config)):
        assert ours.hidden_act == part.hidden_act == "gelu"
    assert load_vision_tower(folder)[0].config == clip.config.vision
    alone = copied(name, tmp_path / "alone", **older)
    written = json.loads((alone / "config.json").read_text())
    (alone / "config.json").write_text(
        json.dumps({key: value for key, value in written.items() if key not in ("text_config", "vision_config")})
    )
    assert ContrastiveCLIP.from_pretrained(alone).config == clip.config


def test_nulls_are_what_transformers_takes_for_them(tmp_path):
    config = read_clip_config(copied("clip-gelu-patch8", tmp_path / "clip", text_config=None, projection_dim=None))
    assert config.projection_dim == 512 and config.text.hidden_size == TEXT_DEFAULTS["hidden_size"]
    with pytest.raises(UserError, match="its text_config is no object"):
        read_clip_config(copied("clip-gelu-patch8", tmp_path / "other", text_config=["hidden_size"]))


def test_a_clip_whose_tokenizer_has_tokens_without_a_row_is_refused(tmp_path):
    folder = copied("clip-gelu-patch8", tmp_path / "clip")
    tokens = ContrastiveCLIP.from_pretrained(folder).tokenizer
    tokens.add_tokens(["giraffe", "zebra"])
    tokens.save_pretrained(str(folder))
    with pytest.raises(UserError, match="has 2 tokens without a row in the model's table of 56, as 'giraffe'"):
        ContrastiveCLIP.from_pretrained(folder)


def test_a_clip_whose_tokenizer_does_not_pad_is_refused(tmp_path):
    clip = ContrastiveCLIP.from_pretrained(FIXTURES / "clip-gelu-patch8")
    clip.tokenizer.pad_token = None
    with pytest.raises(UserError, match="has no padding token"):
        ContrastiveCLIP(clip.config, clip.tokenizer, clip.processor)


def rebuilt(aligner: Qwen3Aligner, tokens) -> Qwen3Aligner:
    parts = aligner.config, aligner.vision, {"model_type": "clip_vision_model"}, aligner.processor
    return Qwen3Aligner(*parts, aligner.language_model, aligner.lm_config, tokens)


def test_a_language_model_whose_tokenizer_is_larger_than_its_table_is_refused():
    tokens = with_start(tokenizer(False))
    tokens.add_special_tokens({"eos_token": "<end>"})
    with pytest.raises(UserError, match="has 1 tokens without a row in the model's table"):
        rebuilt(small_aligner(), tokens)


def test_a_language_model_reads_its_start_token_before_the_image(tmp_path):
    without = small_aligner()
    aligner = rebuilt(without, with_start(without.tokenizer))
    aligner.projector, features = without.projector, mx.random.normal((2, 4, 32))
    before, plain = aligner.prefix(features), without.prefix(features)
    start = embed(aligner.language_model, mx.array([[aligner.tokenizer.bos_token_id]]))
    assert mx.array_equal(before[:, 1:], plain) and mx.array_equal(before[:, :1], mx.broadcast_to(start, (2, 1, 32)))
    assert aligner.prefix_length == before.shape[1] == without.prefix_length + 1
    assert aligner._room(()) == without._room(()) - 1
    aligner.save_pretrained(tmp_path / "to")
    assert Qwen3Aligner.from_pretrained(tmp_path / "to").prefix_length == aligner.prefix_length
    assert llava.start_tokens(aligner.tokenizer) == (aligner.tokenizer.bos_token_id,)


@pytest.mark.parametrize("make", [small_aligner], ids=["aligner"])
def test_no_stop_token_is_learned_amid_a_caption(make):
    from PIL import Image

    module, image = make(), Image.new("RGB", (16, 16))
    caption = f"a red {module.tokenizer.eos_token} circle"
    example = module.transform({"image": image}, caption)
    learned = example["tokens"][example["mask"] > 0].tolist()
    assert learned.count(module.stop_id) == 1 and learned[-1] == module.stop_id
    assert module.text_of(learned[:-1]).split() == ["a", "red", "circle"]
