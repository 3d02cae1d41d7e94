"""Passes over a set in batches: which samples, in which order, for which process, from where."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdeq.data.checks import require_integer

_STATE = ("seed", "epoch", "position", "batch_size", "samples")


class Batch(NamedTuple):
    """One process's part of a batch: ``inputs`` (B, ...), ``targets`` (B, ...) and ``weight``.

    The mean over processes of ``weight`` × (mean over the part) is the mean over the whole batch.
    A part of weight 0 stands in where there are fewer samples than processes: count nothing of it.
    """

    inputs: Tensor
    targets: Tensor
    weight: float = 1.0


class Passes(ABC):
    """Iterate over ``samples`` samples in batches; a subclass says how a batch is made.

    One pass over this object is one epoch. A pass gives every sample once (with ``drop_last``, all
    but the N mod ``batch_size`` samples that come last in this epoch's order), in stored order or,
    with ``shuffle``, in an order that depends on (``seed``, epoch) alone: not on the device and
    not on other random numbers drawn. Passes count the epochs up by themselves; ``set_epoch``
    chooses one. A pass that follows ``load_state_dict`` gives exactly the batches that had not
    been given yet when the state was saved.

    Of several processes (``ranks``) that hold the same samples, each gets its contiguous part of
    every batch; ``batch_size`` counts the samples of the whole batch, over all of them. The parts
    differ by one sample at most, and ``Batch.weight`` evens that out. All ranks see equally many
    batches, and their saved positions are the same.

    Raises ValueError for a ``batch_size``, ``seed`` or ``rank`` out of range, and where an epoch
    would have no batch.
    """

    def __init__(
        self,
        samples: int,
        *,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self._samples = samples
        self._batch_size = require_integer("batch_size", batch_size, minimum=1)
        self._seed = require_integer("seed", seed, minimum=0)
        self._shuffle, self._drop_last = shuffle, drop_last
        self._ranks = require_integer("ranks", ranks, minimum=1)
        self._rank = require_integer("rank", rank, minimum=0)
        if rank >= ranks:
            raise ValueError(f"rank {rank} is none of {ranks} ranks: they count from 0")
        if len(self) == 0:
            raise ValueError(
                f"batch_size {batch_size} leaves no batch of {samples} samples"
                + (" (drop_last is set)" if drop_last else "")
            )
        self._epoch = 0
        self._position = 0  # batches of this epoch given so far
        self._restored = False  # the next pass goes on at the position instead of starting anew

    @abstractmethod
    def _pass(self, first: int) -> Iterator[Batch]:
        """Yield the batches of the epoch from position ``first`` on (see ``_part``)."""

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch, wherever in it the position is."""
        whole, rest = divmod(self._samples, self._batch_size)
        return whole if self._drop_last or not rest else whole + 1

    def __iter__(self) -> Iterator[Batch]:
        # A generator: nothing moves before the first batch is asked for. Lightning makes iterators
        # that it does not use, and one more before it restores a position.
        if not self._restored and self._position > 0:
            self._epoch, self._position = self._epoch + 1, 0
        self._restored = False
        first = self._position
        for position, batch in enumerate(self._pass(first), first):
            # Counted before it is handed over: a state saved while it is used does not repeat it.
            self._position = position + 1
            yield batch

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
            "samples": self._samples,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where ``state`` was saved; saved after an epoch's last batch, that is the next one.

        Raises ValueError for a state that is incomplete or of another data size or batch size.
        """
        if missing := [key for key in _STATE if key not in state]:
            raise ValueError(f"the saved position lacks {', '.join(missing)}")
        for key in _STATE:
            require_integer(f"saved {key}", state[key], minimum=0)
        for key, own in (("batch_size", self._batch_size), ("samples", self._samples)):
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
        """Return the epoch's order, a permutation int64 (N,) on the CPU."""
        return torch.randperm(self._samples, generator=self._generator())

    def _generator(self, key: tuple[int, ...] = ()) -> torch.Generator:
        # SeedSequence mixes the pair, so that (0, 1) and (1, 0) have nothing to do with each other.
        mixed = np.random.SeedSequence((self._seed, self._epoch), spawn_key=key)
        # Drawn on the CPU: a CUDA generator would give another order for the same seed.
        return torch.Generator().manual_seed(int(mixed.generate_state(1, np.uint64)[0]))

    def _part(self, position: int) -> tuple[slice, float]:
        """Return which places of the epoch's order are this rank's, and its mean's weight."""
        first = position * self._batch_size
        size = min(self._batch_size, self._samples - first)
        start, stop = (rank * size // self._ranks for rank in (self._rank, self._rank + 1))
        weight = (stop - start) * self._ranks / size
        # An empty part would leave this rank a batch short, and the others waiting for it: a sample
        # of a neighbour stands in. start < size, because rank < ranks.
        return slice(first + start, first + max(stop, start + 1)), weight
