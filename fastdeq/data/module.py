"""What all data modules share: whose batches, on which device, from where on."""

import hashlib
from abc import ABC, abstractmethod
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor

from fastdeq.data.batches import Normalization
from fastdeq.data.checks import require_integer
from fastdeq.data.passes import Batch, Passes


class AbstractDataModule(LightningDataModule, ABC):
    """Batches of a set on the trainer's device (on the CPU without a trainer).

    Training batches are shuffled anew in each epoch, by ``seed`` and the epoch alone. Batch sizes
    count the samples of all processes together: each gets its part (see ``Passes``).

    ``validation`` training samples are held out for validation: those whose index has the smallest
    SHA-256 (see ``hold_out``), for every seed the same. With 0, validation is the test split
    (``validates_on_test``), as in the published tables: these evaluate the test set in every epoch
    and select nothing on it, and nothing must be selected on these figures here (no early stopping,
    no best checkpoint).

    A subclass says ``input_shape`` (of one sample), ``outputs`` (how many classes, or dimensions of
    a target) and ``normalization``, and makes the batches. ``facts`` is what it learnt about the
    set, for people to read: file, source, licence.

    Raises ValueError for batch sizes that are not integers ≥ 1, for a seed or a ``validation`` that
    is not one ≥ 0.
    """

    input_shape: tuple[int, ...]
    outputs: int
    normalization: Normalization | None

    def __init__(
        self, *, batch_size: int, eval_batch_size: int, seed: int = 0, validation: int = 0
    ) -> None:
        super().__init__()
        self.batch_size = require_integer("batch_size", batch_size, minimum=1)
        self.eval_batch_size = require_integer("eval_batch_size", eval_batch_size, minimum=1)
        self.seed = require_integer("seed", seed, minimum=0)
        self.validation = require_integer("validation", validation, minimum=0)
        self.facts: dict[str, str] = {}
        self._prepared = False
        self._device = torch.device("cpu")
        self._rank, self._ranks = 0, 1
        self._splits: dict[str, Any] = {}
        self._train: Passes | None = None
        self._saved: dict[str, int] | None = None

    def prepare(self) -> None:
        """Download or build what is loaded later; a node's other processes wait meanwhile."""
        return  # most sets need nothing

    @abstractmethod
    def load(self) -> tuple[Any, Any]:
        """Return the samples for training and for testing, to be indexed by a mask, bool (N,)."""

    @abstractmethod
    def _training(self, *, overfit: bool) -> Passes:
        """Return this process's training batches; with ``overfit`` in stored order, unchanged."""

    @abstractmethod
    def _evaluation(self, split: str) -> Passes:
        """Return this process's batches of a split (train, validation or test) in stored order."""

    @abstractmethod
    def _first(self, n: int) -> Batch:
        """Return the first ``n`` training samples on the CPU, as evaluation has them."""

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
        return self._first(n)

    def train_dataloader(self) -> Passes:
        """Return the training samples in shuffled batches of ``batch_size``, the last smaller.

        In stored order and as they are under a trainer with ``overfit_batches``: these are then the
        same batches in every epoch.
        """
        overfit = self.trainer is not None and getattr(self.trainer, "overfit_batches", 0) > 0
        self._train = self._training(overfit=overfit)
        if self._saved is not None:
            self._train.load_state_dict(self._saved)
            self._saved = None
        return self._train

    def val_dataloader(self) -> Passes:
        """Return the samples for validation in stored order, batches of ``eval_batch_size``."""
        return self._evaluation("test" if self.validates_on_test else "validation")

    def test_dataloader(self) -> Passes:
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
        """Load the set where that is not done, and hold out what is for validation."""
        if self._splits:
            return
        train, test = self.load()
        if self.validates_on_test:
            self._splits = {"train": train, "test": test}
            return
        held_out = self._held_out(len(train))
        self._splits = {"train": train[~held_out], "validation": train[held_out], "test": test}

    def _held_out(self, samples: int) -> Tensor:
        """Return which of the training samples are for validation, bool (N,).

        Raises ValueError where nothing is left to train on.
        """
        if self.validation >= samples:
            raise ValueError(
                f"validation {self.validation} leaves nothing of {samples} training samples: "
                "hold out fewer"
            )
        return hold_out(samples, self.validation)


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
