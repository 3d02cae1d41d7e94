"""From encoded images to batches, with Pillow (the extra `images`): RGB, upright, cropped."""

import io
import math
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastdeq.data.epoch_loader import Batch, EpochLoader, Normalization
from fastdeq.data.records import Records
from fastdeq.data.store import one_line
from fastdeq.extras import require
from fastdeq.settings import check_value, setting, settings

with suppress(ImportError):  # reported where it is needed: only image folders need it
    from PIL import Image, ImageOps

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
_BIT_DEPTH = 24  # place of this byte in a PNG file, whose header comes first
_ATTEMPTS = 10  # at a crop that fits into the image
# Ranks are started by "spawn", which their workers would inherit: each would import PyTorch and
# Lightning again, for seconds, and hold an index of its own. Elsewhere the default of the platform.
_CONTEXT = "fork" if sys.platform == "linux" else None
_SAMPLE = 3  # spawn key of the random numbers of a sample; its place in the order follows


def require_pillow() -> None:
    """Raises: MissingExtra if Pillow is not installed."""
    require("data=image_folder", "PIL")


def identify(content: bytes) -> None:
    """Raise ValueError unless the header is that of an image, with its size."""
    with _opened(content):
        pass


def decode(content: bytes) -> "Image.Image":
    """Return an image, the first of several, as upright RGB of 8 bits, as docs/data.md describes.

    Raises ValueError for what is not such an image, or is damaged.
    """
    with _opened(content) as image:
        image.load()
        return _to_rgb(_upright(_keyed(image, content)))


@settings
class Crop(ABC):
    """The part of an image that becomes a sample of ``size`` × ``size`` pixels."""

    size: int = setting(at_least=1)

    @abstractmethod
    def apply(self, image: "Image.Image", random: np.random.Generator) -> "Image.Image":
        """Return the square image; random numbers are drawn from ``random``."""


@final
@settings
class CentralCrop(Crop):
    """Resized until the central square is a ``share`` of the shorter side, and cropped to that.

    With size 224 and share 0.875 the shorter side becomes 256. Nothing is random.
    """

    share: float = setting(default=0.875, above=0, at_most=1)

    def apply(self, image: "Image.Image", random: np.random.Generator) -> "Image.Image":
        shorter = round(self.size / self.share)
        width, height = (shorter * side // min(image.size) for side in image.size)
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (round((side - self.size) / 2) for side in (width, height))
        return image.crop((left, top, left + self.size, top + self.size))


@final
@settings
class RandomCrop(Crop):
    """A random part of the image, resized to the square; mirrored in a share ``flip`` of cases.

    The part's share of the area is uniform in ``area``, the logarithm of its width / height in that
    of ``ratio``, its place uniform. Parts that do not fit are drawn again; after ten, it is the
    largest one in the centre whose ratio is in range (C. Szegedy et al., Going Deeper with
    Convolutions, 2014, arXiv 1409.4842, section 6). Raises ValueError for an ``area`` or a
    ``ratio`` that does not rise from above 0, and for an ``area`` above 1.
    """

    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = setting(default=0.5, at_least=0, at_most=1)

    def validate(self) -> None:
        for name, (low, high) in (("crop_area", self.area), ("crop_ratio", self.ratio)):
            if not 0 < low <= high < math.inf:
                raise ValueError(f"{name} must rise from above 0, not {[low, high]}")
        if self.area[1] > 1:
            raise ValueError(f"crop_area must be at most 1, not {list(self.area)}")

    def apply(self, image: "Image.Image", random: np.random.Generator) -> "Image.Image":
        mirrored = random.random() < self.flip  # drawn first, whatever the size of the image
        left, top, right, bottom = self.draw(*image.size, random)
        part = image.crop((left, top, right, bottom))
        part = part.resize((self.size, self.size), Image.Resampling.BILINEAR)
        return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else part

    def draw(self, width: int, height: int, random: np.random.Generator) -> tuple[int, ...]:
        """Return a random part of an image of this size: left, top, right, bottom in pixels."""
        low, high = (math.log(value) for value in self.ratio)
        for _ in range(_ATTEMPTS):
            area = width * height * random.uniform(*self.area)
            ratio = math.exp(random.uniform(low, high))
            wide, tall = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < wide <= width and 0 < tall <= height:
                left = int(random.integers(width - wide + 1))
                top = int(random.integers(height - tall + 1))
                return left, top, left + wide, top + tall
        return self._central(width, height)

    def _central(self, width: int, height: int) -> tuple[int, ...]:
        lowest, highest = self.ratio
        wide = min(width, max(1, round(height * highest)))
        tall = min(height, max(1, round(width / lowest)))
        left, top = (width - wide) // 2, (height - tall) // 2
        return left, top, left + wide, top + tall


def to_tensor(image: "Image.Image") -> Tensor:
    """Return the pixels of an RGB image, uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _keyed(image: "Image.Image", content: bytes) -> "Image.Image":
    """Return a PNG image that has a transparent colour as RGBA, any other image as it is.

    That colour is compared in all bits (PNG, third edition, 11.3.1.1), unlike in Pillow.
    """
    if image.format != "PNG" or image.mode == "P" or "transparency" not in image.info:
        return image  # a palette has an alpha for each of its colours
    key = image.info.pop("transparency")
    bits = content[_BIT_DEPTH]
    samples = _samples(image, content, bits)  # (H, W, 1 or 3)
    transparent = (samples == np.array(key) & (2**bits - 1)).all(axis=-1)
    keyed = _opaque(image)
    keyed.putalpha(Image.fromarray(np.where(transparent, 0, 255).astype(np.uint8)))
    keyed.info = image.info  # says how the image is turned
    return keyed


def _samples(image: "Image.Image", content: bytes, bits: int) -> NDArray[np.int64]:
    """Return the samples as the file has them, (H, W, 1 or 3)."""
    samples: NDArray[np.int64] = np.asarray(image).astype(np.int64)
    if samples.ndim == 2:
        # Pillow spreads 2 and 4 bits over 0..255; of 1 bit it makes bool, and keeps 16.
        return samples[..., None] // (255 // (2**bits - 1) if image.mode == "L" else 1)
    if bits < 16:
        return samples
    with Image.open(io.BytesIO(content), formats=_FORMATS) as lower:
        # Pillow keeps the first byte of each sample; read as little-endian, it keeps the second.
        lower.tile = [(*tile[:3], "RGB;16L") for tile in lower.tile]  # type: ignore[misc]
        low: NDArray[np.uint8] = np.asarray(lower)
    return 256 * samples + low


def _opaque(image: "Image.Image") -> "Image.Image":
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip instead of scaling
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def _to_rgb(image: "Image.Image") -> "Image.Image":
    if image.has_transparency_data:
        colours = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, colours).convert("RGB")
    return _opaque(image)


def _upright(image: "Image.Image") -> "Image.Image":
    """Return ``image`` turned as its metadata say; unreadable ones are ignored."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # as many kinds as there are damages
        return image


@contextmanager
def _opened(content: bytes) -> Iterator["Image.Image"]:
    with _pillow(), Image.open(io.BytesIO(content), formats=_FORMATS) as image:
        if not all(image.size):
            raise ValueError(f"its size is {image.size}")
        if image.format == "TIFF" and image.mode in ("I", "F"):  # other formats have none of these
            raise ValueError("more than 16 bits per channel, or not whole numbers")
        yield image


@contextmanager
def _pillow() -> Iterator[None]:
    """Turn whatever Pillow raises into a ValueError, and silence its warnings on odd metadata."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except Exception as error:  # damage makes Pillow raise anything, SyntaxError too
            reason = one_line(error)
            if type(error).__name__ == "UnidentifiedImageError":  # its text names an object
                reason = f"not identified as {', '.join(_FORMATS[:-1])} or {_FORMATS[-1]}"
            raise ValueError(f"not a readable image ({reason})") from error


class DecodedBatches(EpochLoader):
    """Iterate over ``records`` in batches of float32 (B, 3, size, size), normalized, on ``device``.

    The random numbers of ``crop`` depend on (``seed``, epoch) and the place of the sample in the
    order alone: not on the number of workers or ranks, nor on where an epoch was resumed. The
    global random states do not change.

    ``workers`` processes decode, each a batch at a time and up to two ahead; they stay from epoch
    to epoch until ``close``. With 0 this process decodes. ``settings``: those of ``EpochLoader``.

    Raises TypeError or ValueError for ``workers`` that are not an integer ≥ 0 and, while iterating,
    ValueError naming an image that cannot be decoded.
    """

    def __init__(
        self,
        records: Records,
        *,
        crop: Crop,
        normalization: Normalization,
        device: torch.device,
        workers: int,
        **settings: Any,
    ) -> None:
        super().__init__(len(records), **settings)
        check_value("workers", workers, int, {"at least": 0})
        self._targets, self._decoder = records.targets, _Decoder(records, crop)
        self._normalize = normalization.on((3, crop.size, crop.size), device)
        self._device, self._workers = device, workers
        self._parts: list[_Part] = []  # of the epoch that begins next
        self._loader: DataLoader[Any] | None = None
        self._running: Generator[Batch, None, None] | None = None

    def close(self) -> None:
        if self._running is not None:
            self._running.close()
        self._running = self._loader = None
        self._decoder.records.close()

    def _batches_from(self, first: int) -> Iterator[Batch]:
        if self._running is not None:
            self._running.close()  # the workers serve one epoch at a time
        self._running = self._decoded(first)
        return self._running

    def _decoded(self, first: int) -> Generator[Batch, None, None]:
        order, epoch = self._order().numpy(), (self._seed, self._epoch)
        windows = [self._part(position) for position in range(first, len(self))]
        self._parts[:] = [_Part(order[window], window.start, epoch) for window, _ in windows]
        if self._loader is None:
            self._loader = self._start()
        for (window, weight), found in zip(windows, self._loader, strict=True):
            if isinstance(found, str):
                raise ValueError(found)
            inputs = found.to(self._device, non_blocking=True)
            targets = self._targets[order[window]].to(self._device, non_blocking=True)
            yield Batch(self._normalize(inputs), targets, weight)

    def _start(self) -> DataLoader[Any]:
        return DataLoader(
            self._decoder,
            sampler=self._parts,
            batch_size=None,  # a part is a batch already
            num_workers=self._workers,
            multiprocessing_context=_CONTEXT if self._workers else None,
            persistent_workers=self._workers > 0,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator(),  # else every epoch draws from the global one
        )


class _Part(NamedTuple):
    """A batch to decode: the samples at ``indices``, from place ``first`` of the order on."""

    indices: NDArray[np.int64]
    first: int
    epoch: tuple[int, int]  # seed and number


class _Decoder(Dataset[Tensor | str]):
    """Images uint8 (B, 3, size, size) of a part."""

    def __init__(self, records: Records, crop: Crop) -> None:
        self.records, self.crop = records, crop

    def __getitem__(self, part: _Part) -> Tensor | str:
        """Return the images, or what is wrong with one of them."""
        try:
            return torch.stack([self._image(part, place) for place in range(len(part.indices))])
        except ValueError as error:
            return str(error)  # an error that leaves a worker becomes a text of its traceback

    def _image(self, part: _Part, place: int) -> Tensor:
        index = int(part.indices[place])
        content = self.records.read(index)
        mixed = np.random.SeedSequence(part.epoch, spawn_key=(_SAMPLE, part.first + place))
        try:
            image = decode(content)
        except ValueError as error:
            raise ValueError(
                f"{self.records.file(index)}: {error}: replace or remove it (data.verify=true "
                "finds all such images when the store is built, data.skip_unreadable=true leaves "
                "them out)"
            ) from error
        return to_tensor(self.crop.apply(image, np.random.default_rng(mixed)))
