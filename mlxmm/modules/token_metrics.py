"""Loss and accuracy of a language model's tokens, with a fused head and loss for a large vocabulary.

B texts, L positions, D features, M positions that get logits.
"""

import mlx.core as mx
import numpy as np

from mlxmm.losses import linear_token_loss, token_accuracy, token_loss
from mlxmm.networks.language_model import head, head_part, head_weight

FUSED_FROM = 32_768  # vocabulary size from which fusing pays; see tools/benchmark_head.py
SIZES = 8  # batches of one shape have this many different numbers of positions at most


def token_metrics(model, states: mx.array, batch: dict) -> dict[str, mx.array]:
    """Loss and accuracy of `states` (B, L, D) for `batch["tokens"]` (B, L) where `batch["mask"]` (B, L) counts.

    A large head is fused with its loss, so that the logits (B, L, V) are never held at once. If the batch has
    "positions" (see `label_positions`), only these get logits.
    """
    tokens, mask = batch["tokens"], batch["mask"]
    if "positions" in batch:
        positions = batch["positions"]
        states = states.reshape(-1, states.shape[-1])[positions]  # (M, D)
        tokens, mask = tokens.reshape(-1)[positions], mask.reshape(-1)[positions]  # (M,)
    if not fuses_head(model):
        logits = head(model, states)
        loss, accuracy = token_loss(logits, tokens, mask), token_accuracy(logits, tokens, mask)
    else:
        trained = model.training and "weight" in head_part(model).trainable_parameters()
        loss, accuracy = linear_token_loss(
            states, head_weight(model), tokens, mask, for_states=model.training, for_weight=trained
        )
    return {"loss": loss, "accuracy": accuracy, "weight": mask.sum()}


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
