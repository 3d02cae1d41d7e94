"""The 8 × 8 handwritten digits that come with fastdeq: they need no download."""

from dataclasses import field
from importlib import resources
from typing import final

from fastdeq.data.epoch_loader import Normalization
from fastdeq.data.module import InMemoryDataModule, NormalizationSetting, Samples, data_module
from fastdeq.data.store import ImageSet, read_store
from fastdeq.settings import setting

_SHA256 = "942b80c7b0bc35d1236d3a4f5fffda2d8159349e604a4855131f9c0e89553a9d"


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
@data_module
class DigitsDataModule(InMemoryDataModule):
    """Batches of digits, float32 (B, 1, 8, 8) normalized, with labels int64 (B,) of 0..9.

    ``normalization``: see ``Normalization.configured``.
    """

    batch_size: int = setting(default=64, at_least=1)
    eval_batch_size: int = setting(default=360, at_least=1)
    normalization: NormalizationSetting = "published"
    augmentation: None = field(default=None, init=False)  # not an argument

    input_shape = (1, 8, 8)
    outputs = 10
    # Pixels count the 16 cells of a 4 × 4 block. Mean and standard deviation are those of the
    # pixels for training after the division by 16 (population, N in the divisor).
    published = Normalization(scale=16.0, mean=(0.304982,), std=(0.375789,))

    def load(self) -> tuple[Samples, Samples]:
        return self._from_images(read_digits(), "fastdeq/data/digits.h5")
