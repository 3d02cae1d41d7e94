"""The optional TensorBoard logger (conf/logger/tensorboard.yaml); needs the extra `tensorboard`.

The package does not import this module itself, so TensorBoard need not be installed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_only
from pytorch_lightning.loggers import TensorBoardLogger

from fastdeq.extras import require
from fastdeq.report.drawing import drawn
from fastdeq.report.records import Record

require("logger=tensorboard", "tensorboard")


class TensorBoard(TensorBoardLogger):
    """Lightning's TensorBoard logger. The table of hyperparameters is written with the metrics of
    the test, beside which Lightning's own `hp_metric` is left out.

    save_dir, name, version: as in Lightning's logger, and so are the options.
    """

    def __init__(
        self, *, save_dir: Path, name: str = "", version: str = "tensorboard", **options: Any
    ) -> None:
        super().__init__(save_dir, name, version, default_hp_metric=False, **options)
        self._described = False

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write scalars; with the first metrics of a test also the hyperparameters."""
        if not self._described and any(name.startswith("test/") for name in metrics):
            self._described = True
            self.log_hyperparams(self.hparams, dict(metrics), step)  # calls this method
        else:
            super().log_metrics(metrics, step)

    @rank_zero_only
    def log_plots(self, run: Record, step: int) -> None:
        """Show plots of the run, if matplotlib is installed."""
        for name, pixels in drawn(run).items():
            self.experiment.add_image(f"plots/{name}", pixels, step, dataformats="HWC")
