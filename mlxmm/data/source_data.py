"""SourceData: a DataModule over a source. A run that is resumed must find the data that it was trained on."""

from mlxmm.data.caption_source import CaptionSource
from mlxmm.data.sources.tables import tell
from mlxmm.storage.lineage import held_out_changes, require_unchanged
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
        are known. A change of what is held out is printed."""
        before, now = state.get("lineage"), self.source.lineage
        if not before or not now:
            return
        require_unchanged(before, now)
        if changed := held_out_changes(before, now):
            tell(f"warning: the held-out data changed, so metrics before and after do not compare: {changed}")
