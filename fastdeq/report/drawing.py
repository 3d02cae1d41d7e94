"""Plots where matplotlib is installed, for what works without them, too."""

from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from fastdeq.report.records import Record

plots: ModuleType | None
try:
    from fastdeq.report import plots
except ModuleNotFoundError as error:
    if not str(error.name).startswith("matplotlib"):
        raise
    plots = None


def drawn(run: Record) -> dict[str, NDArray[np.uint8]]:
    """The pixels of the plots of a run, (height, width, 3), by name; empty without matplotlib."""
    return {} if plots is None else plots.images(run)
