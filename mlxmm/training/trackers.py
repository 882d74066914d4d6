"""WandbLogger and TrackioLogger: runs in Weights & Biases and in Trackio, which has the same functions."""

from html import escape
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mlxmm.errors import UserError
from mlxmm.training.logger import Logger, flat_params


class _Tracker(Logger):
    """A run of `project`, named after `folder`; `settings` are further arguments of the library's `init`."""

    def __init__(self, folder: Path | str, project: str = "mlxmm", **settings):
        self.folder, self.project, self.settings = Path(folder), project, settings
        self._params: dict[str, Any] = {}
        self._run: Any = None
        self._has_run = False  # a run that is written to again goes on

    def _import(self) -> ModuleType:
        raise NotImplementedError

    def _init(self, library: ModuleType, **settings):
        return library.init(**settings)

    @property
    def experiment(self):
        """The run of the library, begun at the first use."""
        if self._run is None:
            settings = {
                "project": self.project,
                "name": "-".join(self.folder.resolve().parts[-2:]),
                "config": self._params,
            }
            self._run = self._init(self._import(), **settings, **self.settings)
            self._has_run = True
        return self._run

    def _log(self, values: dict, step: int) -> None:
        self.experiment.log(values, step=step)

    def log_metrics(self, metrics, step, epoch):
        self._log({**metrics, "epoch": epoch}, step)

    def log_hyperparams(self, params):
        self._params = dict(flat_params(params))

    def log_images(self, name, images, step):
        picture = self._import().Image
        many = len(images) > 1
        self._log({f"{name}/{i}" if many else name: picture(image) for i, image in enumerate(images)}, step)

    def log_table(self, name, columns, rows, step):
        cells = [[str(cell) for cell in row] for row in rows]
        self._log({name: self._import().Table(columns=list(columns), data=cells)}, step)

    def log_histogram(self, name, values, step):
        finite = values[np.isfinite(values)]
        if finite.size:
            self._log({name: self._import().Histogram(np_histogram=np.histogram(finite, bins=64))}, step)

    def finalize(self, status):
        if self._run is not None:
            self._run.finish()
            self._run = None

    def rewind(self, position, step):
        self._has_run = True  # what was logged after the checkpoint stays: neither library takes it back


class WandbLogger(_Tracker):
    """A run in Weights & Biases, whose own files are in `folder`/wandb. `WANDB_MODE=offline` sends nothing.

    Raises `UserError` where wandb is not installed.
    """

    def _import(self):
        try:
            import wandb
        except ImportError:
            raise UserError("WandbLogger needs wandb: pip install wandb") from None
        return wandb

    def _init(self, library, **settings):
        earlier = sorted(self.folder.glob("wandb/*run-*-*"), key=lambda path: path.stat().st_mtime)
        if self._has_run and earlier:  # their names end with the id
            settings = {"id": earlier[-1].name.rpartition("-")[2], "resume": "allow"} | settings
        return library.init(dir=str(self.folder), **settings)

    def log_text(self, name, text, step):
        self._log({name: self._import().Html(f"<pre>{escape(text)}</pre>")}, step)


class TrackioLogger(_Tracker):
    """A run in Trackio, on this machine: `trackio show --project mlxmm` shows it. With `space_id`, on a Space.

    Raises `UserError` where trackio is not installed.
    """

    def _import(self):
        try:
            import trackio
        except ImportError:
            raise UserError("TrackioLogger needs trackio: pip install trackio") from None
        return trackio

    def _init(self, library, **settings):
        return library.init(**{"resume": "allow" if self._has_run else "never", "embed": False} | settings)

    def log_text(self, name, text, step):
        self._log({name: self._import().Markdown(text)}, step)
