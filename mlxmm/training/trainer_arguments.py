"""The arguments of a Trainer, of which Lightning's are translated or answered, as its settings."""

from collections.abc import Mapping
from pathlib import Path

import attrs
import mlx.core as mx

from mlxmm.config import exactly, plain
from mlxmm.distributed import collectives
from mlxmm.errors import Faults, UserError, warn
from mlxmm.training.lightning_words import ARGUMENTS, PRECISIONS
from mlxmm.training.trainer_config import TrainerConfig, duration_text
from mlxmm.training.unknown_names import answer


def configured(config: TrainerConfig, arguments: dict) -> TrainerConfig:
    """`config` with the settings that the arguments of a Trainer name. Raises one `UserError` of all faults."""
    faults = Faults()
    for name, value in arguments.items():
        with faults.noted():
            config = attrs.evolve(config, **_setting(name, value))
    faults.refuse()
    return config.resolved()


def _setting(name: str, value) -> dict:
    """The setting that an argument means, if any. None stands for one that was not given, unless the setting can be
    None, as in Lightning."""
    fields = attrs.fields_dict(TrainerConfig)
    if name in PLACES:
        PLACES[name](value)
        return {}
    if value is None and name in ARGUMENTS:
        return {}
    if name not in fields:
        raise UserError(f"Trainer has no argument {name}{answer(name, ARGUMENTS, fields)}")
    if value is None and not isinstance(None, fields[name].type):
        return {}
    value = TRANSLATED[name](value) if name in TRANSLATED and value is not None else value
    return {name: _typed(name, value, fields[name].type)}


def _typed(name: str, value, kind):
    try:
        return exactly(plain(value), kind)
    except TypeError as error:
        raise UserError(f"Trainer({name}=...): {error}") from None


def _precision(value) -> str:
    name = PRECISIONS.get(str(value), str(value))
    if name.startswith("64"):
        raise UserError(f"precision={value!r}: MLX trains in float32 at most, which is precision='32'")
    if str(value).startswith("16"):
        told = f"precision={value!r} trains in bfloat16 here ({name}): it has float32's range and needs no loss scaling"
        warn(told)
    return name


def _accumulation(value):
    if isinstance(value, Mapping):
        raise UserError(f"accumulate_grad_batches={value}: write callbacks=[GradientAccumulationScheduler({value})]")
    return value


def _require_device(value) -> None:
    here = "cpu" if mx.default_device() == mx.cpu else "gpu"
    if {"mps": "gpu", "cuda": "gpu"}.get(value, value) not in ("auto", here):
        told = "leave it out, or call mx.set_default_device before"
        raise UserError(f"accelerator={value!r} is not the device that MLX computes on here: {told}")


def _require_processes(value) -> None:
    count = len(value) if isinstance(value, list | tuple) else value
    if str(count) not in ("auto", "-1", "1", str(collectives.world_size())):
        raise UserError(
            f"devices={value!r}: a process has one device; mlx.launch -n {count} -- python script.py starts more"
        )


def _require_hosts(value) -> None:
    if value not in (1, None):
        raise UserError(
            f"num_nodes={value!r}: mlx.launch --hosts first,second -- python script.py starts the processes"
        )


PLACES = {"accelerator": _require_device, "devices": _require_processes, "num_nodes": _require_hosts}
TRANSLATED = {
    "precision": _precision,
    "max_time": duration_text,
    "fast_dev_run": lambda value: int(value) if isinstance(value, bool) else value,
    "accumulate_grad_batches": _accumulation,
    "default_root_dir": lambda value: Path(value) if isinstance(value, str) else value,
}
