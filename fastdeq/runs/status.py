"""status.json: the current status of a run."""

import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from fastdeq.runs.checkout import commit
from fastdeq.runs.files import write_json
from fastdeq.runs.folder import STATUS

CREATED, RUNNING, INTERRUPTED, FAILED, DONE = "created", "running", "interrupted", "failed", "done"


class Interrupted(Exception):
    """The run was stopped before its end, after it saved its state in `folder`."""

    folder: Path | None = None


@contextmanager
def recorded(folder: Path, identity: str, explain: Callable[[Exception], str]) -> Iterator[None]:
    """Keep status.json up to date: running, then done, interrupted or failed, with the error in one
    line (`explain`). If the process is killed, the status stays "running", but its lock is released
    (`fastdeq.runs.lock`).
    """
    common = {
        "identity": identity,
        "host": platform.node(),
        "pid": os.getpid(),
        "commit": commit(),
        "since": _now(),
    }
    _write(folder, common, RUNNING)
    try:
        yield
    except Interrupted as pause:
        _write(folder, common, INTERRUPTED, str(pause))
        pause.folder = folder
        raise
    except BaseException as error:
        text = explain(error) if isinstance(error, Exception) else type(error).__name__
        _write(folder, common, FAILED, text)
        raise
    _write(folder, common, DONE)


def created(folder: Path, identity: str) -> None:
    """Write the first status of a new folder."""
    _write(folder, {"identity": identity, "since": _now()}, CREATED)


def read_status(folder: Path) -> dict[str, Any]:
    """The content of status.json; empty if it is missing or cannot be read."""
    try:
        content = json.loads((folder / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(folder: Path, common: dict[str, Any], status: str, error: str | None = None) -> None:
    content = {"status": status, **common, "error": error, "updated": _now()}
    write_json(folder / STATUS, content)


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
