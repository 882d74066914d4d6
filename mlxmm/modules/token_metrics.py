"""Loss and accuracy of a language model's tokens, with a fused head and loss for a large vocabulary.

B texts, L positions, D features, M positions that get logits.
"""

from functools import partial

import mlx.core as mx
import numpy as np

from mlxmm.compute.cores import in_halves
from mlxmm.losses import linear_token_loss, token_accuracy, token_loss
from mlxmm.networks.language_model import head, head_part, head_weight

FUSED_FROM = 32_768  # vocabulary size from which fusing pays; see tools/benchmark_head.py
PICKED_FROM = 1_024  # vocabulary size from which logits cost more than picking the positions that get them
BUCKET = 8  # batches are as long as a multiple of this many tokens
SIZES = 8  # batches of one shape have this many different numbers of positions at most


def token_metrics(model, states: mx.array, batch: dict) -> dict[str, mx.array]:
    """Loss and accuracy of `states` (B, L, D) for `batch["tokens"]` (B, L) where `batch["mask"]` (B, L) counts.

    A large head is fused with its loss, so that the logits (B, L, V) are never held at once. If the batch has
    "positions" (see `label_positions`), only these get logits.
    """
    states, tokens, mask = at_labels(states, batch)
    if not fuses_head(model):
        logits = in_halves(partial(head, model), states)
        loss, accuracy = token_loss(logits, tokens, mask), token_accuracy(logits, tokens, mask)
    else:
        trained = model.training and "weight" in head_part(model).trainable_parameters()
        loss, accuracy = linear_token_loss(
            states, head_weight(model), tokens, mask, for_states=model.training, for_weight=trained
        )
    return {"loss": loss, "accuracy": accuracy, "weight": mask.sum()}


def at_labels(states: mx.array, batch: dict) -> tuple[mx.array, mx.array, mx.array]:
    """`states` (B, L, D), "tokens" and "mask" (B, L) at the batch's "positions" (M,): (M, D), (M,) and (M,).

    A batch without them keeps all.
    """
    tokens, mask = batch["tokens"], batch["mask"]
    if "positions" not in batch:
        return states, tokens, mask
    positions = batch["positions"]
    return states.reshape(-1, states.shape[-1])[positions], tokens.reshape(-1)[positions], mask.reshape(-1)[positions]


def trimmed(batch: dict) -> dict:
    """`batch` with "tokens" and "mask" (B, T) cut to its longest text, rounded up to a multiple of `BUCKET`.

    The training step is compiled again for each new length; rounding leaves T / `BUCKET` of them at most.
    """
    longest = int(np.flatnonzero(batch["mask"].any(axis=0))[-1]) + 1
    length = -(-longest // BUCKET) * BUCKET
    return batch | {name: batch[name][:, :length] for name in ("tokens", "mask")}


def fuses_head(model) -> bool:
    """Whether the head is large and a plain matrix product, without bias or adapter."""
    weight = head_weight(model)
    return weight is not None and len(weight) >= FUSED_FROM


def label_positions(mask: np.ndarray) -> np.ndarray:
    """The indices (M,) in the flattened `mask` (B, L) of the tokens that count, filled up with some that do not.

    Shapes in a compiled step are fixed, so the positions are chosen before it. M is a multiple of B * L / SIZES:
    the step is compiled for SIZES shapes at most.
    """
    step = -(-mask.size // SIZES)
    most = min(mask.size, -(-np.count_nonzero(mask) // step) * step)
    return np.argsort(mask.reshape(-1) == 0, kind="stable")[: max(1, most)].astype(np.int32)
