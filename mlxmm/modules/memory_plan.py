"""What training a Qwen3Aligner will need: bytes of memory and of disk, from the shapes of its arrays.

The factors below were measured: with networks of Qwen3-0.6B's widths, in float32 and in bfloat16, the plan was 1.1 to
1.6 times the peak (`python tools/prove_real_size.py` prints both).
"""

import shutil
from collections.abc import Iterable
from pathlib import Path

import attrs
import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxmm.compute import memory
from mlxmm.compute.memory import GIB
from mlxmm.compute.precision import HALF
from mlxmm.losses import CHUNK_LOGITS
from mlxmm.networks.language_model import compute_dtype, head_part

GRADIENT, MOMENTS = 4, 8  # bytes of a trained parameter's gradient, and of its two means
KEPT_BY_LAYER = 2.4  # numbers kept for the gradient of a layer, as a multiple of what its products give
LOGITS_HELD, CHUNKS_HELD = 6, 16  # copies of all logits, but of no more than so many chunks
NUM_CHECKPOINTS = 3  # on disk at a time: the newest, the best, and the one that is being written


@attrs.frozen(kw_only=True)
class MemoryPlan:
    """Bytes by purpose."""

    weights: int
    optimizer: int  # gradients and moments
    activations: int
    kept: int  # of freed arrays, by MLX
    disk: int  # checkpoints and cached features

    @property
    def total(self) -> int:
        """All of the memory."""
        return self.weights + self.optimizer + self.activations + self.kept

    def __str__(self) -> str:
        parts = ("weights", "optimizer", "activations", "kept")
        memory = ", ".join(f"{name} {getattr(self, name) / GIB:.2f}" for name in parts)
        return f"needs about {self.total / GIB:.1f} GiB of memory ({memory}) and {self.disk / GIB:.1f} GiB of disk"

    def shortages(self, folder: Path) -> list[str]:
        """A sentence for each thing that this machine has less of: memory, and disk where `folder` is."""
        available = memory.working_set() or memory.physical_memory()
        pairs = ("memory", available, self.total), ("free disk", shutil.disk_usage(folder).free, self.disk)
        return [
            f"there are {has / GIB:.1f} GiB of {name} here, fewer than the {needed / GIB:.1f} GiB that this run needs"
            for name, has, needed in pairs
            if has < needed
        ]


def plan_memory(aligner, trained: Iterable[str], trainer, *, batch_size: int, num_cached_rows: int = 0) -> MemoryPlan:
    """The plan of training the parameters `trained` (dotted names) of `aligner` by the settings `trainer`.

    `num_cached_rows` pictures have their features on disk.
    """
    arrays = dict(tree_flatten(aligner.parameters()))
    own = [arrays[name] for name in trained]
    widened = sum(array.size * (4 - array.itemsize) for array in own if array.dtype in HALF)
    weights = widened + sum(array.nbytes for array in arrays.values())
    num_trained = sum(array.size for array in own)
    vision = aligner.vision.config
    return MemoryPlan(
        weights=weights + _half_copies(arrays, trainer.precision),
        optimizer=num_trained * (GRADIENT + MOMENTS),
        activations=_activations(aligner, trainer, batch_size),
        kept=int(memory.KEPT_SHARE * (memory.working_set() or 0)),
        disk=NUM_CHECKPOINTS * (weights + num_trained * MOMENTS)
        + num_cached_rows * vision.num_patches * vision.hidden_size * 2,
    )


def _half_copies(arrays: dict[str, mx.array], precision: str) -> int:
    """An update in bf16-mixed holds float32 weights in bfloat16 too."""
    return sum(a.size * 2 for a in arrays.values() if a.dtype == mx.float32) if precision == "bf16-mixed" else 0


def _activations(aligner, trainer, batch_size: int) -> int:
    """What the language model's layers keep for their gradients, and its logits. The rest is small beside these."""
    model, num_tokens = aligner.language_model, aligner.max_new_tokens
    itemsize = 2 if trainer.precision != "32" else compute_dtype(model).size
    positions = batch_size * (aligner.prefix_length + num_tokens)
    kept = [int(KEPT_BY_LAYER * _outputs(layer)) * positions * itemsize for layer in model.layers]
    if trainer.gradient_checkpointing:
        width = aligner.projector.layers[-1].weight.shape[0]
        kept = [max(kept), len(kept) * width * positions * itemsize]
    logits = batch_size * num_tokens * len(head_part(model).weight)
    return sum(kept) + 4 * min(LOGITS_HELD * logits, CHUNKS_HELD * CHUNK_LOGITS)


def _outputs(layer: nn.Module) -> int:
    """The numbers that the linear layers of `layer` give for a position."""
    linear = (nn.Linear, nn.QuantizedLinear)
    return sum(part.weight.shape[0] for part in layer.modules() if isinstance(part, linear))
