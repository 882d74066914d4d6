"""Teach Qwen3 to read what a CLIP tower sees: the projector first, then the language model's last layers or adapters.

    python -m recipes.align_qwen3
    python -m recipes.align_qwen3 --module.vision openai/clip-vit-base-patch32 --module.lm Qwen/Qwen3-0.6B-Base \\
        --data.source pictures.parquet

Without flags it draws its own pictures and trains a small tower and a small Qwen3 first; both are kept in a cache.
With `--push-to user/name` the trained captioner goes to the Hub, as a LLaVA that transformers loads.
"""

import shutil

import attrs
import mlx.core as mx
from attrs.validators import ge

from mlxmm import TrainerConfig
from mlxmm.callbacks import FreezeSchedule
from mlxmm.cli import run_recipe
from mlxmm.config import Preset, checked, internal, option
from mlxmm.data.caption_source import CaptionDataConfig, CaptionSource, open_source
from mlxmm.data.sources.shapes import ShapesConfig
from mlxmm.distributed import collectives
from mlxmm.errors import UserError
from mlxmm.export import llava
from mlxmm.modules.qwen3_aligner import Qwen3Aligner
from mlxmm.preprocessing.tokenizers import START, load_tokenizer
from mlxmm.progress_bar import stage, staged
from mlxmm.storage.hub import check_upload, local_folder, upload
from mlxmm.storage.lineage import Lineage
from mlxmm.storage.runs import Run, TrainingRunConfig, open_run

from .parts.alignment import FLICKR30K_PRESETS, AlignmentConfig, check_unfrozen, plan_alignment, unfrozen_part
from .parts.captioning import CAPTIONER_PARTS, evaluate, fit, longest_caption, report_truncation
from .parts.language_model import LanguageModelConfig, language_model_or_train
from .parts.named_parts import check_parts
from .parts.next_steps import suggest_captioner, suggest_push
from .parts.plan import Plan
from .parts.refresh_config import RefreshConfig, check_refresh, check_refresh_parts, refresh_section
from .parts.tower import TowerConfig, tower_or_train


@attrs.frozen(kw_only=True, field_transformer=checked)
class Config(TrainingRunConfig, AlignmentConfig):
    """What is aligned, how it is evaluated, and where it goes."""

    refresh: RefreshConfig = refresh_section()
    max_test: int = option(1_000, "most pictures of each test split to caption", ge(1))
    push_to: str | None = option(None, "Hub repository, user/name, to upload the captioner to; created if missing")
    public: bool = option(False, "make the repository that --push-to creates public")
    tower: TowerConfig = internal(TowerConfig())
    language_model: LanguageModelConfig = internal(LanguageModelConfig())


TINY = Config(
    data=CaptionDataConfig(batch_size=16, shapes=ShapesConfig(num_train=64, num_val=16, num_test=8)),
    trainer=TrainerConfig(max_steps=8, val_check_interval=4, log_every_n_steps=2),
    unfreeze_step=4,
    checkpoint_every=3,
    tower=TowerConfig(trainer=TrainerConfig(max_steps=4)),
    language_model=LanguageModelConfig(trainer=TrainerConfig(max_steps=4)),
)
PRESETS = {
    "default": Preset("the demo: drawn pictures, a small tower and a small Qwen3, a few minutes", Config()),
    "tiny": Preset("all of the demo's steps in seconds; the captions are useless", TINY),
}
PRESETS |= {
    name: Preset(preset.about, Config(**attrs.asdict(preset.config, recurse=False)))
    for name, preset in FLICKR30K_PRESETS.items()
}


def main(config: Config) -> None:
    if config.push_to and collectives.rank() == 0:
        check_upload(config.push_to)  # hours before it is needed
    if config.data.streaming and config.module.lm is None:
        raise UserError("a language model is not trained on a stream: name one with --module.lm")
    if config.module.lm is None and not config.module.lora.rank:
        check_unfrozen(config, config.language_model.module.network.num_hidden_layers)  # minutes before there is one
    check_refresh(config.refresh, config.data, config.trainer, captions=True, cached=config.cached_features)
    with open_run(config, "align_qwen3") as run:
        check_parts(tower=config.module.vision, language_model=config.module.lm, clip=config.tower.pretrained)
        check_refresh_parts(config.refresh)
        plan = Plan(run, parts(config))
        source = open_source(config.data, config.seed)
        run.save_lineage(source.lineage)
        aligner = build(config, source, run, plan)
        if config.push_to:
            llava.check(aligner)
        stages = {0: "projector", config.unfreeze_step: ("projector", unfrozen_part(config, aligner))}
        report_memory(config, aligner, source, run)
        fit(config, aligner, source, run, plan, "captioner", FreezeSchedule(stages, unit="step"))
        if run.is_global_zero:
            evaluate(config, aligner, source, run, plan)
            suggest_captioner(run, config.data, config.seed)
            if not config.push_to and _can_be_exported(aligner):
                suggest_push(run, "align_qwen3", run.folder)
    if config.push_to and run.keeps_files and run.is_global_zero:  # once the run's summary is written
        push(config, aligner, run)


def parts(config: Config) -> list[str]:
    """What the run does, in this order."""
    trained = {"tower": config.module.vision, "language model": config.module.lm}
    return [name for name, given in trained.items() if given is None] + CAPTIONER_PARTS


def build(config: Config, source: CaptionSource, run: Run, plan: Plan) -> Qwen3Aligner:
    """The aligner of the parts that `config.module` names; those it does not name are trained on `source`."""
    vision, metrics = tower_or_train(config, source, run, plan)
    run.report(metrics)
    prompt = config.module.prompt or (START if config.module.lm is None else "")
    lm = language_model_or_train(config, source, run, plan)
    module = attrs.evolve(config.module, vision=vision, lm=lm, prompt=prompt)
    if module.max_new_tokens == 0:
        module = attrs.evolve(module, max_new_tokens=longest_caption(load_tokenizer(local_folder(lm)), source))
    mx.random.seed(config.seed)
    aligner = staged("loading the models")(Qwen3Aligner.from_parts)(module)
    aligner.lineage = Lineage(source.lineage)
    report_truncation(aligner, source, run)
    return aligner


def _can_be_exported(aligner: Qwen3Aligner) -> bool:
    try:
        llava.check(aligner)
    except UserError:
        return False
    return True


def report_memory(config: Config, aligner: Qwen3Aligner, source: CaptionSource, run: Run) -> None:
    """Print what the run needs of memory and disk, and where this machine has less."""
    num_rows = sum(len(source.rows[split]) for split in ("train", "val")) if config.cached_features else 0
    plan = plan_alignment(config, aligner, num_rows)
    run.print(str(plan))
    for shortage in plan.shortages(run.folder):
        run.print(f"warning: {shortage}; see docs/on-a-mac.md for smaller presets")


def push(config: Config, aligner: Qwen3Aligner, run: Run) -> None:
    """Export the captioner into the run's folder, with the metrics in its card, and upload that."""
    folder = run.folder / "export"
    if folder.exists():  # of this run, before it was resumed
        shutil.rmtree(folder)
    with stage("exporting"):
        aligner.save_pretrained(folder, run.metrics)
    with stage("uploading"):
        url = upload(folder, config.push_to, public=config.public)
    run.print(f"uploaded: {url}")


if __name__ == "__main__":
    run_recipe("align_qwen3", main, PRESETS)
