"""The child process of `MlxVlmWriter`: it holds the model, and writes captions of the images that it is sent.

This is the only file that imports mlx-vlm. Call `main` in a process of its own, with the model's folder as argument.
"""

from PIL import Image

from mlxmm.captioners.child_server import serve


def main() -> None:
    """Answer the parent until it closes standard input."""
    serve(load, write_captions)


def load(folder: str):
    """The model and its processor, without Python of theirs (`MlxVlmWriter` refuses a "model_file")."""
    from mlx_vlm import load

    model, processor = load(folder, trust_remote_code=False)
    processor.detokenizer = CountingDetokenizer(processor.detokenizer)
    return model, processor


def write_captions(loaded: tuple, images: list[Image.Image], prompts: list[str], sampling: dict):
    """(text, number of tokens) of each image, by the prompt of the same place. `loaded` is what `load` gave."""
    import mlx.core as mx

    model, processor = loaded
    mx.random.seed(sampling["seed"])
    captions: list = [None] * len(images)
    for size in dict.fromkeys(image.size for image in images):  # a batch has one size, so that nothing is padded
        places = [place for place, image in enumerate(images) if image.size == size]
        written = _write_group(model, processor, [images[p] for p in places], [prompts[p] for p in places], sampling)
        for place, caption in zip(places, written):
            captions[place] = caption
    return captions


def _write_group(model, processor, images, prompts, sampling: dict) -> list[tuple[str, int]]:
    from mlx_vlm import batch_generate
    from mlx_vlm.sample_utils import make_sampler

    processor.detokenizer.counts.clear()
    written = batch_generate(
        model,
        processor,
        images=images,
        prompts=prompts,  # as they are: batch_generate applies the chat template
        max_tokens=sampling["max_tokens"],
        sampler=make_sampler(temp=sampling["temperature"], top_p=sampling["top_p"]),
        group_by_shape=True,
    )
    return list(zip(written.texts, processor.detokenizer.counts, strict=True))


class CountingDetokenizer:
    """A detokenizer that counts the tokens of each text, which `batch_generate` does not return."""

    def __init__(self, detokenizer):
        self._detokenizer, self._count = detokenizer, 0
        self.counts: list[int] = []  # of every text that was finished

    def reset(self) -> None:
        self._count = 0
        self._detokenizer.reset()

    def add_token(self, token, **options) -> None:
        self._count += 1
        self._detokenizer.add_token(token, **options)

    def finalize(self) -> None:
        self.counts.append(self._count)
        self._detokenizer.finalize()

    def __getattr__(self, name: str):
        return getattr(self._detokenizer, name)
