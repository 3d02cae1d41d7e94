"""The 8 × 8 handwritten digits that come with fastdeq: runs without a download."""

from importlib import resources
from typing import Any, ClassVar

import torch
from pytorch_lightning import LightningDataModule

from fastdeq.data.batches import Batches, Normalization, require_integer
from fastdeq.data.store import ImageSet, read_store

# Pixels count the 16 cells of a 4 × 4 block. Mean and standard deviation are those of the training
# split's pixels after the division by 16: 0.304982 and 0.375789 (population, N in the divisor).
NORMALIZATION = Normalization(scale=16.0, mean=(0.304982,), std=(0.375789,))


def read_digits() -> ImageSet:
    """Return the shipped digits: 1437 training and 360 test images uint8 (N, 1, 8, 8) of 0..16.

    Raises FileNotFoundError or ValueError, with the cure, where the file is missing or damaged.
    """
    file = resources.files("fastdeq.data").joinpath("digits.h5")
    with resources.as_file(file) as path:
        return read_store(path, cure="reinstall fastdeq")


class DigitsDataModule(LightningDataModule):
    """Batches of digits, float32 (B, 1, 8, 8) normalized, with labels int64 (B,) of 0..9.

    The whole set lies on the trainer's device (on the CPU without a trainer). Training batches are
    shuffled anew in each epoch, by ``seed`` and the epoch alone. Validation and test are both the
    test split, as in the published tables: these evaluate the test set in every epoch and select
    nothing on it, and nothing must be selected on these figures here (no early stopping, no best
    checkpoint).

    Raises ValueError for batch sizes that are not integers ≥ 1 and a seed that is not one ≥ 0.
    """

    input_shape: ClassVar[tuple[int, int, int]] = (1, 8, 8)
    classes: ClassVar[int] = 10

    def __init__(self, *, batch_size: int = 64, eval_batch_size: int = 360, seed: int = 0) -> None:
        super().__init__()
        self.batch_size = require_integer("batch_size", batch_size, minimum=1)
        self.eval_batch_size = require_integer("eval_batch_size", eval_batch_size, minimum=1)
        self.seed = require_integer("seed", seed, minimum=0)
        self._images: ImageSet | None = None
        self._device = torch.device("cpu")
        self._train: Batches | None = None
        self._saved: dict[str, int] | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read and verify the file once, and learn which device the batches are wanted on.

        Raises ValueError on more than one process: each would train on all of the samples.
        """
        if self.trainer is not None:
            if self.trainer.world_size > 1:
                raise ValueError(
                    f"the digits are not divided among {self.trainer.world_size} processes: "
                    "train them on one device (trainer.devices=1, trainer.num_nodes=1)"
                )
            self._device = self.trainer.strategy.root_device
        if self._images is None:
            self._images = read_digits()

    def train_dataloader(self) -> Batches:
        """Return the training split in shuffled batches of ``batch_size``, the last one smaller."""
        images = self._on_device()
        self._train = Batches(
            images.train_images,
            images.train_labels,
            batch_size=self.batch_size,
            shuffle=True,
            seed=self.seed,
            normalization=NORMALIZATION,
        )
        if self._saved is not None:
            self._train.load_state_dict(self._saved)
            self._saved = None
        return self._train

    def val_dataloader(self) -> Batches:
        """Return the test split (see the class) in stored order, batches of ``eval_batch_size``."""
        images = self._on_device()
        return Batches(
            images.test_images,
            images.test_labels,
            batch_size=self.eval_batch_size,
            normalization=NORMALIZATION,
        )

    def test_dataloader(self) -> Batches:
        """Return what ``val_dataloader`` returns."""
        return self.val_dataloader()

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the training batches, which a checkpoint keeps.

        Lightning keeps it too, but forgets it in checkpoints saved at the end of an epoch: the next
        run's first epoch would repeat epoch 0's order.
        """
        return {} if self._train is None else {"train": self._train.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next training batches go on where ``state_dict`` was saved."""
        self._saved = state_dict.get("train")

    def _on_device(self) -> ImageSet:
        if self._images is None:
            raise RuntimeError("call setup() before asking for batches (a Trainer does so itself)")
        self._images = self._images.to(self._device)  # moves once: later calls find it there
        return self._images
