"""Captions of 64 pictures, 16 tokens each, greedily: from PIL images to tokens, in batches of 64."""

from tools.bench import aligner
from tools.bench.child import Case

NUM_TOKENS = 16


def num_pictures(case: Case) -> int:
    return 16 if case.quick else 64


def ours(case: Case):
    from PIL import Image

    from tools.bench.ours import pixels

    module = aligner.build(case, layers=4)
    images = [Image.fromarray(array) for array in pixels(num_pictures(case), 224)]

    def turn() -> dict:
        rows = module.caption_tokens(images, max_new_tokens=NUM_TOKENS)
        return {"check": [token for row in rows for token in row]}

    return turn


def theirs(case: Case):
    import numpy as np
    import torch
    import transformers

    from tools.bench.torch_side import device, normalized

    name = device(case)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(case.folder / "llava").to(name).eval()
    count = num_pictures(case)
    pixels = np.random.default_rng(0).integers(0, 256, (count, 224, 224, 3), dtype=np.uint8)
    num_patches = model.config.image_seq_length
    ids = torch.full((count, num_patches), model.config.image_token_id, device=name)
    settings = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "attention_mask": torch.ones_like(ids)}

    @torch.inference_mode()
    def turn() -> dict:
        found = model.generate(input_ids=ids, pixel_values=normalized(pixels, name), **settings)
        return {"check": found[:, num_patches:].flatten().tolist()}

    return turn
