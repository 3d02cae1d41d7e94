"""HDF5 files with checksums, and image sets as such files, which are read whole.

docs/data.md describes the layouts and how they are verified.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor

from fastdeq.runs.files import atomic_path, remove_leftovers

Arrays = Mapping[str, NDArray[Any]]
Layout = Mapping[str, tuple[str, int]]
"""Type and number of axes of the datasets that are read whole, in the order of the checksum."""

CURE = "delete it and it is built again"
IMAGES: Layout = {
    f"{split}/{name}": kind
    for split in ("train", "test")
    for name, kind in {"images": ("uint8", 4), "labels": ("uint8", 1)}.items()
}
REQUIRED_ATTRIBUTES = ("name", "version", "source", "licence", "split")

DAMAGE = (OSError, RuntimeError, KeyError, TypeError, ValueError)  # what h5py raises for it
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
    checksum = sha256_of_arrays(arrays, IMAGES)
    gzip = {"compression": "gzip", "compression_opts": 9}
    with new_file(path) as file:
        write_attributes(file, {**images.attributes, "sha256": checksum})
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
    attributes, arrays = read_file(Path(path), IMAGES, cure, wanted or {})
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
def new_file(path: Path) -> Iterator[h5py.File]:
    """Yield a file to write, which appears at ``path`` if nothing is raised and none is there."""
    with atomic_path(path, replace=False) as aside, open_file(aside, "x", libver=_LIBVER) as file:
        yield file


def open_file(path: Path, mode: str = "r", **settings: Any) -> h5py.File:
    """Open an HDF5 file, without its own locks."""
    return h5py.File(path, mode, locking=_LOCKING, **settings)


def write_attributes(file: h5py.File, attributes: Mapping[str, str]) -> None:
    """Write attributes of the file itself, in the order of their names."""
    for key in sorted(attributes):
        # Of fixed length: these lie in the header, which HDF5 checksums, and not in its heap.
        file.attrs[key] = np.bytes_(attributes[key].encode())


def read_file(
    path: Path, layout: Layout, cure: str, wanted: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, NDArray[Any]]]:
    """Return the attributes and the datasets of a layout, verified; raises as `read_store`."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such image set: {cure}")
    try:
        with open_file(path) as file:
            attributes = {key: _text(value) for key, value in file.attrs.items()}
            arrays = {name: np.asarray(file[name]) for name in layout if name in file}
    except DAMAGE as error:
        reason = one_line(error)
        if isinstance(error, PermissionError):
            cure = "ask its owner for the permission to read it"
        elif "unable to lock file" in reason:  # the environment overrides _LOCKING
            cure = "set HDF5_USE_FILE_LOCKING=FALSE in the environment"
        raise ValueError(f"{path}: not a readable HDF5 file ({reason}): {cure}") from error
    problem = _layout_problem(arrays, layout, attributes)
    if problem is None and attributes.get("sha256") != sha256_of_arrays(arrays, layout):
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


def sha256_of_arrays(arrays: Arrays, layout: Layout) -> str:
    """Return the attribute ``sha256``: types, shapes and values, in the order of the layout."""
    digest = hashlib.sha256()
    for name, (kind, _) in layout.items():
        dimensions = "x".join(map(str, arrays[name].shape))
        digest.update(f"{name} {kind} {dimensions}\n".encode("ascii"))
        digest.update(arrays[name].tobytes(order="C"))
    return digest.hexdigest()


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
