"""CIFAR-10: 32 × 32 colour images of ten classes, 50,000 for training and 10,000 for test.

A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009. The "python version":
six pickles of 10,000 images each, in an archive or unpacked from it.

A pickle is a program, which may call whatever it names. The reader finds only the few names that an
array is made with, as Python 2 and every NumPy since have written them.
"""

import io
import pickle
import re
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdeq.data.epoch_loader import Normalization
from fastdeq.data.module import data_module
from fastdeq.data.published import ImageSource, StoredDataModule, image_set, is_gzip
from fastdeq.data.store import ImageSet, one_line, read_content
from fastdeq.runs.files import sha256_of

_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32  # of the red plane, then the green and the blue one, each row by row
_CLASSES = 10
_FOLDER = "cifar-10-batches-py"


@final
@dataclass(frozen=True, kw_only=True)
class Cifar10Images(ImageSource):
    """The official archive, or the pickles in it, verified by their published MD5."""

    def read(self, files: Sequence[Path], *, verify: bool) -> ImageSet:
        form = self.files if len(files) == 1 else self.unpacked
        if verify:  # before anything is unpickled
            self.verify_md5(files, form)
        if len(files) == 1:
            contents = _in_archive(files[0], [file.names[0] for file in self.unpacked])
        else:
            contents = {str(path): read_content(path) for path in files}
        *batches, meta = ((place, _read_dict(place, one)) for place, one in contents.items())
        images, labels = zip(*(_read_batch(*batch) for batch in batches), strict=True)
        return image_set(
            (torch.cat(images[:-1]), torch.cat(labels[:-1])),
            (images[-1], labels[-1]),
            {path: sha256_of(path) for path in files},
            classes=", ".join(_read_classes(*meta)),
        )


def _in_archive(path: Path, names: Sequence[str]) -> dict[str, bytes]:
    """Read members of an archive into memory, by archive and name: nothing is written."""
    members, found = [PurePosixPath(_FOLDER, name) for name in names], dict[PurePosixPath, bytes]()
    try:
        with tarfile.open(path, "r:gz" if is_gzip(path) else "r:") as archive:
            for member in archive:
                file = archive.extractfile(member) if member.isfile() else None
                if file is not None and (name := PurePosixPath(member.name)) in members:
                    found[name] = file.read()
                    if len(found[name]) < member.size:
                        raise EOFError(f"{name} is truncated")
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged archive ({error}): get it again") from error
    except OSError as error:  # gzip's own too, which have no number
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    if missing := [member for member in members if member not in found]:
        raise ValueError(f"{path}: {missing[0]} is not in this archive: get it again")
    return {f"{path}: {member}": found[member] for member in members}


def _read_batch(place: str, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return images uint8 (N, 3, 32, 32) and labels int64 (N,) of one pickle."""
    pixels, labels = batch.get("data"), batch.get("labels")
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or not pixels.size:
        raise ValueError(f"{place}: has no images: its 'data' must be a uint8 array")
    if pixels.shape[1:] != (_PIXELS,):
        raise ValueError(f"{place}: not images of {_PIXELS} values, but {pixels.shape}")
    if not isinstance(labels, list) or len(labels) != len(pixels):
        count = len(labels) if isinstance(labels, list) else "none"
        raise ValueError(f"{place}: not a label for each image, {len(pixels)}, but {count}")
    for label in labels:
        if type(label) is not int or not 0 <= label < _CLASSES:
            raise ValueError(f"{place}: label {label!r} is not one of 0..{_CLASSES - 1}")
    images: NDArray[np.uint8] = pixels.reshape(-1, *_SHAPE).copy()
    return torch.from_numpy(images), torch.tensor(labels)


def _read_classes(place: str, meta: Mapping[str, Any]) -> list[str]:
    names = meta.get("label_names")
    if not isinstance(names, list) or not all(isinstance(name, bytes | str) for name in names):
        raise ValueError(f"{place}: has no list of 'label_names'")
    if len(names) != _CLASSES:
        raise ValueError(f"{place}: not {_CLASSES} label_names, but {len(names)}")
    return [_text(name) for name in names]


def _read_dict(place: str, content: bytes) -> Mapping[str, Any]:
    """Return the pickled dictionary; its keys are bytes if it was written by Python 2."""
    try:
        found = read_pickle(content)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{place}: not a batch of CIFAR-10, but a {type(found).__name__}")
    return {_text(key): value for key, value in found.items()}


def _text(value: object) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


class PickleRefusedError(pickle.UnpicklingError):
    """A pickle that names something which is not part of an array."""


@final
class _NumberType:
    """``numpy.dtype`` for numbers alone; an object without attributes that a pickle could set."""

    __slots__ = ()

    def __call__(self, code: str | bytes, align: object = False, copy: object = False) -> Any:
        # align and copy are 0 and 1 in old pickles, which NumPy itself warns about.
        name = code.decode("latin-1") if isinstance(code, bytes) else code
        if not isinstance(name, str) or not re.fullmatch("[<>=|]?[biuf][0-9]+", name):
            raise PickleRefusedError(f"it holds an array of {name!r}")
        return np.dtype(name, copy=True)  # the pickle sets its byte order next


@final
class _FromBuffer:
    """What protocol 5 makes contiguous arrays with, likewise without attributes."""

    __slots__ = ()

    def __call__(self, buffer: Any, dtype: Any, shape: Any, order: Any) -> Any:
        return np.frombuffer(buffer, dtype=dtype).reshape(shape, order=order)


_RECONSTRUCT = np.zeros(0).__reduce__()[0]  # wherever this NumPy keeps it
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy.core.numeric", "_frombuffer"): _FromBuffer(),
    ("numpy._core.numeric", "_frombuffer"): _FromBuffer(),
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _NumberType(),
    # How Python 3 writes bytes for Python 2. For text alone, unlike the function that it names.
    ("_codecs", "encode"): str.encode,
}


def read_pickle(content: bytes) -> Any:
    """Return what is pickled; strings of Python 2 become bytes.

    Raises ValueError, with the reason in one line, for a pickle that is damaged or that names
    anything beside NumPy arrays of numbers and plain containers.
    """
    try:
        return _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except PickleRefusedError as error:
        raise ValueError(f"{error}, which is not part of such a file: not read") from None
    except Exception as error:  # damage makes a pickle raise anything: its documentation says so
        raise ValueError(f"not a readable pickle ({one_line(error)}): get it again") from error


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # Anything else is refused unseen, never imported.
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise PickleRefusedError(f"it asks for {module}.{name}") from None

    def persistent_load(self, pid: object) -> Any:
        raise PickleRefusedError("it asks for something outside of it")


CIFAR10 = Cifar10Images.from_table("cifar10")


@final
@data_module
class Cifar10DataModule(StoredDataModule):
    """CIFAR-10: batches (B, 3, 32, 32), see ``StoredDataModule``."""

    source = CIFAR10
    input_shape = _SHAPE
    outputs = _CLASSES
    # As published; std is the mean over images of the deviation per image, not over all pixels.
    published = Normalization(
        scale=255.0, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)
    )
