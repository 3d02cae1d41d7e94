"""Batches of encoded images, decoded as they are needed, in this process or in workers."""

import sys
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastdeq.data.batches import Normalization
from fastdeq.data.checks import require_integer
from fastdeq.data.decode import Crop, decode, to_tensor
from fastdeq.data.passes import Batch, Passes
from fastdeq.data.records import Records

# Ranks are started by "spawn", which their workers would inherit: each would import PyTorch and
# Lightning again, for seconds, and hold an index of its own. Elsewhere the platform's own way.
_CONTEXT = "fork" if sys.platform == "linux" else None
_SAMPLE = 3  # spawn key of a sample's random numbers; its place in the epoch's order follows


class DecodedBatches(Passes):
    """Iterate over ``records`` in batches of float32 (B, 3, size, size), normalized, on ``device``.

    The batches, their order and what of them is this process's are those of ``Passes``. What is
    random in ``crop`` depends on (``seed``, epoch) and the sample's place in the epoch's order
    alone: not on how many workers or ranks there are, nor on where a pass was taken up again.

    ``workers`` processes decode, each a batch at a time and up to two ahead; they stay from pass to
    pass until ``close``. With 0 this process does it itself. The position counts the batches that
    were given, not those decoded ahead. The numbers that others draw at random are left alone.

    Raises ValueError for ``workers`` that are not an integer ≥ 0, what ``Passes`` raises; and,
    while iterating, for an image that cannot be decoded, named.
    """

    def __init__(
        self,
        records: Records,
        *,
        crop: Crop,
        normalization: Normalization,
        device: torch.device,
        workers: int,
        **settings: Any,
    ) -> None:
        super().__init__(len(records), **settings)
        self._targets = records.targets
        self._decoder = _Decoder(records, crop)
        self._normalize = normalization.on((3, crop.size, crop.size), device)
        self._device = device
        self._workers = require_integer("workers", workers, minimum=0)
        self._parts = _Parts()
        self._loader: DataLoader[Any] | None = None
        self._running: Generator[Batch, None, None] | None = None

    def close(self) -> None:
        """End the pass that is under way and the workers; the next pass starts new ones."""
        if self._running is not None:
            self._running.close()
        self._running = self._loader = None
        self._decoder.records.close()

    def _pass(self, first: int) -> Iterator[Batch]:
        if self._running is not None:
            self._running.close()  # the workers are one pass's at a time
        self._running = self._decoded(first)
        return self._running

    def _decoded(self, first: int) -> Generator[Batch, None, None]:
        windows = [self._part(position) for position in range(first, len(self))]
        order = self._order() if self._shuffle else torch.arange(self._samples)
        self._parts.now = _Epoch(order, [window for window, _ in windows], self._seed, self._epoch)
        if self._loader is None:
            self._loader = self._start()
        for (window, weight), found in zip(windows, self._loader, strict=True):
            if isinstance(found, str):
                raise ValueError(found)
            inputs = found.to(self._device, non_blocking=True)
            targets = self._targets[order[window]].to(self._device, non_blocking=True)
            yield Batch(self._normalize(inputs), targets, weight)

    def _start(self) -> DataLoader[Any]:
        return DataLoader(
            self._decoder,
            sampler=self._parts,
            batch_size=None,  # a part is a batch already
            num_workers=self._workers,
            multiprocessing_context=_CONTEXT if self._workers else None,
            persistent_workers=self._workers > 0,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator(),  # else every pass draws from the global one
        )


class _Part(NamedTuple):
    """What a worker is asked for: the samples at ``indices``, from place ``first`` of the order."""

    indices: list[int]
    first: int
    seed: int
    epoch: int


class _Epoch(NamedTuple):
    order: Tensor
    windows: list[slice]
    seed: int
    epoch: int


class _Parts:
    """The parts of the pass that begins now."""

    now: _Epoch

    def __iter__(self) -> Iterator[_Part]:
        order, windows, seed, epoch = self.now
        for window in windows:
            yield _Part(order[window].tolist(), window.start, seed, epoch)


class _Decoder(Dataset[Tensor | str]):
    """Images uint8 (B, 3, size, size) of a part."""

    def __init__(self, records: Records, crop: Crop) -> None:
        self.records, self.crop = records, crop

    def __getitem__(self, part: _Part) -> Tensor | str:
        """Return the images, or what is wrong with one of them.

        As a value: an error that leaves a worker becomes a text of its traceback.
        """
        try:
            return torch.stack(
                [self._image(index, part, place) for place, index in enumerate(part.indices)]
            )
        except ValueError as error:
            return str(error)

    def _image(self, index: int, part: _Part, place: int) -> Tensor:
        content = self.records.read(index)
        mixed = np.random.SeedSequence(
            (part.seed, part.epoch), spawn_key=(_SAMPLE, part.first + place)
        )
        try:
            image = decode(content)
        except ValueError as error:
            raise ValueError(
                f"{self.records.file(index)}: {error}: replace or remove it (data.verify=true "
                "finds all such images when the store is built)"
            ) from error
        return to_tensor(self.crop.apply(image, np.random.default_rng(mixed)))
