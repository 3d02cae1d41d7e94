"""The run lock: only one process at a time writes into a run folder."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastdeq.runs.folder import LOCK
from fastdeq.runs.status import read_status


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Lock a run folder. The operating system releases the lock whenever this process ends.

    Raises: BlockingIOError if another process holds the lock.
    """
    with (folder / LOCK).open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                f"{folder} is in use: another process ({_owner(folder)}) trains in it; wait for "
                "it, or choose another folder (paths.run=PATH, or resume=never in a sweep)"
            ) from None
        yield


def is_locked(folder: Path) -> bool:
    """Whether a process trains in the folder; False on a file system without locks."""
    try:
        with (folder / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _owner(folder: Path) -> str:
    status = read_status(folder)
    return f"{status.get('pid', 'of unknown number')} on {status.get('host', 'some machine')}"
