"""A strict reader of the IDX format, in which MNIST and its successors are published.

Two zero bytes, a type code (0x08: uint8), the number of axes, a big-endian uint32 size for each
axis, then the values in C order (http://yann.lecun.com/exdb/mnist/); often compressed with gzip.
"""

import gzip
import hashlib
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

_UINT8 = 0x08
_MOST_AXES = 32  # NumPy's own limit in its first version
_CHUNK = 1 << 20  # bytes


@dataclass(frozen=True, kw_only=True, eq=False)
class IdxArray:
    """``values`` uint8, and the SHA-256 of the whole content (uncompressed, header included)."""

    values: NDArray[np.uint8]
    sha256: str


def is_gzip(path: str | Path) -> bool:
    """Whether the file begins as gzip does, whatever its name says."""
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def read_idx(path: str | Path) -> IdxArray:
    """Read an IDX file of uint8, plain or compressed with gzip.

    Raises ValueError naming the file where it cannot be opened, is not IDX or of another type, has
    an axis of size 0, is shorter or longer than its header says, or is damaged as a gzip file.
    """
    path = Path(path)
    try:
        with gzip.open(path) if is_gzip(path) else open(path, "rb") as file:
            # Read to the end in any case: gzip's own checksum stands there.
            return _read(file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged gzip file ({error}): get it again") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read(file: BinaryIO | gzip.GzipFile) -> IdxArray:
    magic = _take(file, 4)
    if len(magic) < 4 or magic[:2] != b"\0\0":
        raise ValueError(f"not an IDX file: it begins with {magic.hex(' ') or 'nothing'}")
    if magic[2] != _UINT8:
        raise ValueError(f"IDX type 0x{magic[2]:02x} is not supported, only uint8 (0x08)")
    axes = magic[3]
    if not 1 <= axes <= _MOST_AXES:
        raise ValueError(f"not an IDX file: it says that it has {axes} axes")
    header = _take(file, 4 * axes)
    if len(header) < 4 * axes:
        raise ValueError(f"truncated: a header of {4 + 4 * axes} bytes, found {4 + len(header)}")
    sizes = struct.unpack(f">{axes}I", header)
    data = _take_values(file, sizes)
    digest = hashlib.sha256(magic + header)
    digest.update(data)
    values = np.frombuffer(data, dtype=np.uint8).reshape(sizes)
    return IdxArray(values=values, sha256=digest.hexdigest())


def _take_values(file: BinaryIO | gzip.GzipFile, sizes: tuple[int, ...]) -> bytearray:
    shape, wanted = " × ".join(map(str, sizes)), math.prod(sizes)
    if wanted == 0:
        raise ValueError(f"its header says {shape} values: an axis of size 0")
    data = _take(file, wanted)
    if len(data) < wanted:
        raise ValueError(
            f"truncated: its header says {shape} = {wanted} bytes of data, found {len(data)}"
        )
    if file.read(1):
        raise ValueError(f"bytes are left over after the {shape} = {wanted} that its header says")
    return data


def _take(file: BinaryIO | gzip.GzipFile, count: int) -> bytearray:
    """Read ``count`` bytes, or all there are; never makes room for more than the file holds."""
    taken = bytearray()
    while len(taken) < count:
        chunk = file.read(min(_CHUNK, count - len(taken)))
        if not chunk:
            break
        taken += chunk
    return taken
