"""Metrics.csv, of runs that may be interrupted."""

import csv
from pathlib import Path
from typing import Any

from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.loggers import CSVLogger

from fastdeq.runs.folder import METRICS


class MetricsFile(CSVLogger):
    """Lightning's CSV logger in `folder`, which goes on after the first `rows` rows of an earlier
    process: what that one wrote after its last saved state comes again, and is written again.
    """

    def __init__(self, folder: Path, *, rows: int = 0) -> None:
        super().__init__(save_dir=folder, name="", version="")
        self.path, self._rows = folder / METRICS, rows

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Lightning's writer; made when the first row comes, by the first process alone."""
        if self._experiment is None:
            kept = _read(self.path)[: self._rows]
            writer: Any = super().experiment  # deletes what is there
            # Columns that only the rows left out had come again with these.
            names = sorted({name for row in kept for name, text in row.items() if text})
            if names:
                writer.metrics_keys = names
                with self.path.open("w", newline="", encoding="utf-8") as file:
                    table = csv.DictWriter(file, fieldnames=names, extrasaction="ignore")
                    table.writeheader()
                    table.writerows(kept)
        return self._experiment

    def flush(self) -> int:
        """Write what was logged so far; how many rows that makes."""
        self.save()
        return len(_read(self.path))


def _read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
