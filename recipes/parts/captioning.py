"""What the recipes that train a captioner share: training, judging, reporting."""

import attrs
from mlxmm.callbacks import (
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    SampleCaptions,
    SyntheticRefresh,
    TQDMProgressBar,
)

from mlxmm import Callback, Trainer
from mlxmm.data.caption_data import CaptionData
from mlxmm.data.caption_source import CaptionSource
from mlxmm.evaluation.caption_metrics import bleu, exact_match
from mlxmm.evaluation.captions import shuffled
from mlxmm.evaluation.contact_sheet import contact_sheet
from mlxmm.modules.captioning_module import CaptioningModule
from mlxmm.preprocessing.tokenizers import token_length
from mlxmm.storage.atomic import atomic_file
from mlxmm.storage.runs import Run

SHEET_ROWS = 24
MAX_NEW_TOKENS = 128  # where --module.max-new-tokens is 0: one caption of the data may fill a page


def longest_caption(tokenizer, source: CaptionSource) -> int:
    """Tokens of the longest of the first captions, with its end, but at most MAX_NEW_TOKENS."""
    return min(token_length(tokenizer, source.sample_captions()) + 1, MAX_NEW_TOKENS)


def report_truncation(captioner: CaptioningModule, source: CaptionSource, run: Run) -> None:
    """Print how many of the first captions are longer than those that `captioner` learns."""
    texts, length = source.sample_captions(), captioner.max_new_tokens
    tokens = captioner.tokenizer(texts, add_special_tokens=False)["input_ids"]
    if num_cut := sum(len(ids) >= length for ids in tokens):
        run.print(
            f"cut: {num_cut} of {len(texts)} captions do not end within {length} tokens, see --module.max-new-tokens"
        )


def fit(config, captioner: CaptioningModule, source: CaptionSource, run: Run, name: str, *callbacks: Callback) -> dict:
    """Train a captioner with the callbacks that all have; returns the figures of the run's end."""
    data = CaptionData(source, transform=captioner.transform, collate=captioner.collate)
    refresh = [SyntheticRefresh(source.fresh_rows)] if source.is_synthetic else []
    samples = [SampleCaptions(source.rows["val"])] if config.trainer.strategy != "fsdp" else []
    trainer = Trainer(
        attrs.evolve(config.trainer, seed=config.seed, default_root_dir=run.folder),
        callbacks=[
            *refresh,
            *callbacks,
            ModelSummary(),
            LearningRateMonitor(),
            TQDMProgressBar(name),
            *samples,
            ModelCheckpoint(every_n_train_steps=config.checkpoint_every, monitor="val/loss"),
        ],
    )
    trainer.fit(captioner, data, ckpt_path=run.ckpt_path)
    return dict(trainer.callback_metrics)


def evaluate(config, captioner: CaptioningModule, source: CaptionSource, run: Run) -> dict:
    """Caption every test part; the control gives each picture's caption to another picture."""
    figures = {}
    for part in source.test_splits:
        rows = [source.rows[part][i] for i in range(min(config.max_test, len(source.rows[part])))]
        captions = captioner.caption([row["image"] for row in rows])
        references = [row["captions"] for row in rows]
        name = part.removeprefix("test")
        figures[f"test/exact_match{name}"] = exact_match(captions, references)
        if part == "test":
            others = shuffled(captions)
            figures["test/exact_match_shuffled"] = exact_match(others, references)
            figures["test/bleu"] = bleu(captions, references)
            figures["test/bleu_shuffled"] = bleu(others, references)
            with atomic_file(run.folder / "samples.png") as path:
                contact_sheet(rows[:SHEET_ROWS], captions[:SHEET_ROWS]).save(path)
    return figures


def report(figures: dict, source: CaptionSource, run: Run) -> None:
    """Write summary.json, and print the figures and where to look."""
    run.write_summary(figures | {"data/skipped": len(source.skipped), "data/skipped_rows": source.skipped})
    run.print("\n".join(f"{name:<36}{value:>10.4f}" for name, value in figures.items()))
    run.print(f"samples: {run.folder / 'samples.png'}\ncurves: tensorboard --logdir {run.folder}")
