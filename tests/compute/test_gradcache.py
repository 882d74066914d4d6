"""GradCache: the gradient of the whole batch from chunks of it, in their memory; and from two processes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from small_clip import SIGLIP, pairs, small_clip

from mlxmm import Trainer
from mlxmm.compute.dropout import PatchDropout, dropout_from
from mlxmm.compute.gradcache import call_in_chunks
from mlxmm.compute.layer_calls import replaced_calls
from mlxmm.compute.precision import autocast
from mlxmm.distributed import collectives
from mlxmm.optimizers import OptimizerConfig

ROOT = Path(__file__).parents[2]
KINDS = {"clip": {}, "siglip": SIGLIP}


class DroppingTower(nn.Module):
    """(B, L, 4) to (B, 3), with dropout and patch dropout, and a frozen layer."""

    def __init__(self):
        super().__init__()
        mx.random.seed(1)
        self.patch_dropout, self.dropout = PatchDropout(0.5, num_first=1), nn.Dropout(0.3)
        self.one, self.two, self.three = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.two.freeze()

    def __call__(self, x):
        x = self.dropout(mx.tanh(self.one(self.patch_dropout(x))))
        return self.three(self.dropout(mx.tanh(self.two(x)))).mean(1)


def call(module, chunk):
    return module(chunk)


def gradient(module, loss, *args, compiled=True):
    """Value and gradient of a batch, by dotted names, with the random key of a seed."""
    function, state = nn.value_and_grad(module, loss), [module.state, mx.random.state]
    mx.random.seed(11)
    value, grads = (mx.compile(function, inputs=state, outputs=state) if compiled else function)(*args)
    mx.eval(value, grads, module.state)
    return value.item(), dict(tree_flatten(grads))


def assert_equal_gradients(one, two):
    assert one[0] == pytest.approx(two[0], abs=1e-5) and one[1].keys() == two[1].keys()
    for name, grad in one[1].items():
        np.testing.assert_allclose(np.array(grad), np.array(two[1][name]), atol=1e-5, err_msg=name)
    assert max(float(mx.abs(grad).max()) for grad in one[1].values()) > 1e-2


def twins(num: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Pairs, three of which have one text."""
    batch = pairs(num, seed)
    batch["tokens"][[1, num - 2]] = batch["tokens"][0]
    return batch


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("chunk_size", "masks"), [(8, False), (7, True), (99, False)])
def test_chunks_have_the_gradient_of_the_whole_batch(chunk_size, masks, kind, compiled):
    batch = {name: mx.array(array) for name, array in twins(32).items()}
    settings = KINDS[kind] | {"mask_duplicates": masks}
    whole, chunked = (
        gradient(clip, lambda batch, clip=clip: clip.training_step(batch)["loss"], batch, compiled=compiled)
        for clip in (small_clip(**settings), small_clip(**settings, chunk_size=chunk_size))
    )
    assert_equal_gradients(whole, chunked)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_second_pass_drops_what_the_first_one_did(compiled):
    x, mix = mx.random.normal((10, 6, 4)), mx.random.normal((10, 10))

    def couple(features):  # a loss in which every example meets every other
        return mx.square(features @ features.T * mix).sum()

    def chunked(tower):
        return couple(call_in_chunks(tower, call, x, 4))

    def written_out(tower):
        keys = mx.random.randint(0, 2**31 - 1, (3, 2), dtype=mx.uint32)
        parts = []
        for key, chunk in zip(keys, (x[:4], x[4:8], x[8:])):
            with dropout_from(tower, mx.stop_gradient(key)):
                parts.append(tower(chunk))
        return couple(mx.concatenate(parts))

    one, two = (
        gradient(tower, lambda loss=loss, tower=tower: loss(tower), compiled=compiled)
        for loss, tower in ((chunked, DroppingTower()), (written_out, DroppingTower()))
    )
    assert_equal_gradients(one, two)
    still = DroppingTower()
    still.eval()
    assert abs(gradient(still, lambda: chunked(still))[0] - one[0]) > 1e-2


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}, {"gradient_checkpointing": True}])
def test_training_in_chunks_is_training_on_whole_batches(settings, make_trainer):
    clips = [small_clip(), small_clip(chunk_size=4)]
    for clip in clips:
        make_trainer(max_steps=4, **settings).fit(clip, train_dataloaders=[pairs(12, seed=i) for i in range(4)])
    assert_close_weights(*(dict(tree_flatten(clip.parameters())) for clip in clips))


def assert_close_weights(one, two):
    assert one.keys() == two.keys()
    for name, array in one.items():
        if not name.endswith("k_proj.bias"):  # its gradient is rounding errors alone, which Adam blows up
            np.testing.assert_allclose(np.array(array), np.array(two[name]), atol=2e-4, err_msg=name)


@pytest.mark.parametrize(("chunk_size", "gradient_checkpointing"), [(4, False), (0, True), (4, True)])
def test_mixed_precision_does_not_round_the_weights(chunk_size, gradient_checkpointing, make_trainer):
    clip = small_clip(chunk_size=chunk_size, optimizer=OptimizerConfig(learning_rate=1e-7, warmup_steps=0))
    before = dict(tree_flatten(clip.parameters()))
    settings = {"precision": "bf16-mixed", "gradient_checkpointing": gradient_checkpointing}
    make_trainer(max_steps=2, **settings).fit(clip, train_dataloaders=[pairs(12)])
    for name, array in tree_flatten(clip.parameters()):
        np.testing.assert_allclose(np.array(array), np.array(before[name]), atol=1e-6, err_msg=name)


def test_frozen_layers_are_of_half_precision_in_the_second_pass_too():
    clip, seen = small_clip(chunk_size=4), []
    clip.vision.encoder.layers[0].self_attn.freeze()

    def watched(name, call):
        return lambda self, x: seen.append((self.weight.dtype, len(x))) or call(self, x)

    def step(batch):
        with autocast(clip, "bf16-mixed"):
            return clip.training_step(batch)["loss"]

    with replaced_calls({"out_proj": clip.vision.encoder.layers[0].self_attn.out_proj}, watched):
        gradient(clip, step, {name: mx.array(array) for name, array in pairs(8).items()}, compiled=False)
    assert seen == [(mx.bfloat16, 4)] * 4  # two chunks, twice


def test_a_chunk_at_a_time_is_in_memory():
    batch, peaks = {name: mx.array(array) for name, array in pairs(256).items()}, {}
    for size in (0, 16):
        clip = small_clip(chunk_size=size)
        mx.eval(clip.parameters(), batch)
        gradient(clip, lambda batch, clip=clip: clip.training_step(batch)["loss"], batch)
        mx.clear_cache()
        mx.reset_peak_memory()
        gradient(clip, lambda batch, clip=clip: clip.training_step(batch)["loss"], batch)
        peaks[size] = mx.get_peak_memory() - mx.get_active_memory()
    assert peaks[16] * 2.5 < peaks[0], peaks


def test_a_locked_tower_is_not_computed_again():
    passes = {}
    for locked in (None, "vision"):
        clip, count = small_clip(chunk_size=8, locked=locked), []
        clip.setup("fit")

        def counted(name, call, count=count):
            return lambda self, x: count.append(1) or call(self, x)

        with replaced_calls({"embeddings": clip.vision.embeddings}, counted):
            batch = {name: mx.array(array) for name, array in pairs(24).items()}
            gradient(clip, lambda batch, clip=clip: clip.training_step(batch)["loss"], batch, compiled=False)
        passes[locked] = len(count)
    assert passes == {None: 6, "vision": 3}


# ---- two processes


def train(folder: Path, kind: str, batches: list[dict]) -> None:
    """A few updates, whose weights are written under the process's number."""
    clip = small_clip(**KINDS[kind], chunk_size=3, mask_duplicates=True)
    settings = {"max_steps": 3, "logger": False, "enable_checkpointing": False, "compile": False}
    Trainer(**settings).fit(clip, train_dataloaders=batches, val_dataloaders=[pairs(4)])
    weights = dict(tree_flatten(clip.parameters()))
    mx.save_safetensors(str(folder / f"{collectives.rank()}.safetensors"), weights)


def whole_batches() -> list[dict]:
    return [twins(12, seed=i) for i in range(3)]  # with equal texts on both processes


def train_share(folder: Path, kind: str) -> None:
    own = slice(collectives.rank() * 6, collectives.rank() * 6 + 6)
    train(folder, kind, [{name: array[own] for name, array in batch.items()} for batch in whole_batches()])


def free_ports(num: int) -> list[int]:
    sockets = [socket.socket() for _ in range(num)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_have_the_negatives_and_the_gradient_of_one_with_the_whole_batch(kind, tmp_path):
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(2)]))
    (tmp_path / "one").mkdir()
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT}/tests", "MLX_HOSTFILE": str(hosts)}
    environment = os.environ | paths | {"OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tmp_path), kind]
    processes = [subprocess.Popen(command, env=environment | {"MLX_RANK": str(rank)}) for rank in range(2)]
    train(tmp_path / "one", kind, whole_batches())
    try:
        assert [process.wait(60) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    alone, *both = (mx.load(str(tmp_path / name)) for name in ("one/0.safetensors", "0.safetensors", "1.safetensors"))
    assert_close_weights(alone, both[0])
    assert all(mx.array_equal(array, both[1][name]) for name, array in both[0].items())
    start = dict(tree_flatten(small_clip(**KINDS[kind]).parameters()))
    assert max(float(mx.abs(array - start[name]).max()) for name, array in alone.items()) > 1e-2


if __name__ == "__main__":
    train_share(Path(sys.argv[1]), sys.argv[2])
