"""Image files in one HDF5 file, which are read one by one; docs/data.md describes its layout."""

import os
import sys
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor

from fastdeq.data.store import (
    CURE,
    DAMAGE,
    Arrays,
    Layout,
    new_file,
    one_line,
    open_file,
    read_content,
    read_file,
    sha256_of_arrays,
    write_attributes,
)

SPLITS = ("train", "val")
_COLUMNS = {"offsets": "<i8", "labels": "<i8", "crc32": "<u4", "names": "|u1"}
INDEX: Layout = {
    **{f"{split}/{name}": (kind, 1) for split in SPLITS for name, kind in _COLUMNS.items()},
    "classes": ("|u1", 1),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class FolderSplit:
    """The image files of one split, sorted by class and name."""

    folder: Path
    names: Sequence[str]  # "class/file", or a longer path
    sizes: NDArray[np.int64]  # (N,), in bytes
    times: NDArray[np.int64]  # (N, 2), mtime and ctime in nanoseconds
    labels: NDArray[np.int64]  # (N,)

    def chosen(self, mask: NDArray[np.bool_]) -> Self:
        """Return the files where ``mask`` (N,) is true."""
        names = [name for name, is_chosen in zip(self.names, mask, strict=True) if is_chosen]
        arrays = {name: getattr(self, name)[mask] for name in ("sizes", "times", "labels")}
        return replace(self, names=names, **arrays)

    def read(self, index: int) -> bytes:
        """Return the content of a file; raises ValueError where that fails or its size changed."""
        path = self.folder / self.names[index]
        content = read_content(path)
        if len(content) != self.sizes[index]:
            raise ValueError(
                f"{path}: has {len(content)} bytes, and had {self.sizes[index]} a moment ago: wait "
                "until nothing is written there any more, and start again"
            )
        return content


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageFolder:
    """A folder of image files: its ``classes`` in the order of their names, and its ``splits``."""

    root: Path
    classes: Sequence[str]
    splits: Mapping[str, FolderSplit]


class Records:
    """The image files of one split of a store.

    Processes may share it, by fork or pickle: each opens the file itself when it first reads.

    ``source``: the folder that the images came from. ``arrays``: offsets, labels and crc32 of all
    images of the split.
    """

    def __init__(self, *, path: Path, split: str, source: str, arrays: Arrays) -> None:
        self._path, self._split, self._source, self._arrays = path, split, source, arrays
        self._numbers = np.arange(len(arrays["labels"]))  # of these images in the split
        self._file: h5py.File | None = None
        self._process: int | None = None  # which has opened the file

    def __len__(self) -> int:
        """Return N."""
        return len(self._numbers)

    @property
    def targets(self) -> Tensor:
        """The labels, int64 (N,)."""
        return torch.from_numpy(self._arrays["labels"][self._numbers])

    def __getitem__(self, mask: Tensor) -> Self:
        """Return the records where ``mask``, bool (N,), is true."""
        chosen = copy(self)
        chosen._numbers = self._numbers[mask.numpy()]
        return chosen

    def to(self, device: torch.device) -> Self:
        """Return these records, as ``Samples.to`` does: they are read on the CPU."""
        return self

    def read(self, index: int) -> bytes:
        """Return the content of an image file; raises ValueError naming it where it is damaged."""
        number = self._numbers[index]
        start, stop = self._arrays["offsets"][number : number + 2]
        try:
            found: bytes = self._open()[f"{self._split}/bytes"][start:stop].tobytes()
        except DAMAGE as error:
            place = f"{self._path}: {self._split} image {number}"
            raise ValueError(f"{place} cannot be read ({one_line(error)}): {CURE}") from error
        if zlib.crc32(found) != self._arrays["crc32"][number]:
            raise ValueError(f"{self._path}: its copy of {self.file(index)} is damaged: {CURE}")
        return found

    def file(self, index: int) -> str:
        """Return the path of the file that an image was read from."""
        return f"{self._source}/{self.names()[index]}"

    def names(self) -> list[str]:
        """Return the names of the images, "class/file"."""
        names = _parted(np.asarray(self._open()[f"{self._split}/names"]))
        return [names[number] for number in self._numbers]

    def holds(self, split: FolderSplit) -> bool:
        """Return whether these are exactly the files of ``split``; raises as ``split.read``."""
        try:
            return self.names() == list(split.names) and all(
                self._reads_as(number, split.read(number))
                for number in shown(len(self), "comparing the store with its files")
            )
        finally:
            self.close()

    def _reads_as(self, index: int, content: bytes) -> bool:
        try:
            return self.read(index) == content
        except ValueError:  # damaged
            return False

    def close(self) -> None:
        """Close the file; the next read opens it again."""
        if self._file is not None and self._process == os.getpid():
            self._file.close()
        self._file = None

    def _open(self) -> h5py.File:
        if self._file is None or self._process != os.getpid():
            self._file, self._process = open_file(self._path), os.getpid()
        return self._file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordFile:
    """An opened store of image files."""

    train: Records
    val: Records
    classes: Sequence[str]
    attributes: Mapping[str, str]


def write_records(
    path: Path,
    folder: ImageFolder,
    attributes: Mapping[str, str],
    *,
    check: Callable[[bytes], object],
) -> None:
    """Write image files to a new file, which appears whole or not at all; one is in memory at once.

    ``check`` raises ValueError for a content that is not an image. Raises ValueError naming a file
    that is wrong, FileExistsError where ``path`` exists, and what h5py raises.
    """
    arrays: dict[str, NDArray[Any]] = {"classes": _joined(folder.classes)}
    with new_file(path) as file:
        for name, split in folder.splits.items():
            offsets = np.concatenate([[0], split.sizes.cumsum()])
            arrays[f"{name}/offsets"], arrays[f"{name}/labels"] = offsets, split.labels
            arrays[f"{name}/names"] = _joined(split.names)
            arrays[f"{name}/crc32"] = crc32 = np.zeros(len(split.names), dtype=np.uint32)
            contents = file.create_dataset(
                f"{name}/bytes", (offsets[-1],), "|u1", track_times=False
            )
            for number in shown(len(split.names), "building the store"):
                content = split.read(number)
                try:
                    check(content)
                except ValueError as error:
                    place = split.folder / split.names[number]
                    raise ValueError(
                        f"{place}: {error}: replace or remove it, or leave out all such images "
                        "with data.skip_unreadable=true"
                    ) from error
                crc32[number] = zlib.crc32(content)
                contents[offsets[number] : offsets[number + 1]] = np.frombuffer(content, np.uint8)
        for name, (kind, _) in INDEX.items():
            arrays[name] = arrays[name].astype(kind)
            file.create_dataset(name, data=arrays[name], track_times=False)
        write_attributes(file, {**attributes, "sha256": sha256_of_arrays(arrays, INDEX)})


def read_records(
    path: Path, *, cure: str = CURE, wanted: Mapping[str, str] | None = None
) -> RecordFile:
    """Open a store of image files and verify all but the contents, as ``read_store`` does."""
    attributes, arrays = read_file(path, INDEX, cure, wanted or {})
    splits = {}
    for split in SPLITS:
        kept = {name: arrays[f"{split}/{name}"] for name in ("offsets", "labels", "crc32")}
        source = f"{attributes['source']}/{attributes.get(split, split)}"
        splits[split] = Records(path=path, split=split, source=source, arrays=kept)
    return RecordFile(**splits, classes=_parted(arrays["classes"]), attributes=attributes)


def _joined(names: Iterable[str]) -> NDArray[Any]:
    # As the file system has them: a name need not be UTF-8.
    content = b"".join(os.fsencode(name) + b"\0" for name in names)
    return np.frombuffer(content, dtype=np.uint8)


def _parted(names: NDArray[Any]) -> list[str]:
    return [os.fsdecode(name) for name in names.tobytes().split(b"\0")[:-1]]


def shown(count: int, task: str) -> Iterable[int]:
    """Return the numbers below ``count``, with a progress bar on a terminal."""
    console = Console(stderr=True)
    hidden = not sys.stderr.isatty()
    return track(range(count), task, console=console, transient=True, disable=hidden)
