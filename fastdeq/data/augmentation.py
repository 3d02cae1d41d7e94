"""Random changes of training images, on their device and of a whole batch at once.

Random numbers are drawn separately from their use: for all samples of an epoch, on the CPU. What
happens to a sample therefore depends on the epoch and its place in it alone, not on the device, the
batch size or the process.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdeq.settings import setting, settings


class Augmentation(ABC):
    """A random change of images float (B, C, H, W), drawn per sample.

    A subclass is final and made with ``@settings``.
    """

    @abstractmethod
    def draw(self, samples: int, generator: torch.Generator) -> Tensor:
        """Return the random numbers of this many samples, (N, ...), on the generator's device."""

    @abstractmethod
    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Return ``images`` (B, C, H, W), changed as ``drawn`` (B, ...), on their device, says."""


@final
@settings
class RandomFlip(Augmentation):
    """Left and right exchanged in a ``share`` (0 to 1) of the samples."""

    share: float = setting(default=0.5, at_least=0, at_most=1)

    def draw(self, samples: int, generator: torch.Generator) -> Tensor:
        return torch.rand(samples, generator=generator) < self.share

    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        return torch.where(drawn.view(-1, 1, 1, 1), images.flip(-1), images)


@final
@settings
class ResizeCrop(Augmentation):
    """Resized to ``resize`` × ``resize``, bilinearly, then a random crop of ``size`` × ``size``.

    All (resize − size + 1)² crops are equally likely. Raises ValueError for a ``size`` above
    ``resize``.
    """

    resize: int = setting(at_least=1)
    size: int = setting(at_least=1)

    def validate(self) -> None:
        if self.resize < self.size:
            raise ValueError(f"ResizeCrop.resize is {self.resize}, but must be at least the size")

    def draw(self, samples: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.resize - self.size + 1, (samples, 2), generator=generator)

    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        # align_corners=False: pixels are areas, as image libraries have it.
        resized = F.interpolate(images, 2 * (self.resize,), mode="bilinear", align_corners=False)
        return _crop(resized, drawn, self.size, self.size)


@final
@settings
class PadCrop(Augmentation):
    """Zeros added around, ``padding`` pixels wide, then a random crop of the original size.

    All (2 · padding + 1)² shifts are equally likely. Zero is black, since normalization follows.
    """

    padding: int = setting(at_least=0)

    def draw(self, samples: int, generator: torch.Generator) -> Tensor:
        return torch.randint(2 * self.padding + 1, (samples, 2), generator=generator)

    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        return _crop(F.pad(images, (self.padding,) * 4), drawn, *images.shape[2:])


@final
@settings
class Transform(Augmentation):
    """A ``transform`` of another library, such as those of ``torchvision.transforms.v2``.

    ``transform``: maps one image uint8 (C, H, W) to one of the same shape and type. It may draw
    from PyTorch's global random state, which is seeded for each sample and restored afterwards.

    ``apply`` raises ValueError for a result of another type.
    """

    transform: Callable[[Tensor], Tensor] = setting()

    def draw(self, samples: int, generator: torch.Generator) -> Tensor:
        return torch.randint(2**63 - 1, (samples,), generator=generator)

    def apply(self, images: Tensor, drawn: Tensor) -> Tensor:
        pixels = images.round().clamp(0, 255).to(torch.uint8)
        devices = [images.device] if images.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            changed = [
                self._changed(one, seed) for one, seed in zip(pixels, drawn.tolist(), strict=True)
            ]
        return torch.stack(changed).to(images.dtype)

    def _changed(self, image: Tensor, seed: int) -> Tensor:
        torch.manual_seed(seed)
        changed = self.transform(image)
        if not isinstance(changed, Tensor) or changed.dtype != torch.uint8:
            kind = changed.dtype if isinstance(changed, Tensor) else type(changed).__name__
            raise ValueError(
                f"augmentation.transform returns {kind}, but must return uint8 as it gets it: "
                "leave scaling to data.normalization"
            )
        return changed


def _crop(images: Tensor, first: Tensor, height: int, width: int) -> Tensor:
    """Return the crops (B, C, height, width) that begin at ``first`` (B, 2): row and column."""
    device = images.device
    rows = first[:, 0, None] + torch.arange(height, device=device)  # (B, height)
    columns = first[:, 1, None] + torch.arange(width, device=device)  # (B, width)
    sample = torch.arange(len(images), device=device).view(-1, 1, 1, 1)
    channel = torch.arange(images.shape[1], device=device).view(1, -1, 1, 1)
    return images[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]
