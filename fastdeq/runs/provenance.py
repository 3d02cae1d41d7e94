"""The provenance of a run's metrics: versions, commit, machine, command, memory."""

import platform
import resource
import subprocess
import sys
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("torch", "pytorch-lightning", "hydra-core", "torchmetrics", "numpy", "h5py")


def provenance(device: torch.device, command: str, release: str) -> dict[str, Any]:
    """Versions, commit, machine and command. release: the version of fastdeq."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "host": platform.node(),
        "threads": torch.get_num_threads(),
        "versions": {
            "fastdeq": release,
            "python": platform.python_version(),
            **{package: _version(package) for package in _PACKAGES},
        },
        "commit": commit(),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "command": command,
        "finished": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def peak_memory(device: torch.device) -> int:
    """The peak memory of the process in bytes: allocated on a GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit that the package's own checkout is at."""
    return _git("rev-parse", "HEAD")


def _git(*arguments: str) -> str | None:
    """The output of git for the package's own checkout; None outside a checkout or without git."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()
