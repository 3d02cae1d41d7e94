"""The 8 × 8 handwritten digits that come with fastdeq: runs without a download."""

from collections.abc import Mapping
from importlib import resources
from typing import Any, final

from fastdeq.data.batches import Normalization
from fastdeq.data.memory import InMemoryDataModule, Samples, image_samples
from fastdeq.data.store import ImageSet, read_store

_SHA256 = "942b80c7b0bc35d1236d3a4f5fffda2d8159349e604a4855131f9c0e89553a9d"
# Pixels count the 16 cells of a 4 × 4 block. Mean and standard deviation are those of the training
# split's pixels after the division by 16: 0.304982 and 0.375789 (population, N in the divisor).
NORMALIZATION = Normalization(scale=16.0, mean=(0.304982,), std=(0.375789,))


def read_digits() -> ImageSet:
    """Return the shipped digits: 1437 training and 360 test images uint8 (N, 1, 8, 8) of 0..16.

    Raises FileNotFoundError or ValueError, with the cure, where the file is missing or damaged.
    """
    file = resources.files("fastdeq.data").joinpath("digits.h5")
    with resources.as_file(file) as path:
        images = read_store(path, cure="reinstall fastdeq")
    if images.attributes["sha256"] != _SHA256:
        raise ValueError(f"{file}: not the digits that come with fastdeq: reinstall fastdeq")
    return images


@final
class DigitsDataModule(InMemoryDataModule):
    """Batches of digits, float32 (B, 1, 8, 8) normalized, with labels int64 (B,) of 0..9.

    ``normalization``: see ``Normalization.configured``. Raises ValueError for another one, and what
    ``InMemoryDataModule`` raises.
    """

    input_shape = (1, 8, 8)
    outputs = 10
    normalization: Normalization = NORMALIZATION

    def __init__(
        self,
        *,
        batch_size: int = 64,
        eval_batch_size: int = 360,
        seed: int = 0,
        validation: int = 0,
        normalization: str | Mapping[str, Any] = "published",
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            seed=seed,
            validation=validation,
        )
        self.normalization = self.normalization.configured(normalization)

    def load(self) -> tuple[Samples, Samples]:
        """Return the shipped training and test split, verified."""
        images = read_digits()
        self.facts = {"file": "fastdeq/data/digits.h5", **images.attributes}
        return image_samples(images)
