"""Small sets of 32 × 32 pictures in the official formats of CIFAR-10 and SVHN, byte by byte.

Neither Python's pickler nor SciPy's writer is used to make them.
"""

import gzip
import hashlib
import io
import struct
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastdeq.data.cifar import CIFAR10, CifarImages
from fastdeq.data.svhn import SVHN, SvhnImages

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
BATCHES = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
META = "batches.meta"
ARCHIVE = "cifar-10-python.tar.gz"
FOLDER = "cifar-10-batches-py"
COUNT = 4  # pictures in each batch
MAT = ("train_32x32.mat", "test_32x32.mat")


# CIFAR-10


def string(text: bytes) -> bytes:
    """A string of Python 2: SHORT_BINSTRING."""
    return b"U" + bytes([len(text)]) + text


def array(values: NDArray[np.uint8]) -> bytes:
    """A uint8 array as NumPy 1 wrote it under Python 2; its type is dtype('u1', 0, 1)."""
    sizes = b"".join(b"M" + struct.pack("<H", size) for size in values.shape)
    return (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85"
        + string(b"b")
        + b"\x87R"
        b"(K\x01(" + sizes + b"tcnumpy\ndtype\n" + string(b"u1") + b"K\x00K\x01\x87R"
        b"(K\x03" + string(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89T" + struct.pack("<i", values.nbytes) + values.tobytes() + b"tb"
    )


def listed(items: Sequence[bytes]) -> bytes:
    return b"](" + b"".join(items) + b"e"


def pickled(entries: Mapping[bytes, bytes]) -> bytes:
    """A dictionary of protocol 2, with keys of Python 2."""
    body = b"".join(string(key) + value for key, value in entries.items())
    return b"\x80\x02}(" + body + b"u."


def batch(pixels: NDArray[np.uint8], labels: Sequence[int]) -> bytes:
    return pickled(
        {
            b"batch_label": string(b"training batch"),
            b"labels": listed([b"K" + bytes([label]) for label in labels]),
            b"data": array(pixels),
            b"filenames": listed([string(b"picture.png") for _ in labels]),
        }
    )


def meta(classes: Sequence[str] = CLASSES) -> bytes:
    names = listed([string(name.encode()) for name in classes])
    return pickled({b"num_cases_per_batch": b"K\x04", b"label_names": names})


def pictures(seed: int = 0) -> list[tuple[NDArray[np.uint8], list[int]]]:
    """Pixels (N, 3072) and labels of each batch; the test batch comes last."""
    random = np.random.default_rng(seed)
    return [
        (
            random.integers(0, 256, (COUNT, 3072), dtype=np.uint8),
            random.integers(0, 10, COUNT).tolist(),
        )
        for _ in BATCHES
    ]


def cifar_files(seed: int = 0) -> dict[str, bytes]:
    """The seven files by name."""
    named = zip(BATCHES, pictures(seed), strict=True)
    return {**{name: batch(*content) for name, content in named}, META: meta()}


def archive(files: Mapping[str, bytes], *, folder: str = FOLDER) -> bytes:
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as tar:
        tar.addfile(_entry(folder, type=tarfile.DIRTYPE))
        for name, content in {**files, "readme.html": b"<html>"}.items():
            tar.addfile(_entry(f"{folder}/{name}", size=len(content)), io.BytesIO(content))
    return gzip.compress(plain.getvalue(), mtime=0)


def _entry(name: str, **settings: object) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    for key, value in settings.items():
        setattr(entry, key, value)
    return entry


def write_folder(folder: Path, files: Mapping[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def small_cifar(*, mirrors: Sequence[str] = ("http://127.0.0.1:9/",)) -> CifarImages:
    """CIFAR-10 whose official files are ``cifar_files()``."""
    files = cifar_files()
    return replace(
        CIFAR10,
        files=(replace(CIFAR10.files[0], md5=md5(archive(files))),),
        others=(
            tuple(replace(one, md5=md5(files[one.names[0]])) for one in CIFAR10.others[0]),
            *CIFAR10.others[1:],
        ),
        mirrors=tuple(mirrors),
    )


# SVHN


def element(kind: int, content: bytes) -> bytes:
    """A tag of type and length, then the content to the next multiple of 8 bytes."""
    return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % 8)


def matrix(name: bytes, values: NDArray[np.uint8]) -> bytes:
    """A uint8 matrix: its flags, sizes, name and values, the first index running fastest."""
    body = (
        element(6, struct.pack("<II", 9, 0))  # uint32: class uint8
        + element(5, struct.pack(f"<{values.ndim}i", *values.shape))  # int32
        + element(1, name)  # int8
        + element(2, values.tobytes(order="F"))  # uint8
    )
    return element(14, body)


def mat(*matrices: bytes, version: int = 0x0100) -> bytes:
    """116 bytes of text, 8 without use, version, byte order, then the matrices."""
    text = b"MATLAB 5.0 MAT-file, by hand".ljust(116)
    return text + bytes(8) + struct.pack("<H", version) + b"IM" + b"".join(matrices)


def digits(seed: int = 0) -> list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """X (32, 32, 3, N) and y (N, 1) of 1..10 for training and for test, in 12 and 11 digits."""
    random = np.random.default_rng(seed)
    return [
        (
            random.integers(0, 256, (32, 32, 3, count), dtype=np.uint8),
            (np.arange(count) % 10 + 1).astype(np.uint8).reshape(-1, 1),
        )
        for count in (12, 11)
    ]


def svhn_files(seed: int = 0) -> dict[str, bytes]:
    """The two files by name."""
    return {
        name: mat(matrix(b"X", pixels), matrix(b"y", labels))
        for name, (pixels, labels) in zip(MAT, digits(seed), strict=True)
    }


def small_svhn(*, mirrors: Sequence[str] = ("http://127.0.0.1:9/",)) -> SvhnImages:
    """SVHN whose official files are ``svhn_files()``."""
    files = svhn_files()
    official = tuple(replace(one, md5=md5(files[one.names[0]])) for one in SVHN.files)
    return replace(SVHN, files=official, mirrors=tuple(mirrors))


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()
