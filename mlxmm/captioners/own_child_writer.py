"""A captioner of ours as a writer in a child process: captions beside training."""

import sys
from collections.abc import Sequence

from mlxmm.captioners.caption_writer import Sampling
from mlxmm.captioners.child_process import ChildFailed, ChildProcess, child_command
from mlxmm.captioners.child_writer import ChildWriter
from mlxmm.captioners.own_writer import checksum
from mlxmm.errors import UserError
from mlxmm.storage.hub import local_folder


class OwnChildWriter(ChildWriter):
    """A `CaptionWriter` that writes what `OwnWriter` does. Raises `UserError` if the captioner cannot be loaded."""

    def __init__(self, path_or_id: str, *, batch_size: int = 64, timeout: float = 600.0):
        folder = local_folder(path_or_id)
        child = ChildProcess(child_command("own_child", folder), timeout)
        named = {"name": str(path_or_id), "revision": checksum(folder)}
        try:
            super().__init__(child, **named, batch_size=batch_size, max_pixels=sys.maxsize)
        except ChildFailed as failure:
            raise UserError(f"{path_or_id} cannot be loaded: {failure}") from None

    def batch_seed(self, sampling: Sampling, part: Sequence, blobs: Sequence[bytes]) -> int:
        """That of the sampling: a caption is a function of it and of its picture alone."""
        return sampling.seed
