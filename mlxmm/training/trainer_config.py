"""TrainerConfig: how long to train, and what to do on the way, under Lightning's names."""

import math
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import attrs
from attrs.validators import ge, in_, optional

from mlxmm.compute.precision import PRECISIONS
from mlxmm.config import checked, option
from mlxmm.errors import UserError
from mlxmm.training.logger_names import logger_names

SHARE = "batches of an epoch, as a number or a fraction"


def is_logger(instance, attribute, value) -> None:
    """Names of loggers whose packages are installed."""
    logger_names(value)


def duration_text(value: str | timedelta | Mapping[str, float]) -> str:
    """ "DD:HH:MM:SS" of a time as Lightning takes it: such a text, a timedelta, or the arguments of one.

    Fractions of a second are rounded up. Raises `UserError`.
    """
    if isinstance(value, Mapping):
        try:
            value = timedelta(**value)
        except TypeError:
            raise UserError(f"a time is like {{'hours': 1, 'minutes': 30}} or '00:01:30:00': {value}") from None
    if not isinstance(value, timedelta):
        return value
    minutes, seconds = divmod(math.ceil(value.total_seconds()), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours // 24:02}:{hours % 24:02}:{minutes:02}:{seconds:02}"


def duration(text: str) -> float:
    """Seconds of "DD:HH:MM:SS", "HH:MM:SS" or "MM:SS"."""
    numbers = [int(part) for part in text.split(":")]
    if not 2 <= len(numbers) <= 4 or min(numbers) < 0:
        raise ValueError(text)
    return float(sum(n * unit for n, unit in zip(reversed(numbers), (1, 60, 3_600, 86_400))))


def is_share(instance, attribute, value) -> None:
    """A number of batches as an integer, or a fraction of them between 0 and 1."""
    if value < 0 or (isinstance(value, float) and value > 1):
        raise ValueError(f"{attribute.name!r} must be a number of batches, or a fraction up to 1.0: {value}")


def is_interval(instance, attribute, value) -> None:
    """A number of updates from 1 on, or a fraction of an epoch up to 1.0."""
    if value == 0:
        raise ValueError(f"{attribute.name!r} must not be 0: limit_val_batches=0 switches validation off")
    is_share(instance, attribute, value)


def is_duration(instance, attribute, value) -> None:
    """Days, hours, minutes and seconds, the larger ones optional."""
    try:
        duration(value)
    except (ValueError, AttributeError):
        raise ValueError(f"{attribute.name!r} must be like 00:12:00:00 (days:hours:minutes:seconds): {value}") from None


def is_folder(instance, attribute, value) -> None:
    """A folder, or a name that nothing has yet."""
    if Path(value).exists() and not Path(value).is_dir():
        raise ValueError(f"{attribute.name!r} must be a folder: {value} is a file")


@attrs.frozen(kw_only=True, field_transformer=checked)
class TrainerConfig:
    """How long to train and what to do on the way. A step is one optimizer update."""

    max_steps: int = option(-1, "updates to run; -1: no limit", ge(-1), flag="--max-steps", first=True)
    max_epochs: int = option(1_000, "passes over the training data; -1: no limit", ge(-1))
    max_time: str | None = option(None, "longest training, as DD:HH:MM:SS, resumes included", optional(is_duration))
    min_steps: int = option(0, "updates before a callback may stop the run", ge(0), rare=True)
    min_epochs: int = option(0, "epochs before a callback may stop the run", ge(0), rare=True)
    limit_train_batches: int | float = option(1.0, f"training {SHARE}", is_share, rare=True)
    limit_val_batches: int | float = option(1.0, f"validation {SHARE}", is_share, rare=True)
    limit_test_batches: int | float = option(1.0, f"test {SHARE}", is_share, rare=True)
    limit_predict_batches: int | float = option(1.0, f"prediction {SHARE}", is_share, rare=True)
    overfit_batches: int | float = option(0, "train and validate on these batches only; 0: all", is_share, rare=True)
    fast_dev_run: int = option(0, "run this many batches of everything and write nothing", ge(0), rare=True)
    num_sanity_val_steps: int = option(2, "validation batches to run before training", ge(0), rare=True)
    val_check_interval: int | float = option(1.0, "updates between validations, or a fraction of an epoch", is_interval)
    check_val_every_n_epoch: int = option(1, "validate in every n-th epoch", ge(1), rare=True)
    accumulate_grad_batches: int = option(1, "batches per update", ge(1))
    gradient_clip_val: float | None = option(
        1.0, "largest global gradient norm; 0 or none: no clipping", optional(ge(0))
    )
    gradient_clip_algorithm: str = option(
        "norm", "norm: scale all gradients; value: bound each number", in_(("norm", "value")), rare=True
    )
    strategy: str = option(
        "auto",
        "auto, ddp; fsdp: each process holds a share of the layers' parameters",
        in_(("auto", "ddp", "fsdp")),
    )
    precision: str = option(
        "32",
        "32: products in the dtype that weights were loaded in; bf16-mixed: in bfloat16; both train float32 weights; "
        "bf16-true: everything is bfloat16",
        in_(PRECISIONS),
    )
    cache_limit_gib: float | None = option(
        None,
        "GiB of freed memory that MLX keeps for new arrays; none: on Metal an eighth of the working set",
        optional(ge(0)),
        rare=True,
    )
    wired_limit_gib: float | None = option(
        None, "GiB that macOS may not swap; none: on Metal half of the working set", optional(ge(0)), rare=True
    )
    gradient_checkpointing: bool = option(
        False, "store only each layer's input, and compute the rest again in the backward pass: saves memory"
    )
    log_every_n_steps: int = option(50, "updates between logs of training metrics", ge(1))
    logger: str = option(
        "tensorboard",
        "tensorboard, wandb, trackio, several with commas between, or none",
        is_logger,
        flag="--logger",
    )
    seed: int = option(0, "seed of data order, dropout and everything else that is random", ge(0))
    compile: bool = option(True, "compile each update; without, it runs as plain Python", rare=True)
    max_compiled_variants: int = option(
        16, "batch shapes that stay compiled, of training and of validation", ge(1), rare=True
    )
    detect_anomaly: bool = option(False, "stop at the first part whose output is not finite, by name; slow", rare=True)
    deterministic: bool = option(
        False,
        "add the gradients of embeddings in one order, which on a GPU makes a run repeatable to the bit; slower. "
        "The first update is computed twice, and the run stops if the results differ",
        rare=True,
    )
    profiler: str | None = option(
        None,
        "simple: print where the time went; metal: also capture a few updates for Xcode",
        optional(in_(("simple", "metal"))),
        rare=True,
    )
    default_root_dir: Path | None = option(
        None, "folder of the run; none: runs/<Module>/version_N, the next N, which `fit` makes", optional(is_folder)
    )
    enable_checkpointing: bool = option(True, "save checkpoints by ModelCheckpoint", rare=True)
    enable_progress_bar: bool = option(True, "show TQDMProgressBar", rare=True)
    enable_model_summary: bool = option(True, "print ModelSummary", rare=True)

    def resolved(self) -> "TrainerConfig":
        """The settings as they act: `fast_dev_run` sets others, and the root is a path."""
        config = attrs.evolve(self, default_root_dir=self.default_root_dir and Path(self.default_root_dir))
        if not (n := int(self.fast_dev_run)):
            return config
        limits = {f"limit_{part}_batches": n for part in ("train", "val", "test", "predict")}
        return attrs.evolve(
            config,
            max_steps=n,
            max_epochs=1,
            num_sanity_val_steps=0,
            val_check_interval=1.0,
            log_every_n_steps=1,
            enable_checkpointing=False,
            **limits,
        )
