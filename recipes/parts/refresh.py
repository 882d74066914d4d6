"""New captions while a recipe trains: from the flags `--refresh.…` to callbacks."""

import contextlib
from collections.abc import Iterator

from mlxmm import Callback
from mlxmm.callbacks import SyntheticRefresh
from mlxmm.captioners.caption_writer import CaptionWriter
from mlxmm.captioners.own_child_writer import OwnChildWriter
from mlxmm.captioners.own_writer import TrainingWriter
from mlxmm.captioners.prompts import find_prompts
from mlxmm.captioners.refresh import CaptionRefresh
from mlxmm.data.caption_source import CaptionDataConfig, CaptionSource
from mlxmm.data.pictures import pictures_of, unlabelled_pictures
from mlxmm.modules.captioning_module import CaptioningModule
from mlxmm.storage.lineage import Lineage
from mlxmm.storage.runs import Run
from mlxmm.training.module import Module

from .captioners import GRAMMAR, is_ours, open_captioner
from .refresh_config import RefreshConfig
from .refresh_judge import RefreshJudge, RefreshPusher

FOLDER = "refresh"


@contextlib.contextmanager
def refreshing(config: RefreshConfig, source: CaptionSource, run: Run, module: Module) -> Iterator[list[Callback]]:
    """The callbacks that change training rows within the block: none, new scenes of `shapes`, or new captions."""
    if not config.writes:
        yield [SyntheticRefresh(source.fresh_rows)] if source.is_synthetic else []
        return
    pusher = RefreshPusher(config, run.folder / FOLDER)
    refresh = open_refresh(config, source, run, module, pusher)
    pusher()  # what a run that was resumed has not pushed
    try:
        yield [SyntheticRefresh(refresh)]
    finally:
        refresh.close()
        pusher.close()
    module.lineage = Lineage((*module.lineage.sources, *refresh.lineage()))
    if run.is_global_zero:
        module.lineage.write(run.folder)


def open_refresh(
    config: RefreshConfig, source: CaptionSource, run: Run, module: Module, pusher: RefreshPusher
) -> CaptionRefresh:
    """The refresh that `config` asks for, in the folder of a run. Its writer is opened on rank 0 only."""
    assert isinstance(source.config, CaptionDataConfig)
    own = config.is_of_itself or _is_own(config)
    held_out = [pictures_of(rows) for split, rows in source.rows.items() if split != "train"]
    every = {"every_n_epochs": config.every_n_epochs or 1, "every_n_train_steps": config.every_n_train_steps}
    writer = _open_writer(config, source, module) if run.is_global_zero else None
    return CaptionRefresh(
        run.folder / FOLDER,
        source.rows["train"],
        writer,
        find_prompts(config.prompts or (("none",) if own else ("describe",)), config.own_prompts),
        config.sampling,
        weight=config.weight,
        pictures=None if config.source is None else unlabelled_pictures(config.source, config.image_column),
        held_out=held_out,
        judge=RefreshJudge(config, config.source or ", ".join(source.config.source), source, writer),
        on_complete=pusher,
        seed=source.seed,
        **every,
    )


def _is_own(config: RefreshConfig) -> bool:
    return not config.captioner.url and config.captioner.model != GRAMMAR and is_ours(config.captioner.model)


def _open_writer(config: RefreshConfig, source: CaptionSource, module: Module) -> CaptionWriter:
    captioner = config.captioner
    batch_size = captioner.batch_size or 64
    if config.is_of_itself:
        assert isinstance(module, CaptioningModule)
        return TrainingWriter(module, batch_size)
    if _is_own(config):
        return OwnChildWriter(captioner.model, batch_size=batch_size, timeout=captioner.timeout_seconds)
    return open_captioner(captioner, source.config, source.seed, "train")
