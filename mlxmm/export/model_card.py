"""Model cards: the README.md of a folder on the Hub, its metadata first."""

from mlxmm.storage.hub import is_hub_id

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

Where torchvision is installed, transformers resizes pictures a little differently than Pillow, which it was trained
with.
{figures}"""


def captioner(config, image: str, figures: dict) -> str:
    """The card of a captioner of `Qwen3AlignerConfig`; `image` is the token that the picture takes the place of.

    Folders of the machine that trained it are not named, repositories of the Hub are.
    """
    bases = [str(name) for name in (config.vision, config.lm) if name is not None and is_hub_id(name)]
    parts = f", from {' and '.join(bases)}" if bases else ""
    return CAPTIONER.format(
        metadata=_metadata(bases), parts=parts, text=image + config.prompt, figures=_figures(figures)
    )


def _metadata(bases: list[str]) -> str:
    lines = ["library_name: transformers", "pipeline_tag: image-text-to-text"]
    if bases:
        lines += ["base_model:", *(f"- {name}" for name in bases)]
    return "\n".join(["---", *lines, "tags:", "- image-captioning", "- llava", "- mlx", "---"])


def _figures(figures: dict) -> str:
    rows = [f"| {name} | {value:.4f} |" for name, value in figures.items() if isinstance(value, int | float)]
    return "\n".join(["", "## Figures", "", "| figure | value |", "| --- | --- |", *rows, ""]) if rows else ""
