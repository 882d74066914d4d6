"""TrainerConfig: how long to train, and what to do on the way, under Lightning's names."""

from pathlib import Path

import attrs
from attrs.validators import ge, in_, optional

from mlxmm.compute.precision import PRECISIONS
from mlxmm.config import option


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


def is_duration(instance, attribute, value) -> None:
    """Days, hours, minutes and seconds, the larger ones optional."""
    try:
        duration(value)
    except ValueError:
        raise ValueError(f"{attribute.name!r} must be like 00:12:00:00 (days:hours:minutes:seconds): {value}") from None


@attrs.frozen(kw_only=True)
class TrainerConfig:
    """How long to train and what to do on the way. A step is one optimizer update."""

    max_steps: int = option(-1, "updates to run; -1: no limit", ge(-1))
    max_epochs: int = option(1_000, "passes over the training data; -1: no limit", ge(-1))
    max_time: str | None = option(None, "longest training, as DD:HH:MM:SS, resumes included", optional(is_duration))
    min_steps: int = option(0, "updates before a callback may end the run", ge(0))
    min_epochs: int = option(0, "epochs before a callback may end the run", ge(0))
    limit_train_batches: int | float = option(1.0, "batches of an epoch, as a number or a fraction", is_share)
    limit_val_batches: int | float = option(1.0, "batches of a validation, as a number or a fraction", is_share)
    limit_test_batches: int | float = option(1.0, "batches of a test, as a number or a fraction", is_share)
    limit_predict_batches: int | float = option(1.0, "batches to predict, as a number or a fraction", is_share)
    overfit_batches: int | float = option(0, "train and validate on these batches alone; 0: on all", is_share)
    fast_dev_run: int = option(0, "try so many batches of everything, writing nothing", ge(0))
    num_sanity_val_steps: int = option(2, "validation batches to try before training", ge(0))
    val_check_interval: int | float = option(1.0, "updates between validations, or a fraction of an epoch", is_share)
    check_val_every_n_epoch: int = option(1, "epochs between epochs with validation", ge(1))
    accumulate_grad_batches: int = option(1, "batches per update", ge(1))
    gradient_clip_val: float | None = option(1.0, "largest global gradient norm, or none", optional(ge(0)))
    gradient_clip_algorithm: str = option("norm", "norm: scale them all; value: bound each", in_(("norm", "value")))
    strategy: str = option(
        "auto",
        "auto, ddp: each process trains the whole module on its share of the data; fsdp: and has a share of each layer",
        in_(("auto", "ddp", "fsdp")),
    )
    precision: str = option("32", "32, bf16-mixed (float32 weights) or bf16-true", in_(PRECISIONS))
    gradient_checkpointing: bool = option(False, "keep of each layer its input alone, and compute the rest again")
    log_every_n_steps: int = option(50, "updates between lines of training metrics", ge(1))
    seed: int = option(0, "of data order, dropout and all else that is random", ge(0))
    compile: bool = option(True, "compile each update; without, it runs as plain Python")
    max_compiled_variants: int = option(16, "batch shapes to keep compiled, of training and of validation", ge(1))
    detect_anomaly: bool = option(False, "name the first part that gives something not finite; slow")
    deterministic: bool = option(False, "compute the first update twice and stop if the two differ by a bit")
    profiler: str | None = option(
        None,
        "simple: print where the time went; metal: also capture a few updates for Xcode",
        optional(in_(("simple", "metal"))),
    )
    default_root_dir: Path | None = option(None, "where loggers and checkpoints write; none: nowhere")
    enable_checkpointing: bool = option(True, "let ModelCheckpoint write")
    enable_progress_bar: bool = option(True, "show TQDMProgressBar")
    enable_model_summary: bool = option(True, "print ModelSummary")

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
