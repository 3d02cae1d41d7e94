"""Training a finished run further, in a folder of its own."""

import shutil
from pathlib import Path
from typing import Any

from fastdeq.runs.files import is_sealed, sealed_path
from fastdeq.runs.folder import BEST, LAST, METRICS, RESUME
from fastdeq.runs.identity import identity
from fastdeq.runs.reading import is_done, read_config, read_summary

_MAY_DIFFER = {"extend", "name", "trainer.max_epochs", "trainer.max_steps"}


def check_extension(run: Path, config: dict[str, Any]) -> None:
    """Raises: ValueError if the run cannot be trained further with this configuration."""
    if not is_done(run):
        raise ValueError(
            f"extend: {run} has not finished: the command that started it resumes it (paths.run)"
        )
    if not is_sealed(run / LAST):
        raise ValueError(f"extend: {run / LAST} is missing or damaged: take another run")
    saved, ours = identity(read_config(run)), identity(config)
    for key in sorted((saved.keys() | ours.keys()) - _MAY_DIFFER):
        if saved.get(key) != ours.get(key):
            raise ValueError(
                f"extend: {key} is {saved.get(key)} in {run}, and here it is {ours.get(key)}: only "
                "trainer.max_epochs and trainer.max_steps may differ (from_run=RUN and "
                "checkpoint=RUN/last.ckpt begin a new run with its weights)"
            )
    _check_longer(run, config["trainer"])


def _check_longer(run: Path, trainer: dict[str, Any]) -> None:
    summary = read_summary(run)
    for key, done in (("max_epochs", summary["epochs"]), ("max_steps", summary["steps"])):
        limit = trainer.get(key)
        if limit not in (None, -1) and limit <= done:
            raise ValueError(
                f"extend: trainer.{key} is {limit}, but {run} has trained {done} already: give "
                f"trainer.{key}=N above it"
            )


def begin_from(run: Path, folder: Path) -> None:
    """Make `folder` resume where `run` has ended: its last state, metrics and best checkpoint."""
    for source, target in ((LAST, RESUME), (BEST, BEST)):
        if (run / source).exists():
            with sealed_path(folder / target) as aside:
                shutil.copyfile(run / source, aside)
    if (run / METRICS).exists():
        shutil.copyfile(run / METRICS, folder / METRICS)
