"""Checks of numbers: one step of training on the GPU and on the CPU, and a gradient computed several times."""

import contextlib
from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxmm import Qwen3Aligner
from mlxmm.compute.precision import autocast
from mlxmm.modules.qwen3_aligner import Qwen3AlignerConfig
from mlxmm.networks.clip import CLIPVisionTower, VisionConfig
from mlxmm.networks.language_model import Qwen3Config, build_language_model
from mlxmm.preprocessing.images import ImageProcessor
from mlxmm.preprocessing.tokenizers import train_tokenizer
from mlxmm.training.trainable import match_parameters, set_trainable
from tools.proof_report import Line, judged, not_tried

IMAGES, SIDE, TOKENS = 4, 32, 16
MAX_DIFFERENCE = 1e-3  # of the float32 loss and gradient, as a fraction: factors of TF32 have 10 bits
MAX_ROUNDING = 2.0  # how much further than the CPU's bfloat16 the GPU's may be from float32
REPEATS = 8
PARITY = "one step of a small aligner on the GPU is that on the CPU, {}"
REPEATED = f"the gradient of an embedding, computed {REPEATS} times, is the same to the bit"

Step = tuple[float, np.ndarray]  # the loss, and all gradients in a row


def parity(quick: bool) -> list[Line]:
    """The loss and the gradient of one step, on the GPU and on the CPU."""
    if mx.default_device() == mx.cpu:
        return [not_tried(PARITY.format(each), "no GPU") for each in ("in float32", "in bf16-mixed")]
    module, gpu = small_aligner(), mx.default_device()
    steps = {(p, str(d)): step(module, p, d) for p in ("32", "bf16-mixed") for d in (mx.cpu, gpu)}
    return parity_lines(*(steps[p, str(d)] for p in ("32", "bf16-mixed") for d in (mx.cpu, gpu)))


def parity_lines(exact: Step, ours: Step, cpu_half: Step, gpu_half: Step) -> list[Line]:
    """The GPU's float32 is near the CPU's; its bfloat16 is about as far from that as the CPU's own."""
    loss, gradient = differences(ours, exact)
    of_cpu, of_gpu = (max(differences(half, exact)) for half in (cpu_half, gpu_half))
    detail = f"relative differences: loss {loss:.1e}, gradient {gradient:.1e}; allowed {MAX_DIFFERENCE:.0e}"
    rounding = f"from the CPU's float32: GPU {of_gpu:.1e}, CPU's own bf16-mixed {of_cpu:.1e}; allowed twice that"
    return [
        judged(PARITY.format("in float32"), max(loss, gradient) <= MAX_DIFFERENCE, detail),
        judged(PARITY.format("in bf16-mixed"), of_gpu <= MAX_ROUNDING * of_cpu, rounding),
    ]


def small_aligner() -> Qwen3Aligner:
    """With fresh float32 weights, of which the projector and the language model's last layer are trained."""
    mx.random.seed(0)
    tokenizer = train_tokenizer(["a red circle above a blue square"], 300)
    hub = Qwen3Config().to_hub(tokenizer)
    parts = CLIPVisionTower(VisionConfig()), {}, ImageProcessor.square(SIDE), build_language_model(hub), hub, tokenizer
    module = Qwen3Aligner(Qwen3AlignerConfig(max_new_tokens=TOKENS), *parts)
    patterns = "projector", "language_model.model.layers[-1:]"
    set_trainable(module, [name for pattern in patterns for name in match_parameters(module, pattern)])
    mx.eval(module.parameters())
    return module


def step(module: Qwen3Aligner, precision: str, device: mx.Device) -> Step:
    """The loss of a fixed batch and its gradient, computed on `device`."""

    def loss(batch):
        with autocast(module, precision):
            return module.training_step(batch)["loss"]

    with computing_on(device):
        value, gradients = nn.value_and_grad(module, loss)(batch(module))
        arrays = [array.astype(mx.float32).flatten() for _, array in sorted(tree_flatten(gradients))]
        return value.item(), np.array(mx.concatenate(arrays))


def batch(module: Qwen3Aligner) -> dict:
    rng = np.random.default_rng(0)
    arrays = {
        "pixels": rng.integers(0, 256, (IMAGES, SIDE, SIDE, 3), dtype=np.uint8),
        "tokens": rng.integers(0, 200, (IMAGES, TOKENS), dtype=np.int32),
        "mask": np.ones((IMAGES, TOKENS), dtype=np.float32),
    }
    return {name: mx.array(array) for name, array in module.collate(arrays).items()}


@contextlib.contextmanager
def computing_on(device: mx.Device) -> Iterator[None]:
    before = mx.default_device()
    mx.set_default_device(device)
    try:
        yield
    finally:
        mx.set_default_device(before)


def differences(one: Step, other: Step) -> tuple[float, float]:
    """Of loss and gradient (the norm of their difference), as fractions of the other."""
    loss, gradient = other
    norm = float(np.linalg.norm(gradient))
    return abs(one[0] - loss) / abs(loss), float(np.linalg.norm(one[1] - gradient)) / norm


def repeated_gradient(quick: bool) -> list[Line]:
    """The gradient of an embedding: many positions add to one row, and GPUs add them in any order."""
    rng = np.random.default_rng(0)
    ids, weights = mx.array(rng.integers(0, 50, 20_000)), mx.array(rng.normal(size=(20_000, 64)).astype(np.float32))
    gradient = mx.grad(lambda table: (table[ids] * weights).sum())
    found = [np.array(gradient(mx.zeros((100, 64)))) for _ in range(REPEATS)]
    largest = max(float(np.abs(each - found[0]).max()) for each in found)
    size = float(np.abs(found[0]).max())
    detail = f"largest difference {largest:.1e} of numbers up to {size:.1e}"
    return [judged(REPEATED, largest == 0, detail + ("; MLX adds by atomics (mlx-lm#1759)" if largest else ""))]
