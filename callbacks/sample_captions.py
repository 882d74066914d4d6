"""SampleCaptions: captions of a few images, in TensorBoard."""

from collections.abc import Sequence

import numpy as np

from mlxmm.training.callback import Callback


class SampleCaptions(Callback):
    """After each validation, logs the images of a few rows, and their expected and generated captions as text.

    Every rank captions them, since the layers of strategy fsdp are gathered by all; rank 0 writes. The random key of
    an update is a function of the step, so what is sampled here cannot change training.
    """

    def __init__(self, rows: Sequence, num_samples: int = 8):
        self.rows, self.num_samples = rows, num_samples

    def on_validation_end(self, trainer, module, metrics):
        rows = [self.rows[i] for i in range(min(self.num_samples, len(self.rows)))]
        captions = module.caption([row["image"] for row in rows])
        lines = [f"| {i} | {row['captions'][0]} | {text} |" for i, (row, text) in enumerate(zip(rows, captions))]
        table = "\n".join(["| | expected | generated |", "| --- | --- | --- |", *lines])
        pixels = np.stack([module.processor.pixels(row["image"]) for row in rows])
        for logger in trainer.loggers:
            logger.log_images("samples", pixels, trainer.global_step)
            logger.log_text("samples", table, trainer.global_step)
