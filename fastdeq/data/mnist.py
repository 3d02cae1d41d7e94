"""MNIST and the sets in its format: Fashion-MNIST, KMNIST, QMNIST and EMNIST, 28 × 28 images.

MNIST: Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, Gradient-Based Learning Applied to Document
Recognition, 1998. Fashion-MNIST: H. Xiao, K. Rasul, R. Vollgraf, arXiv 1708.07747. KMNIST:
T. Clanuwat et al., arXiv 1812.01718. QMNIST: C. Yadav, L. Bottou, arXiv 1905.10498. EMNIST:
G. Cohen, S. Afshar, J. Tapson, A. van Schaik, arXiv 1702.05373.

They are published as IDX files (http://yann.lecun.com/exdb/mnist/), often compressed with gzip: two
zero bytes, a type code (0x08: uint8, 0x0c: int32), the number of axes, a big-endian uint32 size for
each axis, then the values in C order, big-endian.
"""

import gzip
import hashlib
import math
import string
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdeq.data.archive import GZIP, is_gzip
from fastdeq.data.epoch_loader import Normalization
from fastdeq.data.module import data_module
from fastdeq.data.published import ImageSource, StoredDataModule, image_set
from fastdeq.data.store import ImageSet, read_content

_SIDE = 28  # pixels
_CLASSES = 10
_KINDS = {0x08: "u1", 0x0C: ">i4"}
_MERGED = string.digits + string.ascii_uppercase + "abdefghnqrt"  # the others look like capitals
_CHARACTERS = {
    "balanced": _MERGED,
    "byclass": string.digits + string.ascii_uppercase + string.ascii_lowercase,
    "bymerge": _MERGED,
    "digits": string.digits,
    "letters": string.ascii_uppercase,  # of either case
    "mnist": string.digits,
}
"""The classes of EMNIST's splits, in the order of their labels."""


@dataclass(frozen=True, kw_only=True, eq=False)
class IdxArray:
    """``values`` uint8 or int32, and the SHA-256 of the whole content, uncompressed."""

    values: NDArray[Any]
    sha256: str


def read_idx(path: str | Path) -> IdxArray:
    """Read an IDX file of uint8 or int32, plain or compressed with gzip.

    Raises ValueError naming the file where it cannot be opened, is not IDX or of another type, has
    an axis of size 0, is shorter or longer than its header says, or is damaged as a gzip file.
    """
    return _to_array(str(path), read_content(Path(path)))


def _to_array(place: str, content: bytes) -> IdxArray:
    try:
        content = gzip.decompress(content) if content.startswith(GZIP) else content
        values = _parse_idx(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{place}: damaged gzip file ({error}): get it again") from error
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    return IdxArray(values=values, sha256=hashlib.sha256(content).hexdigest())


def _parse_idx(content: bytes) -> NDArray[Any]:
    magic = content[:4]
    if len(magic) < 4 or magic[:2] != b"\0\0":
        raise ValueError(f"not an IDX file: it begins with {magic.hex(' ') or 'nothing'}")
    if magic[2] not in _KINDS:
        raise ValueError(
            f"IDX type 0x{magic[2]:02x} is not supported, only uint8 (0x08) and int32 (0x0c)"
        )
    axes = magic[3]
    if not 1 <= axes <= 32:  # NumPy's own limit in its first version
        raise ValueError(f"not an IDX file: it says that it has {axes} axes")
    header = 4 + 4 * axes
    if len(content) < header:
        raise ValueError(f"truncated: a header of {header} bytes, found {len(content)}")
    sizes = struct.unpack_from(f">{axes}I", content, 4)
    kind = np.dtype(_KINDS[magic[2]])
    factors = sizes if kind.itemsize == 1 else (*sizes, kind.itemsize)
    shape, wanted = " × ".join(map(str, factors)), math.prod(factors)
    found = len(content) - header
    if wanted == 0:
        raise ValueError(f"its header says {shape} values: an axis of size 0")
    if found < wanted:
        raise ValueError(
            f"truncated: its header says {shape} = {wanted} bytes of data, found {found}"
        )
    if found > wanted:
        raise ValueError(f"bytes are left over after the {shape} = {wanted} that its header says")
    values = np.frombuffer(content, kind, offset=header).reshape(sizes)
    return values.astype(kind.newbyteorder("="))  # a copy


@final
@dataclass(frozen=True, kw_only=True)
class IdxImages(ImageSource):
    """Four IDX files, of images and labels for training, then of images and labels for test.

    A file is verified by the ``sha256`` of its content where known, else by the published MD5 of
    the compressed file or of their archive. Without ``sha256`` an unpacked file cannot be verified
    and is refused.

    ``characters``: the names of the classes; empty: not known, there are ten. ``first``: the label
    of the first class. ``columns``: of the labels where these are rows, which begin with the class.
    ``transposed``: whether the images are stored column by column.
    """

    sha256: tuple[str, ...] = ()
    characters: str = ""
    first: int = 0
    columns: int = 0
    transposed: bool = False

    def read(self, files: Sequence[Path], *, verify: bool) -> ImageSet:
        is_archive = len(files) == 1
        contents = self.contents(files, verify=verify and is_archive)
        arrays = {Path(place): _to_array(place, content) for place, content in contents.items()}
        if verify and not is_archive:
            for number, (path, array) in enumerate(arrays.items()):
                self._verify(number, path, array.sha256)
        pairs = list(arrays.items())
        sha256 = {path: array.sha256 for path, array in pairs}
        named = {"classes": ", ".join(self.characters)} if self.characters else {}
        return image_set(self._split(*pairs[:2]), self._split(*pairs[2:]), sha256, **named)

    def is_official(self, attributes: Mapping[str, str]) -> bool:
        # Without known sha256 the official files are the compressed ones: fastdeq once took
        # unpacked files of Fashion-MNIST for verified.
        entries = [entry.split() for entry in attributes.get("source_sha256", "").split(", ")]
        if self.sha256:
            return tuple(entry[-1] for entry in entries if entry) == self.sha256
        return all(entry and entry[0].endswith(".gz") for entry in entries)

    def _verify(self, number: int, path: Path, found: str) -> None:
        file = self.forms[-1][number]
        if self.sha256:
            if found != self.sha256[number]:
                raise self.not_official(path, "SHA-256 of the content", found)
        elif is_gzip(path) or not file.md5:
            self.verify_md5([path], [file])
        else:
            raise self.unverifiable(path, "the .gz files", file.names[0])

    def _split(
        self, images: tuple[Path, IdxArray], labels: tuple[Path, IdxArray]
    ) -> tuple[Tensor, Tensor]:
        """Return images uint8 (N, 1, 28, 28) and labels int64 (N,), checked."""
        pixels, classes = images[1].values, labels[1].values
        if pixels.shape[1:] != (_SIDE, _SIDE) or pixels.dtype != np.uint8:
            raise ValueError(f"{images[0]}: not images of {_SIDE} × {_SIDE}, but {pixels.shape}")
        if classes.shape != (len(pixels), *((self.columns,) * bool(self.columns))):
            raise ValueError(
                f"{labels[0]}: not a label for each image, {len(pixels)}, but {classes.shape}"
            )
        found = torch.from_numpy(classes[:, 0] if self.columns else classes).long() - self.first
        last = (len(self.characters) or _CLASSES) - 1
        wrong = found[(found < 0) | (found > last)] + self.first
        if len(wrong):
            span = f"{self.first}..{last + self.first}"
            raise ValueError(f"{labels[0]}: label {wrong[0]} is not one of {span}")
        if self.transposed:
            pixels = np.ascontiguousarray(pixels.swapaxes(1, 2))
        return torch.from_numpy(pixels).unsqueeze(1), found


def _spellings(name: str) -> tuple[str, ...]:
    """Return the names that a file goes by: compressed or not, with "-" or "." before "idx"."""
    if not name.endswith(".gz"):
        return (name,)
    stem = name.removesuffix(".gz")
    return tuple(stem.replace("-idx", f"{dot}idx") + end for end in (".gz", "") for dot in "-.")


MNIST = IdxImages.from_table("mnist", spellings=_spellings)
FASHION_MNIST = IdxImages.from_table("fashion_mnist", spellings=_spellings)
KMNIST = IdxImages.from_table("kmnist", spellings=_spellings)
QMNIST = IdxImages.from_table("qmnist", spellings=_spellings, columns=8)
EMNIST = IdxImages.from_table("emnist", spellings=_spellings, transposed=True)
"""Of every split, which stands for SPLIT in the names of its files."""


class _IdxDataModule(StoredDataModule):
    """A set in MNIST's format of ten classes: batches (B, 1, 28, 28)."""

    input_shape = (1, _SIDE, _SIDE)
    outputs = _CLASSES


@final
@data_module
class MnistDataModule(_IdxDataModule):
    """MNIST, handwritten digits: batches (B, 1, 28, 28), see ``StoredDataModule``."""

    source = MNIST
    published = Normalization(scale=255.0, mean=(0.1307,), std=(0.3081,))


@final
@data_module
class FashionMnistDataModule(_IdxDataModule):
    """Fashion-MNIST, articles of clothing in MNIST's format (see ``MnistDataModule``)."""

    source = FASHION_MNIST
    published = Normalization(scale=255.0, mean=(0.2860,), std=(0.3530,))


@final
@data_module
class KmnistDataModule(_IdxDataModule):
    """KMNIST, ten cursive Japanese characters in MNIST's format (see ``MnistDataModule``)."""

    source = KMNIST
    published = Normalization(scale=255.0, mean=(0.1918,), std=(0.3483,))


@final
@data_module
class QmnistDataModule(_IdxDataModule):
    """QMNIST, MNIST made again, with all 60,000 images for test (see ``MnistDataModule``)."""

    source = QMNIST
    published = MnistDataModule.published


@final
@data_module
class EmnistDataModule(StoredDataModule):
    """EMNIST, handwritten letters and digits in MNIST's format (see ``MnistDataModule``).

    ``split``: which of its six divisions. Labels begin with 0, those of "letters" too, which the
    files count from 1; images are upright, which the files store transposed.
    """

    split: Literal["balanced", "byclass", "bymerge", "digits", "letters", "mnist"] = "balanced"

    source: ClassVar[IdxImages] = EMNIST
    input_shape = (1, _SIDE, _SIDE)
    published = Normalization(scale=255.0, mean=(0.1736,), std=(0.3317,))

    @property
    def outputs(self) -> int:
        """The number of classes."""
        return len(_CHARACTERS[self.split])

    def chosen(self) -> ImageSource:
        (files,) = self.source.others
        form = tuple(
            replace(file, names=tuple(name.replace("SPLIT", self.split) for name in file.names))
            for file in files
        )
        return replace(
            self.source,
            name=f"{self.source.name}_{self.split}",
            others=(form,),
            characters=_CHARACTERS[self.split],
            first=int(self.split == "letters"),
        )
