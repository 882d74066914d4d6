"""Train a small Qwen3 as a language model on the text of a data set: captions, and for `shapes` its whole grammar.

python -m recipes.train_language_model
"""

import attrs

from mlxmm.cli import run_recipe
from mlxmm.config import Preset, section
from mlxmm.data.caption_source import CaptionDataConfig, open_source
from mlxmm.storage.runs import TrainingRunConfig, open_run

from .parts.language_model import LanguageModelConfig, train


@attrs.frozen(kw_only=True)
class Config(TrainingRunConfig, LanguageModelConfig):
    """A small Qwen3 from scratch."""

    data: CaptionDataConfig = section(CaptionDataConfig(), without=("batch_size", "random_crop"))


def main(config: Config) -> None:
    with open_run(config, "train_language_model") as run:
        source = open_source(config.data, config.seed)
        run.save_lineage(source.lineage)
        model, metrics = train(config, source, run, config.seed)
        run.report(metrics)
        if run.is_global_zero:
            model.save_pretrained(run.folder / "model")
            run.suggest("align it", "align_qwen3", "--module.lm", run.folder / "model")


if __name__ == "__main__":
    run_recipe("train_language_model", main, {"default": Preset("text of drawn pictures, half a minute", Config())})
