"""Small image sets in the official IDX format, written byte by byte, and mirrors that serve them.

Nothing of fastdeq's own reader or writer is used to make them.
"""

import gzip
import hashlib
import http.server
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fastdeq.data import StoredDataModule
from fastdeq.data.mnist import MNIST, IdxImages

STEMS = ("train-images", "train-labels", "t10k-images", "t10k-labels")
KINDS = ("idx3-ubyte", "idx1-ubyte", "idx3-ubyte", "idx1-ubyte")
TRAIN, TEST = 30, 20  # samples, of ten classes in equal parts


def idx(values: NDArray[np.uint8], *, type_code: int = 0x08) -> bytes:
    """Two zero bytes, type code, number of axes, big-endian sizes, values in C order."""
    header = struct.pack(">BBBB", 0, 0, type_code, values.ndim)
    return header + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def zipped(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


def samples(seed: int = 0) -> list[NDArray[np.uint8]]:
    """Training images and labels, test images and labels, in the order of the files."""
    random = np.random.default_rng(seed)
    arrays: list[NDArray[np.uint8]] = []
    for count in (TRAIN, TEST):
        arrays.append(random.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        arrays.append(random.permutation(np.arange(count) % 10).astype(np.uint8))
    return arrays


def names(*, dot: str = "-", compressed: bool = True) -> list[str]:
    """The four file names, spelled train-images-idx3-ubyte or train-images.idx3-ubyte."""
    end = ".gz" if compressed else ""
    return [f"{stem}{dot}{kind}{end}" for stem, kind in zip(STEMS, KINDS, strict=True)]


def write_files(
    folder: Path,
    arrays: Sequence[NDArray[np.uint8]],
    *,
    dot: str = "-",
    compressed: bool = True,
) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in names(dot=dot, compressed=compressed)]
    for path, array in zip(paths, arrays, strict=True):
        path.write_bytes(zipped(idx(array)) if compressed else idx(array))
    return paths


def published(
    source: IdxImages,
    arrays: Sequence[NDArray[np.uint8]],
    *,
    mirrors: Sequence[str] = ("http://127.0.0.1:9/",),  # discard: nobody answers
) -> IdxImages:
    """The source as if these samples were the official ones."""
    contents = [idx(array) for array in arrays]
    files = tuple(
        replace(file, md5=hashlib.md5(zipped(content)).hexdigest())
        for file, content in zip(source.files, contents, strict=True)
    )
    checksums = tuple(hashlib.sha256(content).hexdigest() for content in contents)
    return replace(
        source,
        files=files,
        mirrors=tuple(mirrors),
        sha256=checksums if source.sha256 else (),
    )


def small_mnist(*, mirrors: Sequence[str] = ("http://127.0.0.1:9/",)) -> IdxImages:
    """MNIST whose official files are those of ``samples()``."""
    return published(MNIST, samples(), mirrors=mirrors)


def loaded(data: StoredDataModule) -> StoredDataModule:
    """The same, ready to yield batches."""
    data.prepare_data()
    data.setup()
    return data


def labels(data: StoredDataModule) -> list[int]:
    """Of the test set."""
    return torch.cat([batch.targets for batch in data.test_dataloader()]).tolist()


def tree(folder: Path) -> dict[str, bytes]:
    """Everything beneath a folder: contents by relative path, folders with a slash at the end."""
    return {
        str(path.relative_to(folder)) + "/" * path.is_dir(): b""
        if path.is_dir()
        else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


class _Handler(http.server.BaseHTTPRequestHandler):
    def __init__(
        self, files: Mapping[str, bytes], requested: list[str], lost: int, *rest: object
    ) -> None:
        self._files, self._asked, self._lost = files, requested, lost
        super().__init__(*rest)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        self._asked.append(self.path.removeprefix("/"))
        content = self._files.get(self.path.removeprefix("/"))
        self.send_response(404 if content is None else 200)
        self.send_header("Content-Length", str(len(content or b"") + self._lost))
        self.end_headers()
        self.wfile.write(content or b"")

    def log_message(self, *_: object) -> None:
        return  # no lines between pytest's


@contextmanager
def mirror(files: Mapping[str, bytes], *, lost: int = 0) -> Iterator[tuple[str, list[str]]]:
    """A server on this machine: its address, and the names that were requested so far.

    ``lost``: how many bytes it promises beyond those it sends before it hangs up.
    """
    requested: list[str] = []
    with http.server.HTTPServer(
        ("127.0.0.1", 0), partial(_Handler, files, requested, lost)
    ) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/", requested
        finally:
            server.shutdown()
            thread.join()
