"""Write small checkpoints with random weights and what transformers computes from them: tests/fixtures/.

    python tools/make_parity_fixtures.py

Needs torch and transformers (and sentencepiece); the tests that read the folders need neither torch nor this file.
"""

import io
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

FOLDER = Path(__file__).parent.parent / "tests" / "fixtures"
TEXTS = ["a small red circle", "a blue square far above it"]
PICTURES = [(25, 17), (10, 31)]  # width and height
VISION = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32}
VISION |= {"layer_norm_eps": 0.01}  # large enough to show
TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
CLIP_TEXT = TEXT | {"max_position_embeddings": 20}


def clip(tokenizer, *, act: str, legacy: bool, patch_size: int):
    """CLIP; `legacy`: the end token as the first configurations on the Hub have it."""
    tokens = {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id, "pad_token_id": 1}
    tokens["eos_token_id"] = 2 if legacy else tokenizer.eos_token_id
    config = transformers.CLIPConfig(
        vision_config=VISION | {"image_size": 16, "patch_size": patch_size, "hidden_act": act},
        text_config=CLIP_TEXT | tokens | {"hidden_act": act, "layer_norm_eps": 0.02},
        projection_dim=20,
    )
    return transformers.CLIPModel(config)


def siglip(vocab_size: int):
    """SigLIP, on pictures of which the last pixels do not fill a patch."""
    text = TEXT | {"layer_norm_eps": 0.02, "vocab_size": vocab_size, "projection_size": 24}
    text |= {"max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    config = transformers.SiglipConfig(vision_config=VISION | {"image_size": 15, "patch_size": 4}, text_config=text)
    return transformers.SiglipModel(config)


def vit(kind):
    """A ViTModel, or one with a classifier."""
    return kind(transformers.ViTConfig(**VISION, image_size=16, patch_size=4, num_labels=5))


def clip_tokenizer(*, legacy: bool):
    """CLIP's tokenizer with single letters and two merges; the end is the highest id only where it must be."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    merges = [("r", "e"), ("re", "d</w>")]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges)]
    special = ["<|startoftext|>", "<|endoftext|>"]
    tokens = tokens + special if legacy else tokens[:10] + special + tokens[10:]
    vocab = {token: i for i, token in enumerate(tokens)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=20)


def siglip_tokenizer(folder: Path):
    """SigLIP's tokenizer, trained on a few words."""
    import sentencepiece

    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 3),
        model_writer=file,
        vocab_size=40,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(file.getvalue())
    tokenizer = transformers.SiglipTokenizer(str(folder / "spiece.model"), model_max_length=16)
    (folder / "spiece.model").unlink()
    return tokenizer


def shuffle_weights(model, seed: int) -> None:
    """Random numbers everywhere, large enough that every one of them shows in the outputs."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("logit_scale"):
            parameter.data.fill_(1.5)
        elif parameter.ndim < 2 and "norm" in name and name.endswith("weight"):
            parameter.data = 1 + 0.2 * noise
        else:
            parameter.data = noise * (0.3 if parameter.ndim < 2 else 1.5 / parameter[0].numel() ** 0.5)


def pictures(seed: int) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in PICTURES]


def make(name: str, folder: Path, seed: int = 0) -> None:
    """Write the checkpoint `name` and, in expected.safetensors, what transformers makes of it."""
    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer, processor = CASES[name](folder)
    shuffle_weights(model, seed)
    model.save_pretrained(folder)
    if tokenizer:
        tokenizer.save_pretrained(folder)
    file = "processor_config.json" if name == "clip-gelu-patch8" else "preprocessor_config.json"  # both layouts
    values = json.loads(processor.to_json_string())
    values = {"image_processor": values} if file == "processor_config.json" else values
    (folder / file).write_text(json.dumps(values, indent=2))
    arrays = compute(folder, seed)
    save_file({name: array.contiguous() for name, array in arrays.items()}, folder / "expected.safetensors")


def compute(folder: Path, seed: int = 0) -> dict:
    """What transformers computes from `folder`: inputs as its processors make them, logits, hidden states."""
    config = json.loads((folder / "config.json").read_text())
    kind = config["model_type"]
    model = getattr(transformers, config["architectures"][0]).from_pretrained(folder).eval()
    processor = PROCESSORS[kind].from_pretrained(folder)
    pixels = processor(pictures(seed), return_tensors="pt")["pixel_values"]
    tower = model.vision_model if kind != "vit" else getattr(model, "vit", model)
    large = torch.nn.functional.interpolate(pixels, size=(24, 17), mode="bilinear")
    with torch.no_grad():
        states = tower(pixels, output_hidden_states=True).hidden_states
        other = tower(large, output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
        arrays = {f"vision.{i}": state for i, state in enumerate(states)}
        arrays |= {"pixels": pixels.permute(0, 2, 3, 1), "large": large.permute(0, 2, 3, 1), "vision_large": other[-1]}
        if kind == "vit":
            return arrays | {"class_token": tower(pixels).last_hidden_state[:, 0]}
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        length = model.config.text_config.max_position_embeddings
        tokens = tokenizer(TEXTS, padding="max_length", max_length=length, truncation=True)["input_ids"]
        tokens = torch.tensor(tokens)
        states = model.text_model(tokens, output_hidden_states=True).hidden_states
        arrays |= {f"text.{i}": state for i, state in enumerate(states)}
        output = model(input_ids=tokens, pixel_values=pixels, return_loss=True)
    arrays |= {"tokens": tokens.int(), "logits": output.logits_per_image, "loss": output.loss}
    return arrays | {"image_embeds": output.image_embeds, "text_embeds": output.text_embeds}


def _clip(*, legacy: bool, **settings):
    tokenizer = clip_tokenizer(legacy=legacy)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 18}, crop_size={"height": 16, "width": 16})
    return clip(tokenizer, legacy=legacy, **settings), tokenizer, processor


def _siglip(folder):
    tokenizer = siglip_tokenizer(folder)
    return siglip(len(tokenizer)), tokenizer, SiglipImageProcessorPil(size={"height": 15, "width": 15})


def _vit(kind):
    return vit(kind), None, ViTImageProcessorPil(size={"height": 16, "width": 16})


PROCESSORS = {"clip": CLIPImageProcessorPil, "siglip": SiglipImageProcessorPil, "vit": ViTImageProcessorPil}
CASES = {
    "clip-quick-gelu-patch4": lambda _: _clip(act="quick_gelu", legacy=True, patch_size=4),
    "clip-gelu-patch8": lambda _: _clip(act="gelu", legacy=False, patch_size=8),
    "siglip": _siglip,
    "vit": lambda _: _vit(transformers.ViTModel),
    "vit-classifier": lambda _: _vit(transformers.ViTForImageClassification),
}
STORED = [name for name in CASES if name != "vit-classifier"]  # which is a vit under other names

if __name__ == "__main__":
    for case in STORED:
        make(case, FOLDER / case)
        print(case, sum(path.stat().st_size for path in (FOLDER / case).iterdir()), "bytes")
