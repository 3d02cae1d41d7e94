"""The provenance of a run's metrics: versions, commit, machine, command, memory."""

import platform
import resource
import sys
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from fastdeq.runs.checkout import commit, is_dirty

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
        "dirty": is_dirty(),
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
