"""Run `recipes.align_qwen3` with a clock, export what it trained, and write what it took: tools/run_real.py calls this.

    python -m tools.run_real_child REPORT.json START --run-dir FOLDER [FLAGS of recipes.align_qwen3]

START is when the process was started, in seconds since 1970. The recipe does not know of the clock: its functions are
wrapped, and its trainer gets one callback more.
"""

import gc
import json
import sys
import time
from pathlib import Path

import attrs
import huggingface_hub
import mlx.core as mx
from mlx.utils import tree_flatten

from mlxmm import Callback, Qwen3Aligner, Trainer
from mlxmm.cli import run_recipe, take_flag
from mlxmm.modules.captioning_module import CaptioningModule
from mlxmm.recipes import align_qwen3 as recipe
from mlxmm.storage import checkpoint
from tools.phases import Phases


class Clock(Callback):
    """Tells `phases` where `fit` is, and notes the types of numbers that it finds."""

    def __init__(self, phases: Phases, report: dict):
        self.phases, self.report = phases, report

    def on_fit_start(self, trainer, module):
        parts = {name: part.parameters() for name, part in module.children().items() if tree_flatten(part)}
        self.report["types"] = {name: types_of(tree) for name, tree in parts.items()}
        names = "precision", "gradient_checkpointing", "accumulate_grad_batches", "max_steps"
        self.report["settings"] |= {name: getattr(trainer.config, name) for name in names}

    def on_sanity_check_start(self, trainer, module):
        self.phases.switch("sanity check")

    def on_train_start(self, trainer, module):
        self.phases.switch("between updates")

    def on_train_batch_start(self, trainer, module, batches):
        self.phases.switch(f"update {trainer.global_step + 1}")

    def on_train_batch_end(self, trainer, module, metrics, batches):
        self.phases.switch("between updates")
        self.report["losses"].append(float(metrics["loss"]))
        name = f"update {trainer.global_step}"
        print(f"{name}: {self.phases.records[name].seconds:.1f} s, loss {self.report['losses'][-1]:.4f}", flush=True)

    def on_validation_start(self, trainer, module):
        self.phases.switch("validation")

    def on_validation_end(self, trainer, module, metrics):
        self.phases.switch("between updates")

    def on_train_end(self, trainer, module):
        self.report["types"]["trained"] = types_of(module.trainable_parameters())
        self.report["types"]["moments"] = types_of(trainer.optimizer.state)
        self.phases.switch("end of training")


def types_of(tree) -> dict[str, tuple[int, int]]:
    """For each type of numbers, how many arrays have it, and their bytes. Scalars do not count."""
    found: dict[str, tuple[int, int]] = {}
    for _, array in tree_flatten(tree):
        if array.ndim:
            name = str(array.dtype).removeprefix("mlx.core.")
            count, size = found.get(name, (0, 0))
            found[name] = count + 1, size + array.nbytes
    return found


def measure(phases: Phases, report: dict) -> None:
    """Wrap what the recipe calls, so that its calls are phases."""
    huggingface_hub.snapshot_download = phases.timed("fetching models", huggingface_hub.snapshot_download)
    recipe.open_source = phases.timed("opening data", recipe.open_source)
    recipe.build = phases.timed("loading models", recipe.build)
    recipe.evaluate = phases.timed("evaluation", recipe.evaluate)
    CaptioningModule.caption = phases.timed("captioning", CaptioningModule.caption)
    Trainer.dump_checkpoint = phases.timed("copying the checkpoint", Trainer.dump_checkpoint)
    checkpoint.save = phases.timed_aside("writing the checkpoint (meanwhile)", checkpoint.save)
    fit = phases.timed("preparing fit", recipe.fit)

    def fit_with_clock(config, *arguments):
        report["settings"] |= {"batch_size": config.data.batch_size, "unfreeze_step": config.unfreeze_step}
        fit(config, *arguments, Clock(phases, report))

    recipe.fit = fit_with_clock


def export(phases: Phases, run: Path) -> None:
    """What a user does with the newest checkpoint."""
    gc.collect()
    mx.clear_cache()
    with phases.phase("loading the checkpoint"):
        aligner = Qwen3Aligner.from_pretrained(run / "checkpoints" / "last")
        mx.eval(aligner.parameters())
    with phases.phase("export"):
        aligner.save_pretrained(run / "export")


def main() -> None:
    path, started, *flags = sys.argv[1:]
    phases = Phases("start", elapsed=time.time() - float(started))
    report: dict = {"settings": {}, "types": {}, "losses": []}
    run = Path(take_flag("--run-dir", flags)[0])
    sys.argv[1:] = flags
    measure(phases, report)
    try:
        with phases.phase("other"):
            run_recipe("align_qwen3", recipe.main, recipe.PRESETS)
            export(phases, run)
    finally:
        report["seconds"] = time.time() - float(started)
        report["phases"] = {name: attrs.asdict(phase) for name, phase in phases.records.items()}
        Path(path).write_text(json.dumps(report))


if __name__ == "__main__":
    main()
