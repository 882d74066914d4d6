"""What the recipes that train a captioner share: training, and captioning the test splits."""

import attrs

from mlxmm import Callback, Trainer
from mlxmm.callbacks import CachedFeatures, CachedPixels, SampleCaptions
from mlxmm.data.caption_data import CaptionData
from mlxmm.data.caption_source import CaptionSource
from mlxmm.data.overview import training_warnings
from mlxmm.evaluation.caption_metrics import bleu, exact_match
from mlxmm.evaluation.captions import Images, shuffled
from mlxmm.evaluation.contact_sheet import contact_sheet, failures_first
from mlxmm.modules.captioning_module import CaptioningModule
from mlxmm.preprocessing.tokenizers import token_length
from mlxmm.progress_bar import stage
from mlxmm.storage.atomic import atomic_file
from mlxmm.storage.disk import going_on
from mlxmm.storage.runs import Run

from .monitoring import checkpoints, log_results, monitors, newest
from .plan import Plan, chosen
from .refresh import refreshing

CAPTIONER_PARTS = ["captioner", "test"]  # after those that it is built of
SHEET_ROWS = 12  # of each test split
EXAMPLE, MAX_EXAMPLE = "example.png", 1_024  # pixels of its longer side at most
MAX_NEW_TOKENS = 128  # where --module.max-new-tokens is 0: one caption of the data may fill a page


def longest_caption(tokenizer, source: CaptionSource) -> int:
    """Tokens of the longest of the first captions, with its end, but at most MAX_NEW_TOKENS."""
    return min(token_length(tokenizer, source.sample_captions()) + 1, MAX_NEW_TOKENS)


def report_truncation(captioner: CaptioningModule, source: CaptionSource, run: Run) -> None:
    """Print how many of the first captions are longer than those that `captioner` is trained on."""
    with stage("tokenizing captions"):
        texts, length = source.sample_captions(), captioner.max_new_tokens
        tokens = captioner.tokenizer(texts, add_special_tokens=False)["input_ids"]
    if num_cut := sum(len(ids) >= length for ids in tokens):
        flag = "--module.max-new-tokens"
        run.print(f"cut: {num_cut} of {len(texts)} captions do not end within {length} tokens, see {flag}")


def fit(
    config,
    captioner: CaptioningModule,
    source: CaptionSource,
    run: Run,
    plan: Plan,
    name: str,
    *callbacks: Callback,
) -> None:
    """Train a captioner with the callbacks that all have, and report the metrics of the run's end."""
    data = CaptionData(source, transform=captioner.transform, collate=captioner.collate)
    for line in training_warnings(source, contrastive=False):
        run.print(f"warning: {line}")
    part = plan.next()
    part.train(config.trainer, run.ckpt_path)
    features = [CachedFeatures()] if config.cached_features else []
    with refreshing(config.refresh, source, run, captioner) as refresh:
        trainer = Trainer(
            attrs.evolve(config.trainer, seed=config.seed, default_root_dir=run.folder),
            callbacks=[
                *refresh,
                *callbacks,
                *features,
                CachedPixels(max_gib=source.config.pixel_cache_gib),
                *monitors(name),
                SampleCaptions(source.rows["val"]),
                *checkpoints(config.trainer, every_n_train_steps=config.checkpoint_every, monitor="val/loss"),
            ],
        )
        trainer.fit(captioner, data, ckpt_path=run.ckpt_path)
    metrics = newest(trainer)
    part.end("trained", chosen(metrics, "val/loss"))
    run.report(metrics)
    with going_on("summary.json"):
        run.save()  # captioning takes long, and may fail


def evaluate(config, captioner: CaptioningModule, source: CaptionSource, run: Run, plan: Plan) -> None:
    """Caption every test split, report how right the captions are, and draw `samples.png`, failures first.

    The control ("_shuffled") holds each caption against another picture's references.
    """
    sheet, most = [], config.max_test
    if config.trainer.fast_dev_run:
        most = min(most, config.trainer.fast_dev_run * config.data.batch_size)
    part = plan.next()
    part.begin(f"captioning pictures of {', '.join(source.test_splits)}")
    for split in source.test_splits:
        rows = source.rows[split]
        images = Images(rows, most=most)
        captions = captioner.caption(images)
        references = [rows.without_image(i)["captions"] for i in range(len(images))]
        run.report({f"test/exact_match{split.removeprefix('test')}": exact_match(captions, references)})
        sheet.append(failures_first(split, rows, captions, most=SHEET_ROWS))
        if split == "test":
            others = shuffled(captions)
            run.report({"test/exact_match_shuffled": exact_match(others, references)})
            run.report({"test/bleu": bleu(captions, references), "test/bleu_shuffled": bleu(others, references)})
    part.end("captioned", chosen(run.metrics, "test/exact_match", "test/bleu"))
    samples = contact_sheet(sheet)
    with stage("drawing samples.png"), going_on("samples.png"), atomic_file(run.folder / "samples.png") as path:
        samples.save(path)
    with going_on(EXAMPLE):
        save_example(source, run)
    log_results(captioner.trainer, {k: v for k, v in run.metrics.items() if k.startswith("test/")}, samples)
    run.report({"data/skipped": len(source.skipped), "data/skipped_rows": list(source.skipped)})


def save_example(source: CaptionSource, run: Run) -> None:
    """Write the first test picture into the run's folder: something to caption, where pictures are in no files."""
    picture = source.rows["test"][0]["image"].copy()
    picture.thumbnail((MAX_EXAMPLE, MAX_EXAMPLE))
    with atomic_file(run.folder / EXAMPLE) as path:
        picture.save(path, format="PNG")
