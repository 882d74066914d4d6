"""The flags `--refresh.…`: new captions while a recipe trains."""

from collections.abc import Iterator

import attrs
from attrs.validators import ge, gt, optional

from mlxmm import TrainerConfig
from mlxmm.captioners.caption_writer import Sampling
from mlxmm.captioners.filters import check_filters
from mlxmm.captioners.prompts import find_prompts
from mlxmm.config import checked, option, section
from mlxmm.data.caption_source import CaptionDataConfig
from mlxmm.distributed import collectives
from mlxmm.errors import UserError
from mlxmm.export.dataset import check_config_name
from mlxmm.storage.hub import check_upload

from .captioners import GRAMMAR, CaptionerConfig, check_captioner
from .named_parts import check_parts
from .publishing import DatasetConfig

ITSELF = "itself"  # the captioner that is being trained


@attrs.frozen(kw_only=True, field_transformer=checked)
class RefreshCaptionerConfig(CaptionerConfig):
    """Who writes new captions."""

    model: str | None = option(
        None,
        "who writes new captions of training pictures while training goes on: what write_captions takes, or `itself`, "
        "the captioner in training; none: nobody",
    )


@attrs.frozen(kw_only=True, field_transformer=checked)
class RefreshConfig(DatasetConfig):
    """New captions of training pictures, or of more pictures, while training goes on."""

    captioner: RefreshCaptionerConfig = section(RefreshCaptionerConfig())
    sampling: Sampling = section(Sampling(temperature=1.0))
    source: str | None = option(
        None, "pictures without captions to add: parquet, folder or Hub id; none: those of training get new captions"
    )
    image_column: str = option("image", "column of `source` that holds the picture")
    every_n_epochs: int | None = option(None, "epochs from refresh to refresh; none: 1", optional(ge(1)))
    every_n_train_steps: int | None = option(
        None, "updates from refresh to refresh, which the next epoch is trained on; in place of epochs", optional(ge(1))
    )
    weight: float = option(0.5, "pictures with new captions in an epoch, as a fraction of the training pictures", gt(0))
    prompts: tuple[str, ...] = option(
        (), "ids of what is asked of each picture; none: `describe`, and nothing of captioners of ours"
    )
    own_prompts: tuple[str, ...] = option((), "more prompts, each written id=text")
    config_name: str = option("refresh", "first part of the configuration that is pushed: refresh-1, refresh-2, …")
    push_to: str | None = option(None, "data set on the Hub, user/name, that each refresh is pushed to")

    @property
    def writes(self) -> bool:
        """Whether there is a refresh at all."""
        return self.captioner.model is not None

    @property
    def is_of_itself(self) -> bool:
        """Whether the module that is being trained writes."""
        return self.captioner.model == ITSELF


def refresh_section():
    """The field of a recipe's config: `--help` shows its main flags, `--help-all` all of them."""
    shown = ("captioner.model", "source", "every_n_epochs", "weight", "push_to")
    return section(RefreshConfig(), rare=True, shown=shown)


def check_refresh(
    config: RefreshConfig, data: CaptionDataConfig, trainer: TrainerConfig, *, captions: bool, cached: bool = False
) -> None:
    """Raise `UserError`, before anything else is done, for settings that do not go together.

    `captions` says whether the recipe trains a captioner, `cached` whether features of its tower are cached.
    """
    if not config.writes:
        if config != RefreshConfig():
            raise UserError("--refresh.captioner.model is missing: name who writes new captions")
        return
    for fault in (*_writer_faults(config, data, trainer, captions), *_rows_faults(config, data, trainer, cached)):
        raise UserError(f"--refresh.{fault}")
    find_prompts(config.prompts or ("none",), config.own_prompts)
    check_config_name(config.config_name)
    if config.push_to and collectives.rank() == 0:
        check_upload(config.push_to)


def _writer_faults(
    config: RefreshConfig, data: CaptionDataConfig, trainer: TrainerConfig, captions: bool
) -> Iterator[str]:
    captioner = config.captioner
    if config.is_of_itself and not captions:
        yield "captioner.model itself: a CLIP writes no captions, name a captioner"
    if config.is_of_itself and captioner.url:
        yield "captioner.url: servers do not write by the captioner in training, name theirs"
    if config.is_of_itself and trainer.strategy == "fsdp":
        yield "captioner.model itself does not write with strategy fsdp: use ddp"
    if captioner.model == GRAMMAR and not captioner.url and (data.source != (GRAMMAR,) or config.source):
        yield "captioner.model shapes knows the drawn pictures of training alone"
    if (config.include_images or config.public or config.licence) and not config.push_to:
        yield "push-to is missing: include-images, public and licence are of what is pushed"


def _rows_faults(config: RefreshConfig, data: CaptionDataConfig, trainer: TrainerConfig, cached: bool) -> Iterator[str]:
    if data.streaming:
        yield "captioner.model does not go with --data.streaming: rows of a stream have no numbers"
    if config.every_n_epochs and config.every_n_train_steps:
        yield "every-n-epochs or --refresh.every-n-train-steps: set one of them"
    if config.weight > 1 and not config.source:
        yield "weight above 1 needs more pictures: name them with --refresh.source"
    if config.source == GRAMMAR:
        yield "source shapes: drawn pictures have captions already"
    if config.source and trainer.max_steps < 0:
        yield "source makes epochs longer: say how long to train with --max-steps"
    if config.source and data.weights:
        yield "source adds pictures, and --data.weights counts those of --data.source alone: set one of them"
    if config.source and cached:
        yield "source adds other pictures in every epoch, whose features cannot be cached: add --no-cached-features"


def check_refresh_parts(config: RefreshConfig) -> None:
    """Raise `UserError`, before data are opened, if a captioner, a CLIP or a package is missing. A collective call."""
    if not config.writes:
        return
    if not config.is_of_itself:
        check_captioner(config.captioner)
    check_filters(config.filters)
    check_parts(clip=config.filters.clip)
