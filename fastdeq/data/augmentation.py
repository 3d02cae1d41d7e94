"""Random changes of training images, on their device and of a whole batch at once.

What is random is drawn apart from where it is used: for all samples of an epoch, on the CPU. So
what happens to a sample depends on the epoch and its place in it alone, not on the device, the
batch size or the process.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdeq.data.checks import require_integer, require_number


class Augmentation(ABC):
    """A random change of images float (B, C, H, W), each sample's own.

    A subclass is final: a frozen keyword-only dataclass.
    """

    @abstractmethod
    def draw(self, samples: int, generator: torch.Generator) -> Tensor:
        """Return what is random of this many samples, (N, ...), drawn on the generator's device."""

    @abstractmethod
    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Return ``images`` (B, C, H, W), changed as ``drawn`` (B, ...), of their device, says."""


@final
@dataclass(frozen=True, kw_only=True)
class RandomFlip(Augmentation):
    """Left and right exchanged in a ``share`` (0 to 1) of the samples; ValueError for others."""

    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= require_number("share", self.share) <= 1:
            raise ValueError(f"share must be from 0 to 1, not {self.share!r}")

    def draw(self, samples: int, generator: torch.Generator) -> Tensor:
        """Return which samples are flipped, bool (N,)."""
        return torch.rand(samples, generator=generator) < self.share

    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Return ``images`` with those flipped that ``drawn`` says."""
        return torch.where(drawn.view(-1, 1, 1, 1), images.flip(-1), images)


@final
@dataclass(frozen=True, kw_only=True)
class ResizeCrop(Augmentation):
    """Resized to ``resize`` × ``resize``, bilinearly, then a random crop of ``size`` × ``size``.

    All (resize − size + 1)² crops are equally likely. Raises ValueError for sizes that are not
    integers ≥ 1, and for a ``size`` above ``resize``.
    """

    resize: int
    size: int

    def __post_init__(self) -> None:
        require_integer("size", self.size, minimum=1)
        require_integer("resize", self.resize, minimum=self.size)

    def draw(self, samples: int, generator: torch.Generator) -> Tensor:
        """Return the crops' first rows and columns, int64 (N, 2)."""
        return torch.randint(self.resize - self.size + 1, (samples, 2), generator=generator)

    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Return the crops (B, C, size, size) that begin where ``drawn`` says."""
        square = (self.resize, self.resize)
        # align_corners=False: pixels are areas, as image libraries have it.
        resized = F.interpolate(images, square, mode="bilinear", align_corners=False)
        return _crop(resized, drawn, self.size, self.size)


@final
@dataclass(frozen=True, kw_only=True)
class PadCrop(Augmentation):
    """Zeros put around, ``padding`` pixels wide, then a random crop of the size from before.

    All (2 · padding + 1)² shifts are equally likely. Zero is black: this stands before the
    normalization. Raises ValueError for a ``padding`` that is not an integer ≥ 0.
    """

    padding: int

    def __post_init__(self) -> None:
        require_integer("padding", self.padding, minimum=0)

    def draw(self, samples: int, generator: torch.Generator) -> Tensor:
        """Return the crops' first rows and columns, int64 (N, 2)."""
        return torch.randint(2 * self.padding + 1, (samples, 2), generator=generator)

    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Return the crops, of the shape of ``images``, that begin where ``drawn`` says."""
        padded = F.pad(images, (self.padding,) * 4)
        return _crop(padded, drawn, *images.shape[2:])


def _crop(images: Tensor, first: Tensor, height: int, width: int) -> Tensor:
    """Return the crops (B, C, height, width) that begin at ``first`` (B, 2): row and column."""
    device = images.device
    rows = first[:, 0, None] + torch.arange(height, device=device)  # (B, height)
    columns = first[:, 1, None] + torch.arange(width, device=device)  # (B, width)
    sample = torch.arange(len(images), device=device).view(-1, 1, 1, 1)
    channel = torch.arange(images.shape[1], device=device).view(1, -1, 1, 1)
    return images[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]
