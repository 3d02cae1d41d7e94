"""metrics.csv, for runs that may be interrupted."""

import csv
from pathlib import Path
from typing import Any

from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.loggers import CSVLogger

from fastdeq.runs.folder import METRICS


class MetricsFile(CSVLogger):
    """Lightning's CSV logger in `folder`. It keeps the first `rows` rows of an earlier process; the
    steps after its last saved state are repeated, and so are their rows.
    """

    def __init__(self, folder: Path, *, rows: int = 0) -> None:
        super().__init__(save_dir=folder, name="", version="")
        self.path, self._rows = folder / METRICS, rows

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Lightning's writer, created with the first row, on the first process only."""
        if self._experiment is None:
            kept = _read(self.path)[: self._rows]
            writer: Any = super().experiment  # deletes an existing file
            # Columns that only dropped rows had are added again by the repeated steps.
            names = sorted({name for row in kept for name, text in row.items() if text})
            if names:
                writer.metrics_keys = names
                with self.path.open("w", newline="", encoding="utf-8") as file:
                    table = csv.DictWriter(file, fieldnames=names, extrasaction="ignore")
                    table.writeheader()
                    table.writerows(kept)
        return self._experiment

    def flush(self) -> int:
        """Write all logged rows; return the number of rows in the file."""
        self.save()
        return len(_read(self.path))


def _read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
