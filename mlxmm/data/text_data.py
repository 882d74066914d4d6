"""TextData: the text of a source as a DataModule, for language models."""

from collections.abc import Callable

from mlxmm.data.caption_source import CaptionSource
from mlxmm.data.loader import Loader
from mlxmm.data.source_data import SourceData


class TextData(SourceData):
    """Batches of `transform((notes, caption))` of the texts of `source`, completed by `collate`."""

    def __init__(
        self,
        source: CaptionSource,
        *,
        transform: Callable[[tuple[str, str]], dict],
        collate: Callable[[dict], dict] | None = None,
        batch_size: int,
    ):
        super().__init__(source)
        self.transform, self.collate = transform, collate
        self.batch_size, self._texts = batch_size, source.texts()

    def train_dataloader(self):
        return Loader(
            rows=self._texts,
            transform=lambda text, rng: self.transform(text),
            batch_size=self.batch_size,
            collate=self.collate,
            seed=self.source.seed,
            shuffle=True,
            drop_last=True,
        )
