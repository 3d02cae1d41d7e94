"""Short runs, whole and in pieces."""

from pathlib import Path

from fastdeq import experiment
from fastdeq.runs.files import is_sealed
from fastdeq.runs.folder import RESUME
from fastdeq.runs.status import Interrupted
from tests.configurations import composed

SHORT = ("trainer.max_epochs=3", "trainer.accelerator=cpu", "data.batch_size=360")
"""Twelve steps: three epochs of four."""
AT_ONCE = "stop_after=1e-9"  # after every step, but for the last of the run


def run(folder: Path, *overrides: str) -> Path:
    return experiment.run_config(composed(*SHORT, f"paths.run={folder}", *overrides))


def run_in_pieces(folder: Path, *overrides: str, most: int = 40) -> int:
    """Start the run again whenever it stops; how often that was."""
    for pieces in range(most):
        try:
            run(folder, AT_ONCE, *overrides)
        except Interrupted:
            assert is_sealed(folder / RESUME)
            continue
        return pieces
    raise AssertionError(f"not done after {most} pieces")
