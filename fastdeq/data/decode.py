"""From an encoded image to pixels, with Pillow (the extra `images`): RGB, upright, cropped.

For training, C. Szegedy et al., Going Deeper with Convolutions, 2014 (arXiv 1409.4842, section 6);
for evaluation the centre.
"""

import io
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdeq.data.checks import require_integer, require_number

try:
    from PIL import Image, ImageOps
except ImportError:  # said where it is needed: who reads no image files need not have it
    _HAS_PILLOW = False
else:
    _HAS_PILLOW = True

Box: TypeAlias = tuple[int, int, int, int]
"""Left, top, right, bottom, in pixels; right and bottom are just outside."""

_FORMATS = ("JPEG", "PNG")
_BIT_DEPTH = 24  # place of this byte in a PNG file, whose header comes first
_ATTEMPTS = 10  # at a crop that fits into the image


def require_pillow() -> None:
    """Raise ImportError, with the cure, where Pillow is not installed."""
    if not _HAS_PILLOW:
        raise ImportError("image folders need Pillow: pip install pillow, or 'fastdeq[images]'")


def identify(content: bytes) -> None:
    """Raise ValueError unless the header is that of a JPEG or PNG image, with its size."""
    with _pillow(), Image.open(io.BytesIO(content), formats=_FORMATS) as image:
        if not all(image.size):
            raise ValueError(f"its size is {image.size}")


def decode(content: bytes) -> "Image.Image":
    """Return a JPEG or PNG image as RGB, 8 bits a channel.

    Grey and palette images get equal or their palette's channels; CMYK is converted without a
    profile; what is transparent is laid on white; of 16 bits the upper 8 are kept. A transparent
    colour of a PNG image is compared in all bits of its samples (PNG, third edition, 11.3.1.1). The
    image is turned as its EXIF orientation says, which is how viewers show it. Raises ValueError
    for what is not such an image, or is damaged.
    """
    with _pillow(), Image.open(io.BytesIO(content), formats=_FORMATS) as image:
        image.load()
        return _to_rgb(_upright(_keyed(image, content)))


@dataclass(frozen=True, kw_only=True)
class Crop(ABC):
    """Says what of an image becomes a sample of ``size`` × ``size`` pixels."""

    size: int

    @abstractmethod
    def apply(self, image: "Image.Image", random: np.random.Generator) -> "Image.Image":
        """Return the square image; what is random is drawn from ``random``."""


@final
@dataclass(frozen=True, kw_only=True)
class CentralCrop(Crop):
    """Resized until the central square is a ``share`` of the shorter side, and cropped to that.

    With size 224 and share 0.875 the shorter side becomes 256. Nothing is random. Raises ValueError
    for a ``share`` that is not above 0 and at most 1.
    """

    share: float = 0.875

    def __post_init__(self) -> None:
        require_integer("size", self.size, minimum=1)
        if not 0 < require_number("crop_share", self.share) <= 1:
            raise ValueError(f"crop_share must be above 0 and at most 1, not {self.share!r}")

    def apply(self, image: "Image.Image", random: np.random.Generator) -> "Image.Image":
        """Return the centre of ``image``."""
        shorter = round(self.size / self.share)
        width, height = (shorter * side // min(image.size) for side in image.size)
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (round((side - self.size) / 2) for side in (width, height))
        return image.crop((left, top, left + self.size, top + self.size))


@final
@dataclass(frozen=True, kw_only=True)
class RandomCrop(Crop):
    """A random part of the image, resized to the square; mirrored in a share ``flip`` of cases.

    The part's share of the area is uniform in ``area``, the logarithm of its width / height in that
    of ``ratio``, its place uniform. Parts that do not fit are drawn again; after ten, it is the
    largest one in the centre whose ratio is in range. Raises ValueError for ranges or a share that
    make no sense.
    """

    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __post_init__(self) -> None:
        require_integer("size", self.size, minimum=1)
        if not 0 <= require_number("flip", self.flip) <= 1:
            raise ValueError(f"flip must be from 0 to 1, not {self.flip!r}")
        for name, (low, high) in (("crop_area", self.area), ("crop_ratio", self.ratio)):
            if not 0 < require_number(name, low) <= require_number(name, high):
                raise ValueError(f"{name} must rise from above 0, not {[low, high]}")
        if self.area[1] > 1:
            raise ValueError(f"crop_area must be at most 1, not {list(self.area)}")

    def apply(self, image: "Image.Image", random: np.random.Generator) -> "Image.Image":
        """Return a random part of ``image``, mirrored or not."""
        mirrored = random.random() < self.flip  # drawn first, whatever the image's size
        part = image.crop(self.draw(*image.size, random))
        part = part.resize((self.size, self.size), Image.Resampling.BILINEAR)
        return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else part

    def draw(self, width: int, height: int, random: np.random.Generator) -> Box:
        """Return a random part of an image of this size."""
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

    def _central(self, width: int, height: int) -> Box:
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

    Pillow compares that colour, in the file's units, with samples that it scaled to 8 bits.
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
    """Return the samples as the file has them, of this many bits, (H, W, 1 or 3)."""
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
    """Return an image without transparency as RGB."""
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
    """Return ``image`` turned as its metadata say; unreadable ones say nothing."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # as many kinds as there are damages
        return image


@contextmanager
def _pillow() -> Iterator[None]:
    """Turn whatever Pillow raises into a ValueError, and silence its notes on odd metadata."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except Exception as error:  # damage makes Pillow raise anything, SyntaxError too
            reason = " ".join(str(error).split()) or type(error).__name__
            if type(error).__name__ == "UnidentifiedImageError":  # its text names an object
                reason = "neither JPEG nor PNG"
            raise ValueError(f"not a readable image ({reason})") from error
