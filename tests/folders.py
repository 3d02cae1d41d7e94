"""Small folders of images: PNG files byte by byte, JPEG files by Pillow."""

import io
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

Pixels = NDArray[Any]

CLASSES = ("cat", "dog", "eel")
TRAIN, VAL = 8, 5  # images of each class
SIDE = 40  # pixels

COLOUR_TYPES = {"grey": 0, "rgb": 2, "palette": 3, "grey+alpha": 4, "rgba": 6}


def png(pixels: Pixels, kind: str = "rgb", *, before: Mapping[bytes, bytes] | None = None) -> bytes:
    """Signature, header, further chunks, the rows unfiltered and compressed, end.

    pixels: (H, W) or (H, W, C), uint8, or uint16 for 16 bits a channel.
    """
    height, width = pixels.shape[:2]
    header = struct.pack(
        ">IIBBBBB", width, height, 8 * pixels.itemsize, COLOUR_TYPES[kind], 0, 0, 0
    )
    big_endian = pixels.astype(pixels.dtype.newbyteorder(">"))
    rows = b"".join(b"\0" + row.tobytes() for row in big_endian)
    chunks = {b"IHDR": header, **(before or {}), b"IDAT": zlib.compress(rows), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks.items())


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def jpeg(pixels: Pixels, mode: str | None = None, **settings: Any) -> bytes:
    into = io.BytesIO()
    pytest.importorskip("PIL.Image").fromarray(pixels, mode).save(into, "JPEG", **settings)
    return into.getvalue()


def noise(seed: int, height: int = SIDE, width: int = SIDE) -> Pixels:
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (height, width, 3), dtype=np.uint8)


def images(classes: tuple[str, ...] = CLASSES) -> dict[str, bytes]:
    """Noise of several sizes, the first PNG, the next JPEG: contents by "split/class/file"."""
    return {
        f"{split}/{name}/{number}.{'JPEG' if number % 2 else 'png'}": (jpeg if number % 2 else png)(
            noise(100 * label + number + 50 * (split == "val"), SIDE + number, SIDE + 2 * label)
        )
        for split, count in (("train", TRAIN), ("val", VAL))
        for label, name in enumerate(classes)
        for number in range(count)
    }


def write_images(root: Path, contents: Mapping[str, bytes] | None = None) -> Path:
    for name, content in (images() if contents is None else contents).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root
