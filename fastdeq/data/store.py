"""HDF5 files with checksums: image sets that are read whole, image files that are read one by one.

docs/data.md describes both layouts and how they are verified.
"""

import hashlib
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor

from fastdeq.runs.files import atomic_path, remove_leftovers

Arrays = Mapping[str, NDArray[Any]]
Layout = Mapping[str, tuple[str, int]]
"""Type and number of axes of the datasets that are read whole, in the order of the checksum."""

CURE = "delete it and it is built again"
SPLITS = ("train", "val")
IMAGES: Layout = {
    f"{split}/{name}": kind
    for split in ("train", "test")
    for name, kind in {"images": ("uint8", 4), "labels": ("uint8", 1)}.items()
}
_COLUMNS = {"offsets": "<i8", "labels": "<i8", "crc32": "<u4", "names": "|u1"}
INDEX: Layout = {
    **{f"{split}/{name}": (kind, 1) for split in SPLITS for name, kind in _COLUMNS.items()},
    "classes": ("|u1", 1),
}
REQUIRED_ATTRIBUTES = ("name", "version", "source", "licence", "split")

_DAMAGE = (OSError, RuntimeError, KeyError, TypeError, ValueError)  # what h5py raises for it
_LIBVER = ("v110", "v110")  # fixed, for equal bytes; HDF5 checksums its own metadata since 1.8
# HDF5's own locks fail on many network file systems, and there is nothing to lock here: a file is
# written by one process, under a name of its own, and never changes under its final name.
_LOCKING = False
_CHUNK = 1024  # samples


# Image sets


@dataclass(frozen=True, eq=False)
class ImageSet:
    """An image set in memory: images uint8 (N, C, H, W), labels int64 (N,), and its attributes."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    attributes: Mapping[str, str]


def write_store(path: str | Path, images: ImageSet) -> str:
    """Write an image set to a new file, which appears whole or not at all; return its ``sha256``.

    Raises FileExistsError where ``path`` exists, ValueError for arrays or attributes that do not
    fit the layout.
    """
    path, arrays = Path(path), _to_arrays(images)
    problem = _layout_problem(arrays, IMAGES, images.attributes) or _size_problem(arrays)
    if problem:
        raise ValueError(f"{path}: cannot be written: {problem}")
    checksum = _checksum(arrays, IMAGES)
    gzip = {"compression": "gzip", "compression_opts": 9}
    with _new_file(path) as file:
        _write_attributes(file, {**images.attributes, "sha256": checksum})
        for name, array in arrays.items():
            chunks = (min(len(array), _CHUNK), *array.shape[1:])
            file.create_dataset(name, data=array, chunks=chunks, track_times=False, **gzip)
    return checksum


def read_store(
    path: str | Path,
    *,
    cure: str = "delete it and make it again",
    wanted: Mapping[str, str] | None = None,
) -> ImageSet:
    """Read and verify an image set; ``cure`` ends the message where the file is damaged.

    ``wanted``: the attributes whose name and version it must have.

    Raises FileNotFoundError where there is no file, ValueError where it cannot be read, has another
    layout or does not match its checksum.
    """
    attributes, arrays = _read_file(Path(path), IMAGES, cure, wanted or {})
    if problem := _size_problem(arrays):
        raise ValueError(f"{path}: {problem}: {cure}")
    train_images, train_labels, test_images, test_labels = (
        torch.from_numpy(array.astype(np.int64) if name.endswith("labels") else array)
        for name, array in arrays.items()
    )
    return ImageSet(train_images, train_labels, test_images, test_labels, attributes)


def _to_arrays(images: ImageSet) -> dict[str, NDArray[Any]]:
    tensors = (images.train_images, images.train_labels, images.test_images, images.test_labels)
    arrays = {name: tensor.cpu().numpy() for name, tensor in zip(IMAGES, tensors, strict=True)}
    for name in ("train/labels", "test/labels"):
        labels = arrays[name].astype(np.uint8)
        # Labels that a byte cannot hold keep their type, which the layout then refuses.
        arrays[name] = labels if np.array_equal(labels, arrays[name]) else arrays[name]
    return arrays


def _size_problem(arrays: Arrays) -> str | None:
    for split in ("train", "test"):
        images, labels = arrays[f"{split}/images"], arrays[f"{split}/labels"]
        if len(images) != len(labels) or not len(images):
            return f"{split} has {len(images)} images and {len(labels)} labels"
    if arrays["train/images"].shape[1:] != arrays["test/images"].shape[1:]:
        return "the images of train and test differ in shape"
    return None


# Image files


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
        except _DAMAGE as error:
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
            self._file, self._process = _open_file(self._path), os.getpid()
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
    with _new_file(path) as file:
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
        _write_attributes(file, {**attributes, "sha256": _checksum(arrays, INDEX)})


def read_records(
    path: Path, *, cure: str = CURE, wanted: Mapping[str, str] | None = None
) -> RecordFile:
    """Open a store of image files and verify all but the contents, as ``read_store`` does."""
    attributes, arrays = _read_file(path, INDEX, cure, wanted or {})
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


# Files of either layout


def one_line(error: BaseException) -> str:
    """Return the text of an error in one line, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def read_content(path: Path) -> bytes:
    """Return the content of a file; raises ValueError naming it where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error


@contextmanager
def building(path: Path) -> Iterator[bool]:
    """Lock the store at ``path`` for the process that builds it; yield whether it is missing.

    Raises OSError, with the cure, for any OSError or RuntimeError: the store cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            remove_leftovers(path)  # the lock was free: their writers are dead
            yield not path.exists()
    except (OSError, RuntimeError) as error:  # RuntimeError: h5py's on a full disk, when closing
        reason = getattr(error, "strerror", None) or one_line(error)
        raise OSError(
            f"{path}: cannot be written ({reason}): choose a folder for it with data.store=PATH "
            "or FASTDEQ_CACHE"
        ) from error


@contextmanager
def _new_file(path: Path) -> Iterator[h5py.File]:
    """Yield a file to write, which appears at ``path`` if nothing is raised and none is there."""
    with atomic_path(path, replace=False) as aside, _open_file(aside, "x", libver=_LIBVER) as file:
        yield file


def _open_file(path: Path, mode: str = "r", **settings: Any) -> h5py.File:
    return h5py.File(path, mode, locking=_LOCKING, **settings)


def _write_attributes(file: h5py.File, attributes: Mapping[str, str]) -> None:
    for key in sorted(attributes):
        # Of fixed length: these lie in the header, which HDF5 checksums, and not in its heap.
        file.attrs[key] = np.bytes_(attributes[key].encode())


def _read_file(
    path: Path, layout: Layout, cure: str, wanted: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    """Return the attributes and the datasets of a layout, verified; raises as `read_store`."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such image set: {cure}")
    try:
        with _open_file(path) as file:
            attributes = {key: _text(value) for key, value in file.attrs.items()}
            arrays = {name: np.asarray(file[name]) for name in layout if name in file}
    except _DAMAGE as error:
        reason = one_line(error)
        if isinstance(error, PermissionError):
            cure = "ask its owner for the permission to read it"
        elif "unable to lock file" in reason:  # the environment overrides _LOCKING
            cure = "set HDF5_USE_FILE_LOCKING=FALSE in the environment"
        raise ValueError(f"{path}: not a readable HDF5 file ({reason}): {cure}") from error
    problem = _layout_problem(arrays, layout, attributes)
    if problem is None and attributes.get("sha256") != _checksum(arrays, layout):
        problem = "the data do not match their sha256"
    for key in ("name", "version"):
        if problem is None and attributes[key] != wanted.get(key, attributes[key]):
            problem = f"its {key} is {attributes[key]!r}, not {wanted[key]!r}"
    if problem:
        raise ValueError(f"{path}: {problem}: {cure}")
    return attributes, arrays


def _layout_problem(arrays: Arrays, layout: Layout, attributes: Mapping[str, str]) -> str | None:
    for name, (kind, axes) in layout.items():
        if name not in arrays:
            return f"dataset {name} is missing"
        array = arrays[name]
        if array.dtype != np.dtype(kind) or array.ndim != axes:
            return f"{name} must be {kind} with {axes} axes, not {array.dtype} {array.shape}"
    missing = [name for name in REQUIRED_ATTRIBUTES if not attributes.get(name)]
    return f"attributes are missing: {', '.join(missing)}" if missing else None


def _checksum(arrays: Arrays, layout: Layout) -> str:
    """Return the attribute ``sha256``: types, shapes and values, in the order of the layout."""
    digest = hashlib.sha256()
    for name, (kind, _) in layout.items():
        dimensions = "x".join(map(str, arrays[name].shape))
        digest.update(f"{name} {kind} {dimensions}\n".encode("ascii"))
        digest.update(arrays[name].tobytes(order="C"))
    return digest.hexdigest()


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
