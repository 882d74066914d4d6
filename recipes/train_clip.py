"""Train CLIP from scratch on pictures with captions; tiny by default.

python -m recipes.train_clip
python -m recipes.train_clip --data.source pictures.parquet --max-steps 2000
python -m recipes.train_clip --preset vit-b-32 --data.source pictures.parquet --batch-size 256
"""

import attrs

from mlxmm import TrainerConfig
from mlxmm.cli import run_recipe
from mlxmm.config import Preset, section
from mlxmm.data.caption_source import CaptionDataConfig, open_source
from mlxmm.data.sources.shapes import ShapesConfig
from mlxmm.modules.contrastive_clip import CLIPConfig
from mlxmm.networks.towers import TextConfig, VisionConfig
from mlxmm.optimizers import OptimizerConfig
from mlxmm.storage.runs import TrainingRunConfig, open_run

from .parts.named_parts import check_parts
from .parts.next_steps import suggest_clip
from .parts.refresh_config import RefreshConfig, check_refresh, check_refresh_parts, refresh_section
from .parts.tower import TowerConfig, train


@attrs.frozen(kw_only=True)
class Config(TrainingRunConfig, TowerConfig):
    """CLIP from scratch."""

    data: CaptionDataConfig = section(CaptionDataConfig())
    trainer: TrainerConfig = section(TrainerConfig(max_steps=1_000), without=("seed", "default_root_dir"))
    refresh: RefreshConfig = refresh_section()


def paper_preset(
    learning_rate: float, patch_size: int, vision: tuple, text: tuple, *, image_size: int = 224, epochs: int = 32
) -> Config:
    """A row of the CLIP paper's table 20, with what is common to all rows (table 18 and section 2.5), but with batches
    of 1,024 where the paper has 32,768: these are computed in chunks, so that one machine holds them.

    `vision` and `text` are layers, width, heads; the text tower's width is the shared space's too.
    """
    module = CLIPConfig(
        vision=VisionConfig(image_size=image_size, patch_size=patch_size, **_sizes(*vision)),
        text=TextConfig(vocab_size=49_408, max_position_embeddings=77, **_sizes(*text)),
        projection_dim=text[1],
        initialization="openai",
        chunk_size=64,
        optimizer=OptimizerConfig(
            learning_rate=learning_rate, warmup_steps=2_000, weight_decay=0.2, beta1=0.9, beta2=0.98, eps=1e-6
        ),
    )
    trainer = TrainerConfig(
        max_epochs=epochs, gradient_clip_val=None, precision="bf16-mixed", gradient_checkpointing=True
    )
    data = CaptionDataConfig(batch_size=1_024)
    return Config(data=data, module=module, vocab_size=49_408, max_tokens=77, trainer=trainer)


def _sizes(layers: int, width: int, heads: int) -> dict:
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    return sizes | {"intermediate_size": 4 * width}


BASE, LARGE = (12, 768, 12), (24, 1_024, 16)
TINY = Config(
    data=CaptionDataConfig(batch_size=16, shapes=ShapesConfig(num_train=64, num_val=16, num_test=8)),
    trainer=TrainerConfig(max_steps=8, log_every_n_steps=2),
)
PRESETS = {
    "default": Preset("drawn pictures, small towers, about a minute", Config()),
    "tiny": Preset("all steps in seconds, to try things out; the CLIP is useless", TINY),
    "vit-b-32": Preset(
        "CLIP paper, table 20; batches of 1,024 in chunks", paper_preset(5e-4, 32, vision=BASE, text=(12, 512, 8))
    ),
    "vit-b-16": Preset(
        "CLIP paper, table 20; batches of 1,024 in chunks", paper_preset(5e-4, 16, vision=BASE, text=(12, 512, 8))
    ),
    "vit-l-14": Preset(
        "CLIP paper, table 20; batches of 1,024 in chunks", paper_preset(4e-4, 14, vision=LARGE, text=(12, 768, 12))
    ),
    "vit-l-14-336px": Preset(
        "one epoch more at 336 pixels: --pretrained names a ViT-L/14",
        paper_preset(2e-5, 14, vision=LARGE, text=(12, 768, 12), image_size=336, epochs=1),
    ),
}


def main(config: Config) -> None:
    check_refresh(config.refresh, config.data, config.trainer, captions=False)
    with open_run(config, "train_clip") as run:
        check_parts(clip=config.pretrained)
        check_refresh_parts(config.refresh)
        source = open_source(config.data, config.seed)
        run.save_lineage(source.lineage)
        clip, metrics = train(config, source, run, config.seed, config.refresh)
        run.report(metrics)
        if run.is_global_zero:
            clip.save_pretrained(run.folder / "model")
            suggest_clip(run, config.data, config.seed)


if __name__ == "__main__":
    run_recipe("train_clip", main, PRESETS)
