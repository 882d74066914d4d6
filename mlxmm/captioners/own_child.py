"""The child process of `OwnChildWriter`: it holds a captioner of ours.

Call `main` in a process of its own, with the captioner's folder as argument.
"""

from PIL import Image

from mlxmm.captioners.caption_writer import Sampling
from mlxmm.captioners.child_server import serve
from mlxmm.captioners.own_writer import OwnWriter


def main() -> None:
    """Answer the parent until it closes standard input."""
    serve(OwnWriter.from_pretrained, write_captions)


def write_captions(writer: OwnWriter, images: list[Image.Image], prompts: list[str], sampling: dict):
    """(text, number of tokens, why it ended) of each image, by the prompt of the same place."""
    written = writer.write(images, prompts, Sampling(**sampling))
    return [(caption.text, caption.num_tokens, caption.finish_reason) for caption in written]
