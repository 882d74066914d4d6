"""Checkpoints: a folder of safetensors files and a state.json, complete or absent.

weights.safetensors     the parameters that are trained or change otherwise, by their dotted names
frozen.safetensors      all others, if there are any: checkpoints of a run may share this file
optimizer.safetensors   moments, step counts, learning rates
state.json              counters, names of trainable parameters, callbacks, loggers, a checksum of each file and its own
...                     what the module's `from_pretrained` needs beside the weights
"""

import copy
import json
import re
from collections.abc import Callable, Collection
from pathlib import Path

import attrs
import mlx.core as mx
from mlx.utils import tree_flatten

from mlxmm.compute.named_arrays import unflatten_like
from mlxmm.compute.precision import HALF, widen
from mlxmm.errors import UserError
from mlxmm.storage import json_values
from mlxmm.storage.atomic import atomic_folder, follow_link, read_arrays, write_arrays, write_json
from mlxmm.storage.checksums import check_files, checksum_of_values, checksums, identity
from mlxmm.storage.disk import read_text
from mlxmm.storage.frozen_weights import FROZEN, FrozenWeights
from mlxmm.terminal import say

FORMAT, READ_FORMATS = 3, (2, 3)  # of format 2, all parameters are in weights.safetensors
WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
ADVICE = "take another checkpoint"
NAMES = ("last", "best")  # links to checkpoints, beside them
INSIDE = ("checkpoints/last", "last")  # of the folder of a run, and of its checkpoints


def contents(module, optimizer, state: dict) -> dict[str, dict]:
    """The contents of a checkpoint: arrays by dotted names, and JSON values. Later updates do not change them."""
    # `copy.copy` shares the numbers: `array[...] = x` gives others to the object in the module, and not to this one.
    trees = module.parameters(), optimizer.state
    weights, moments = ({name: copy.copy(array) for name, array in tree_flatten(tree)} for tree in trees)
    return {"weights": weights, "optimizer": moments, "state": copy.deepcopy(state)}


def save(
    folder: Path,
    checkpoint: dict[str, dict],
    save_config: Callable[[Path], None],
    earlier: FrozenWeights | None = None,
    apart_from: Path | None = None,
) -> FrozenWeights:
    """Write `folder`, replacing it as a whole: "state" as JSON, every other flat dict of arrays as safetensors.

    The file of frozen weights is a link to the one of the checkpoint before, whose save returned `earlier`, if they are
    the same; but `folder` shares no file with the checkpoint `apart_from`.
    """
    weights, state = checkpoint.get("weights", {}), checkpoint["state"]
    frozen = FrozenWeights.of(weights, state.get("trainable", weights), earlier)
    with atomic_folder(folder) as temporary:
        known = _share(temporary, frozen, earlier, apart_from)
        for name, arrays in _files(checkpoint, frozen.shared).items():
            if name not in known:
                write_arrays(temporary / name, arrays)
        save_config(temporary)
        files = checksums(temporary, known)
        state = {"format": FORMAT, **state, "files": files}
        state = json.loads(json.dumps(state))  # as a reader gets it: keys are texts
        write_json(temporary / STATE, state | {"checksum": checksum_of_values(state)})
        as_written = {"identity": identity(temporary / FROZEN), "checksum": files[FROZEN]} if frozen.shared else {}
    return attrs.evolve(frozen, file=folder / FROZEN, **as_written)


def _share(
    folder: Path, frozen: FrozenWeights, earlier: FrozenWeights | None, apart_from: Path | None
) -> dict[str, str]:
    """Link the frozen weights of the checkpoint before into `folder` if they are `frozen`; the file's checksum then."""
    if earlier is None or not frozen.shared or frozen.shared != earlier.shared:
        return {}
    linked = earlier.link(folder / FROZEN, apart_from and apart_from / FROZEN)
    return {FROZEN: earlier.checksum} if linked else {}


def _files(checkpoint: dict[str, dict], shared: Collection[str]) -> dict[str, dict[str, mx.array]]:
    """The arrays of a checkpoint by the names of the files that hold them; `shared` are those of frozen weights."""
    files = {f"{name}.safetensors": arrays for name, arrays in checkpoint.items() if name != "state"}
    if shared:
        files[WEIGHTS] = {name: array for name, array in checkpoint["weights"].items() if name not in shared}
        files[FROZEN] = {name: checkpoint["weights"][name] for name in shared}
    return files


def load(folder: Path) -> dict[str, dict]:
    """What `save` wrote, verified; arrays are read when they are used. Raises `UserError` as `read_state` does."""
    folder = follow_link(folder)
    state = read_state(folder)
    files = [folder / name for name in state["files"] if name.endswith(".safetensors")]
    loaded = {path.stem: mx.load(str(path)) for path in files}
    frozen = loaded.pop(Path(FROZEN).stem, {}) if state["format"] == FORMAT else {}
    return {"state": state} | loaded | ({"weights": frozen | loaded["weights"]} if frozen else {})


def read_weights(folder: Path) -> dict[str, mx.array]:
    """Every parameter in a checkpoint's folder, by its dotted name. Raises `UserError` if it is missing or damaged."""
    frozen = read_arrays(folder / FROZEN) if (folder / FROZEN).exists() else {}
    return frozen | read_arrays(folder / WEIGHTS)


def read_state(folder: Path) -> dict:
    """The counters of a checkpoint, after every file was compared with its checksum.

    Raises `UserError` that names the file that is missing or damaged.
    """
    folder = follow_link(folder)
    state = _read_state(folder)
    check_files(folder, state["files"], ADVICE)
    return state


def check_model(folder: Path) -> None:
    """Raise `UserError` where a file of a checkpoint is damaged that a model is made of; a folder that is no checkpoint
    passes. Of what a checkpoint on the Hub has beside weights not all is fetched, so that it may be missing."""
    if (folder / STATE).is_file() and (folder / WEIGHTS).is_file():
        files = _read_state(folder)["files"]
        fetched = {name: sum for name, sum in files.items() if _is_fetched(folder / name)}
        check_files(folder, fetched, ADVICE)


def _is_fetched(path: Path) -> bool:
    return path.name == FROZEN or (path.name != OPTIMIZER and path.exists())


def _read_state(folder: Path) -> dict:
    """The state.json of a checkpoint, compared with its own checksum alone. Raises `UserError`."""
    path = folder / STATE
    try:
        text = read_text(path)
        state = json_values.loads(text)
    except (FileNotFoundError, NotADirectoryError):
        told = next((f"; write {path}" for name in INSIDE if follow_link(path := folder / name).is_dir()), "")
        raise UserError(f"{folder} holds no checkpoint: {STATE} is missing{told}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; {ADVICE}") from None
    except ValueError:
        raise UserError(f"{path} is damaged; {ADVICE}") from None
    if not _is_state(state):
        raise UserError(f"{path} is no checkpoint's")
    if state["format"] not in READ_FORMATS:
        raise UserError(f"{path} has format {state['format']!r}, expected was {FORMAT}: use the mlxmm that wrote it")
    if state.pop("checksum", None) != checksum_of_values(state):
        raise UserError(f"{path} is damaged; {ADVICE}")
    return json_values.loads(text, object_hook=json_values.decode)


def _is_state(values) -> bool:
    """Whether JSON values are those of a state.json, of whatever format."""
    if not isinstance(values, dict) or "format" not in values or type(values.get("global_step")) is not int:
        return False
    files = values.get("files")
    return isinstance(files, dict) and all(isinstance(checksum, str) for checksum in files.values())


def load_weights(folder: Path, module) -> None:
    """Load the weights of a checkpoint into `module`. Raises `UserError` unless names and shapes are the module's."""
    load_arrays(folder, read_weights(folder), module)


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


def by_step(folder: Path) -> dict[int, Path]:
    """The checkpoints in `folder`, in the order of their steps. What else lies there is nobody's: `step=10 copy`."""
    found = [path for path in folder.glob("step=*") if re.fullmatch(r"step=(0|[1-9]\d*)", path.name) and path.is_dir()]
    return dict(sorted((int(path.name.removeprefix("step=")), path) for path in found))


def copied_names(folder: Path) -> list[Path]:
    """The names that are folders: what copies them follows links (`cp -rL`, zip, a bucket)."""
    return [path for name in NAMES if (path := folder / name).is_dir() and not path.is_symlink()]


def step_of(folder: Path) -> int:
    """The step that a checkpoint is of; -1 for a folder that is none."""
    try:
        return int(json_values.read(folder / STATE)["global_step"])
    except (OSError, ValueError, TypeError, KeyError, OverflowError):
        return -1


def latest(*folders: Path) -> Path | None:
    """The newest undamaged checkpoint in `folders`; None if there is none yet. Prints each damaged one that it skips.

    Of two folders that have the same step, the last is taken: what was saved last knows of the others.
    Raises `UserError` that names the damaged file where all are damaged: to start again would overwrite the run.
    """
    copies = [(step_of(path), path) for folder in folders for path in copied_names(folder)]
    found = [(step, path) for folder in folders for step, path in by_step(folder).items()]
    damage: UserError | None = None
    for _, path in reversed(sorted(copies + found, key=lambda one: one[0])):  # of equals, the last in this list
        try:
            read_state(path)
            return path
        except UserError as error:
            if not path.exists():  # a run that goes on has just deleted it
                return latest(*folders)
            damage = damage or error
            say(f"skipped: {error}")
    if damage is not None:
        raise UserError(f"no checkpoint of this run is whole: {damage}")
    return None
