"""AdamW as the papers use it, and the schedule they use with it."""

from collections.abc import Callable

import attrs
import mlx.core as mx
import mlx.optimizers as optim
from attrs.validators import ge, gt, le, lt

from mlxmm.compute import functional as F
from mlxmm.config import checked, option


@attrs.frozen(kw_only=True, field_transformer=checked)
class OptimizerConfig:
    """AdamW with warm-up and cosine decay."""

    learning_rate: float = option(1e-3, "highest learning rate", gt(0), flag="--lr", first=True)
    warmup_steps: int = option(50, "updates in which the learning rate rises from zero", ge(0))
    final_fraction: float = option(0.0, "last learning rate, as a fraction of the highest", ge(0), le(1), rare=True)
    weight_decay: float = option(0.1, "decoupled decay of matrices; gains and biases have none", ge(0))
    beta1: float = option(0.9, "decay of the mean of gradients", ge(0), lt(1), rare=True)
    beta2: float = option(0.98, "decay of the mean of squared gradients (CLIP's for ViTs)", ge(0), lt(1), rare=True)
    eps: float = option(1e-6, "added to the root of the mean square", gt(0), rare=True)

    def build(self, num_steps: int, *, scale: float = 1.0) -> "AdamW":
        """The optimizer of a run of `num_steps` updates, its rate multiplied by `scale`."""
        return AdamW(
            warmup_cosine(scale * self.learning_rate, self.warmup_steps, num_steps, final_fraction=self.final_fraction),
            betas=[self.beta1, self.beta2],
            eps=self.eps,
            weight_decay=self.weight_decay,
        )


class AdamW(optim.AdamW):
    """Adam with decoupled weight decay (arXiv 1711.05101) on matrices only, its moments free of bias.

    Each parameter counts its own updates, so one that is unfrozen late starts as it would have at the
    beginning (MLX counts once for all, which makes such a start three times too fast).
    """

    def __init__(self, learning_rate: float | Callable, **kwargs):
        super().__init__(learning_rate, bias_correction=True, **kwargs)

    def init_single(self, parameter: mx.array, state: dict) -> None:
        super().init_single(parameter, state)
        state["start"] = mx.array(self.step)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        rate = self.learning_rate.astype(gradient.dtype)
        b1, b2 = self.betas
        count = (self.step - state["start"]).astype(mx.float32)
        state["m"] = m = b1 * state["m"] + (1 - b1) * gradient
        state["v"] = v = b2 * state["v"] + (1 - b2) * mx.square(gradient)
        c1, c2 = (rate / (1 - b1**count)).astype(gradient.dtype), mx.rsqrt(1 - b2**count).astype(gradient.dtype)
        if F.is_linux_cpu():
            # Stacked, so that they are computed once: MLX fuses the powers into the kernel, for every element. A GPU
            # computes these while it waits for memory, and each kernel more would cost it as much as the update.
            c1, c2 = mx.stack([c1, c2])
        kept = parameter if parameter.ndim < 2 else parameter * (1 - rate * self.weight_decay)
        return kept - c1 * m / (mx.sqrt(v) * c2 + self.eps)


def grouped(default: optim.Optimizer, **groups: optim.Optimizer) -> optim.MultiOptimizer:
    """`default`, but an optimizer of its own for each part: `grouped(adam, language_model=slower)`."""

    def within(part: str) -> Callable:
        return lambda name, parameter: name.startswith(part + ".")

    return optim.MultiOptimizer([*groups.values(), default], [within(part) for part in groups])


def warmup_cosine(peak: float, warmup_steps: int, num_steps: int, *, final_fraction: float = 0.0) -> Callable:
    """Rise linearly to `peak` in `warmup_steps` updates, then fall along a cosine until `num_steps`."""
    floor = peak * final_fraction
    fall = optim.cosine_decay(peak, max(1, num_steps - warmup_steps), floor)
    if warmup_steps == 0:
        return fall
    # The first update comes at step 0: starting the rise one step in makes it count.
    rise = optim.linear_schedule(peak / (warmup_steps + 1), peak, warmup_steps)
    return optim.join_schedules([rise, fall], [warmup_steps])
