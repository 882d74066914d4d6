"""Why a run has ended, where it is not plain: a callback stopped it, or it was resumed and had nothing left to do."""

from mlxmm.terminal import counted


def why_ended(trainer, first_step: int) -> str | None:
    """A line that says why training ended at a step that began at `first_step`; None if a limit was all it came to."""
    limit, reason = trainer.schedule.limit, _reason(trainer)
    if trainer.global_step == first_step:
        before = "no update was made" + (f", the run has had {counted(first_step, 'update')}" if first_step else "")
        if limit is not None:
            return f"{before}: {limit} is reached"
        return f"{before}: {reason}; to go on, change what stops it, or leave it out"
    if limit is not None:
        return None
    total = trainer.schedule.known_updates
    of = "" if total is None else f" of {total:,}"
    return f"training ended after {counted(trainer.global_step, 'update')}{of}: {reason}"


def _reason(trainer) -> str:
    """What stopped the run, by the words of those that did."""
    if trainer.schedule.time_is_up:
        return f"max_time={trainer.config.max_time} is over"
    told = [f"{type(one).__name__}: {one.stopping_reason}" for one in trainer.callbacks if one.stopping_reason]
    return "; ".join(told) or "trainer.should_stop was set"
