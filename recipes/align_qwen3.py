"""Teach Qwen3 to read what a CLIP tower sees: the projector first, then the language model's last two layers, or
with --module.lora.rank 8 the adapters of all its layers.

    python -m recipes.align_qwen3
    python -m recipes.align_qwen3 --module.vision openai/clip-vit-base-patch32 --module.lm Qwen/Qwen3-0.6B-Base \\
        --data.source pictures.parquet

Without flags it draws its own pictures and trains a small tower and a small Qwen3 first; both are kept in a cache.
With `--push-to user/name` the trained captioner goes to the Hub, as a LLaVA that transformers loads.
"""

import json
import shutil
import time
from pathlib import Path

import attrs
import mlx.core as mx
from attrs.validators import ge

from callbacks import (
    FreezeSchedule,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    SampleCaptions,
    SyntheticRefresh,
    TQDMProgressBar,
)
from mlxmm import Callback, Trainer, TrainerConfig, distributed
from mlxmm.config import UserError, option, run_recipe, to_json
from mlxmm.data.datamodule import CaptionData, CaptionDataConfig
from mlxmm.data.sheet import contact_sheet
from mlxmm.data.tokenizers import START, load_tokenizer, token_length
from mlxmm.files import whole_file, write_json
from mlxmm.hub import check_upload, local_folder, upload
from mlxmm.metrics import bleu, exact_match
from mlxmm.module import is_quantized
from mlxmm.modules import llava
from mlxmm.modules.captioner import Captioner
from mlxmm.modules.qwen3_aligner import Qwen3Aligner, Qwen3AlignerConfig
from mlxmm.networks.adapters import LoRAConfig
from mlxmm.optimizers import OptimizerConfig
from mlxmm.run import Run, RunConfig, cached, check_free, open_run, read_saved_config
from recipes import train_clip, train_language_model

SHEET_ROWS = 24
LONGEST = 128  # tokens of a caption where --module.max-caption-tokens does not say: one may be a whole page


@attrs.frozen(kw_only=True)
class Config(RunConfig):
    """Tower, projector and language model; data; when to open what."""

    data: CaptionDataConfig = CaptionDataConfig()
    module: Qwen3AlignerConfig = Qwen3AlignerConfig()
    trainer: TrainerConfig = TrainerConfig(max_steps=1_170, val_check_interval=390)
    open_step: int = option(
        120, "update from which the language model's adapters, if any, or its last layers are trained too", ge(0)
    )
    open_layers: int = option(2, "how many of its last layers", ge(1))
    checkpoint_every: int = option(200, "updates between checkpoints", ge(1))
    max_test: int = option(1_000, "most pictures of each test part to caption", ge(1))
    push_to: str | None = option(None, "repository of the Hub, user/name, for the captioner; made where there is none")
    public: bool = option(False, "whether the repository that --push-to makes is public")
    tower: train_clip.TowerConfig = train_clip.TowerConfig()
    language_model: train_language_model.LanguageModelConfig = train_language_model.LanguageModelConfig()


FLICKR30K = Config(
    data=CaptionDataConfig(
        source="nlphuji/flickr30k", revision="refs/convert/parquet", split_column="split", batch_size=48
    ),
    module=Qwen3AlignerConfig(
        vision="openai/clip-vit-base-patch32",
        lm="Qwen/Qwen3-0.6B-Base",
        layer=-2,
        projector_width=1_024,
        max_caption_tokens=32,
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=200, weight_decay=0.0),
    ),
    trainer=TrainerConfig(max_steps=6_000, val_check_interval=600),
    open_step=1_200,
    checkpoint_every=600,
)
FLICKR30K_LORA = attrs.evolve(FLICKR30K, module=attrs.evolve(FLICKR30K.module, lora=LoRAConfig(rank=8)))
PRESETS = {"default": Config(), "flickr30k": FLICKR30K, "flickr30k-lora": FLICKR30K_LORA}


def main(config: Config) -> None:
    start = time.perf_counter()
    if config.push_to and distributed.rank() == 0:
        check_upload(config.push_to)  # hours before it is needed
    check_free(config)
    distributed.check_strategy(config.trainer.strategy)
    if config.data.streaming and config.module.lm is None:
        raise UserError("a language model is not trained on a stream: name one with --module.lm")
    data = CaptionData(config.data, config.seed)
    data.setup()
    run = open_run(config, "align_qwen3")
    aligner, figures = build(config, data, run)
    if config.push_to:
        llava.check(aligner)
    figures |= align(config, aligner, data, run)
    if run.is_global_zero:
        figures |= evaluate(config, aligner, data, run)
    report(figures | {"seconds": time.perf_counter() - start}, data, run)
    if config.push_to and run.is_global_zero:
        push(config, aligner, figures, run)


def build(config: Config, data: CaptionData, run: Run) -> tuple[Qwen3Aligner, dict]:
    """The aligner of the parts that `config.module` names; those it does not name are trained on `data`."""
    vision, figures = find_tower(config, data, run)
    module = attrs.evolve(config.module, vision=vision)
    if module.lm is None:
        key = [*_data_key(config), to_json(config.language_model)]
        folder = cached("language-model", key, lambda to: _train_lm(config, data, run, to))
        module = attrs.evolve(module, lm=str(folder), prompt=module.prompt or START)
    if module.max_caption_tokens == 0:
        captions = [caption for _, caption in data.sample_texts()]
        length = token_length(load_tokenizer(local_folder(module.lm)), captions) + 1  # the end
        module = attrs.evolve(module, max_caption_tokens=min(length, LONGEST))
    mx.random.seed(config.seed)
    aligner = Qwen3Aligner.from_parts(module)
    say_cut(aligner, data, run, "--module.max-caption-tokens")
    return aligner, figures


def say_cut(captioner: Captioner, data: CaptionData, run: Run, flag: str) -> None:
    """Print how many of the first captions are longer than those that `captioner` learns; `flag` says how long."""
    texts, length = [caption for _, caption in data.sample_texts()], captioner.max_new_tokens
    tokens = captioner.tokenizer(texts, add_special_tokens=False)["input_ids"]
    if num_cut := sum(len(ids) >= length for ids in tokens):
        run.print(f"cut: {num_cut} of {len(texts)} captions do not end within {length} tokens, see {flag}")


def find_tower(config, data: CaptionData, run: Run) -> tuple[str, dict]:
    """The tower that `config.module` names, or one trained on `data`, now or in an earlier run, with its figures."""
    if config.module.vision is not None:
        return config.module.vision, {}
    key = [*_data_key(config), to_json(config.tower)]
    folder = cached("tower", key, lambda to: _train_tower(config, data, run, to))
    return str(folder), _read_figures(folder, "zero_shot/accuracy")


def align(config: Config, aligner: Qwen3Aligner, data: CaptionData, run: Run) -> dict:
    """Train the projector, then adapters or the last layers too; returns the figures of the run's end."""
    schedule = FreezeSchedule({0: "projector", config.open_step: ("projector", opened(config, aligner))}, unit="step")
    return fit(config, aligner, data, run, "align", schedule)


def fit(config, captioner: Captioner, data: CaptionData, run: Run, name: str, *callbacks: Callback) -> dict:
    """Train a captioner with the callbacks that all have; returns the figures of the run's end."""
    data.encode, data.complete_batch = captioner.encode, captioner.complete_batch
    refresh = [SyntheticRefresh(data.fresh_rows)] if data.is_synthetic else []
    samples = [SampleCaptions(data.rows["val"])] if config.trainer.strategy != "fsdp" else []
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


def opened(config: Config, aligner: Qwen3Aligner) -> str:
    """What of the language model is trained, as `FreezeSchedule` names it."""
    if config.module.lora.rank:
        return "lora"
    if any(map(is_quantized, aligner.language_model.modules())):
        raise UserError(
            "layers of a quantized language model cannot be opened: set --module.lora.rank, to 8 for example"
        )
    return f"language_model.model.layers[-{config.open_layers}:]"


def evaluate(config, captioner: Captioner, data: CaptionData, run: Run) -> dict:
    """Caption every test part; the control gives each picture's caption to another picture."""
    figures = {}
    for part in data.test_parts:
        rows = [data.rows[part][i] for i in range(min(config.max_test, len(data.rows[part])))]
        captions = captioner.caption([row["image"] for row in rows])
        references = [row["captions"] for row in rows]
        name = part.removeprefix("test")
        figures[f"test/exact_match{name}"] = exact_match(captions, references)
        if part == "test":
            shuffled = captions[len(captions) // 2 :] + captions[: len(captions) // 2]
            figures["test/exact_match_shuffled"] = exact_match(shuffled, references)
            figures["test/bleu"] = bleu(captions, references)
            figures["test/bleu_shuffled"] = bleu(shuffled, references)
            with whole_file(run.folder / "samples.png") as path:
                contact_sheet(rows[:SHEET_ROWS], captions[:SHEET_ROWS]).save(path)
    return figures


def report(figures: dict, data: CaptionData, run: Run) -> None:
    """Write summary.json, and print the figures and where to look."""
    run.write_summary(figures | {"data/skipped": len(data.skipped), "data/skipped_rows": data.skipped})
    run.print("\n".join(f"{name:<36}{value:>10.4f}" for name, value in figures.items()))
    run.print(f"samples: {run.folder / 'samples.png'}\ncurves: tensorboard --logdir {run.folder}")


def push(config: Config, aligner: Qwen3Aligner, figures: dict, run: Run) -> None:
    """Write the captioner with its `figures` into the run's folder, and upload that."""
    folder = run.folder / "export"
    if folder.exists():  # of this run, before it was resumed
        shutil.rmtree(folder)
    aligner.save_pretrained(folder, figures)
    run.print(f"uploaded: {upload(folder, config.push_to, public=config.public)}")


def _data_key(config) -> list:
    return [to_json(config.data), config.seed]


def _train_tower(config, data: CaptionData, run: Run, folder: Path) -> None:
    clip, figures = train_clip.train(config.tower, data, run.part("tower"), config.seed)
    clip.save_pretrained(folder)
    write_json(folder / "figures.json", figures)


def _train_lm(config: Config, data: CaptionData, run: Run, folder: Path) -> None:
    model, figures = train_language_model.train(config.language_model, data, run.part("language_model"), config.seed)
    model.save_pretrained(folder)
    write_json(folder / "figures.json", figures)


def _read_figures(folder: Path, *names: str) -> dict:
    figures = json.loads((folder / "figures.json").read_text())
    return {name: figures[name] for name in names if name in figures}


if __name__ == "__main__":
    run_recipe(main, PRESETS, read_saved_config(Config, "align_qwen3"))
