"""Batches cut from tensors that lie whole on one device: no worker processes, no copies."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdeq.data.augmentation import Augmentation
from fastdeq.data.checks import require_integer

_AUGMENTATION = (2,)  # spawn key: keeps what is drawn for it apart from the order's numbers
_STATE = ("seed", "epoch", "position", "batch_size", "samples")


@dataclass(frozen=True, kw_only=True)
class Normalization:
    """(x / scale − mean) / std, with one mean and one std for each channel (axis 1).

    Raises ValueError for a scale or std that is not positive and for lists of unequal length.
    """

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.scale > 0 or not all(value > 0 for value in self.std):
            raise ValueError(f"scale and std must be positive: {self}")
        if not self.mean or len(self.mean) != len(self.std):
            raise ValueError(f"mean and std must have one value for each channel: {self}")


class Batch(NamedTuple):
    """One process's part of a batch: ``inputs`` (B, ...), ``targets`` (B, ...) and ``weight``.

    The mean over processes of ``weight`` × (mean over the part) is the mean over the whole batch.
    A part of weight 0 stands in where there are fewer samples than processes: count nothing of it.
    """

    inputs: Tensor
    targets: Tensor
    weight: float = 1.0


class Batches:
    """Iterate over ``inputs`` (N, C, ...) and ``targets`` (N, ...) in batches, on their device.

    One pass over this object is one epoch. A pass gives every sample once (with ``drop_last``, all
    but the N mod ``batch_size`` samples that come last in this epoch's order), in stored order or,
    with ``shuffle``, in an order that depends on (``seed``, epoch) alone: not on the device and
    not on other random numbers drawn. Passes count the epochs up by themselves; ``set_epoch``
    chooses one. A pass that follows ``load_state_dict`` gives exactly the batches that had not
    been given yet when the state was saved.

    A ``Batch`` has float32, normalized inputs if ``normalization`` is given. Without it and without
    ``shuffle`` it is a view of the stored tensors: do not write to it.

    ``augmentation`` changes images (N, C, H, W), as float32 and before the normalization. What is
    random in it depends on (``seed``, epoch) and the sample's place in the epoch's order alone: it
    is the same again after ``load_state_dict``, with any number of ranks, and on every device.

    Of several processes (``ranks``) that hold the same tensors, each gets its contiguous part of
    every batch; ``batch_size`` counts the samples of the whole batch, over all of them. The parts
    differ by one sample at most, and ``Batch.weight`` evens that out. All ranks see equally many
    batches, and their saved positions are the same.

    Raises ValueError for lengths or devices that differ, for a ``batch_size``, ``seed`` or ``rank``
    out of range, for a normalization of another channel count, for an augmentation of inputs that
    are no images, and where an epoch would have no batch.
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        *,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        normalization: Normalization | None = None,
        augmentation: Sequence[Augmentation] = (),
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        if len(inputs) != len(targets):
            raise ValueError(f"{len(inputs)} inputs but {len(targets)} targets")
        if inputs.device != targets.device:
            raise ValueError(f"inputs are on {inputs.device}, targets on {targets.device}")
        self._inputs, self._targets = inputs, targets
        self._batch_size = require_integer("batch_size", batch_size, minimum=1)
        self._seed = require_integer("seed", seed, minimum=0)
        self._shuffle, self._drop_last = shuffle, drop_last
        self._ranks = require_integer("ranks", ranks, minimum=1)
        self._rank = require_integer("rank", rank, minimum=0)
        if rank >= ranks:
            raise ValueError(f"rank {rank} is none of {ranks} ranks: they count from 0")
        if len(self) == 0:
            raise ValueError(
                f"batch_size {batch_size} leaves no batch of {len(inputs)} samples"
                + (" (drop_last is set)" if drop_last else "")
            )
        self._normalization = normalization
        if normalization is not None:
            self._mean = _by_channel(normalization.mean, inputs)
            self._std = _by_channel(normalization.std, inputs)
        self._augmentation = tuple(augmentation)
        if self._augmentation and inputs.ndim != 4:
            raise ValueError(f"augmentation needs images (N, C, H, W), not {tuple(inputs.shape)}")
        self._epoch = 0
        self._position = 0  # batches of this epoch given so far
        self._restored = False  # the next pass goes on at the position instead of starting anew

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch, wherever in it the position is."""
        whole, rest = divmod(len(self._inputs), self._batch_size)
        return whole if self._drop_last or not rest else whole + 1

    def __iter__(self) -> Iterator[Batch]:
        # A generator: nothing moves before the first batch is asked for. Lightning makes iterators
        # that it does not use, and one more before it restores a position.
        if not self._restored and self._position > 0:
            self._epoch, self._position = self._epoch + 1, 0
        self._restored = False
        order = self._order() if self._shuffle else None
        drawn = self._draw()
        for position in range(self._position, len(self)):
            # Counted before it is handed over: a state saved while it is used does not repeat it.
            self._position = position + 1
            window, weight = self._part(position)
            index = window if order is None else order[window]
            yield self._batch(index, weight, [values[window] for values in drawn])

    @property
    def epoch(self) -> int:
        """The epoch of the batch given last, or of the next one if none was given yet."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Make ``epoch`` (≥ 0) the next pass; a restored position in this same epoch is kept."""
        require_integer("epoch", epoch, minimum=0)
        if not (self._restored and epoch == self._epoch):
            self._epoch, self._position, self._restored = epoch, 0, False

    def state_dict(self) -> dict[str, int]:
        """Return seed, epoch and position (batches given), and the sizes they are valid for."""
        return {
            "seed": self._seed,
            "epoch": self._epoch,
            "position": self._position,
            "batch_size": self._batch_size,
            "samples": len(self._inputs),
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where ``state`` was saved; saved after an epoch's last batch, that is the next one.

        Raises ValueError for a state that is incomplete or of another data size or batch size.
        """
        if missing := [key for key in _STATE if key not in state]:
            raise ValueError(f"the saved position lacks {', '.join(missing)}")
        for key in _STATE:
            require_integer(f"saved {key}", state[key], minimum=0)
        for key, own in (("batch_size", self._batch_size), ("samples", len(self._inputs))):
            if state[key] != own:
                raise ValueError(
                    f"the saved position is for {key} {state[key]}, this run has {own}: "
                    f"resume with the {key} it was saved with, or start a new run"
                )
        if state["position"] > len(self):
            raise ValueError(f"saved position {state['position']} is past {len(self)} batches")
        self._seed = state["seed"]
        epochs, self._position = divmod(state["position"], len(self))
        self._epoch = state["epoch"] + epochs
        self._restored = True

    def _order(self) -> Tensor:
        order = torch.randperm(len(self._inputs), generator=self._generator())
        return order.to(self._inputs.device)

    def _draw(self) -> list[Tensor]:
        """Return what is random in each augmentation, for all places of the epoch's order."""
        generator = self._generator(_AUGMENTATION)
        drawn = (one.draw(len(self._inputs), generator) for one in self._augmentation)
        return [values.to(self._inputs.device) for values in drawn]  # once an epoch, as the order

    def _generator(self, key: tuple[int, ...] = ()) -> torch.Generator:
        # SeedSequence mixes the pair, so that (0, 1) and (1, 0) have nothing to do with each other.
        mixed = np.random.SeedSequence((self._seed, self._epoch), spawn_key=key)
        # Drawn on the CPU: a CUDA generator would give another order for the same seed.
        return torch.Generator().manual_seed(int(mixed.generate_state(1, np.uint64)[0]))

    def _part(self, position: int) -> tuple[slice, float]:
        """Return which places of the epoch's order are this rank's, and its mean's weight."""
        first = position * self._batch_size
        size = min(self._batch_size, len(self._inputs) - first)
        start, stop = (rank * size // self._ranks for rank in (self._rank, self._rank + 1))
        weight = (stop - start) * self._ranks / size
        # An empty part would leave this rank a batch short, and the others waiting for it: a sample
        # of a neighbour stands in. start < size, because rank < ranks.
        return slice(first + start, first + max(stop, start + 1)), weight

    def _batch(self, index: slice | Tensor, weight: float, drawn: Sequence[Tensor]) -> Batch:
        inputs, targets = self._inputs[index], self._targets[index]
        for one, values in zip(self._augmentation, drawn, strict=True):
            inputs = one.apply(inputs.float(), values)
        if self._normalization is not None:
            inputs = (inputs.float() / self._normalization.scale - self._mean) / self._std
        return Batch(inputs, targets, weight)


def _by_channel(values: tuple[float, ...], inputs: Tensor) -> Tensor:
    """Return ``values`` as float32 (C, 1, ...), to be broadcast over ``inputs`` (N, C, ...)."""
    channels = inputs.shape[1] if inputs.ndim > 1 else 0
    if len(values) != channels:
        raise ValueError(f"normalization has {len(values)} channels, the inputs have {channels}")
    tensor = torch.tensor(values, dtype=torch.float32, device=inputs.device)
    return tensor.view(-1, *(1 for _ in inputs.shape[2:]))
