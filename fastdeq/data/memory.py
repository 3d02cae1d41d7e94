"""Data modules that keep a whole set in memory, on the device that trains on it."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from fastdeq.data.augmentation import Augmentation
from fastdeq.data.batches import Batches
from fastdeq.data.module import AbstractDataModule
from fastdeq.data.passes import Batch
from fastdeq.data.store import ImageSet


@dataclass(frozen=True, eq=False)
class Samples:
    """Inputs (N, ...) and targets (N, ...) of one split; ValueError where their lengths differ."""

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise ValueError(f"{len(self.inputs)} inputs but {len(self.targets)} targets")

    def __len__(self) -> int:
        """Return N."""
        return len(self.inputs)

    def __getitem__(self, index: slice | Tensor) -> Self:
        """Return the samples at ``index``."""
        return type(self)(self.inputs[index], self.targets[index])

    def to(self, device: torch.device) -> Self:
        """Return these samples on ``device``; what is there already is not copied."""
        return type(self)(self.inputs.to(device), self.targets.to(device))


class InMemoryDataModule(AbstractDataModule):
    """Batches of a set that lies whole on the trainer's device; see ``AbstractDataModule``.

    ``augmentation`` changes the images of the training batches, by ``seed`` and the epoch too, one
    after the other; None: nothing.

    A subclass is final. Beside what every data module says, it loads the samples, and may
    ``prepare`` them. ``facts`` is what ``load`` learnt.

    Raises ValueError for an ``augmentation`` that changes the images' shape, what
    ``AbstractDataModule`` raises; and, at ``setup``, for a ``validation`` that leaves nothing to
    train on.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        eval_batch_size: int,
        seed: int = 0,
        validation: int = 0,
        augmentation: Sequence[Augmentation] | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            seed=seed,
            validation=validation,
        )
        self.augmentation = _chain(augmentation, self.input_shape)

    @abstractmethod
    def load(self) -> tuple[Samples, Samples]:
        """Return the samples for training and for testing, on the CPU."""

    def _training(self, *, overfit: bool) -> Batches:
        return self._batches(
            self._on_device("train"),
            batch_size=self.batch_size,
            shuffle=not overfit,
            seed=self.seed,
            augmentation=() if overfit else self.augmentation,
            rank=self._rank,
            ranks=self._ranks,
        )

    def _first(self, n: int) -> Batch:
        first = self._splits["train"][:n].to(torch.device("cpu"))
        return next(iter(self._batches(first, batch_size=n)))

    def _on_device(self, split: str) -> Samples:
        if not self._splits:
            raise RuntimeError("call setup() before asking for batches (a Trainer does so itself)")
        # Moves once: later calls find it there.
        samples: Samples = self._splits[split].to(self._device)
        self._splits[split] = samples
        return samples

    def _evaluation(self, split: str) -> Batches:
        return self._batches(
            self._on_device(split),
            batch_size=self.eval_batch_size,
            rank=self._rank,
            ranks=self._ranks,
        )

    def _batches(self, samples: Samples, **settings: Any) -> Batches:
        return Batches(
            samples.inputs, samples.targets, normalization=self.normalization, **settings
        )


def image_samples(images: ImageSet) -> tuple[Samples, Samples]:
    """Return the training and the test split of an image set."""
    return (
        Samples(images.train_images, images.train_labels),
        Samples(images.test_images, images.test_labels),
    )


def _chain(augmentation: object, shape: tuple[int, ...]) -> tuple[Augmentation, ...]:
    """Return the augmentations, each tried on an image of this shape, which it must keep."""
    chain = () if augmentation is None else augmentation
    if not isinstance(chain, Sequence) or not all(isinstance(one, Augmentation) for one in chain):
        raise ValueError(f"augmentation must be a list of augmentations, not {augmentation!r}")
    generator = torch.Generator().manual_seed(0)
    for one in chain:
        found = one.apply(torch.zeros(1, *shape), one.draw(1, generator)).shape[1:]
        if found != shape:
            raise ValueError(
                f"augmentation: {one} makes images of {tuple(found)} from {shape}: keep their shape"
            )
    return tuple(chain)
