"""Progress: the counters of a run, which a checkpoint keeps."""

import uuid
from collections.abc import Mapping

import attrs
import mlx.core as mx

from mlxmm.training.epoch_means import EpochMeans


@attrs.define(on_setattr=attrs.setters.NO_OP)
class Progress:
    """How far a run is. Order of data and random keys are functions of these counters and of the seed."""

    global_step: int = 0  # optimizer updates, and nothing else
    current_epoch: int = 0
    batch_idx: int = 0  # micro-batches of this epoch that are done
    seconds: float = 0.0  # of training, those before a resume included
    validating: bool = False  # the validation after this update has begun and not ended
    means: EpochMeans = attrs.field(factory=EpochMeans)  # of the training metrics of this epoch
    run_id: str = attrs.field(factory=lambda: uuid.uuid4().hex)  # that of the first fit, in all that resume it

    def finish_update(self, num_batches: int, metrics: Mapping[str, mx.array]) -> None:
        """Count an update made from `num_batches` micro-batches, and its metrics."""
        self.global_step += 1
        self.batch_idx += num_batches
        self.means.add(metrics)

    def finish_epoch(self) -> None:
        """Count an epoch; the next one starts at its first batch."""
        self.current_epoch, self.batch_idx, self.means = self.current_epoch + 1, 0, EpochMeans()

    def state_dict(self) -> dict:
        """The counters as JSON values."""
        return attrs.asdict(self, recurse=False) | {"means": self.means.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Take back what `state_dict` gave; other entries of `state` are ignored."""
        for field in attrs.fields(type(self)):
            if field.name != "means":
                setattr(self, field.name, state.get(field.name, getattr(type(self)(), field.name)))
        self.means.load_state_dict(state.get("means", {}))
