"""What the Trainer costs: `fit` against a bare compiled MLX loop on the same module and data.

    python tools/benchmark_overhead.py

The two take turns of 20 updates, so that both feel whatever else the machine does. Prints, for a module whose step is
nearly free and for one of about 20 ms, the time of a bare step and what `fit` adds to it (means over a run; their
median, least and most over runs), and whether the losses are equal to the last bit. Where torch and lightning are
installed, the same for Lightning against a bare torch loop.
"""

import argparse
import contextlib
import importlib.util
import io
import itertools
import statistics
import tempfile
import time
import warnings
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxmm import Callback, Module, Trainer
from mlxmm.callbacks import LearningRateMonitor, ModelCheckpoint, ThroughputMonitor, TQDMProgressBar
from mlxmm.optimizers import OptimizerConfig
from mlxmm.training.randomness import step_seed
from mlxmm.training.train_step import clip, global_norm

LOG_EVERY = 50
TURN = 20  # updates of a loop before it is the other's turn
DROPPED = 1  # first turns: compiling, and caches that fill
SIZES = {"nearly free": (8, 1, 4), "about 20 ms": (512, 4, 96)}  # width, depth, rows of a batch


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


def bare_step(module: MLP):
    """`step(batch) -> loss` of the loop that someone would write by hand, which reads the loss now and then."""
    optimizer = module.configure_optimizers()
    optimizer.init(module.trainable_parameters())
    state = [module.state, optimizer.state, mx.random.state]
    loss_and_grad = nn.value_and_grad(module, lambda batch: module.training_step(batch)["loss"])
    numbers = itertools.count()

    def update(batch):
        loss, grads = loss_and_grad(batch)
        norm = global_norm(grads)
        optimizer.update(module, clip(grads, norm, 1.0, "norm"))
        return loss, norm

    compiled = mx.compile(update, inputs=state, outputs=state)

    def step(batch):
        number = next(numbers)
        mx.random.seed(step_seed(0, 0, number))
        loss, norm = compiled({name: mx.array(array) for name, array in batch.items()})
        mx.eval(loss, norm, state[:2])
        if (number + 1) % LOG_EVERY == 0:
            loss.item()
        return loss

    return step


class Stopwatch:
    """Times turns of a loop, and after them as many steps of a bare loop: both feel what else the machine does."""

    def __init__(self, step, batches: list[dict], wait=lambda loss: None):
        self.fit_times, self.bare_times, self.fit_losses, self.bare_losses = [], [], [], []
        self._step, self._batches, self._wait = step, iter(batches), wait
        self._last = time.perf_counter()

    def lap(self, loss) -> None:
        """Note the end of an update. `wait` waits for its loss, once in a turn: a loop may be ahead of the device."""
        self.fit_losses.append(loss)
        if len(self.fit_losses) % TURN:
            return
        self._wait(loss)
        middle = time.perf_counter()
        self.bare_losses += [self._step(batch) for batch in itertools.islice(self._batches, TURN)]
        end = time.perf_counter()
        self.fit_times.append((middle - self._last) / TURN)
        self.bare_times.append((end - middle) / TURN)
        self._last = time.perf_counter()


class Laps(Callback):
    """Has a `Stopwatch` see the end of each update."""

    def __init__(self, watch: Stopwatch):
        self.watch = watch

    def on_train_batch_end(self, trainer, module, metrics, batches):
        self.watch.lap(metrics["loss"])


def run_mlxmm(width: int, depth: int, batches: list[dict]) -> Stopwatch:
    """`Trainer.fit` with everything that people switch on."""
    watch = Stopwatch(bare_step(MLP(width, depth)), batches, wait=mx.eval)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        trainer = Trainer(
            max_steps=len(batches),
            default_root_dir=folder,
            log_every_n_steps=LOG_EVERY,
            enable_model_summary=False,
            callbacks=[ModelCheckpoint(), LearningRateMonitor(), ThroughputMonitor(), TQDMProgressBar(), Laps(watch)],
        )
        trainer.fit(MLP(width, depth), train_dataloaders=batches)
    return watch


def run_lightning(width: int, depth: int, batches: list[dict]) -> Stopwatch:
    """The same for torch: Lightning's Trainer with its own callbacks and loggers, against a bare torch loop."""
    import lightning
    import torch
    from lightning.pytorch.callbacks import LearningRateMonitor as TorchMonitor
    from lightning.pytorch.callbacks import ModelCheckpoint as TorchCheckpoint
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

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

    def torch_step():
        module = TorchMLP()
        made = module.configure_optimizers()
        optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]

        def step(batch):
            optimizer.zero_grad()
            loss = module.training_step(batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            return loss.detach()

        return step

    class TorchLaps(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, *rest):
            watch.lap(outputs["loss"])

    watch = Stopwatch(torch_step(), data)
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
            callbacks=[TorchCheckpoint(folder), TorchMonitor(), TorchLaps()],
            enable_model_summary=False,
        )
        trainer.fit(TorchMLP(), torch.utils.data.DataLoader(data, batch_size=None))
    return watch


def mean_us(times: list[float]) -> float:
    return 1e6 * statistics.fmean(times[DROPPED:])


def compare(name: str, run, repeats: int) -> None:
    """Print the median run's mean of a bare step, and what `fit` adds: median and spread over the runs."""
    watches = [run() for _ in range(repeats)]
    bare = statistics.median(mean_us(watch.bare_times) for watch in watches)
    added = sorted(mean_us(watch.fit_times) - mean_us(watch.bare_times) for watch in watches)
    cost = statistics.median(added)
    print(f"{name:<26}{bare:>12.1f}{cost:>12.1f}{cost / bare:>10.1%}{added[0]:>12.1f}{added[-1]:>12.1f}", end="")
    same = all(a.item() == b.item() for w in watches for a, b in zip(w.fit_losses, w.bare_losses))
    print(f"   losses {'equal to the last bit' if same else 'differ'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    print(f"{'us a step':<26}{'bare loop':>12}{'fit adds':>12}{'':>10}{'least':>12}{'most':>12}")
    for name, (width, depth, rows) in SIZES.items():
        batches = make_batches(width, rows, arguments.steps)
        compare(f"mlxmm, {name}", partial(run_mlxmm, width, depth, batches), arguments.repeats)
        if all(importlib.util.find_spec(package) for package in ("torch", "lightning")):
            warnings.simplefilter("ignore")
            compare(f"Lightning, {name}", partial(run_lightning, width, depth, batches), arguments.repeats)


if __name__ == "__main__":
    main()
