"""What the Trainer costs: `fit` against a bare compiled MLX loop on the same module and data.

    python tools/benchmark_overhead.py

Prints, for a module whose step is nearly free and for one of about 20 ms, the time a step of each (the mean over a run,
the median over interleaved runs), and whether the losses are equal to the last bit. Where torch and lightning are
installed, the same for Lightning against a bare torch loop.
"""

import argparse
import contextlib
import importlib.util
import io
import statistics
import tempfile
import time
import warnings
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from callbacks import LearningRateMonitor, ModelCheckpoint, ThroughputMonitor, TQDMProgressBar
from mlxmm import Callback, Module, Trainer
from mlxmm.optimizers import OptimizerConfig
from mlxmm.randomness import step_seed
from mlxmm.train_step import clip, global_norm

LOG_EVERY = 50
DROPPED = 10  # first steps: compiling, and caches that fill


class MLP(Module):
    """Layers of one width, with dropout, and a squared error."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        mx.random.seed(0)
        self.body = [nn.Linear(width, width) for _ in range(depth)]
        self.dropout = nn.Dropout(0.1)

    def training_step(self, batch):
        x = batch["x"]
        for layer in self.body:
            x = self.dropout(mx.maximum(layer(x), 0))
        return {"loss": mx.square(x - batch["y"]).mean()}

    def configure_optimizers(self):
        return OptimizerConfig(warmup_steps=5).build(1_000)


def make_batches(width: int, rows: int, count: int) -> list[dict]:
    rng = np.random.default_rng(0)
    return [{name: rng.normal(size=(rows, width)).astype(np.float32) for name in "xy"} for _ in range(count)]


def bare(module: MLP, batches: list[dict]) -> tuple[list[float], list[float]]:
    """(seconds of each step, losses) of the loop that someone would write by hand."""
    optimizer = module.configure_optimizers()
    optimizer.init(module.trainable_parameters())
    state = [module.state, optimizer.state, mx.random.state]
    loss_and_grad = nn.value_and_grad(module, lambda batch: module.training_step(batch)["loss"])

    def update(batch):
        loss, grads = loss_and_grad(batch)
        norm = global_norm(grads)
        optimizer.update(module, clip(grads, norm, 1.0, "norm"))
        return loss, norm

    step = mx.compile(update, inputs=state, outputs=state)
    times, losses = [], []
    for i, batch in enumerate(batches):
        start = time.perf_counter()
        mx.random.seed(step_seed(0, 0, i))
        loss, norm = step({name: mx.array(array) for name, array in batch.items()})
        mx.eval(loss, norm, state[:2])
        if (i + 1) % LOG_EVERY == 0:
            loss.item()
        times.append(time.perf_counter() - start)
        losses.append(loss)
    return times, [loss.item() for loss in losses]


class Stopwatch(Callback):
    """The time of each turn of the loop, from the end of one update to the end of the next."""

    def __init__(self):
        self.times, self.losses = [], []
        self._last = time.perf_counter()

    def on_train_batch_end(self, trainer, module, metrics, batches):
        now = time.perf_counter()
        self.times.append(now - self._last)
        self.losses.append(metrics["loss"])
        self._last = now


def fitted(module: MLP, batches: list[dict]) -> tuple[list[float], list[float]]:
    """(seconds of each step, losses) of `Trainer.fit` with everything that people switch on."""
    watch = Stopwatch()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(
            max_steps=len(batches),
            default_root_dir=folder,
            log_every_n_steps=LOG_EVERY,
            callbacks=[watch, ModelCheckpoint(), LearningRateMonitor(), ThroughputMonitor(), TQDMProgressBar()],
        )
        trainer.fit(module, train_dataloaders=batches)
    return watch.times, [loss.item() for loss in watch.losses]


def lightning_runs(width: int, depth: int, batches: list[dict]):
    """The same pair for torch: a bare loop, and Lightning's Trainer with its own callbacks and logger."""
    import lightning
    import torch
    from lightning.pytorch.callbacks import LearningRateMonitor as TorchMonitor
    from lightning.pytorch.callbacks import ModelCheckpoint as TorchCheckpoint
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

    torch.set_num_threads(2)
    data = [{name: torch.from_numpy(array) for name, array in batch.items()} for batch in batches]

    class TorchMLP(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            layers = [(torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Dropout(0.1)) for _ in range(depth)]
            self.body = torch.nn.Sequential(*(part for layer in layers for part in layer))

        def training_step(self, batch, batch_idx=0):
            loss = torch.square(self.body(batch["x"]) - batch["y"]).mean()
            if self._trainer is not None:
                self.log("train/loss", loss)
            return loss

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1_000)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def torch_bare():
        module, times = TorchMLP(), []
        made = module.configure_optimizers()
        optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
        for batch in data:
            start = time.perf_counter()
            optimizer.zero_grad()
            module.training_step(batch).backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            times.append(time.perf_counter() - start)
        return times

    class TorchStopwatch(lightning.Callback):
        def __init__(self):
            self.times, self._last = [], time.perf_counter()

        def on_train_batch_end(self, *args):
            now = time.perf_counter()
            self.times.append(now - self._last)
            self._last = now

    def torch_fitted():
        watch = TorchStopwatch()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            loggers = [CSVLogger(folder)]
            with contextlib.suppress(ModuleNotFoundError):
                loggers.append(TensorBoardLogger(folder))
            trainer = lightning.Trainer(
                max_steps=len(data),
                accelerator="cpu",
                gradient_clip_val=1.0,
                log_every_n_steps=LOG_EVERY,
                default_root_dir=folder,
                logger=loggers,
                callbacks=[watch, TorchCheckpoint(folder), TorchMonitor()],
                enable_model_summary=False,
            )
            trainer.fit(TorchMLP(), torch.utils.data.DataLoader(data, batch_size=None))
        return watch.times

    return torch_bare, torch_fitted


def timed(run, make, batches: list[dict]) -> list[float]:
    return run(make(), batches)[0]


def mean_us(times: list[float]) -> float:
    return 1e6 * statistics.fmean(times[DROPPED:])


def compare(name: str, runs: dict, repeats: int) -> None:
    """Run each `repeats` times, in turn, and print the medians of their means."""
    medians: dict[str, list[float]] = {kind: [] for kind in runs}
    for _ in range(repeats):
        for kind, run in runs.items():
            medians[kind].append(mean_us(run()))
    (_, base), (_, ours) = ((kind, statistics.median(values)) for kind, values in medians.items())
    spread = max(max(v) - min(v) for v in medians.values())
    print(f"{name:<34}{base:>12.1f}{ours:>12.1f}{ours - base:>12.1f}{(ours - base) / base:>10.1%}{spread:>12.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    sizes = {"nearly free": (8, 1, 4, arguments.steps), "about 20 ms": (512, 4, 96, arguments.steps)}
    print(f"{'us a step, mean of a run':<34}{'bare loop':>12}{'fit':>12}{'difference':>12}{'':>10}{'spread':>12}")
    for name, (width, depth, rows, steps) in sizes.items():
        batches = make_batches(width, rows, steps)
        make = partial(MLP, width, depth)
        losses = [run(make(), batches)[1] for run in (bare, fitted)]
        runs = {"bare": partial(timed, bare, make, batches), "fit": partial(timed, fitted, make, batches)}
        compare(f"mlxmm, {name}", runs, arguments.repeats)
        print(f"{'':<4}losses {'equal to the last bit' if losses[0] == losses[1] else 'DIFFERENT'}")
        if all(importlib.util.find_spec(package) for package in ("torch", "lightning")):
            warnings.simplefilter("ignore")
            torch_bare, torch_fitted = lightning_runs(width, depth, batches)
            compare(f"Lightning, {name}", {"bare": torch_bare, "fit": torch_fitted}, max(3, arguments.repeats // 2))


if __name__ == "__main__":
    main()
