"""The loggers that a setting can name, and whether what they need is installed."""

import importlib.util

from mlxmm.errors import UserError

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}  # what each name needs


def logger_names(value: str) -> list[str]:
    """The names in "tensorboard,wandb"; none in "none". Raises `UserError` for other names, and missing packages."""
    names = [] if value == "none" else [name.strip() for name in value.split(",")]
    for name in names:
        if name not in PACKAGES:
            raise UserError(f"logger={value!r}: choose of {', '.join(PACKAGES)}, with commas between, or none")
        if not _is_installed(PACKAGES[name]):
            raise UserError(f"logger={value!r} needs {PACKAGES[name]}: pip install {PACKAGES[name]}")
    return names


def _is_installed(package: str) -> bool:
    """A folder of this name, as wandb leaves one where it ran, is not enough."""
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None
