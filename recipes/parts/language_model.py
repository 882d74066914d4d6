"""A small Qwen3 trained from scratch on text: by `train_language_model`, and as the language model of the demo."""

import attrs
import mlx.core as mx
from attrs.validators import ge

from mlxmm import Trainer, TrainerConfig
from mlxmm.config import checked, option, section, to_json
from mlxmm.data.caption_source import CaptionSource
from mlxmm.data.text_data import TextData
from mlxmm.modules.text_model import TextModel, TextModelConfig
from mlxmm.preprocessing.tokenizers import token_length, train_tokenizer
from mlxmm.storage.atomic import write_json
from mlxmm.storage.cache import cached, made_in
from mlxmm.storage.lineage import Lineage
from mlxmm.storage.pretrained import read_json
from mlxmm.storage.runs import Run

from .limits import tried_too
from .monitoring import checkpoints, monitors, newest
from .plan import OWN_LENGTH, Plan, chosen


@attrs.frozen(kw_only=True, slots=False, field_transformer=checked)  # recipes derive their Config from two of these
class LanguageModelConfig:
    """A small Qwen3 and how long it is trained."""

    module: TextModelConfig = section(TextModelConfig(), without=("max_tokens",))
    vocab_size: int = option(2_000, "most tokens of the tokenizer that is trained on the text", ge(1), rare=True)
    batch_size: int = option(64, "texts in a batch", ge(1), first=True)
    trainer: TrainerConfig = section(TrainerConfig(max_steps=250), without=("seed", "default_root_dir"))


def language_model_or_train(config, source: CaptionSource, run: Run, plan: Plan) -> str:
    """The language model that `config.module` names, or one trained on the text of `source`, now or earlier."""
    if config.module.lm is not None:
        return config.module.lm

    language_model = attrs.evolve(
        config.language_model, trainer=tried_too(config.language_model.trainer, config.trainer)
    )

    part = plan.next()

    def make(folder):
        subrun = run.subrun("language_model")
        part.train(language_model.trainer, subrun.ckpt_path, OWN_LENGTH)
        model, metrics = train(language_model, source, subrun, config.seed)
        model.save_pretrained(folder)
        write_json(folder / "metrics.json", metrics)

    key = [to_json(config.data), source.fingerprints, config.seed, to_json(language_model)]
    if run.keeps_files:
        folder = cached("language-model", key, make)
    else:
        folder = made_in(run.folder / "language-model", make)
    part.end("trained", chosen(read_json(folder / "metrics.json"), "train/loss", "val/loss"), folder)
    return str(folder)


def train(config: LanguageModelConfig, source: CaptionSource, run: Run, seed: int) -> tuple[TextModel, dict]:
    """Train a language model on the text of `source`; returns it with the metrics of the run's end."""
    sample = [f"{notes} {caption}" for notes, caption in source.sample_texts()]
    tokenizer = train_tokenizer(sample, config.vocab_size)
    longest = token_length(tokenizer, sample) + 2  # start and end
    mx.random.seed(seed)
    model = TextModel(attrs.evolve(config.module, max_tokens=longest), tokenizer)
    model.lineage = Lineage(source.lineage)
    data = TextData(source, transform=model.transform, collate=model.collate, batch_size=config.batch_size)
    trainer = Trainer(
        attrs.evolve(config.trainer, seed=seed, default_root_dir=run.folder),
        callbacks=[
            *monitors("language model"),
            *checkpoints(config.trainer, every_n_train_steps=200),
        ],
    )
    trainer.fit(model, data, ckpt_path=run.ckpt_path)
    return model, newest(trainer)
