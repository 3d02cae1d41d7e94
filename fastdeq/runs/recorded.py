"""Recorded equilibria in HDF5: how the solves of some batches went, forward and backward.

Layout of a file, recorded/epoch_<number>.h5 or recorded/test.h5 of a run folder; N samples of
the whole set, B of a batch, K steps at most, D numbers of a state:

    attributes                  format "fastdeq recorded solves", version 1, stage, epoch, step
    nfe, status                 (N,)         every sample of the set (of the first process)
    relative_residual           (N,)
    batches/<index>/
        spectral_radius         (B,)         of ∂f/∂z at z*
        inputs, targets         (B, ...)     with states
        forward/, backward/
            residuals           (K + 1, B)   row 0 is the start; backward: GMRES by its recurrence
            nfe, steps, status  (B,)         status: the values of `fastdeq.solution.Status`
            residual            (B,)
            relative_residual   (B,)
            norm                (B,)         ‖z*‖; backward: ‖v‖ of (I − Jᵀ) v = w
            value               (B, D)       z*; backward: v; with states
            states              (K + 1, B, D)  the iterates; not of GMRES; with states

Numbers that a solve does not have are missing.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import h5py
import numpy as np
from numpy.typing import NDArray

from fastdeq.runs.files import atomic_path

FORMAT, VERSION = "fastdeq recorded solves", 1

Numbers = NDArray[Any]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SolveRecord:
    """The solve of a batch, forward or backward; see the layout above."""

    nfe: Numbers
    steps: Numbers
    status: Numbers
    residual: Numbers
    relative_residual: Numbers
    residuals: Numbers | None = None
    norm: Numbers | None = None
    value: Numbers | None = None
    states: Numbers | None = None


@dataclass(frozen=True, kw_only=True)
class BatchRecord:
    """A batch of the validation or test set; see the layout above."""

    forward: SolveRecord
    backward: SolveRecord | None = None
    spectral_radius: Numbers | None = None
    inputs: Numbers | None = None
    targets: Numbers | None = None


@dataclass(frozen=True, kw_only=True)
class RecordedSolves:
    """The content of a file. batches: by their index in the set."""

    stage: str
    epoch: int
    step: int
    nfe: Numbers
    status: Numbers
    relative_residual: Numbers
    batches: Mapping[int, BatchRecord] = field(default_factory=dict)


def write_recording(path: Path, recording: RecordedSolves) -> None:
    """Write a file atomically; one that exists is replaced."""
    path.parent.mkdir(exist_ok=True)
    with atomic_path(path) as aside, h5py.File(aside, "w") as file:
        file.attrs.update({"format": FORMAT, "version": VERSION})
        for name in ("stage", "epoch", "step"):
            file.attrs[name] = getattr(recording, name)
        for name in ("nfe", "status", "relative_residual"):
            _write(file, name, getattr(recording, name))
        for index, batch in recording.batches.items():
            _write(file.create_group(f"batches/{index}"), "", batch)


def read_recording(path: Path) -> RecordedSolves:
    """Read a file.

    Raises: FileNotFoundError if there is none; ValueError for a file of another layout.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        with h5py.File(path, "r") as file:
            found = file.attrs.get("format"), file.attrs.get("version")
            if found != (FORMAT, VERSION):
                raise KeyError(f"its format is {found[0]}, version {found[1]}")
            batches = file.get("batches", {})
            return RecordedSolves(
                **{name: _plain(file.attrs[name]) for name in ("stage", "epoch", "step")},
                **{name: file[name][()] for name in ("nfe", "status", "relative_residual")},
                batches={int(name): _batch(batches[name]) for name in sorted(batches, key=int)},
            )
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).strip("'\"").split())
        raise ValueError(
            f"{path} holds no equilibria that fastdeq has recorded ({reason}): give a file of "
            "<run>/recorded"
        ) from error


def _write(group: h5py.Group, name: str, value: Any) -> None:
    if isinstance(value, SolveRecord | BatchRecord):
        inner = group.create_group(name) if name else group
        for each in fields(value):
            _write(inner, each.name, getattr(value, each.name))
    elif value is not None:
        group.create_dataset(name, data=value, compression="gzip", shuffle=True)


def _batch(group: h5py.Group) -> BatchRecord:
    solves = {
        name: _made(SolveRecord, group[name]) for name in ("forward", "backward") if name in group
    }
    return _made(BatchRecord, group, **solves)


def _made(kind: Callable[..., T], group: h5py.Group, **inner: Any) -> T:
    others = {name: node[()] for name, node in group.items() if isinstance(node, h5py.Dataset)}
    return kind(**others, **inner)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
