"""What a run folder says of its run while nobody looks: status.json."""

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from fastdeq.experiment.explain import explain
from fastdeq.experiment.folder import commit, write_json
from fastdeq.training import Interrupted

STATUS = "status.json"
CREATED, RUNNING, INTERRUPTED, FAILED, DONE = "created", "running", "interrupted", "failed", "done"


@contextmanager
def recorded(folder: Path, identity: str) -> Iterator[None]:
    """Keep status.json while the run is made: running; then done, interrupted or failed, with the
    error in a line. A process that is killed leaves "running" behind, and its lock open: see
    `fastdeq.experiment.resume.held`.
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
        raise
    except BaseException as error:
        text = explain(error) if isinstance(error, Exception) else type(error).__name__
        _write(folder, common, FAILED, text)
        raise
    _write(folder, common, DONE)


def created(folder: Path, identity: str) -> None:
    """The first word of a new folder."""
    _write(folder, {"identity": identity, "since": _now()}, CREATED)


def read_status(folder: Path) -> dict[str, Any]:
    """What status.json says; of an older run, or half a folder, nothing."""
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
