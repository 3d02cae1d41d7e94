"""Data modules that keep a whole set in memory, on the device that trains on it."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor

from fastdeq.data.augmentation import Augmentation
from fastdeq.data.batches import Batch, Batches, Normalization
from fastdeq.data.checks import require_integer
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


class InMemoryDataModule(LightningDataModule, ABC):
    """Batches of a set that lies whole on the trainer's device (on the CPU without a trainer).

    Training batches are shuffled anew in each epoch, by ``seed`` and the epoch alone. Batch sizes
    count the samples of all processes together: each gets its part (see ``Batches``).

    ``validation`` training samples are held out for validation: those whose index has the smallest
    SHA-256 (see ``hold_out``), for every seed the same. With 0, validation is the test split
    (``validates_on_test``), as in the published tables: these evaluate the test set in every epoch
    and select nothing on it, and nothing must be selected on these figures here (no early stopping,
    no best checkpoint).

    ``augmentation`` changes the images of the training batches, by ``seed`` and the epoch too, one
    after the other; None: nothing.

    A subclass is final. It says ``input_shape`` (of one sample), ``outputs`` (how many classes, or
    dimensions of a target) and ``normalization``, loads the samples, and may ``prepare`` them.
    ``facts`` is what ``load`` learnt about the set, for people to read: file, source, licence.

    Raises ValueError for batch sizes that are not integers ≥ 1, for a seed or a ``validation`` that
    is not one ≥ 0, for an ``augmentation`` that changes the images' shape; and, at ``setup``, for a
    ``validation`` that leaves nothing to train on.
    """

    input_shape: tuple[int, ...]
    outputs: int
    normalization: Normalization | None

    def __init__(
        self,
        *,
        batch_size: int,
        eval_batch_size: int,
        seed: int = 0,
        validation: int = 0,
        augmentation: Sequence[Augmentation] | None = None,
    ) -> None:
        super().__init__()
        self.batch_size = require_integer("batch_size", batch_size, minimum=1)
        self.eval_batch_size = require_integer("eval_batch_size", eval_batch_size, minimum=1)
        self.seed = require_integer("seed", seed, minimum=0)
        self.validation = require_integer("validation", validation, minimum=0)
        self.augmentation = _chain(augmentation, self.input_shape)
        self.facts: dict[str, str] = {}
        self._prepared = False
        self._splits: dict[str, Samples] = {}
        self._device = torch.device("cpu")
        self._rank, self._ranks = 0, 1
        self._train: Batches | None = None
        self._saved: dict[str, int] | None = None

    @abstractmethod
    def load(self) -> tuple[Samples, Samples]:
        """Return the samples for training and for testing, on the CPU."""

    def prepare(self) -> None:
        """Download or build what ``load`` reads; a node's other processes wait meanwhile."""
        return  # most sets need nothing

    @property
    def validates_on_test(self) -> bool:
        """Whether validation is the test split."""
        return self.validation == 0

    def prepare_data(self) -> None:
        """Call ``prepare``, once however often Lightning asks."""
        if not self._prepared:
            self.prepare()
            self._prepared = True

    def setup(self, stage: str | None = None) -> None:
        """Load the set once, and learn on which device and for which process batches are wanted."""
        if self.trainer is not None:
            self._device = self.trainer.strategy.root_device
            self._rank, self._ranks = self.trainer.global_rank, self.trainer.world_size
        self._load_once()

    def sample_batch(self, n: int = 2) -> Batch:
        """Return the first ``n`` training samples on the CPU, normalized; needs no trainer.

        For trying whether a model fits the data. Prepares and loads the set where that is not done.
        Raises ValueError for an ``n`` that is not an integer ≥ 1.
        """
        require_integer("n", n, minimum=1)
        self.prepare_data()
        self._load_once()
        first = self._splits["train"][:n].to(torch.device("cpu"))
        return next(iter(self._batches(first, batch_size=n)))

    def train_dataloader(self) -> Batches:
        """Return the training samples in shuffled batches of ``batch_size``, the last smaller.

        In stored order and as they are under a trainer with ``overfit_batches``: these are then the
        same batches in every epoch.
        """
        overfit = self.trainer is not None and getattr(self.trainer, "overfit_batches", 0) > 0
        self._train = self._batches(
            self._on_device("train"),
            batch_size=self.batch_size,
            shuffle=not overfit,
            seed=self.seed,
            augmentation=() if overfit else self.augmentation,
            rank=self._rank,
            ranks=self._ranks,
        )
        if self._saved is not None:
            self._train.load_state_dict(self._saved)
            self._saved = None
        return self._train

    def val_dataloader(self) -> Batches:
        """Return the samples for validation in stored order, batches of ``eval_batch_size``."""
        return self._evaluation("test" if self.validates_on_test else "validation")

    def test_dataloader(self) -> Batches:
        """Return the test split in stored order, batches of ``eval_batch_size``."""
        return self._evaluation("test")

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the training batches, which a checkpoint keeps.

        Lightning keeps it too, but forgets it in checkpoints saved at the end of an epoch: the next
        run's first epoch would repeat epoch 0's order.
        """
        return {} if self._train is None else {"train": self._train.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next training batches go on where ``state_dict`` was saved."""
        self._saved = state_dict.get("train")

    def _load_once(self) -> None:
        if self._splits:
            return
        train, test = self.load()
        if self.validates_on_test:
            self._splits = {"train": train, "test": test}
            return
        if self.validation >= len(train):
            raise ValueError(
                f"validation {self.validation} leaves nothing of {len(train)} training samples: "
                "hold out fewer"
            )
        held_out = hold_out(len(train), self.validation)
        self._splits = {"train": train[~held_out], "validation": train[held_out], "test": test}

    def _on_device(self, split: str) -> Samples:
        if not self._splits:
            raise RuntimeError("call setup() before asking for batches (a Trainer does so itself)")
        # Moves once: later calls find it there.
        self._splits[split] = self._splits[split].to(self._device)
        return self._splits[split]

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


def hold_out(samples: int, count: int) -> Tensor:
    """Return which of ``samples`` are held out, bool (N,): ``count`` of them, by a fixed rule.

    The rule: the indices i with the smallest SHA-256 of the ASCII text "fastdeq validation <i>".
    Neither a seed nor a library's random numbers are in it, and a larger set holds the smaller.
    """
    digests = [hashlib.sha256(f"fastdeq validation {i}".encode()).digest() for i in range(samples)]
    chosen = sorted(range(samples), key=digests.__getitem__)[:count]
    mask = torch.zeros(samples, dtype=torch.bool)
    mask[chosen] = True
    return mask
