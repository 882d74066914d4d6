"""Model cards: the README.md of a folder on the Hub, its metadata first."""

from operator import itemgetter

from mlxmm.escaping import markdown
from mlxmm.storage.hub import card_metadata, is_hub_id, split_revision
from mlxmm.storage.lineage import Lineage

CAPTIONER = """\
{metadata}
# Captions of pictures

A vision tower, a projector and a Qwen3 that reads what the projector makes of the picture, as a LLaVA.
Trained on MLX by mlxmm's `Qwen3Aligner`{parts}.

```python
from PIL import Image, ImageOps
from transformers import AutoProcessor, LlavaForConditionalGeneration

folder = "."  # or this repository's name
processor = AutoProcessor.from_pretrained(folder)
model = LlavaForConditionalGeneration.from_pretrained(folder)
picture = ImageOps.exif_transpose(Image.open("picture.jpg"))
inputs = processor(images=picture, text={text!r}, return_tensors="pt")
tokens = model.generate(**inputs)
print(processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
```

It needs PyTorch beside transformers: `pip install torch transformers pillow`.

With [mlx-vlm](https://github.com/Blaizzy/mlx-vlm), which takes the model from this folder's `mlx_vlm_llava.py`:

    mlx_vlm.generate --model FOLDER --image picture.jpg --prompt ""

If torchvision is installed, transformers resizes images with it, and outputs may differ a little: the model was
trained on images resized with Pillow.
{data}{metrics}"""


def captioner(config, image_token: str, metrics: dict, lineage: Lineage) -> str:
    """The card of a captioner with this `Qwen3AlignerConfig`, trained on the data of `lineage`, which names no local
    folders; nor does the card, which names Hub repositories."""
    bases = [str(name) for name in (config.vision, config.lm) if name is not None and is_hub_id(name)]
    return CAPTIONER.format(
        metadata=card_metadata(
            library_name="transformers",
            pipeline_tag="image-text-to-text",
            datasets=[split_revision(name)[0] for name in map(itemgetter("source"), lineage.sources) if is_hub_id(name)]
            or None,
            base_model=[split_revision(name)[0] for name in bases] or None,
            tags=["image-captioning", "llava", "mlx"],
        ),
        parts=f", from {' and '.join(bases)}" if bases else "",
        text=image_token + config.prompt,
        data=_data(lineage),
        metrics=_table(metrics),
    )


def _data(lineage: Lineage) -> str:
    """The sources of `lineage` as a section of Markdown; empty if there are none."""
    rows = [f"| {markdown(one['source'])} | {one['rows']['train']} | {_facts(one)} |" for one in lineage.sources]
    head = ["", "## Data", "", "| trained on | rows | which |", "| --- | --- | --- |"]
    return "\n".join([*head, *rows, ""]) if rows else ""


def _facts(source: dict) -> str:
    """Version, conditions, filters and captioners of a source, for a cell of a table."""
    dropped = (f"{name} ({number} dropped)" for name, number in source["filters"].items())
    left_out = (f"{condition} ({number} rows left out)" for condition, number in source["where"].items())
    writers = (f"{one['captioner']} at {one['revision']} ({one['captions']} captions)" for one in source["captioners"])
    facts = {
        "revision": source["revision"],
        "configuration": source["config_name"],
        "weight": None if source["weight"] == 1 else f"{source['weight']:g}",
        "where": ", ".join(left_out),
        "filtered by": ", ".join(dropped),
        "captions by": ", ".join(writers),
        "fingerprint": source["fingerprint"][:16],
    }
    return markdown("; ".join(f"{name} {fact}" for name, fact in facts.items() if fact))


def _table(metrics: dict) -> str:
    """The numbers of `metrics` as a section of Markdown; empty if there are none."""
    rows = [f"| {markdown(name)} | {value:.4f} |" for name, value in metrics.items() if isinstance(value, int | float)]
    return "\n".join(["", "## Metrics", "", "| metric | value |", "| --- | --- |", *rows, ""]) if rows else ""
