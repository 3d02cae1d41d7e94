"""Lightning data modules: which batches, on which device, for which process, from where on."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, TypeAlias, TypeVar, dataclass_transform

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor

from fastdeq.data.augmentation import Augmentation
from fastdeq.data.epoch_loader import Batch, Batches, EpochLoader, Normalization
from fastdeq.data.store import ImageSet
from fastdeq.settings import check_fields, check_value, setting

NormalizationSetting: TypeAlias = Normalization | str | Mapping[str, Any]
"""A normalization, or what ``Normalization.configured`` reads."""

_T = TypeVar("_T")


@dataclass_transform(kw_only_default=True, eq_default=False, field_specifiers=(setting, field))
def data_module(cls: type[_T]) -> type[_T]:
    """Class decorator: annotated fields become keyword arguments, checked like those of settings.

    As a dataclass, but compared by identity. A subclass without it, or with an ``__init__`` of its
    own that calls ``super().__init__``, works as well.
    """
    return dataclass(kw_only=True, eq=False, repr=False)(cls)


@data_module
class AbstractDataModule(LightningDataModule, ABC):
    """Batches of a set on the trainer's device (on the CPU without a trainer).

    Training batches are shuffled in each epoch, by ``seed`` and the epoch alone. Batch sizes count
    the samples of all processes together: each gets its part (see ``EpochLoader``).

    ``validation`` training samples are held out, for every seed the same (see ``hold_out``). With
    0, validation is the test split, as in the published tables, which select nothing on it. Then
    nothing must be selected on its metrics (no early stopping, no best checkpoint).

    A subclass defines ``input_shape`` and ``outputs``, as attributes or properties, ``load`` and
    ``_loader``. ``normalization``, where it has one, is a ``Normalization``, or a setting that
    ``published`` resolves; ``normalizer`` is the result. ``metadata`` describes the loaded set to
    people: file, source, licence.

    Raises TypeError or ValueError for arguments of another type or out of range, and at ``setup``
    for a ``validation`` that leaves no training samples.
    """

    batch_size: int = setting(at_least=1)
    eval_batch_size: int = setting(at_least=1)
    seed: int = setting(default=0, at_least=0)
    validation: int = setting(default=0, at_least=0)
    published: ClassVar[Normalization]
    workers = 0  # processes that make the batches

    def __post_init__(self) -> None:
        super().__init__()
        check_fields(self)
        given = self.normalization
        if given is not None and not isinstance(given, Normalization):
            given = self.published.configured(given)
        self.normalizer: Normalization | None = given
        self.metadata: dict[str, str] = {}
        self._prepared = False
        self._device = torch.device("cpu")
        self._rank, self._ranks = 0, 1
        self._splits: dict[str, Any] = {}
        self._loaders: list[EpochLoader] = []
        self._train: EpochLoader | None = None
        self._saved: dict[str, int] | None = None

    @property
    @abstractmethod
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one sample."""

    @property
    @abstractmethod
    def outputs(self) -> int:
        """The number of classes, or of dimensions of a target."""

    @property
    def normalization(self) -> Any:
        """The normalization of inputs, or a setting that chooses it; None: there is none."""
        return None

    def prepare(self) -> None:
        """Download or build what is loaded later; other processes of the node wait meanwhile."""
        return  # most sets need nothing

    @abstractmethod
    def load(self) -> tuple[Any, Any]:
        """Return the samples for training and for testing, ``Samples`` or ``Records``."""

    @abstractmethod
    def _loader(
        self, split: Any, *, device: torch.device, workers: int, random: bool, **settings: Any
    ) -> EpochLoader:
        """Return batches on ``device`` of a split of ``load``; ``random``: shuffled and changed."""

    @property
    def validates_on_test(self) -> bool:
        """Whether validation is the test split."""
        return self.validation == 0

    def prepare_data(self) -> None:
        """Call ``prepare``, once however often Lightning calls this."""
        if not self._prepared:
            self.prepare()
            self._prepared = True

    def setup(self, stage: str | None = None) -> None:
        """Load the set once; read from the trainer the device and the process of the batches."""
        if self.trainer is not None:
            self._device = self.trainer.strategy.root_device
            self._rank, self._ranks = self.trainer.global_rank, self.trainer.world_size
        if not self._splits:
            self._load_splits()

    def sample_batch(self, n: int = 2) -> Batch:
        """Return the first ``n`` (≥ 1) training samples on the CPU, as in evaluation.

        It serves to check that a model fits the data. Prepares and loads the set if necessary;
        needs no trainer.
        """
        check_value("n", n, int, {"at least": 1})
        self.prepare_data()
        self.setup()
        train, cpu = self._splits["train"], torch.device("cpu")
        first = train[torch.arange(len(train)) < n]
        loader = self._loader(first, device=cpu, random=False, workers=0, batch_size=n)
        batch = next(iter(loader))
        loader.close()
        return batch

    def train_dataloader(self) -> EpochLoader:
        """Return the training samples in shuffled batches of ``batch_size``, the last smaller.

        Under a trainer with ``overfit_batches``, in stored order and unchanged: the same batches in
        every epoch.
        """
        overfit = self.trainer is not None and getattr(self.trainer, "overfit_batches", 0) > 0
        self._train = self._batches("train", self.batch_size, random=not overfit)
        if self._saved is not None:
            self._train.load_state_dict(self._saved)
            self._saved = None
        return self._train

    def val_dataloader(self) -> EpochLoader:
        """Return the samples for validation in stored order, batches of ``eval_batch_size``."""
        name = "test" if self.validates_on_test else "validation"
        return self._batches(name, self.eval_batch_size)

    def test_dataloader(self) -> EpochLoader:
        """Return the test split in stored order, batches of ``eval_batch_size``."""
        return self._batches("test", self.eval_batch_size)

    def teardown(self, stage: str | None = None) -> None:
        """Close the batches, with their workers."""
        for loader in self._loaders:
            loader.close()
        self._loaders = []

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the training batches, which a checkpoint keeps.

        Lightning keeps it too, but not in checkpoints saved at the end of an epoch: the first epoch
        of the next run would repeat the order of epoch 0.
        """
        return {} if self._train is None else {"train": self._train.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next training batches continue where ``state_dict`` was saved."""
        self._saved = state_dict.get("train")

    def _batches(self, name: str, batch_size: int, *, random: bool = False) -> EpochLoader:
        if not self._splits:
            raise RuntimeError("call setup() before asking for batches (a Trainer does so itself)")
        # Moves once: later calls find it there.
        self._splits[name] = self._splits[name].to(self._device)
        loader = self._loader(
            self._splits[name],
            device=self._device,
            random=random,
            workers=self.workers,
            batch_size=batch_size,
            seed=self.seed,
            rank=self._rank,
            ranks=self._ranks,
        )
        self._loaders.append(loader)
        return loader

    def _load_splits(self) -> None:
        train, test = self.load()
        self._splits = {"train": train, "test": test}
        if self.validation >= len(train):
            raise ValueError(
                f"validation {self.validation} leaves nothing of {len(train)} training samples: "
                "hold out fewer"
            )
        if not self.validates_on_test:
            held_out = hold_out(len(train), self.validation)
            self._splits |= {"train": train[~held_out], "validation": train[held_out]}


def hold_out(samples: int, count: int) -> Tensor:
    """Return which of ``samples`` are held out, bool (N,): ``count`` of them, by a fixed rule.

    The rule: the indices i with the smallest SHA-256 of the ASCII text "fastdeq validation <i>".
    A larger set contains the smaller.
    """
    digests = [hashlib.sha256(f"fastdeq validation {i}".encode()).digest() for i in range(samples)]
    chosen = sorted(range(samples), key=digests.__getitem__)[:count]
    mask = torch.zeros(samples, dtype=torch.bool)
    mask[chosen] = True
    return mask


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


@data_module
class InMemoryDataModule(AbstractDataModule):
    """Batches of a set that lies whole on the trainer's device; see ``AbstractDataModule``.

    ``augmentation`` changes the images of the training batches, one after the other, by ``seed``
    and the epoch; None: nothing.

    A subclass is final. It defines ``input_shape``, ``outputs`` and ``load``, where it needs them
    ``prepare`` and ``normalization``, and sets ``metadata`` in ``load``.

    Raises ValueError for an ``augmentation`` that changes the shape of the images.
    """

    augmentation: Sequence[Augmentation] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.augmentation = tuple(self.augmentation or ())
        _check_shapes(self.augmentation, self.input_shape)

    @abstractmethod
    def load(self) -> tuple[Samples, Samples]:
        """Return the samples for training and for testing, on the CPU."""

    def _loader(
        self, split: Samples, *, device: torch.device, workers: int, random: bool, **settings: Any
    ) -> Batches:
        samples = split.to(device)
        changed = self.augmentation if random else ()
        settings |= {"normalization": self.normalizer, "augmentation": changed, "shuffle": random}
        return Batches(samples.inputs, samples.targets, **settings)

    def _from_images(self, images: ImageSet, file: str) -> tuple[Samples, Samples]:
        """Return both splits of an image set, which the metadata describe."""
        self.metadata = {"file": file, **images.attributes}
        return (
            Samples(images.train_images, images.train_labels),
            Samples(images.test_images, images.test_labels),
        )


def _check_shapes(augmentation: Sequence[Augmentation], shape: tuple[int, ...]) -> None:
    """Apply each augmentation to an image of this shape, which it must keep."""
    generator = torch.Generator().manual_seed(0)
    for one in augmentation:
        found = one.apply(torch.zeros(1, *shape), one.draw(1, generator)).shape[1:]
        if found != shape:
            raise ValueError(
                f"augmentation: {one} makes images of {tuple(found)} from {shape}: keep their shape"
            )
