"""What a batch of pairs costs at once, and in chunks: peak memory and seconds of a loss with its gradient.

python tools/benchmark_gradcache.py
python tools/benchmark_gradcache.py --batch-size 1024 --chunks 256 64 --width 128 --layers 4
"""

import argparse
import json
import subprocess
import sys
import time

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxmm.modules.contrastive_clip import CLIPConfig, ContrastiveCLIP
from mlxmm.networks.clip import TextConfig, VisionConfig
from mlxmm.preprocessing.images import ImageProcessor

VOCAB_SIZE, LENGTH = 512, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=1_024)
    parser.add_argument("--chunks", type=int, nargs="+", default=[256, 64])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)  # one chunk size, in a process of its own
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(json.dumps(measure(arguments, arguments.measure)))
        return
    print(f"{arguments.batch_size} pairs, {arguments.layers} layers of {arguments.width} features, compiled")
    print(f"{'in memory at a time':<22}{'peak MB':>10}{'seconds':>10}{'loss':>12}{'gradient norm':>16}")
    rows = [(str(size), size) for size in arguments.chunks] + [(f"a batch of {min(arguments.chunks)}", None)]
    for name, size in [("all", 0), *rows]:
        print(f"{name:<22}" + line(arguments, size), flush=True)


def line(arguments, size: int | None) -> str:
    """The measurements of one chunk size; if `size` is None, of a batch as small as the smallest chunk."""
    batch_size = arguments.batch_size if size is not None else min(arguments.chunks)
    flags = {"batch-size": batch_size, "width": arguments.width, "layers": arguments.layers, "measure": size or 0}
    command = [sys.executable, __file__, *(text for name, n in flags.items() for text in (f"--{name}", str(n)))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    done = json.loads(done.stdout)
    return f"{done['peak']:>10.1f}{done['seconds']:>10.2f}{done['loss']:>12.6f}{done['norm']:>16.6f}"


def measure(arguments, chunk_size: int) -> dict[str, float]:
    """Peak MB and seconds of the second of two updates' loss and gradient (the first compiles), and both values."""
    mx.random.seed(0)
    sizes = {"hidden_size": arguments.width, "intermediate_size": 4 * arguments.width}
    config = CLIPConfig(
        vision=VisionConfig(num_hidden_layers=arguments.layers, **sizes),
        text=TextConfig(num_hidden_layers=arguments.layers, max_position_embeddings=LENGTH, **sizes),
        chunk_size=chunk_size,
    )
    module = ContrastiveCLIP(config, None, ImageProcessor.square(config.vision.image_size))
    batch = {
        "pixels": mx.random.randint(0, 256, (arguments.batch_size, 32, 32, 3)).astype(mx.uint8),
        "tokens": mx.random.randint(0, VOCAB_SIZE, (arguments.batch_size, LENGTH)),
    }
    loss_and_grad = nn.value_and_grad(module, lambda batch: module.training_step(batch)["loss"])
    state = [module.state, mx.random.state]
    step = mx.compile(loss_and_grad, inputs=state, outputs=state)
    mx.eval(module.parameters(), batch, step(batch))
    mx.clear_cache()
    mx.reset_peak_memory()
    start = time.perf_counter()
    loss, grads = step(batch)
    mx.eval(loss, grads)
    seconds, peak = time.perf_counter() - start, mx.get_peak_memory() / 1e6
    norm = sum(mx.square(grad).sum() for _, grad in tree_flatten(grads)) ** 0.5
    return {"peak": peak, "seconds": seconds, "loss": loss.item(), "norm": norm.item()}


if __name__ == "__main__":
    main()
