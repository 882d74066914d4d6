"""What the peers' sides share that compute with torch. It imports nothing of mlxmm."""

import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from tools.bench.child import CannotRun, Case

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
DEVICES = {"cpu": "cpu", "cuda": "cuda", "metal": "mps"}


def device(case: Case) -> str:
    """torch's name of the device that MLX computes on. Raises `CannotRun` where torch does not have it."""
    name = DEVICES[case.device]
    if name != "cpu" and not getattr(torch, {"cuda": "cuda", "mps": "mps"}[name]).is_available():
        raise CannotRun(f"torch has no {name} here, and MLX computes on {case.device}")
    return name


def updates(model, loss: Callable[[], torch.Tensor]) -> Callable[[], dict]:
    """A turn: an update of `model` by AdamW, fused as transformers' Trainer has it, with clipped gradients."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1, fused=True)

    def turn() -> dict:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        synchronize(value.device.type)
        return {"check": [value.item()]}

    return turn


def synchronize(name: str) -> None:
    """Wait for a GPU."""
    if name != "cpu":
        getattr(torch, name).synchronize()


def normalized(pixels: np.ndarray, name: str) -> torch.Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) floats as `ImageProcessor.square` has them."""
    images = torch.from_numpy(pixels).to(name).permute(0, 3, 1, 2).contiguous()
    mean, std = (torch.tensor(values, device=name).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (images / 255 - mean) / std


def decoded(data: bytes, side: int) -> np.ndarray:
    """A picture as (side, side, 3) uint8: its shorter edge resized, its middle cropped, as CLIP's processor does."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = side / min(image.size)
    width, height = (max(side, int(edge * scale)) for edge in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - side) // 2, (height - side) // 2
    return np.asarray(image.crop((left, top, left + side, top + side)))
