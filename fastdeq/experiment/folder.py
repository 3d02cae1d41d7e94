"""The run folder: made exclusively, and what is written about where the figures come from."""

import json
import logging
import platform
import resource
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

import torch

import fastdeq
from fastdeq.runs.files import write_atomic
from fastdeq.training import Interrupted

LOG = logging.getLogger("fastdeq")
SUMMARY, CONFIG, OVERRIDES = "summary.json", "config.yaml", "overrides.json"

_PACKAGES = ("torch", "pytorch-lightning", "hydra-core", "torchmetrics", "numpy", "h5py")


def make_folder(outputs: Path, name: str, chosen: Path | None) -> Path:
    """A new, empty folder: `chosen`, or <outputs>/<name>/<date and time>, where a number is added
    when another run was as quick.

    Raises: FileExistsError where `chosen` has appeared by now, OSError where none can be made.
    """
    try:
        return _make_folder(outputs, name, chosen)
    except FileExistsError:
        raise
    except OSError as error:
        key, place = ("paths.run", chosen) if chosen else ("paths.outputs", outputs)
        raise OSError(f"{key}: no folder can be made in {place} ({error.strerror})") from error


def _make_folder(outputs: Path, name: str, chosen: Path | None) -> Path:
    if chosen is not None:
        try:
            chosen.mkdir(parents=True)
        except FileExistsError:
            raise FileExistsError(
                f"paths.run: {chosen} is there already: give another name, leave it to the clock "
                "(paths.run=null), or go on with it (resume=auto)"
            ) from None
        return chosen
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in range(1000):
        folder = outputs / name / (stamp if attempt == 0 else f"{stamp}_{attempt}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise FileExistsError(f"could not make a new folder in {outputs / name}: 1000 in one second")


def write_json(path: Path, content: Any) -> None:
    """A reader never sees half of it."""
    write_atomic(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def provenance(device: torch.device, command: str) -> dict[str, Any]:
    """Where figures come from: versions, commit, machine and command."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "host": platform.node(),
        "threads": torch.get_num_threads(),
        "versions": {
            "fastdeq": fastdeq.__version__,
            "python": platform.python_version(),
            **{package: _version(package) for package in _PACKAGES},
        },
        "commit": commit(),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "command": command,
        "finished": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def peak_memory(device: torch.device) -> int:
    """Bytes: what the process had allocated at most on a GPU, or resident at most on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    """Let what is logged, and all warnings, go to the console as it is and to `path` with the time.

    An exception that passes through leaves its traceback in the file.
    """
    console, file = (
        _Console(),
        logging.FileHandler(path, encoding="utf-8", errors="backslashreplace"),
    )
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    LOG.addHandler(console)
    LOG.addHandler(file)
    shown, warnings.showwarning = warnings.showwarning, _log_warning
    try:
        yield
    except Interrupted as pause:
        LOG.info("%s", pause)
        raise
    except BaseException:
        record = (LOG.name, logging.ERROR, __file__, 0, "the run failed", (), sys.exc_info())
        file.handle(LOG.makeRecord(*record))
        raise
    finally:
        warnings.showwarning = shown
        LOG.removeHandler(console)
        LOG.removeHandler(file)
        file.close()


def _log_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    LOG.warning("warning: %s (%s:%d)", message, Path(filename).name, lineno)


class _Console(logging.Handler):
    """Prints to whatever stdout is now: a progress bar puts itself in its place."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), flush=True)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit that the package's own checkout is at."""
    return _git("rev-parse", "HEAD")


def _git(*arguments: str) -> str | None:
    """What git says of the package's own checkout; None outside one or without git."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(Path(fastdeq.__file__).parent), *arguments],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()
