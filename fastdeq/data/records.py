"""Encoded images in one HDF5 file: a million stay one file, written and read one at a time.

Datasets of each split, train and val: ``bytes`` uint8, the files' contents one after the other,
contiguous; ``offsets`` int64 (N + 1,), where each begins and the last one ends; ``labels`` int64
(N,); ``crc32`` uint32 (N,), of each content, as zlib has it; ``names`` uint8, each file's
"class/file" and a zero byte. Beside the splits: ``classes`` uint8, the classes' names likewise.
File attributes, UTF-8: those of every store and ``sha256``.

``sha256`` is the SHA-256 of, for each dataset but ``bytes`` in the order of ``INDEX``, the ASCII
line ``"<name> <type> <length>\\n"`` followed by its values, little-endian. It is verified whenever
a file is opened. The contents may take a quarter of an hour to read: each is verified by its CRC-32
whenever it is read.
"""

import hashlib
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdeq.data.build import CURE
from fastdeq.data.folder import SPLITS, FolderSplit, ImageFolder
from fastdeq.data.store import (
    DAMAGE,
    attribute_problem,
    open_file,
    read_file,
    write_attributes,
    written_aside,
)

_TYPES = {"offsets": "<i8", "labels": "<i8", "crc32": "<u4", "names": "|u1"}
INDEX = {
    **{f"{split}/{name}": kind for split in SPLITS for name, kind in _TYPES.items()},
    "classes": "|u1",
}
"""The datasets that are read whole, and their types."""

Arrays = Mapping[str, NDArray[Any]]


def write_records(
    path: Path,
    folder: ImageFolder,
    attributes: Mapping[str, str],
    *,
    check: Callable[[bytes], None],
    watch: Callable[[range], Iterable[int]],
) -> None:
    """Write the folder's images to a new file, one in memory at a time; it appears whole or not.

    ``check`` raises ValueError for a content that is no image; ``watch`` passes the numbers of the
    images on as they are written, and may tell the user. Raises ValueError naming a file that is
    wrong, FileExistsError where ``path`` exists, and what h5py does where it cannot be written.
    """
    arrays: dict[str, NDArray[Any]] = {"classes": _joined(folder.classes)}
    with written_aside(path) as aside, open_file(aside, new=True) as file:
        for name, split in folder.splits.items():
            offsets = np.concatenate([[0], split.sizes.cumsum()])
            arrays[f"{name}/offsets"], arrays[f"{name}/labels"] = offsets, split.labels
            arrays[f"{name}/names"] = _joined(split.names)
            arrays[f"{name}/crc32"] = crc32 = np.zeros(len(split.names), dtype=np.uint32)
            contents = file.create_dataset(
                f"{name}/bytes", (offsets[-1],), "|u1", track_times=False
            )
            for number in watch(range(len(split.names))):
                content = split.read(number)
                try:
                    check(content)
                except ValueError as error:
                    place = split.folder / split.names[number]
                    raise ValueError(f"{place}: {error}: replace or remove it") from error
                crc32[number] = zlib.crc32(content)
                contents[offsets[number] : offsets[number + 1]] = np.frombuffer(content, np.uint8)
        for name, kind in INDEX.items():
            arrays[name] = arrays[name].astype(kind)
            file.create_dataset(name, data=arrays[name], track_times=False)
        write_attributes(file, {**attributes, "sha256": _checksum(arrays)})


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordFile:
    """An opened file: its splits, the classes' names, and what it says of itself."""

    train: "Records"
    val: "Records"
    classes: Sequence[str]
    attributes: Mapping[str, str]


def read_records(path: Path, *, cure: str = CURE) -> RecordFile:
    """Open a file of this layout and verify all but the contents; ``cure`` ends its messages.

    Raises FileNotFoundError where there is no file, ValueError where it is not HDF5, is cut short
    or damaged, or of another layout.
    """
    attributes, arrays = read_file(path, tuple(INDEX), cure=cure)
    problem = _problem(arrays) or attribute_problem(attributes)
    if problem is None and attributes.get("sha256") != _checksum(arrays):
        problem = "the data do not match their sha256"
    if problem:
        raise ValueError(f"{path}: {problem}: {cure}")
    train, val = (
        Records(
            path=path,
            split=split,
            source=f"{attributes['source']}/{split}",
            columns={
                "start": arrays[f"{split}/offsets"][:-1],
                "length": np.diff(arrays[f"{split}/offsets"]),
                "crc32": arrays[f"{split}/crc32"],
                "label": arrays[f"{split}/labels"],
                "number": np.arange(len(arrays[f"{split}/labels"])),
            },
        )
        for split in SPLITS
    )
    return RecordFile(
        train=train, val=val, classes=_parted(arrays["classes"]), attributes=attributes
    )


def holds(
    file: RecordFile, folder: ImageFolder, *, watch: Callable[[range], Iterable[int]]
) -> bool:
    """Return whether an opened file has exactly the folder's files: names and contents.

    ``watch`` is that of ``write_records``. Raises ValueError where the folder cannot be read.
    """
    try:
        return all(
            _same(records, folder.splits[name], watch)
            for name, records in (("train", file.train), ("val", file.val))
        )
    finally:
        file.train.close()
        file.val.close()


def _same(records: "Records", split: FolderSplit, watch: Callable[[range], Iterable[int]]) -> bool:
    if records.names() != list(split.names):
        return False
    for number in watch(range(len(split.names))):
        content = split.read(number)
        try:
            if records.read(number) != content:
                return False
        except ValueError:  # the store is damaged
            return False
    return True


class Records:
    """The images of one split in a file, still encoded: ``targets`` are their labels, int64 (N,).

    Processes may share it, by fork or pickle: each opens the file for itself when it first reads.

    ``columns``, each (N,): where an image's content starts, its length, its CRC-32, its label, and
    its number in the file. ``source``: the folder that the images came from.
    """

    def __init__(self, *, path: Path, split: str, source: str, columns: Arrays) -> None:
        self._path, self._split, self._source, self._columns = path, split, source, columns
        self._file: h5py.File | None = None
        self._process: int | None = None  # whose file that is

    def __len__(self) -> int:
        """Return N."""
        return len(self._columns["label"])

    @property
    def targets(self) -> Tensor:
        """The labels, int64 (N,)."""
        return torch.from_numpy(self._columns["label"].astype(np.int64))

    def __getitem__(self, mask: Tensor) -> Self:
        """Return the records where ``mask``, bool (N,), is true."""
        columns = {name: column[mask.numpy()] for name, column in self._columns.items()}
        return type(self)(path=self._path, split=self._split, source=self._source, columns=columns)

    def read(self, index: int) -> bytes:
        """Return the content of an image's file; ValueError naming it where it is damaged."""
        start, length, crc32, number = (
            int(self._columns[name][index]) for name in ("start", "length", "crc32", "number")
        )
        try:
            found: bytes = self._open()[f"{self._split}/bytes"][start : start + length].tobytes()
        except DAMAGE as error:
            reason = " ".join(str(error).split())
            place = f"{self._path}: {self._split} image {number}"
            raise ValueError(f"{place} cannot be read ({reason}): {CURE}") from error
        if zlib.crc32(found) != crc32:
            raise ValueError(f"{self._path}: its copy of {self.file(index)} is damaged: {CURE}")
        return found

    def file(self, index: int) -> str:
        """Return the path of the file that an image was read from."""
        return f"{self._source}/{self.names()[index]}"

    def names(self) -> list[str]:
        """Return the images' names, "class/file"."""
        names = _parted(np.asarray(self._open()[f"{self._split}/names"]))
        return [names[number] for number in self._columns["number"]]

    def close(self) -> None:
        """Close the file; it is opened again when it is read."""
        if self._file is not None and self._process == os.getpid():
            self._file.close()
        self._file = None

    def _open(self) -> h5py.File:
        if self._file is None or self._process != os.getpid():
            self._file, self._process = open_file(self._path), os.getpid()
        return self._file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}


def _joined(names: Iterable[str]) -> NDArray[Any]:
    # As the file system has them: a name need not be UTF-8.
    content = b"".join(os.fsencode(name) + b"\0" for name in names)
    return np.frombuffer(content, dtype=np.uint8)


def _parted(names: NDArray[Any]) -> list[str]:
    return [os.fsdecode(name) for name in names.tobytes().split(b"\0")[:-1]]


def _problem(arrays: Arrays) -> str | None:
    for name, kind in INDEX.items():
        if name not in arrays:
            return f"dataset {name} is missing"
        if arrays[name].dtype.str != kind or arrays[name].ndim != 1:
            return f"{name} must be {kind} with 1 axis, not {arrays[name].dtype.str}"
    return None


def _checksum(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name, kind in INDEX.items():
        digest.update(f"{name} {kind} {len(arrays[name])}\n".encode("ascii"))
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()
