"""Data modules of other libraries: pairs (x, y) from ordinary loaders, resumed bit for bit."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from pytorch_lightning import LightningDataModule
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor

from fastdeq.data import Batch, EpochLoader
from fastdeq.training.random_state import random_state, set_random_state


class PlainDataModule(LightningDataModule):
    """Any LightningDataModule whose batches are pairs (x, y) of tensors, for a run.

    The order of the training batches, and what random transforms draw, depends on `seed` and the
    epoch alone. A run that resumes within an epoch draws the batches before its position again, and
    drops them. Evaluations draw the same numbers in every epoch. Without a `val_dataloader`,
    validation is the test set.

    Raises: ValueError for a data module without `train_dataloader` or `test_dataloader`, for
        several loaders in place of one, and for a loader without a length.
    """

    def __init__(self, data: LightningDataModule, *, seed: int) -> None:
        super().__init__()
        self.data, self.seed = data, seed
        for name in ("train_dataloader", "test_dataloader"):
            if not is_overridden(name, data, LightningDataModule):
                raise ValueError(
                    f"{type(data).__name__} has no {name}: give it one that yields pairs (x, y)"
                )
        self._train: _PlainBatches | None = None
        self._saved: dict[str, int] | None = None

    @property
    def validates_on_test(self) -> bool:
        """Whether validation is the test set."""
        return not is_overridden("val_dataloader", self.data, LightningDataModule)

    def prepare_data(self) -> None:
        """Prepare the module's data."""
        self.data.prepare_data()

    def setup(self, stage: str) -> None:
        """Set the module up; without a validation set for testing too."""
        self.data.trainer = self.trainer
        self.data.setup(stage)
        if stage == "fit" and self.validates_on_test:
            self.data.setup("test")

    def teardown(self, stage: str) -> None:
        """Tear the module down."""
        self.data.teardown(stage)

    def sample_batch(self) -> Batch:
        """The first two training samples; no random state changes. The data must be prepared."""
        self.setup("fit")
        x, targets, _ = self.on_after_batch_transfer(next(iter(self.train_dataloader())), 0)
        self._train = None
        return Batch(x[:2], targets[:2])

    def train_dataloader(self) -> EpochLoader:
        """The training batches; with `overfit_batches` the same ones in every epoch."""
        overfit = getattr(self.trainer, "overfit_batches", 0) > 0
        self._train = self._batches("train_dataloader", repeats=overfit)
        if self._saved is not None:
            self._train.load_state_dict(self._saved)
            self._saved = None
        return self._train

    def val_dataloader(self) -> EpochLoader:
        """The batches of the validation set."""
        name = "test_dataloader" if self.validates_on_test else "val_dataloader"
        return self._batches(name, repeats=True)

    def test_dataloader(self) -> EpochLoader:
        """The batches of the test set."""
        return self._batches("test_dataloader", repeats=True)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """The module's own hook."""
        return self.data.on_before_batch_transfer(batch, dataloader_idx)

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """The module's own hook."""
        return self.data.transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Batch:
        """The result of the module's own hook, as inputs, targets and weight.

        Raises: ValueError for a batch that is not a pair of tensors.
        """
        batch = self.data.on_after_batch_transfer(batch, dataloader_idx)
        if not isinstance(batch, tuple | list) or not all(isinstance(b, Tensor) for b in batch):
            found = type(batch).__name__
        elif len(batch) != 2:
            found = f"{len(batch)} tensors"
        else:
            return Batch(*batch)
        raise ValueError(
            f"a batch of {type(self.data).__name__} is {found}, but must be two tensors (x, y)"
        )

    def state_dict(self) -> dict[str, Any]:
        """The position in the training batches, and the module's own state."""
        train = {} if self._train is None else {"train": self._train.state_dict()}
        return {**train, "data": self.data.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the state was saved."""
        self._saved = state_dict.get("train")
        self.data.load_state_dict(state_dict["data"])

    def _batches(self, name: str, *, repeats: bool) -> "_PlainBatches":
        loader = getattr(self.data, name)()
        where = f"{type(self.data).__name__}.{name}"
        if isinstance(loader, list | tuple | dict):
            raise ValueError(f"{where} returns {len(loader)} loaders, but must return one")
        try:
            len(loader)
        except TypeError as error:
            raise ValueError(f"{where} returns a loader without a length: give it one") from error
        return _PlainBatches(loader, seed=self.seed, repeats=repeats)


class _PlainBatches(EpochLoader):
    """Iterate over the batches of `loader`, by (seed, epoch); repeats: every epoch as the first."""

    def __init__(self, loader: Any, *, seed: int, repeats: bool) -> None:
        super().__init__(len(loader), batch_size=1, seed=seed)  # positions count its batches
        self._loader, self._repeats = loader, repeats

    @property
    def indices(self) -> Tensor:
        """Unknown. Raises: ValueError."""
        raise ValueError("batches of an ordinary loader do not say which samples they hold")

    def _batches_from(self, first: int) -> Iterator[Batch]:
        epoch = 0 if self._repeats else self._epoch
        mixed = int(np.random.SeedSequence((self._seed, epoch)).generate_state(1)[0])
        self._seed_samplers(epoch, mixed)
        drawn = _RandomState(mixed)
        with drawn.used():
            batches = iter(self._loader)
        for position in range(len(self)):
            with drawn.used():
                batch = next(batches)
            if position >= first:
                yield cast(Batch, batch)  # `on_after_batch_transfer` makes it one

    def _seed_samplers(self, epoch: int, mixed: int) -> None:
        """Seed what a loader draws from beside the global random state."""
        own = (self._loader, getattr(self._loader, "sampler", None))
        for each in own:
            if isinstance(generator := getattr(each, "generator", None), torch.Generator):
                generator.manual_seed(mixed)
            if callable(set_epoch := getattr(each, "set_epoch", None)):
                set_epoch(epoch)


class _RandomState:
    """A random state of its own, which does not touch the state of the process."""

    def __init__(self, seed: int) -> None:
        self._seed: int | None = seed
        self._own: dict[str, Any] = {}

    @contextmanager
    def used(self) -> Iterator[None]:
        """Draw from this state."""
        before = random_state()
        if self._seed is None:
            set_random_state(self._own)
        else:
            _seed_all(self._seed)
            self._seed = None
        try:
            yield
        finally:
            self._own = random_state()
            set_random_state(before)


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
