"""Train a small Qwen3 as a language model on the text of a data set: captions, and for `shapes` its whole grammar.

python -m recipes.train_language_model
"""

import attrs

from mlxmm.cli import read_saved_config, run_recipe
from mlxmm.data.caption_source import CaptionDataConfig, open_source
from mlxmm.storage.runs import RunConfig, open_run

from .parts.language_model import LanguageModelConfig, train


@attrs.frozen(kw_only=True)
class Config(RunConfig):
    """A small Qwen3 from scratch."""

    data: CaptionDataConfig = CaptionDataConfig()
    lm: LanguageModelConfig = LanguageModelConfig()


def main(config: Config) -> None:
    source = open_source(config.data, config.seed)
    run = open_run(config, "train_language_model")
    model, figures = train(config.lm, source, run, config.seed)
    if run.is_global_zero:
        model.save_pretrained(run.folder / "model")
    run.write_summary(figures)
    run.print("\n".join(f"{name:<24}{value:.4f}" for name, value in figures.items()))
    run.print(f"model: {run.folder / 'model'}\ncurves: tensorboard --logdir {run.folder}")


if __name__ == "__main__":
    run_recipe(main, {"default": Config()}, read_saved_config(Config, "train_language_model"))
