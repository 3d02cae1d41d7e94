"""L8: a run folder that is there already: whose it is, and from where it can go on."""

import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fastdeq.callbacks import BEFORE, RESUME, is_sealed
from fastdeq.experiment.folder import CONFIG, LOG, SUMMARY
from fastdeq.experiment.status import read_status

_LOCK = ".lock"
_FREE = (
    *("paths", "resume", "stop_after", "from_run", "reference", "logger", "debug"),
    "stop_at_failure",
    *("callbacks.resumption", "task.optimizer", "task.model", "task.weights", "task.schedule"),
    *("trainer.accelerator", "trainer.devices", "trainer.strategy", "trainer.num_nodes"),
    *("trainer.detect_anomaly", "data.root", "data.store", "data.download", "data.verify"),
    "data.workers",
)
"""What is no part of a run's identity: where it is made and by what machines, and what is said a
second time (the task's parts). Its figures do not depend on it.
"""


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


def identity_of(config: dict[str, Any]) -> str:
    """Twelve digits that two runs share if their settings are the same."""
    text = json.dumps(_identity(config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


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
    saved = _identity(OmegaConf.to_container(OmegaConf.load(path)))
    ours = _identity(config)
    for key in sorted(saved.keys() | ours.keys()):
        if saved.get(key) != ours.get(key):
            raise FileExistsError(
                f"paths.run: {folder} is there already, a run with {key}={saved.get(key)}, and "
                f"here it is {ours.get(key)}: go on with the settings of that run, or give another "
                "name (its weights can be taken by checkpoint=)"
            )


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


def _identity(config: Any) -> dict[str, Any]:
    """All settings that the figures depend on, by their full keys."""
    return {
        key: value
        for key, value in _leaves(config, "")
        if not any(key == free or key.startswith(f"{free}.") for free in _FREE)
    }


def _leaves(node: Any, key: str) -> Iterator[tuple[str, Any]]:
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for name, value in items:
        full = f"{key}.{name}" if key else str(name)
        if isinstance(value, dict | list) and value:
            yield from _leaves(value, full)
        else:
            yield full, value
