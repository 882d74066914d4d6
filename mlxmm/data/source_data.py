"""SourceData: a DataModule over a source. A run that is resumed must find the data that it was trained on."""

from mlxmm.data.caption_source import CaptionSource
from mlxmm.errors import UserError
from mlxmm.storage.lineage import changes
from mlxmm.training.datamodule import DataModule


class SourceData(DataModule):
    """What the DataModules over a `CaptionSource` share: its lineage goes into each checkpoint."""

    def __init__(self, source: CaptionSource):
        self.source = source

    def state_dict(self) -> dict:
        """The lineage of the source, whatever has replaced its rows meanwhile."""
        return {"lineage": list(self.source.lineage)}

    def load_state_dict(self, state: dict) -> None:
        """Raise `UserError` that says what changed, unless the source is the one that was trained on, as far as both
        are known."""
        before, now = state.get("lineage"), self.source.lineage
        if before and now and (changed := changes(before, now)):
            raise UserError(
                f"the training data changed: {changed}. Bring them back, or start a new run from this one's weights"
            )
