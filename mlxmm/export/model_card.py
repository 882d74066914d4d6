"""Model cards: the README.md of a folder on the Hub, its metadata first."""

from mlxmm.storage.hub import card_metadata, is_hub_id, split_revision

CAPTIONER = """\
{metadata}
# Captions of pictures

A vision tower, a projector and a Qwen3 that reads what the projector makes of the picture, as a LLaVA.
Trained on MLX by mlxmm's `Qwen3Aligner`{parts}.

```python
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

folder = "."  # or this repository's name
processor = AutoProcessor.from_pretrained(folder)
model = LlavaForConditionalGeneration.from_pretrained(folder)
inputs = processor(images=Image.open("picture.jpg"), text={text!r}, return_tensors="pt")
tokens = model.generate(**inputs)
print(processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
```

With [mlx-vlm](https://github.com/Blaizzy/mlx-vlm), which takes the model from this folder's `mlx_vlm_llava.py`:

    mlx_vlm.generate --model FOLDER --image picture.jpg --prompt ""

If torchvision is installed, transformers resizes images with it, and outputs may differ a little: the model was
trained on images resized with Pillow.
{metrics}"""


def captioner(config, image_token: str, metrics: dict) -> str:
    """The card of a captioner with this `Qwen3AlignerConfig`. It names Hub repositories, but no local folders."""
    bases = [str(name) for name in (config.vision, config.lm) if name is not None and is_hub_id(name)]
    return CAPTIONER.format(
        metadata=card_metadata(
            library_name="transformers",
            pipeline_tag="image-text-to-text",
            base_model=[split_revision(name)[0] for name in bases] or None,
            tags=["image-captioning", "llava", "mlx"],
        ),
        parts=f", from {' and '.join(bases)}" if bases else "",
        text=image_token + config.prompt,
        metrics=_table(metrics),
    )


def _table(metrics: dict) -> str:
    """The numbers of `metrics` as a section of Markdown; empty if there are none."""
    rows = [f"| {name} | {value:.4f} |" for name, value in metrics.items() if isinstance(value, int | float)]
    return "\n".join(["", "## Metrics", "", "| metric | value |", "| --- | --- |", *rows, ""]) if rows else ""
