"""A language model that learns to read a frozen tower: an update, and an epoch over pictures.

The projector is trained; logits are computed where there is a label, on both sides. transformers reads the folder that
mlxmm exports. The update has a tower of ViT-S's width and a Qwen3 of 512 features, the epoch ViT-B/32 and 256 features.
"""

import io

import numpy as np

from tools.bench.child import Case, clocked

VIT_S = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536}
VIT_S |= {"image_size": 224, "patch_size": 16}
VIT_B = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
VIT_B |= {"image_size": 224, "patch_size": 32}
VOCABULARY, LONGEST = 8_192, 24


def build(case: Case, tower: dict = VIT_S, width: int = 512, layers: int = 8):
    """The module, which is also written to the case's folder."""
    import attrs
    import mlx.core as mx

    from mlxmm import Qwen3Aligner
    from mlxmm.modules.qwen3_aligner import Qwen3AlignerConfig
    from mlxmm.networks.clip import CLIPVisionTower, VisionConfig
    from mlxmm.networks.language_model import Qwen3Config, build_language_model
    from mlxmm.preprocessing.images import ImageProcessor
    from mlxmm.preprocessing.tokenizers import train_tokenizer
    from tools.bench.ours import WORDS

    tokenizer = train_tokenizer(WORDS, 300)
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 3 * width}
    hub = Qwen3Config(**sizes, num_attention_heads=width // 64, num_key_value_heads=width // 128, head_dim=64).to_hub(
        tokenizer
    ) | {"vocab_size": VOCABULARY}
    vision = VisionConfig(**tower)
    mx.random.seed(0)
    parts = CLIPVisionTower(vision), attrs.asdict(vision) | {"model_type": "clip_vision_model"}
    parts += ImageProcessor.square(224), build_language_model(hub), hub, tokenizer
    module = Qwen3Aligner(Qwen3AlignerConfig(layer=-2, max_new_tokens=LONGEST), *parts)
    if not (case.folder / "llava").exists():
        module.save_pretrained(case.folder / "llava")
    return module


def captions(count: int) -> dict[str, np.ndarray]:
    """Tokens (count, T) of 6 to T each, and the mask of those that count."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(6, LONGEST + 1, count)
    tokens = rng.integers(2, VOCABULARY, (count, LONGEST)).astype(np.int32)
    return {"tokens": tokens, "mask": (np.arange(LONGEST) < lengths[:, None]).astype(np.float32)}


def jpegs(count: int) -> list[bytes]:
    """Pictures of Flickr30k's size, of noise as coarse as pictures are."""
    from PIL import Image

    rng, made = np.random.default_rng(0), []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)).resize((500, 375))
        coarse.save(data := io.BytesIO(), "JPEG", quality=90)
        made.append(data.getvalue())
    return made


def ours(case: Case):
    from tools.bench.ours import pixels, updates

    module = build(case)
    batch = module.collate(captions(8) | {"pixels": pixels(8, 224)})
    return updates(module, batch)


def theirs(case: Case):
    from tools.bench.torch_side import device, normalized, updates

    name = device(case)
    model, batch = _llava(case, name), captions(8)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 224, 224, 3), dtype=np.uint8)
    return updates(model, lambda: _loss(model, normalized(pixels, name), batch))


def _llava(case: Case, name: str):
    import transformers

    model = transformers.LlavaForConditionalGeneration.from_pretrained(case.folder / "llava").to(name).train()
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    return model


def _loss(model, images, batch: dict):
    """The mean loss of the tokens that count; no other position gets logits."""
    import torch

    tokens, mask = (torch.from_numpy(batch[name]).to(images.device) for name in ("tokens", "mask"))
    num_patches = model.config.image_seq_length
    patches = torch.full((len(tokens), num_patches), model.config.image_token_id, device=images.device)
    ids = torch.cat([patches, tokens[:, :-1].long()], dim=1)
    states = model.model(input_ids=ids, pixel_values=images, use_cache=False).last_hidden_state
    labelled = mask.bool()
    logits = model.lm_head(states[:, num_patches - 1 :][labelled])[:, :VOCABULARY]  # export adds rows for new tokens
    return torch.nn.functional.cross_entropy(logits, tokens[labelled].long())


# ---- an epoch


def num_pictures(case: Case) -> int:
    return 32 if case.quick else 64


def our_epoch(case: Case):
    import datasets

    from mlxmm import Trainer
    from mlxmm.callbacks import CachedFeatures
    from mlxmm.data.caption_data import CaptionData
    from mlxmm.data.caption_source import CaptionDataConfig, open_source
    from tools.bench.ours import QUIET, Epochs

    count = num_pictures(case)
    split = ["train"] * count + ["val"] + ["test"]
    images = [{"bytes": data, "path": None} for data in jpegs(count + 2)]
    rows = {"image": images, "caption": [str(i) for i in range(count + 2)], "split": split}
    datasets.Dataset.from_dict(rows).to_parquet(str(case.folder / "pictures.parquet"))
    (case.folder / "pictures").mkdir()
    for i, image in enumerate(images[:count]):
        (case.folder / "pictures" / f"{i}.jpg").write_bytes(image["bytes"])
    config = CaptionDataConfig(
        source=str(case.folder / "pictures.parquet"),
        split_column="split",
        batch_size=16,
        num_threads=case.threads,
    )
    source, module, texts = open_source(config, 0), build(case, VIT_B, 256, 4), captions(count + 2)

    def transform(row: dict, caption: str) -> dict:
        return module.transform(row, "red") | {name: array[int(caption)] for name, array in texts.items()}

    def turn() -> dict:
        epochs = Epochs()
        callbacks = [CachedFeatures(case.folder / "features"), epochs]
        trainer = Trainer(max_epochs=2, num_sanity_val_steps=0, limit_val_batches=0, callbacks=callbacks, **QUIET)
        trainer.fit(module, CaptionData(source, transform=transform, collate=module.collate))
        return epochs.seconds

    return turn


def their_epoch(case: Case):
    from tools.bench.torch_side import decoded, device, normalized, updates

    name = device(case)
    model, count = _llava(case, name), num_pictures(case)
    texts, now = captions(count), {}
    update = updates(model, lambda: _loss(model, normalized(now["pixels"], name), now["texts"]))

    def epoch() -> None:
        for start in range(0, count, 16):
            files = [case.folder / "pictures" / f"{i}.jpg" for i in range(start, start + 16)]
            now["pixels"] = np.stack([decoded(file.read_bytes(), 224) for file in files])
            now["texts"] = {key: array[start : start + 16] for key, array in texts.items()}
            update()

    return lambda: clocked(epoch)[1]
