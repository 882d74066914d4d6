"""The update of a CLIP, from a batch that is in memory."""

import numpy as np

from tools.bench.child import Case

SIZES = {
    # width, layers, heads, side, patch, text width, text layers, tokens, pairs, pairs with --quick
    "small": (128, 4, 4, 64, 8, 128, 4, 16, 64, 64),
    "ViT-S": (384, 6, 6, 224, 16, 384, 6, 32, 32, 4),
}


def batch(case: Case, vocab_size: int, end: int) -> dict[str, np.ndarray]:
    _, _, _, side, _, _, _, length, count, few = SIZES[case.options["size"]]
    rng = np.random.default_rng(0)
    count = few if case.quick else count
    tokens = rng.integers(2, vocab_size, (count, length)).astype(np.int32)
    tokens[:, -1] = end
    return {"pixels": rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8), "tokens": tokens}


def ours(case: Case):
    import mlx.core as mx

    from mlxmm import ContrastiveCLIP
    from mlxmm.modules.contrastive_clip import CLIPConfig
    from mlxmm.networks.towers import TextConfig, VisionConfig
    from mlxmm.preprocessing.images import ImageProcessor
    from mlxmm.preprocessing.tokenizers import train_tokenizer
    from tools.bench.ours import WORDS, updates

    width, layers, heads, side, patch, text_width, text_layers, length, *_ = SIZES[case.options["size"]]
    tokenizer = train_tokenizer(WORDS, 300, adds_start_and_end=True)
    common = {"num_attention_heads": heads}
    text = TextConfig(
        hidden_size=text_width,
        num_hidden_layers=text_layers,
        intermediate_size=4 * text_width,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        max_position_embeddings=length,
        **common,
    )
    vision = VisionConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        intermediate_size=4 * width,
        image_size=side,
        patch_size=patch,
        **common,
    )
    mx.random.seed(0)
    module = ContrastiveCLIP(CLIPConfig(vision=vision, text=text), tokenizer, ImageProcessor.square(side))
    module.save_pretrained(case.folder / "clip")
    return updates(module, batch(case, len(tokenizer), tokenizer.eos_token_id))


def theirs_compiled(case: Case):
    import torch

    return theirs(case, torch.compile)


def theirs(case: Case, wrap=lambda model: model):
    import torch
    import transformers

    from tools.bench.torch_side import device, normalized, updates

    name = device(case)
    model = transformers.CLIPModel.from_pretrained(case.folder / "clip").to(name).train()
    config = model.config.text_config
    data = batch(case, config.vocab_size, config.eos_token_id)
    tokens = torch.from_numpy(data["tokens"]).long().to(name)
    call = wrap(model)

    def loss():
        return call(input_ids=tokens, pixel_values=normalized(data["pixels"], name), return_loss=True).loss

    return updates(model, loss)
