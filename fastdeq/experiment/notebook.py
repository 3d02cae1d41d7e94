"""Experiments in a notebook or a script."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from fastdeq.experiment.explain import explain
from fastdeq.experiment.load import load_with
from fastdeq.experiment.parts import as_typed, composed
from fastdeq.experiment.run import initial_weights
from fastdeq.experiment.run import run as run_config
from fastdeq.nn import DEQChain
from fastdeq.runs.folder import LAST
from fastdeq.runs.reading import read_summary


class Result(NamedTuple):
    """A finished run.

    model: with its last weights (mode=test: with those that were tested), in evaluation mode on
        the CPU. metrics: of the last epoch and of the test, by name. folder: the run folder.
    """

    model: DEQChain
    metrics: Mapping[str, float]
    folder: Path


def run(overrides: Sequence[str] = ()) -> Result:
    """Run one experiment, as `fastdeq train` does with these overrides: `run(["model=deq"])`.

    Raises: ValueError, TypeError or OSError for settings, data or a checkpoint that cannot be used,
        before anything is written. Later: Interrupted, after Ctrl-C; the same call with the run's
        folder (paths.run) resumes it.
    """
    try:
        if isinstance(overrides, str):
            raise TypeError(f"overrides is {overrides!r}, but must be a list: [{overrides!r}]")
        if flags := [word for word in overrides if word.startswith("-")]:
            raise ValueError(f"{flags[0]} is for the command line alone: give overrides only")
        cfg = composed(as_typed(overrides))
        folder = run_config(cfg)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error)) from error
    tested = initial_weights(cfg) if cfg.mode == "test" else None
    model = load_with(folder, tested or folder / LAST)
    return Result(model, read_summary(folder)["metrics"], folder)
