"""Prompt templates: sentences with {} where a class name goes.

The 80 for ImageNet, and the best seven of them, are OpenAI's, published with CLIP under the MIT licence:
https://github.com/openai/CLIP/blob/main/notebooks/Prompt_Engineering_for_ImageNet.ipynb
"""

from mlxmm.errors import UserError

PHOTO = ("a photo of a {}.",)  # CLIP, section 3.1.4: 1.3 points on ImageNet over the name alone

_WITH_A_AND_THE = (
    "THE cartoon {}.",
    "THE embroidered {}.",
    "THE origami {}.",
    "THE plastic {}.",
    "THE plushie {}.",
    "THE toy {}.",
    "THE {} in a video game.",
    "a bad photo of THE {}.",
    "a black and white photo of THE {}.",
    "a blurry photo of THE {}.",
    "a bright photo of THE {}.",
    "a close-up photo of THE {}.",
    "a cropped photo of THE {}.",
    "a dark photo of THE {}.",
    "a doodle of THE {}.",
    "a drawing of THE {}.",
    "a good photo of THE {}.",
    "a jpeg corrupted photo of THE {}.",
    "a low resolution photo of THE {}.",
    "a painting of THE {}.",
    "a photo of THE clean {}.",
    "a photo of THE cool {}.",
    "a photo of THE dirty {}.",
    "a photo of THE hard to see {}.",
    "a photo of THE large {}.",
    "a photo of THE nice {}.",
    "a photo of THE small {}.",
    "a photo of THE weird {}.",
    "a photo of THE {}.",
    "a pixelated photo of THE {}.",
    "a rendering of THE {}.",
    "a rendition of THE {}.",
    "a sculpture of THE {}.",
    "a sketch of THE {}.",
    "a tattoo of THE {}.",
    "art of THE {}.",
    "graffiti of THE {}.",
    "itap of THE {}.",
)

IMAGENET_80 = (
    *(text.replace("THE", article) for text in _WITH_A_AND_THE for article in ("a", "the")),
    "a photo of many {}.",
    "a photo of my {}.",
    "a photo of one {}.",
    "itap of my {}.",
)

IMAGENET_7 = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)

TEMPLATES = {"name": ("{}",), "photo": PHOTO, "imagenet-7": IMAGENET_7, "imagenet-80": IMAGENET_80}
CHOICES = f"{', '.join(TEMPLATES)}, or a sentence with {{}} where the name goes"


def read_templates(choice: str) -> tuple[str, ...]:
    """The templates called `choice`, or `choice` itself if it has {}. Raises `UserError` for anything else."""
    if choice not in TEMPLATES and "{}" not in choice:
        raise UserError(f"--templates {choice!r}: choose one of {CHOICES}")
    return TEMPLATES.get(choice, (choice,))
