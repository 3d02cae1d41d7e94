"""MNIST and Fashion-MNIST: 28 × 28 images of ten classes, 60,000 for training and 10,000 for test.

MNIST: Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, Gradient-Based Learning Applied to Document
Recognition, 1998. Fashion-MNIST: H. Xiao, K. Rasul, R. Vollgraf, arXiv 1708.07747.

Both are published as IDX files (http://yann.lecun.com/exdb/mnist/), often compressed with gzip: two
zero bytes, a type code (0x08: uint8), the number of axes, a big-endian uint32 size for each axis,
then the values in C order.
"""

import gzip
import hashlib
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdeq.data.epoch_loader import Normalization
from fastdeq.data.module import data_module
from fastdeq.data.published import ImageSource, StoredDataModule, image_set, is_gzip
from fastdeq.data.store import ImageSet, read_content

_SIDE = 28  # pixels
_CLASSES = 10


@dataclass(frozen=True, kw_only=True, eq=False)
class IdxArray:
    """``values`` uint8, and the SHA-256 of the whole content (uncompressed, header included)."""

    values: NDArray[np.uint8]
    sha256: str


def read_idx(path: str | Path) -> IdxArray:
    """Read an IDX file of uint8, plain or compressed with gzip.

    Raises ValueError naming the file where it cannot be opened, is not IDX or of another type, has
    an axis of size 0, is shorter or longer than its header says, or is damaged as a gzip file.
    """
    path = Path(path)
    content = read_content(path)
    try:
        content = gzip.decompress(content) if is_gzip(path) else content
        values = _parse_idx(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged gzip file ({error}): get it again") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return IdxArray(values=values, sha256=hashlib.sha256(content).hexdigest())


def _parse_idx(content: bytes) -> NDArray[np.uint8]:
    magic = content[:4]
    if len(magic) < 4 or magic[:2] != b"\0\0":
        raise ValueError(f"not an IDX file: it begins with {magic.hex(' ') or 'nothing'}")
    if magic[2] != 0x08:
        raise ValueError(f"IDX type 0x{magic[2]:02x} is not supported, only uint8 (0x08)")
    axes = magic[3]
    if not 1 <= axes <= 32:  # NumPy's own limit in its first version
        raise ValueError(f"not an IDX file: it says that it has {axes} axes")
    header = 4 + 4 * axes
    if len(content) < header:
        raise ValueError(f"truncated: a header of {header} bytes, found {len(content)}")
    sizes = struct.unpack_from(f">{axes}I", content, 4)
    shape, wanted = " × ".join(map(str, sizes)), math.prod(sizes)
    found = len(content) - header
    if wanted == 0:
        raise ValueError(f"its header says {shape} values: an axis of size 0")
    if found < wanted:
        raise ValueError(
            f"truncated: its header says {shape} = {wanted} bytes of data, found {found}"
        )
    if found > wanted:
        raise ValueError(f"bytes are left over after the {shape} = {wanted} that its header says")
    return np.frombuffer(content, np.uint8, offset=header).reshape(sizes).copy()


@final
@dataclass(frozen=True, kw_only=True)
class IdxImages(ImageSource):
    """Four IDX files, of images and labels for training, then of images and labels for test.

    A file is verified by the ``sha256`` of its content where known, else by the published MD5 of
    the compressed file. Without ``sha256`` an unpacked file cannot be verified and is refused.
    """

    sha256: tuple[str, ...] = ()

    def read(self, files: Sequence[Path], *, verify: bool) -> ImageSet:
        arrays = [read_idx(path) for path in files]
        sha256 = {path: array.sha256 for path, array in zip(files, arrays, strict=True)}
        if verify:
            for number, (path, found) in enumerate(sha256.items()):
                self._verify(number, path, found)
        train, test = (_split(files[first:], arrays[first:]) for first in (0, 2))
        return image_set(train, test, sha256)

    def is_official(self, attributes: Mapping[str, str]) -> bool:
        # Without known sha256 the official files are the compressed ones: fastdeq once took
        # unpacked files of Fashion-MNIST for verified.
        entries = [entry.split() for entry in attributes.get("source_sha256", "").split(", ")]
        if self.sha256:
            return tuple(entry[-1] for entry in entries if entry) == self.sha256
        return all(entry and entry[0].endswith(".gz") for entry in entries)

    def _verify(self, number: int, path: Path, found: str) -> None:
        if self.sha256:
            if found != self.sha256[number]:
                raise self.not_official(path, "SHA-256 of the content", found)
        elif is_gzip(path):
            self.verify_md5([path], [self.files[number]])
        else:
            raise ValueError(
                f"{path}: cannot be verified, for of {self.title} only the checksums of the .gz "
                f"files are published: give the official {self.files[number].names[0]} instead, "
                "or take your own files as they are with data.verify=false"
            )


def _split(files: Sequence[Path], arrays: Sequence[IdxArray]) -> tuple[Tensor, Tensor]:
    """Return the split whose images and labels come first in the lists, checked."""
    images, labels = arrays[0].values, arrays[1].values
    if images.shape[1:] != (_SIDE, _SIDE):
        raise ValueError(f"{files[0]}: not images of {_SIDE} × {_SIDE}, but {images.shape}")
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"{files[1]}: not a label for each image, {len(images)}, but {labels.shape}"
        )
    if labels.max() >= _CLASSES:
        raise ValueError(f"{files[1]}: label {labels.max()} is not one of 0..{_CLASSES - 1}")
    return torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels).long()


def _spellings(name: str) -> tuple[str, ...]:
    """Return the names that a file goes by: compressed or not, with "-" or "." before "idx"."""
    stem = name.removesuffix(".gz")
    return tuple(stem.replace("-idx", f"{dot}idx") + end for end in (".gz", "") for dot in "-.")


MNIST = IdxImages.from_table("mnist", spellings=_spellings)
FASHION_MNIST = IdxImages.from_table("fashion_mnist", spellings=_spellings)


@final
@data_module
class MnistDataModule(StoredDataModule):
    """MNIST, handwritten digits: batches (B, 1, 28, 28), see ``StoredDataModule``."""

    source = MNIST
    input_shape = (1, _SIDE, _SIDE)
    outputs = _CLASSES
    published = Normalization(scale=255.0, mean=(0.1307,), std=(0.3081,))


@final
@data_module
class FashionMnistDataModule(StoredDataModule):
    """Fashion-MNIST, articles of clothing in MNIST's format (see ``MnistDataModule``)."""

    source = FASHION_MNIST
    input_shape = (1, _SIDE, _SIDE)
    outputs = _CLASSES
    published = Normalization(scale=255.0, mean=(0.2860,), std=(0.3530,))
