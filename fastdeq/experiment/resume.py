"""A run folder that is there already: whose it is, and from where it can go on."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fastdeq.experiment.folder import CONFIG, LOG, SUMMARY
from fastdeq.experiment.status import read_status
from fastdeq.runs.files import is_sealed
from fastdeq.runs.identity import Leaf, identity
from fastdeq.training import BEFORE, RESUME

_LOCK = ".lock"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run folder; the operating system lets them in again when this
    one ends, however it ends.

    Raises: BlockingIOError where a process is at work in it.
    """
    with (folder / _LOCK).open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                f"{folder} is in use: another process ({_owner(folder)}) trains in it; wait for "
                "it, or choose another folder (paths.run=PATH, or resume=never in a sweep)"
            ) from None
        yield


def is_done(folder: Path) -> bool:
    """Whether the run has come to its end."""
    return (folder / SUMMARY).exists()


def check_same(folder: Path, config: dict[str, Any]) -> None:
    """Raises: FileExistsError for a folder that is no run, or a run with other settings."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileExistsError(
            f"paths.run: {folder} is there already and is no run (without {CONFIG}): give another "
            "name, or leave it to the clock (paths.run=null)"
        )
    saved, ours = _saved(folder), identity(config)
    for key in sorted(saved.keys() | ours.keys()):
        if saved.get(key) != ours.get(key):
            raise FileExistsError(
                f"paths.run: {folder} is there already, a run with {key}={saved.get(key)}, and "
                f"here it is {ours.get(key)}: go on with the settings of that run, or give another "
                "name (its weights can be taken by checkpoint=)"
            )


def same_run_beside(folder: Path, config: dict[str, Any]) -> Path | None:
    """Of the runs of a sweep, which are called by their identities, the one that is the same: an
    earlier version of fastdeq has called it otherwise than `folder`.
    """
    ours = identity(config)
    for path in sorted(folder.parent.glob(f"{'[0-9a-f]' * 12}/{CONFIG}")):
        if _saved(path.parent) == ours:
            return path.parent
    return None


def saved_state(folder: Path) -> Path | None:
    """The newest state that is whole, or None: then the run starts from its beginning."""
    states = [folder / name for name in (RESUME, BEFORE)]
    found = next((path for path in states if is_sealed(path)), None)
    for path in states[: None if found is None else states.index(found)]:
        if path.exists():
            instead = "the beginning" if found is None else found.name
            LOG.warning("warning: %s is not whole: going on from %s", path, instead)
    return found


def _owner(folder: Path) -> str:
    status = read_status(folder)
    return f"{status.get('pid', 'of unknown number')} on {status.get('host', 'some machine')}"


def _saved(folder: Path) -> dict[str, Leaf]:
    """The identity of the run in a folder, as it is judged today."""
    saved: Any = OmegaConf.to_container(OmegaConf.load(folder / CONFIG))
    return identity(saved if isinstance(saved, dict) else {})
