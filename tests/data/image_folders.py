"""Small folders of images, PNG files byte by byte, JPEG files by Pillow; and their data modules."""

import io
import os
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdeq.data import Batch, EpochLoader, ImageFolderDataModule

Pixels = NDArray[Any]

CLASSES = ("cat", "dog", "eel")
TRAIN, VAL = 8, 5  # images of each class
SIDE = 40  # pixels
SIZE = 32  # of the samples
SAMPLES = TRAIN * len(CLASSES)

SMALL = ("data=image_folder", "arch=cifar_tiny", "model=skip_mdeq", "data.size=32")
RUN = (*SMALL, "sizes.outputs=3", "data.batch_size=6", "solver.max_steps=3", "data.workers=0")
"""A short training run on such a folder."""

# First row and step, first column and step of each pass
ADAM7 = (
    *((0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4)),
    *((2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1)),
)
COLOUR_TYPES = {"grey": 0, "rgb": 2, "palette": 3, "grey+alpha": 4, "rgba": 6}


def png(
    pixels: Pixels,
    kind: str = "rgb",
    *,
    before: Mapping[bytes, bytes] | None = None,
    bits: int | None = None,
    interlaced: bool = False,
) -> bytes:
    """Signature, header, further chunks, the rows unfiltered and compressed, end.

    pixels: (H, W) or (H, W, C), uint8, or uint16 for 16 bits per sample. bits: 1, 2 or 4 per sample
    for pixels uint8 (H, W) below 2**bits. interlaced: the seven passes of Adam7.
    """
    height, width = pixels.shape[:2]
    bits = bits or 8 * pixels.itemsize
    header = struct.pack(">IIBBBBB", width, height, bits, COLOUR_TYPES[kind], 0, 0, int(interlaced))
    big_endian = pixels.astype(pixels.dtype.newbyteorder(">"))
    passes = ADAM7 if interlaced else ((0, 1, 0, 1),)
    parts = [big_endian[top::down, left::right] for top, down, left, right in passes]
    rows = b"".join(b"\0" + _row(row, bits) for part in parts if part.size for row in part)
    chunks = {b"IHDR": header, **(before or {}), b"IDAT": zlib.compress(rows), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks.items())


def _row(row: Pixels, bits: int) -> bytes:
    """One row's bytes; of less than 8 bits, samples are packed from the highest bit on."""
    if bits >= 8:
        return row.tobytes()
    return np.packbits(np.unpackbits(row[:, None], axis=1)[:, 8 - bits :]).tobytes()


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


def folder(root: Path | None, **settings: Any) -> ImageFolderDataModule:
    defaults = {"size": SIZE, "workers": 0, "batch_size": 5, "eval_batch_size": 4}
    return ImageFolderDataModule(root=root, **(defaults | settings))


def ready(root: Path, *, rank: int = 0, ranks: int = 1, **settings: Any) -> ImageFolderDataModule:
    data = folder(root, **settings)
    strategy = Mock(root_device=torch.device("cpu"))
    data.trainer = Mock(strategy=strategy, global_rank=rank, world_size=ranks, overfit_batches=0)
    data.setup()
    return data


def inputs(batches: EpochLoader) -> Tensor:
    return torch.cat([batch.inputs for batch in batches])


def pixels_of(batch: Batch) -> Tensor:
    """What was there before the normalization, as uint8."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    return ((batch.inputs * std + mean) * 255).round().to(torch.uint8)


def stores(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").glob("*.h5"))


def refusal(data: ImageFolderDataModule, place: Path) -> str:
    """What preparing says: one line that begins with the place; nothing half-made stays."""
    with pytest.raises((ValueError, OSError)) as caught:
        data.load()
    text = str(caught.value)
    assert text.startswith(f"{place}: ")
    assert "\n" not in text
    cache = Path(os.environ["FASTDEQ_CACHE"])
    assert not list(cache.glob(".*.tmp"))
    return text.removeprefix(f"{place}: ")
