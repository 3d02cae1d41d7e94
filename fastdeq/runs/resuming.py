"""Resuming in an existing run folder: whether it holds this run, and the state to resume from."""

from pathlib import Path
from typing import Any

from fastdeq.runs.files import is_sealed
from fastdeq.runs.folder import BEFORE, CONFIG, RESUME
from fastdeq.runs.identity import identity
from fastdeq.runs.log import LOG
from fastdeq.runs.reading import read_config


def check_same(folder: Path, config: dict[str, Any]) -> None:
    """Raises: FileExistsError for a folder without a run, or with a run of other settings."""
    if not (folder / CONFIG).is_file():
        raise FileExistsError(
            f"paths.run: {folder} exists and is not a run folder (without {CONFIG}): give another "
            "name, or leave it to the clock (paths.run=null)"
        )
    saved, ours = identity(read_config(folder)), identity(config)
    for key in sorted(saved.keys() | ours.keys()):
        if saved.get(key) != ours.get(key):
            raise FileExistsError(
                f"paths.run: {folder} exists, a run with {key}={saved.get(key)}, and here it is "
                f"{ours.get(key)}: resume with the settings of that run, or give another name (its "
                "weights can be taken by checkpoint=)"
            )


def same_run_beside(folder: Path, config: dict[str, Any]) -> Path | None:
    """The folder beside `folder` that holds the same run of a sweep. Folders are named by identity,
    and an earlier version of fastdeq may have named this run differently.
    """
    ours = identity(config)
    for path in sorted(folder.parent.glob(f"{'[0-9a-f]' * 12}/{CONFIG}")):
        if identity(read_config(path.parent)) == ours:
            return path.parent
    return None


def saved_state(folder: Path) -> Path | None:
    """The newest intact state, or None: the run then starts from the beginning."""
    states = [folder / name for name in (RESUME, BEFORE)]
    found = next((path for path in states if is_sealed(path)), None)
    for path in states[: None if found is None else states.index(found)]:
        if path.exists():
            instead = "the beginning" if found is None else found.name
            LOG.warning("warning: %s is damaged: resuming from %s", path, instead)
    return found
