"""The state of a run beside its weights and moments: dumped into a checkpoint, and restored from one."""

from collections.abc import Callable

import mlx.core as mx

from mlxmm.distributed import collectives
from mlxmm.errors import UserError
from mlxmm.storage import checkpoint
from mlxmm.storage.json_values import encode
from mlxmm.training.monitors import Metrics
from mlxmm.training.trainable import set_trainable, trainable_names


def dump(trainer, on_save: Callable[[dict], object]) -> dict[str, dict]:
    """What `restore` takes back: arrays by their dotted names, and JSON values as "state"; `on_save` may add to it.

    Raises `UserError` where `trainer` has not been fitting anything, and for what JSON cannot hold, with its name.
    """
    if trainer.module is None or trainer.optimizer is None:
        raise UserError("there is nothing to save yet: a checkpoint holds the module and the optimizer of a `fit`")
    if trainer.state == "interrupted":
        trainer.strategy.check_interrupted()
    for logger in trainer.loggers:
        logger.flush()
    state = trainer.progress.state_dict() | {
        "seconds": trainer.training_seconds,
        "world_size": collectives.world_size(),
        "callback_metrics": trainer.callback_metrics,
        "logged_at": trainer.logged_at,
        "trainable": trainable_names(trainer.module),
        "callbacks": {callback.state_key: callback.state_dict() for callback in trainer.callbacks},
        "datamodule": trainer.datamodule.state_dict(),
        "loggers": [[type(logger).__qualname__, logger.position()] for logger in trainer.loggers],
    }
    contents = checkpoint.contents(trainer.module, trainer.optimizer, state)
    on_save(contents)
    _check_contents(contents)
    return contents | {"state": encode(contents["state"])}


def _check_contents(contents: dict) -> None:
    """What callbacks may add to a checkpoint: values to its "state", and dicts of arrays by names of their own."""
    if "frozen" in contents:
        raise UserError("a checkpoint has frozen weights of its own: a callback must name its arrays otherwise")
    for name, part in contents.items():
        is_arrays = isinstance(part, dict) and all(isinstance(value, mx.array) for value in part.values())
        if name != "state" and not is_arrays:
            told = f"write checkpoint['state'][{name!r}] = ..., and read it there in on_load_checkpoint"
            raise UserError(f"on_save_checkpoint: checkpoint[{name!r}] is no dict of arrays: {told}")


def restore(trainer, saved: dict[str, dict], on_load: Callable[[], None]) -> None:
    """Take back what `dump` gave. The optimizer comes later: it is made for what is trainable.

    `on_load` runs once callbacks have their state, before the module gets its weights.
    Raises `UserError`, before anything is changed, where there are more or fewer processes than the run had.
    """
    state = saved["state"]
    _check_world_size(trainer.ckpt_path, state)
    trainer.datamodule.load_state_dict(state.get("datamodule", {}))  # refuses other data before anything is changed
    trainer.progress.load_state_dict(state)
    trainer.callback_metrics, trainer.logged_at = Metrics(state["callback_metrics"]), state.get("logged_at", {})
    for callback in trainer.callbacks:
        if callback.state_key in state["callbacks"]:
            callback.load_state_dict(state["callbacks"][callback.state_key])
    on_load()
    checkpoint.load_arrays(trainer.ckpt_path, saved["weights"], trainer.module)
    set_trainable(trainer.module, state["trainable"])


def _check_world_size(ckpt_path, state: dict) -> None:
    """Another number of processes is another run: its batches, shares of the data and random keys are others."""
    now = collectives.world_size()
    saved = state.get("world_size", now)
    if saved != now:
        processes = f"{saved} process" if saved == 1 else f"{saved} processes"
        there = "there is 1" if now == 1 else f"there are {now}"
        raise UserError(f"{ckpt_path} is of a run of {processes}, and now {there}: start as many as before")
