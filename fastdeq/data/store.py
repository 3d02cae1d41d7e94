"""One HDF5 layout for every image set, read and written whole, with a checksum.

Datasets: ``train/images`` and ``test/images`` uint8 (N, C, H, W), ``train/labels`` and
``test/labels`` uint8 (N,). File attributes, UTF-8: ``REQUIRED_ATTRIBUTES`` and ``sha256``.

``sha256`` is the SHA-256 of, for each dataset in the order of ``DATASETS``, the ASCII line
``"<name> uint8 <dimensions joined by x>\\n"`` followed by its values in C order, one byte each.
"""

import glob
import hashlib
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DATASETS = ("train/images", "train/labels", "test/images", "test/labels")
REQUIRED_ATTRIBUTES = ("name", "version", "source", "licence", "split")
DAMAGE = (OSError, RuntimeError, KeyError, TypeError, ValueError)
"""What h5py raises for a file that it cannot make sense of."""

_LIBVER = ("v110", "v110")  # fixed, for equal bytes; HDF5 checksums its own metadata since 1.8
# HDF5's own locks fail on many network file systems, and there is nothing to lock here: a file is
# written by one process, under a name of its own, and never changes under its final name.
_LOCKING = False
_CHUNK = 1024  # samples
_ASIDE = ".{name}.{random}.tmp"  # the file that is written before it gets its name


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSet:
    """An image set in memory: images uint8 (N, C, H, W), labels int64 (N,), and what it is."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    attributes: Mapping[str, str]

    def to(self, device: torch.device) -> Self:
        """Return this set with its tensors on ``device``; those already there are not copied."""
        return replace(
            self,
            train_images=self.train_images.to(device),
            train_labels=self.train_labels.to(device),
            test_images=self.test_images.to(device),
            test_labels=self.test_labels.to(device),
        )


def write_store(path: str | Path, images: ImageSet) -> str:
    """Write ``images`` to a new file and return its ``sha256``; the file appears whole or not.

    Raises FileExistsError where ``path`` exists, ValueError for arrays or attributes that do not
    fit the layout.
    """
    path = Path(path)
    arrays = _to_arrays(images)
    if problem := _layout_problem(arrays) or attribute_problem(images.attributes):
        raise ValueError(f"{path}: cannot be written: {problem}")
    checksum = _checksum(arrays)
    with written_aside(path) as aside:
        _write_file(aside, arrays, {**images.attributes, "sha256": checksum})
    return checksum


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Give the path of a new file to write, which gets the name ``path`` if nothing is raised.

    Raises FileExistsError where ``path`` exists by then; the file aside is gone in any case.
    """
    aside = path.with_name(_ASIDE.format(name=path.name, random=secrets.token_hex(8)))
    try:
        yield aside
        _publish(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def remove_unfinished(path: str | Path) -> None:
    """Delete what killed writers of ``path`` left beside it; call it only while nobody writes."""
    path = Path(path)
    for aside in path.parent.glob(_ASIDE.format(name=glob.escape(path.name), random="*")):
        aside.unlink(missing_ok=True)


def read_store(path: str | Path, *, cure: str = "delete it and make it again") -> ImageSet:
    """Read and verify a file of this layout; ``cure`` ends the message when it is broken.

    Raises FileNotFoundError where there is no file, ValueError where it is not HDF5, misses a
    dataset or an attribute, holds other shapes or types, does not match its checksum, or may not
    be opened.
    """
    path = Path(path)
    attributes, arrays = read_file(path, DATASETS, cure=cure)
    problem = _layout_problem(arrays) or attribute_problem(attributes)
    if problem is None and attributes.get("sha256") != _checksum(arrays):
        problem = "the data do not match their sha256"
    if problem:
        raise ValueError(f"{path}: {problem}: {cure}")
    return ImageSet(
        train_images=torch.from_numpy(arrays["train/images"]),
        train_labels=torch.from_numpy(arrays["train/labels"].astype(np.int64)),
        test_images=torch.from_numpy(arrays["test/images"]),
        test_labels=torch.from_numpy(arrays["test/labels"].astype(np.int64)),
        attributes=attributes,
    )


def read_file(
    path: Path, names: Sequence[str], *, cure: str
) -> tuple[dict[str, str], dict[str, NDArray[np.generic]]]:
    """Return a file's attributes and those of the datasets ``names`` that are in it, whole.

    Raises FileNotFoundError where there is no file, ValueError where it cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such image set: {cure}")
    try:
        with open_file(path) as file:
            attributes = {key: _text(value) for key, value in file.attrs.items()}
            arrays = {name: np.asarray(file[name]) for name in names if name in file}
    except DAMAGE as error:
        reason = " ".join(str(error).split())  # HDF5's messages can take several lines
        if isinstance(error, PermissionError):
            cure = "ask its owner for the permission to read it"
        elif "unable to lock file" in reason:  # the environment's setting goes before ours
            cure = "set HDF5_USE_FILE_LOCKING=FALSE in the environment"
        raise ValueError(f"{path}: not a readable HDF5 file ({reason}): {cure}") from error
    return attributes, arrays


def open_file(path: Path, *, new: bool = False) -> h5py.File:
    """Open a store to read it, or a ``new`` file to write one; raises what h5py does."""
    if new:
        return h5py.File(path, "x", libver=_LIBVER, locking=_LOCKING)
    return h5py.File(path, "r", locking=_LOCKING)


def write_attributes(file: h5py.File, attributes: Mapping[str, str]) -> None:
    """Write the attributes of a file, UTF-8."""
    for key in sorted(attributes):
        # Of fixed length: these lie in the header, which HDF5 checksums, and not in its heap.
        file.attrs[key] = np.bytes_(attributes[key].encode())


def attribute_problem(attributes: Mapping[str, str]) -> str | None:
    """Say which of the attributes that every store has are missing, if any are."""
    missing = [name for name in REQUIRED_ATTRIBUTES if not attributes.get(name)]
    return f"attributes are missing: {', '.join(missing)}" if missing else None


def _to_arrays(images: ImageSet) -> dict[str, NDArray[np.generic]]:
    tensors = (images.train_images, images.train_labels, images.test_images, images.test_labels)
    arrays = {name: tensor.cpu().numpy() for name, tensor in zip(DATASETS, tensors, strict=True)}
    for name in ("train/labels", "test/labels"):
        labels = arrays[name].astype(np.uint8)
        # Labels that a byte cannot hold keep their type, which the layout then refuses.
        arrays[name] = labels if np.array_equal(labels, arrays[name]) else arrays[name]
    return arrays


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _layout_problem(arrays: Mapping[str, NDArray[np.generic]]) -> str | None:
    for name in DATASETS:
        if name not in arrays:
            return f"dataset {name} is missing"
        array, axes = arrays[name], 4 if name.endswith("images") else 1
        if array.dtype != np.uint8 or array.ndim != axes:
            return f"{name} must be uint8 with {axes} axes, not {array.dtype} {array.shape}"
    for split in ("train", "test"):
        images, labels = arrays[f"{split}/images"], arrays[f"{split}/labels"]
        if len(images) != len(labels) or not len(images):
            return f"{split} has {len(images)} images and {len(labels)} labels"
    if arrays["train/images"].shape[1:] != arrays["test/images"].shape[1:]:
        return "the images of train and test differ in shape"
    return None


def _checksum(arrays: Mapping[str, NDArray[np.generic]]) -> str:
    digest = hashlib.sha256()
    for name in DATASETS:
        dimensions = "x".join(map(str, arrays[name].shape))
        digest.update(f"{name} uint8 {dimensions}\n".encode("ascii"))
        digest.update(arrays[name].tobytes(order="C"))
    return digest.hexdigest()


def _write_file(
    path: Path, arrays: Mapping[str, NDArray[np.generic]], attributes: Mapping[str, str]
) -> None:
    with open_file(path, new=True) as file:
        write_attributes(file, attributes)
        for name in DATASETS:
            array = arrays[name]
            chunks = (min(len(array), _CHUNK), *array.shape[1:])
            file.create_dataset(
                name,
                data=array,
                chunks=chunks,
                compression="gzip",
                compression_opts=9,
                track_times=False,
            )


def _publish(aside: Path, path: Path) -> None:
    """Give the finished file its name; a link, unlike a rename, never replaces another file."""
    _flush(aside)
    try:
        os.link(aside, path)
    except FileExistsError:
        raise FileExistsError(f"{path}: exists already: delete it or choose another name") from None
    _flush(path.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
