"""What a recipe of several parts does, told while it does it: what it will do, then a line for each part that is done.

The lines are plain: a log reads as a terminal does.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs

from mlxmm import TrainerConfig
from mlxmm.storage import checkpoint
from mlxmm.storage.runs import Run

OWN_LENGTH = " (--max-steps is for the captioner)"  # of what is trained before it


@attrs.define
class Plan:
    """The names of the parts of `run`, in their order."""

    run: Run
    parts: Sequence[str]
    _num_begun: int = attrs.field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        self.run.print(f"{len(self.parts)} parts to do: {', '.join(self.parts)}")

    def next(self) -> "Part":
        """The part that comes next."""
        self._num_begun += 1
        return Part(self.run, self.parts[self._num_begun - 1], f"{self._num_begun} of {len(self.parts)}")


@attrs.define
class Part:
    """One part of a plan, and its place in it."""

    run: Run
    name: str
    place: str
    _start: float | None = attrs.field(default=None, init=False)

    def train(self, config: TrainerConfig, ckpt_path: Path | None, note: str = "") -> None:
        """Say that it is trained, for how long, with a note on that, and where it goes on from `ckpt_path`."""
        goes_on = f", from step {checkpoint.step_of(ckpt_path)}" if ckpt_path is not None else ""
        self.begin(f"training the {self.name}, {_length(config)}{note}{goes_on}")

    def begin(self, doing: str) -> None:
        """Say what begins."""
        self._start = time.perf_counter()
        self.run.print(f"{self.place}: {doing}")

    def end(self, done: str, metrics: Mapping[str, float], kept: Path | None = None) -> None:
        """Say that it is done, with its result; or, if it never began, that it is taken from where it is `kept`."""
        results = "".join(f", {name} {value:.4g}" for name, value in metrics.items())
        if self._start is None:
            self.run.print(f"{self.place}: the {self.name} was {done} earlier{results}: {kept}")
        else:
            self.run.print(f"{self.name}: {done} in {time.perf_counter() - self._start:.0f} s{results}")


def chosen(metrics: Mapping, *names: str) -> dict[str, float]:
    """Those of `metrics` that have these names."""
    return {name: metrics[name] for name in names if isinstance(metrics.get(name), int | float)}


def _length(config: TrainerConfig) -> str:
    if config.fast_dev_run:
        return "a few batches"
    return f"{config.max_steps:,} updates" if config.max_steps > 0 else f"{config.max_epochs or 'no limit of'} epochs"
