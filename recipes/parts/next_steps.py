"""The commands that one may want after a run: printed at its end, to be copied as they stand."""

from pathlib import Path

import attrs

from mlxmm.cli import flags_of
from mlxmm.data.caption_config import SHAPES
from mlxmm.data.caption_source import BatchConfig, CaptionDataConfig
from mlxmm.storage.runs import Run

from .captioning import EXAMPLE

# What says which pictures, and not how they become batches.
OF_TRAINING = {field.name for field in attrs.fields(BatchConfig)} | {"streaming", "held_out", "weights"}


def data_flags(data: CaptionDataConfig, seed: int) -> list[str]:
    """The flags that open the same data in another recipe: those that are not as they are by default."""
    unread = OF_TRAINING if SHAPES in data.source else OF_TRAINING | {SHAPES}
    defaults = {flag.name: flag.default for flag in flags_of(CaptionDataConfig())}
    changed = [flag for flag in flags_of(data) if flag.path[0] not in unread and flag.default != defaults[flag.name]]
    values = [list(flag.default) if isinstance(flag.default, tuple | list) else [flag.default] for flag in changed]
    words = [word for flag, value in zip(changed, values) for word in (f"--data.{flag.name}", *map(str, value))]
    return words + (["--seed", str(seed)] if seed else [])


def suggest_captioner(run: Run, data: CaptionDataConfig, seed: int) -> None:
    """Commands for a run that has trained a captioner; FOLDER is to be replaced."""
    if (model := run.model) is not None:
        run.suggest("caption", "caption", "--module", model, run.folder / EXAMPLE)
        run.suggest("evaluate", "evaluate_captions", "--module", model, *data_flags(data, seed))
        run.suggest("try it", "serve", run.folder)
        run.suggest("your pictures", "caption", "--module", model, "FOLDER", "--to", "captions.csv")
        if SHAPES in data.source:
            run.suggest("train on yours", "train_captioner", "--data.source", "FOLDER")


def suggest_clip(run: Run, data: CaptionDataConfig, seed: int) -> None:
    """Commands for a run that has trained a CLIP."""
    model = run.folder / "model"
    run.suggest("evaluate", "evaluate_clip", "--module", model, *data_flags(data, seed))
    run.suggest("try it", "serve", run.folder)


def suggest_push(run: Run, recipe: str, folder: Path) -> None:
    """The command that uploads what a run has made; NAME is to be replaced."""
    run.suggest("upload", recipe, "--run-dir", folder, "--resume", "last", "--push-to", "NAME/" + folder.name)
