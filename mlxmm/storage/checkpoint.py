"""Checkpoints: a folder of safetensors files and a state.json, complete or absent.

weights.safetensors     every parameter of the module, by its dotted name
optimizer.safetensors   moments, step counts, learning rates
state.json              counters, names of trainable parameters, callbacks, loggers, and a checksum of each file
...                     what the module's `from_pretrained` needs beside the weights
"""

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxmm.compute.named_arrays import unflatten_like
from mlxmm.compute.precision import HALF, widen
from mlxmm.errors import UserError
from mlxmm.storage.atomic import atomic_folder, read_arrays, sha256, write_arrays, write_json
from mlxmm.terminal import say

FORMAT = 1
WEIGHTS, STATE = "weights.safetensors", "state.json"


def contents(module, optimizer, state: dict) -> dict[str, dict]:
    """The contents of a checkpoint: arrays by dotted names, and JSON values. Later updates do not change them."""
    weights, moments = (dict(tree_flatten(tree)) for tree in (module.parameters(), optimizer.state))
    return {"weights": weights, "optimizer": moments, "state": copy.deepcopy(state)}


def save(folder: Path, checkpoint: dict[str, dict], save_config: Callable[[Path], None]) -> None:
    """Write `folder`, replacing it as a whole: "state" as JSON, every other flat dict of arrays as safetensors."""
    with atomic_folder(folder) as temporary:
        for name, arrays in checkpoint.items():
            if name != "state":
                write_arrays(temporary / f"{name}.safetensors", arrays)
        save_config(temporary)
        files = {path.name: sha256(path) for path in sorted(temporary.iterdir())}
        write_json(temporary / STATE, {"format": FORMAT, **checkpoint["state"], "files": files})


def load(folder: Path) -> dict[str, dict]:
    """What `save` wrote, verified; arrays are read when they are used. Raises `UserError` as `read_state` does."""
    state = read_state(folder)
    files = [folder / name for name in state["files"] if name.endswith(".safetensors")]
    return {"state": state} | {path.stem: mx.load(str(path)) for path in files}


def read_state(folder: Path) -> dict:
    """The counters of a checkpoint, after every file was compared with its checksum.

    Raises `UserError` that names the file that is missing or damaged.
    """
    try:
        state = json.loads((folder / STATE).read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} holds no checkpoint: {STATE} is missing") from None
    except ValueError:
        raise UserError(f"{folder / STATE} is damaged; resume from another checkpoint") from None
    if state["format"] > FORMAT:
        raise UserError(f"{folder} has format {state['format']}, newer than {FORMAT}: update mlxmm")
    for name, checksum in state["files"].items():
        if not (folder / name).exists() or _checksum(folder / name) != checksum:
            raise UserError(f"{folder / name} is missing or damaged; resume from another checkpoint")
    return state


def _checksum(path: Path) -> str:
    """The checksum of a file, computed once as long as the file stays what it is.

    Finding a run's newest checkpoint verifies it, and so does loading it: of a model of some GB, seconds each.
    """
    stat = path.stat()
    return _checksum_of(path.resolve(), stat.st_size, stat.st_mtime_ns, stat.st_ino)


@functools.lru_cache(maxsize=64)
def _checksum_of(path: Path, *identity: int) -> str:
    return sha256(path)


def load_weights(path: Path, module) -> None:
    """Load a safetensors file into `module`. Raises `UserError` unless names and shapes are the module's."""
    load_arrays(path, read_arrays(path), module)


def load_arrays(path: Path, weights: dict[str, mx.array], module) -> None:
    """Load named arrays, read from `path`, into `module`. Raises `UserError` unless they fit.

    They are cast to its dtypes; but float32 arrays that it has in half precision were trained, and stay float32.
    """
    own = dict(tree_flatten(module.parameters()))
    misfits = {
        "missing": sorted(set(own) - set(weights)),
        "unexpected": sorted(set(weights) - set(own)),
        "of another shape": [
            f"{name} {weights[name].shape}, wanted {own[name].shape}"
            for name in own
            if name in weights and weights[name].shape != own[name].shape
        ],
    }
    if any(misfits.values()):
        found = "; ".join(f"{len(names)} {kind} ({names[0]})" for kind, names in misfits.items() if names)
        raise UserError(f"{path} holds another model than {type(module).__name__}: {found}")
    module.load_weights([(name, array.astype(own[name].dtype)) for name, array in weights.items()])
    widen(module, {n: a for n, a in weights.items() if a.dtype == mx.float32 and own[n].dtype in HALF})
    mx.eval(module.parameters())  # `mx.load` is lazy, and the file may be replaced or deleted later


def load_optimizer(arrays: dict[str, mx.array], optimizer, module) -> None:
    """Restore moments and step counts; parameters that are new to the optimizer start at zero."""
    mx.eval(arrays)
    like = module.parameters()
    groups = getattr(optimizer, "optimizers", None)  # of a MultiOptimizer
    optimizer.state = unflatten_like(arrays, {"states": [like] * len(groups)} if groups else like)
    # Frozen layers leave empty dicts, which safetensors cannot hold: `init` puts them back.
    optimizer.init(module.trainable_parameters())


def latest(checkpoints: Path) -> Path | None:
    """The newest undamaged checkpoint of a run; None if it has none yet. Prints each damaged one that it skips.

    Raises `UserError` that names the damaged file where all are damaged: to start again would overwrite the run.
    """
    folders = sorted(checkpoints.glob("step=*"), key=lambda path: int(path.name.removeprefix("step=")))
    damage: UserError | None = None
    for folder in reversed(folders):
        try:
            read_state(folder)
            return folder
        except UserError as error:
            damage = damage or error
            say(f"skipped: {error}")
    if damage is not None:
        raise UserError(f"no checkpoint of this run is whole: {damage}")
    return None
