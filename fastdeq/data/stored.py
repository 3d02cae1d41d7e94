"""Data modules of published image sets, read from a store that is built once."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdeq.data.augmentation import Augmentation
from fastdeq.data.batches import Normalization
from fastdeq.data.build import StoredSet, store_folder
from fastdeq.data.checks import require_flag, require_folder
from fastdeq.data.memory import InMemoryDataModule, Samples, image_samples
from fastdeq.data.sources import ImageSource


class StoredDataModule(InMemoryDataModule):
    """Batches of a published image set, float32 (B, C, H, W) normalized, labels int64 (B,).

    A subclass is final and says its ``source`` beside what ``InMemoryDataModule`` asks for.
    ``root``, ``store``, ``download`` and ``verify`` are those of ``StoredSet``; ``store`` None is
    the folder that ``store_folder`` says. ``normalization``: see ``Normalization.configured``.

    Raises ValueError for arguments of another type, for ``verify=False`` without a ``root`` or with
    ``download``, and what ``InMemoryDataModule`` raises; ``prepare_data`` and ``setup`` raise what
    ``StoredSet`` does.
    """

    source: ImageSource
    normalization: Normalization

    def __init__(
        self,
        *,
        root: str | Path | None = None,
        store: str | Path | None = None,
        download: bool = False,
        verify: bool = True,
        batch_size: int = 128,
        eval_batch_size: int = 1000,
        seed: int = 0,
        validation: int = 0,
        augmentation: Sequence[Augmentation] | None = None,
        normalization: str | Mapping[str, Any] = "published",
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            seed=seed,
            validation=validation,
            augmentation=augmentation,
        )
        self.normalization = self.normalization.configured(normalization)
        self._stored = StoredSet(
            source=self.source,
            root=require_folder("root", root),
            store=store_folder(require_folder("store", store)),
            download=require_flag("download", download),
            verify=require_flag("verify", verify),
        )

    def prepare(self) -> None:
        """Build the store if it is missing."""
        self._stored.ensure()

    def load(self) -> tuple[Samples, Samples]:
        """Read and verify the store; build it if it is missing."""
        path = self._stored.ensure()
        images = self._stored.read(path)
        self.facts = {"file": str(path), **images.attributes}
        return image_samples(images)
