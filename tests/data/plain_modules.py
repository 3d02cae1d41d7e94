"""Data modules as users of Lightning write them: pairs (x, y) from torch's DataLoader."""

from collections.abc import Iterator
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fastdeq.data import read_digits


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Digits with noise that every access draws anew."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images.float() / 16, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index]
        return image + 0.1 * torch.randn_like(image), self.labels[index]


class Plain(LightningDataModule):
    """The digits; the keys of conf/data/digits.yaml that it does not need are ignored."""

    def __init__(self, *, batch_size: int = 360, workers: int = 0, **others: Any) -> None:
        super().__init__()
        self.batch_size, self.workers = batch_size, workers

    def setup(self, stage: str) -> None:
        images = read_digits()
        self.train = Noisy(images.train_images, images.train_labels)
        self.test = Noisy(images.test_images, images.test_labels)

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, self.batch_size, shuffle=True, num_workers=self.workers)

    def test_dataloader(self) -> Any:
        return DataLoader(self.test, 360)


class Own(Plain):
    """With a generator of its own, and a validation set."""

    def __init__(self, **others: Any) -> None:
        super().__init__(**others)
        self.generator = torch.Generator().manual_seed(5)

    def train_dataloader(self) -> Any:
        return DataLoader(self.train, self.batch_size, shuffle=True, generator=self.generator)

    def val_dataloader(self) -> Any:
        return DataLoader(self.test, 180)


class Lacking(LightningDataModule):
    """Without loaders."""

    def __init__(self, **others: Any) -> None:
        super().__init__()


class Named(Plain):
    """Batches are dictionaries."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return dict(zip("xy", batch, strict=True))


class Tripled(Plain):
    """Batches are three tensors."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return *batch, batch[0]


class Endless(IterableDataset[Tensor]):
    """Samples without a number."""

    def __iter__(self) -> Iterator[Tensor]:
        yield torch.zeros(1)


class Unbounded(Plain):
    """A loader without a length."""

    def train_dataloader(self) -> Any:
        return DataLoader(Endless(), 8)


class Several(Plain):
    """Two training loaders."""

    def train_dataloader(self) -> Any:
        return [super().train_dataloader()] * 2


class Flat(Plain):
    """Images as vectors."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0].flatten(1), batch[1]


class NotData:
    """No data module."""

    def __init__(self, **others: Any) -> None:
        pass
