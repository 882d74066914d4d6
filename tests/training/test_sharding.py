"""Fully sharded layers on two real processes: the updates of one process, in half of the memory.

MLX's ring cannot scatter sums, so the processes put an exact stand-in in the place of that one operation.
"""

import json
import os
import signal
import sys
from pathlib import Path

import attrs
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from conftest import DistinctBatches, TinyRegression
from mlx.utils import tree_flatten
from test_distributed import Shards, assert_close, own_lines, run_workers, save

from callbacks import EMAWeightAveraging, FreezeSchedule, ModelCheckpoint, OnExceptionCheckpoint
from mlxmm import Callback, Module, Trainer, seed_everything
from mlxmm.distributed import collectives
from mlxmm.errors import UserError
from mlxmm.optimizers import OptimizerConfig, grouped
from mlxmm.storage import checkpoint
from mlxmm.training.strategy import REPLICATED, FullySharded, shardable_layers
from mlxmm.training.trainable import trainable_names

UPDATES = {  # six micro-batches each, and clipping acts on all
    "plain": {"compile": True},
    "accumulated": {"accumulate_grad_batches": 2, "max_steps": 3},
    "recomputed": {"gradient_checkpointing": True},
    "clipped-by-value": {"gradient_clip_algorithm": "value"},
    "freezing": {"freezing": True},
}

# ---- what the processes run: `python tests/test_sharding.py NAME FOLDER`


def sum_scatter(x, *, group=None, stream=None):
    """MLX's own sums rows over processes, and leaves each with its own of them; the ring has no such operation."""
    rows = len(x) // collectives.world_size()
    return mx.distributed.all_sum(x)[collectives.rank() * rows :][:rows]


class Block(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4, inner), nn.GELU(), nn.Linear(inner, 4))  # has `layers` of its own

    def __call__(self, x):
        return x + self.mlp(x)


class Stack(Module):
    """Blocks in a list called `layers`, the last of which has rows that two processes cannot divide, and a head."""

    def __init__(self, inner=(8, 6, 5)):
        super().__init__()
        seed_everything(5)
        self.layers, self.head = [Block(size) for size in inner], nn.Linear(4, 1)

    def training_step(self, batch):
        x = batch["x"]
        for layer in self.layers:
            x = layer(x)
        weight = batch["mask"].sum()
        return {"loss": (mx.square(self.head(x)[:, 0] - batch["y"]) * batch["mask"]).sum() / weight, "weight": weight}

    def configure_optimizers(self):
        return OptimizerConfig(warmup_steps=2, learning_rate=0.05).build(30)


class GroupedStack(Stack):
    def configure_optimizers(self):
        config = OptimizerConfig(warmup_steps=2, learning_rate=0.05)
        return grouped(config.build(30), head=config.build(30, scale=0.5))


class Watchdog(Callback):
    """What a run looks like from inside, at each update."""

    def __init__(self):
        self.norms, self.names, self.sizes = [], None, {}

    def on_train_batch_end(self, trainer, module, metrics, batches):
        self.norms.append(metrics["grad_norm"].item())
        self.names = trainable_names(module)
        moments = {
            name: array.shape for name, array in tree_flatten(trainer.optimizer.state) if name[-2:] in (".m", ".v")
        }
        self.sizes = {name: array.shape for name, array in tree_flatten(module.parameters())} | moments


def trainer(folder, *, freezing=False, callbacks=(), **settings):
    strategy = "fsdp" if collectives.world_size() > 1 else "auto"
    opened = [FreezeSchedule({0: "layers[1:]", 3: ("layers", "head")}, unit="step")] if freezing else []
    defaults = {"default_root_dir": folder, "logger": False, "max_steps": 6, "enable_model_summary": False}
    defaults["enable_checkpointing"] = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    return Trainer(
        **(defaults | {"strategy": strategy, "gradient_clip_val": 0.3, "compile": False} | settings),
        callbacks=[*opened, *callbacks],
    )


def started_apart(kind=Stack) -> Stack:
    """Its first weights are each process's own."""
    module = kind()
    module.head.weight = module.head.weight + collectives.rank()
    first = module.layers[0].mlp.layers[0]
    first.weight = first.weight + collectives.rank()
    return module


def equal(folder):
    for name, settings in UPDATES.items():
        module, watch = started_apart(), Watchdog()
        run = trainer(folder, callbacks=[watch], **settings)
        run.fit(module, train_dataloaders=Shards())
        save(module, folder, name)
        assert [type(layer) for layer in module.layers] == [Block] * 3 and not getattr(run.strategy, "names", ())
        (folder / f"{name}{collectives.rank()}.json").write_text(json.dumps(vars(watch)))


def fit(folder, name, max_steps, ckpt_path=None, callbacks=(), **settings):
    callbacks = [ModelCheckpoint(every_n_train_steps=4), *callbacks]
    run = trainer(folder / name, max_steps=max_steps, callbacks=callbacks, **settings)
    module = started_apart(GroupedStack if settings.get("freezing") else Stack)
    run.fit(module, train_dataloaders=Shards(), ckpt_path=ckpt_path)
    save(module, folder, f"{name}-{max_steps}-")
    return run


class Signals(Callback):
    def on_train_batch_end(self, trainer, module, metrics, batches):
        if trainer.global_step == 5 and collectives.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)


class RunsAhead(Callback):
    """One process's clock is a minute ahead of the other's."""

    def on_train_batch_start(self, trainer, module, batches):
        if trainer.global_step == 2 and collectives.rank() == 0:
            trainer.progress.seconds += 60


def clocks(folder):
    by_time = ModelCheckpoint(every_n_train_steps=None, train_time_interval="01:00")
    trainer(folder, callbacks=[by_time, RunsAhead()]).fit(Stack(), train_dataloaders=Shards())


def resume(folder):
    for name, settings in {"plain": {}, "freezing": {"freezing": True}}.items():
        fit(folder, f"{name}-whole", 6, **settings)
        fit(folder, f"{name}-stopped", 4, **settings)
        run = fit(folder, f"{name}-stopped", 6, "last", **settings)
        run.save_checkpoint(folder / f"{name}-after")
        collectives.barrier()
        fit(folder, f"{name}-further", 8, folder / f"{name}-after", **settings)
    fit(folder, "plain-ended", 5)
    fit(folder, "signalled", 6, callbacks=[Signals()])


def validate(folder):
    """Three rows, of which rank 0 has two batches and rank 1 one; then none of rank 1's."""
    rows = DistinctBatches(num_batches=1, batch_size=3).batches[0]
    for shares in ([[0], [1]], [[2]]), ([[0]], []):
        held_out = [{key: array[of] for key, array in rows.items()} for of in shares[collectives.rank()]]
        run = trainer(folder, max_steps=2, callbacks=[])
        run.fit(Stack(), train_dataloaders=Shards(), val_dataloaders=held_out)
        (folder / f"told{collectives.rank()}.json").write_text(json.dumps(run.callback_metrics))


def equal_and_uneven(folder):
    equal(folder)
    uneven = Shards(num_batches=6 - collectives.rank())
    trainer(folder, accumulate_grad_batches=4, max_steps=9).fit(Stack(), train_dataloaders=uneven)


class Fails(Callback):
    def on_train_batch_end(self, trainer, module, metrics, batches):
        if trainer.global_step == 3 and collectives.rank() == 1:
            raise ZeroDivisionError


def failing(folder):
    trainer(folder, callbacks=[Fails(), OnExceptionCheckpoint(folder)]).fit(Stack(), train_dataloaders=Shards())


# ---- the tests


@pytest.fixture(autouse=True)
def hostfiles(tmp_path, monkeypatch):
    monkeypatch.setenv("HOSTFILES", str(tmp_path))


def run(name, folder):
    return run_workers(__file__, name, folder)[0]


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_two_processes_of_shards_make_the_updates_of_one_process_and_need_equally_many_batches(tmp_path):
    ended = run("equal_and_uneven", tmp_path)
    assert all("processes have more and fewer batches for one update" in err for _, _, err in ended), ended
    (tmp_path / "one").mkdir()
    equal(tmp_path / "one")
    for name in UPDATES:
        assert_close(tmp_path / f"{name}0.safetensors", tmp_path / f"{name}1.safetensors", atol=0)
        assert_close(tmp_path / f"{name}0.safetensors", tmp_path / f"one/{name}0.safetensors", atol=1e-6)
        one, *two = (read(tmp_path, path) for path in (f"one/{name}0.json", f"{name}0.json", f"{name}1.json"))
        assert two[0]["norms"] == two[1]["norms"] == pytest.approx(one["norms"], rel=1e-5)
        assert min(one["norms"]) > 0.3 and two[0]["names"] == two[1]["names"] == one["names"]
        assert [rank["sizes"] for rank in two] == [halved(one["sizes"])] * 2


def halved(sizes: dict) -> dict:
    """Of the layers that can be divided, each process has half of the rows, and half of the moments'."""
    is_shard = lambda name: "layers.0.mlp" in name or "layers.1.mlp" in name
    return {name: [rows // 2 if is_shard(name) else rows, *rest] for name, (rows, *rest) in sizes.items()}


@pytest.mark.slow
def test_a_resumed_run_of_shards_is_the_uninterrupted_one_and_its_checkpoints_are_whole(tmp_path):
    ended = run("resume", tmp_path)
    assert [code for code, _, _ in ended] == [128 + signal.SIGTERM] * 2, ended
    for name, settings in {"plain": {}, "freezing": {"freezing": True}}.items():
        stopped, whole, after = (tmp_path / f"{name}-{how}" for how in ("stopped", "whole", "after"))
        for rank in (0, 1):
            assert_close(f"{stopped}-6-{rank}.safetensors", f"{whole}-6-{rank}.safetensors", atol=0)
        for file in ("weights.safetensors", "optimizer.safetensors"):
            assert_close(stopped / "checkpoints/last" / file, whole / "checkpoints/last" / file, atol=0)
            assert_close(after / file, whole / "checkpoints/last" / file, atol=0)
        assert_close(after / "weights.safetensors", f"{whole}-6-0.safetensors", atol=0)
        (tmp_path / "one").mkdir(exist_ok=True)
        saved = checkpoint.load(after)
        for key in ("world_size", "checksum"):  # so that one process takes it
            saved["state"].pop(key)
        checkpoint.save(tmp_path / "one" / name, saved, lambda folder: None)
        fit(tmp_path / "one", f"{name}-further", 8, tmp_path / "one" / name, **settings)  # moments are whole, the same
        assert_close(
            f"{tmp_path}/one/{name}-further-8-0.safetensors", f"{tmp_path}/{name}-further-8-0.safetensors", 1e-6
        )
    signalled, ended = (tmp_path / f"{name}/checkpoints/step=5" for name in ("signalled", "plain-ended"))
    for file in ("weights.safetensors", "optimizer.safetensors"):
        assert_close(signalled / file, ended / file, atol=0)


def test_processes_save_together_though_their_clocks_differ(tmp_path):
    ended = run("clocks", tmp_path)
    assert [code for code, _, _ in ended] == [0, 0] and (tmp_path / "checkpoints/step=6").is_dir(), ended


def test_validation_of_shards_on_unequal_data_gives_the_means_of_one_process(tmp_path):
    ended = run("validate", tmp_path)
    assert "rank 1 has no batch where others have some" in ended[1][2], ended
    told = [read(tmp_path, f"told{rank}.json") for rank in (0, 1)]
    one = trainer(tmp_path, max_steps=2)
    rows = DistinctBatches(num_batches=1, batch_size=3).batches[0]
    one.fit(Stack(), train_dataloaders=Shards(), val_dataloaders=[rows])
    assert told[0] == told[1] and told[0]["val/loss"] == pytest.approx(one.callback_metrics["val/loss"], rel=1e-5)


def test_a_failing_process_ends_the_others_with_its_name(tmp_path):
    ended = run("failing", tmp_path)
    assert all(code for code, _, _ in ended) and not (tmp_path / "on_exception").exists()
    assert own_lines(ended[0][2])[-1].startswith("error: rank 1 failed: ZeroDivisionError"), ended
    assert "cannot be gathered" in ended[1][2]


@pytest.mark.parametrize(
    ("module", "told"),
    [
        (TinyRegression(), "TinyRegression has no entry of a list `layers`"),
        (Stack(inner=()), "Stack has no entry"),
    ],
)
def test_what_cannot_be_sharded_is_refused_with_one_line(tmp_path, module, told):
    run = Trainer(default_root_dir=tmp_path, logger=False)
    run.module = module
    with pytest.raises(UserError, match=told), FullySharded().sharded(run):
        pass


def test_averages_of_whole_layers_are_refused_where_layers_are_sharded(tmp_path):
    run = Trainer(default_root_dir=tmp_path, logger=False)
    run.config = attrs.evolve(run.config, strategy="fsdp")
    with pytest.raises(UserError, match="EMAWeightAveraging averages whole layers"):
        EMAWeightAveraging().setup(run, Stack(), "fit")


@pytest.mark.parametrize("name", ["Adafactor", "Muon"])
def test_an_optimizer_of_whole_matrices_is_refused(name):
    optimizer = optim.MultiOptimizer([getattr(optim, name)(learning_rate=0.1), optim.SGD(0.1)], [lambda *_: True])
    with pytest.raises(UserError, match=f"{name} needs whole matrices"):
        FullySharded().check_optimizer(optimizer)
    REPLICATED.check_optimizer(optimizer)


def test_only_layers_that_can_be_divided_are_sharded():
    def chosen(*layers):
        return sorted(shardable_layers(nn.Sequential(*layers)))

    linear, scaled = nn.Linear(4, 4), nn.Linear(4, 4)
    scaled.scale = mx.array(1.0)
    halves = nn.Linear(4, 4)
    halves.bias = halves.bias.astype(mx.bfloat16)
    packed = nn.QuantizedLinear(64, 64)
    assert chosen(linear, nn.Sequential(nn.Linear(4, 4)), nn.GELU()) == ["layers.0", "layers.1"]
    assert chosen(scaled, halves, packed, nn.BatchNorm(4), linear, linear) == []


if __name__ == "__main__":
    mx.distributed.sum_scatter = sum_scatter
    globals()[sys.argv[1]](Path(sys.argv[2]))
