"""Folders in the Hub's layout: their JSON files, tokenizer and weights."""

from pathlib import Path

import mlx.core as mx

from mlxmm.errors import UserError
from mlxmm.storage import atomic, checkpoint, json_values
from mlxmm.storage.atomic import atomic_file, read_arrays, write_json
from mlxmm.storage.torch_weights import read_torch_weights

# The file that holds all weights, and the pattern of it or of the files among which they are split.
WEIGHT_FILES = {"model.safetensors": "model*.safetensors", "pytorch_model.bin": "pytorch_model*.bin"}


def read_config(folder: Path) -> dict:
    """The `config.json` of a folder; of a checkpoint, once its files were compared with their checksums.

    Raises `UserError` that names the file that is missing or damaged.
    """
    checkpoint.check_model(folder)
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} holds no model: it has no config.json")
    values = read_json(folder / "config.json")
    _check_not_a_run(folder, values)
    return values


def _check_not_a_run(folder: Path, values: dict) -> None:
    """Raise `UserError` where these are the settings of a run: what it trained is in folders of its own."""
    if "model_type" in values or "run_dir" not in values:
        return
    if any((folder / "checkpoints").glob("*")):
        raise UserError(f"{folder} is the folder of a run: name {folder / 'checkpoints' / 'best'}")
    go_on = f"go on with the command that began it, with --run-dir {folder} --resume last"
    raise UserError(f"{folder} is the folder of a run that has no model yet: it was not finished; {go_on}")


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises `UserError` if it is missing or damaged."""
    try:
        values = json_values.read(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} cannot be read: it is damaged, {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} cannot be read: a JSON object was expected, {type(values).__name__} came")
    return values


def require_parts(folder: Path, values: dict, *names: str) -> None:
    """Raise `UserError` if `values`, the `config.json` of a module, lacks one of the parts `names`."""
    if missing := [name for name in names if not isinstance(values.get(name), dict)]:
        raise UserError(f"{folder / 'config.json'} is damaged: it does not describe {', '.join(missing)}")


def write_settings(folder: Path, config: dict, processor, tokenizer) -> None:
    """Write all that a model's folder holds beside its weights."""
    write_json(folder / "config.json", config)
    write_json(folder / "preprocessor_config.json", processor.to_hub())
    tokenizer.save_pretrained(str(folder))


def write_arrays(path: Path, arrays: dict[str, mx.array], **metadata: str) -> None:
    """Write a safetensors file, whole or not at all. Arrays may have been read from `path` itself."""
    with atomic_file(path) as temporary:
        atomic.write_arrays(temporary, arrays, metadata=metadata or None)


def read_weights(folder: Path) -> dict[str, mx.array]:
    """The arrays of all model*.safetensors of a folder, or of its pytorch_model*.bin if it has no such file.

    Raises `UserError` if there are neither, or if one is missing or damaged.
    """
    files = weight_files(folder)
    read = read_arrays if files[0].suffix == ".safetensors" else read_torch_weights
    return {name: array for file in files for name, array in read(file).items()}


def weight_files(folder: Path) -> list[Path]:
    """The files that `read_weights` reads. Raises `UserError` if there are none, or if the index names one that is
    missing."""
    for whole, pattern in WEIGHT_FILES.items():
        if files := sorted(folder.glob(pattern)):
            if folder / whole not in files:
                _check_index(folder / f"{whole}.index.json", files)
            return files
    raise UserError(f"{folder} has neither {' nor '.join(WEIGHT_FILES)}")


def _check_index(index: Path, files: list[Path]) -> None:
    if not index.exists():
        return
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict):
        raise UserError(f"{index} is damaged: it has no weight_map")
    if missing := sorted(set(named.values()) - {file.name for file in files}):
        raise UserError(f"{index.parent} lacks {', '.join(missing)}, which {index.name} names")


def require_weights(folder: Path) -> None:
    """Raise `UserError` unless `folder` has all files of its weights: those of a checkpoint, or of `weight_files`.

    Of safetensors files the headers are read.
    """
    if (folder / checkpoint.WEIGHTS).exists():
        checkpoint.read_weights(folder)
        return
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            read_arrays(file)
