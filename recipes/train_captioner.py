"""Train a caption decoder from scratch over a frozen vision tower; tiny by default.

    python -m recipes.train_captioner
    python -m recipes.train_captioner --module.decoder.reading prefix
    python -m recipes.train_captioner --module.vision openai/clip-vit-base-patch32 --module.layer -2 \\
        --data.source pictures.parquet

Without flags it draws its own pictures and trains a small tower first, which is kept in a cache.
"""

import attrs
import mlx.core as mx
from attrs.validators import ge

from mlxmm import TrainerConfig
from mlxmm.cli import run_recipe
from mlxmm.config import Preset, checked, internal, option, section
from mlxmm.data.caption_source import CaptionDataConfig, CaptionSource, open_source
from mlxmm.data.sources.shapes import ShapesConfig
from mlxmm.modules.caption_decoder import CaptionDecoder, CaptionDecoderConfig
from mlxmm.preprocessing.tokenizers import load_tokenizer, train_tokenizer
from mlxmm.storage.hub import local_folder
from mlxmm.storage.lineage import Lineage
from mlxmm.storage.runs import Run, TrainingRunConfig, open_run

from .parts.captioning import CAPTIONER_PARTS, evaluate, fit, longest_caption, report_truncation
from .parts.named_parts import check_parts
from .parts.next_steps import suggest_captioner
from .parts.plan import Plan
from .parts.refresh_config import RefreshConfig, check_refresh, check_refresh_parts, refresh_section
from .parts.tower import TowerConfig, tower_or_train


@attrs.frozen(kw_only=True, field_transformer=checked)
class Config(TrainingRunConfig):
    """Tower and decoder; data; how long."""

    data: CaptionDataConfig = section(CaptionDataConfig())
    module: CaptionDecoderConfig = section(CaptionDecoderConfig())
    trainer: TrainerConfig = section(
        TrainerConfig(max_steps=1_400, val_check_interval=350), without=("seed", "default_root_dir")
    )
    refresh: RefreshConfig = refresh_section()
    tokenizer: str | None = option(None, "folder or Hub id of a tokenizer; none: one is trained on the captions")
    vocab_size: int = option(2_000, "most tokens of a tokenizer that is trained", ge(1))
    checkpoint_every: int = option(200, "updates between checkpoints", ge(1))
    max_test: int = option(1_000, "most pictures of each test split to caption", ge(1))
    cached_features: bool = option(False, "compute the frozen tower's features once, and keep them on disk")
    tower: TowerConfig = internal(TowerConfig())


TINY = Config(
    data=CaptionDataConfig(batch_size=16, shapes=ShapesConfig(num_train=64, num_val=16, num_test=8)),
    trainer=TrainerConfig(max_steps=8, val_check_interval=4, log_every_n_steps=2),
    checkpoint_every=3,
    tower=TowerConfig(trainer=TrainerConfig(max_steps=4)),
)
PRESETS = {
    "default": Preset("drawn pictures, a small tower and a small decoder, a few minutes", Config()),
    "tiny": Preset("all steps in seconds, to try things out; the captions are useless", TINY),
}


def main(config: Config) -> None:
    check_refresh(config.refresh, config.data, config.trainer, captions=True, cached=config.cached_features)
    with open_run(config, "train_captioner") as run:
        check_parts(tower=config.module.vision, tokenizer=config.tokenizer, clip=config.tower.pretrained)
        check_refresh_parts(config.refresh)
        plan = Plan(run, CAPTIONER_PARTS if config.module.vision else ["tower", *CAPTIONER_PARTS])
        source = open_source(config.data, config.seed)
        run.save_lineage(source.lineage)
        captioner = build(config, source, run, plan)
        fit(config, captioner, source, run, plan, "captioner")
        if run.is_global_zero:
            evaluate(config, captioner, source, run, plan)
            suggest_captioner(run, config.data, config.seed)


def build(config: Config, source: CaptionSource, run: Run, plan: Plan) -> CaptionDecoder:
    """The tower that `config.module` names, or one trained on `source`, under a decoder with fresh weights."""
    vision, metrics = tower_or_train(config, source, run, plan)
    run.report(metrics)
    if config.tokenizer is None:
        tokenizer = train_tokenizer(source.sample_captions(), config.vocab_size)
    else:
        tokenizer = load_tokenizer(local_folder(config.tokenizer))
    length = config.module.max_new_tokens or longest_caption(tokenizer, source)
    mx.random.seed(config.seed)
    captioner = CaptionDecoder.from_parts(attrs.evolve(config.module, vision=vision, max_new_tokens=length), tokenizer)
    captioner.lineage = Lineage(source.lineage)
    report_truncation(captioner, source, run)
    return captioner


if __name__ == "__main__":
    run_recipe("train_captioner", main, PRESETS)
