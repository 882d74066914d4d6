"""SampleCaptions: captions of a few images, in TensorBoard."""

from collections.abc import Sequence

import numpy as np

from mlxmm.evaluation.contact_sheet import Section, contact_sheet
from mlxmm.training.callback import Callback


class SampleCaptions(Callback):
    """After each validation, logs a few rows as one image, each with what was expected and what was generated, and as
    a table.

    Every rank captions them, since the layers of strategy fsdp are gathered by all; rank 0 writes. The random key of
    an update is a function of the step, so what is sampled here cannot change training.
    """

    def __init__(self, rows: Sequence, num_samples: int = 8):
        self.rows, self.num_samples = rows, num_samples

    def on_validation_end(self, trainer, module, metrics):
        rows = [self.rows[i] for i in range(min(self.num_samples, len(self.rows)))]
        captions = module.caption([row["image"] for row in rows])
        table = [(i, row["captions"][0], text) for i, (row, text) in enumerate(zip(rows, captions))]
        sheet = np.asarray(contact_sheet([Section("validation", rows, captions)]))
        for logger in trainer.loggers:
            logger.log_images("val/samples", sheet[None], trainer.global_step)
            logger.log_table("val/samples", ("", "expected", "generated"), table, trainer.global_step)
