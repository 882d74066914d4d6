"""Write the fixtures of tests/storage/test_torch_weights.py: a state dict in both of PyTorch's formats, and its values.

    python tools/make_torch_fixtures.py        needs torch

Views, shared storages, an empty tensor, every type of number, a parameter.
"""

from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parents[1] / "tests" / "fixtures" / "torch"


def state_dict() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    base = torch.randn(6, 4)
    numbers = torch.arange(5)
    types = {str(t).removeprefix("torch."): numbers.to(t) for t in (torch.int32, torch.int16, torch.int8, torch.uint8)}
    return {
        "base": base,
        "transposed": base.T,
        "slice": base[1:3, 1:],
        "half": base.half(),
        "bfloat16": base.bfloat16(),
        "bfloat16_rows": base.bfloat16()[::2],
        "double": base.double(),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
        "bool": base > 0,
        "int64": numbers,
        "parameter": torch.nn.Parameter(base),
        **types,
    }


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    tensors = state_dict()
    torch.save(tensors, FOLDER / "zip.bin")
    torch.save(tensors, FOLDER / "legacy.bin", _use_new_zipfile_serialization=False)
    widened = (torch.bfloat16, torch.float64)  # which NumPy, or MLX on a GPU, does not have
    values = {name: (t.float() if t.dtype in widened else t).detach().numpy() for name, t in tensors.items()}
    np.savez(FOLDER / "values.npz", **values)


if __name__ == "__main__":
    main()
