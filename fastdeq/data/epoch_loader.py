"""Epochs of batches: which samples, in which order, for which process, from which position on."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from fastdeq.data.augmentation import Augmentation
from fastdeq.settings import check_value

_AUGMENTATION = (2,)  # spawn key: separates what is drawn for it from the numbers of the order


class Batch(NamedTuple):
    """The part of a batch for one process: ``inputs`` (B, ...), ``targets`` (B, ...), ``weight``.

    The mean over processes of ``weight`` × (mean over the part) is the mean over the whole batch.
    A part of weight 0 stands in where there are fewer samples than processes.
    """

    inputs: Tensor
    targets: Tensor
    weight: float = 1.0


class EpochLoader(ABC):
    """Iterate over ``samples`` samples in batches; a subclass defines how a batch is made.

    One iteration over this object is one epoch. It yields every sample once (with ``drop_last``,
    all but the N mod ``batch_size`` samples that come last), in stored order or, with ``shuffle``,
    in an order that depends on (``seed``, epoch) alone: not on the device or other random numbers.
    Iterations count the epochs up; ``set_epoch`` chooses one. After ``load_state_dict``, the next
    iteration yields exactly the batches that had not been yielded when the state was saved.

    Of several processes (``ranks``) that hold the same samples, each gets its contiguous part of
    every batch; ``batch_size`` counts the samples of all parts. These differ by one sample at most,
    and ``Batch.weight`` evens that out. All ranks have the same number of batches and the same
    position.

    Raises TypeError or ValueError for a ``batch_size``, ``seed`` or ``rank`` that is not an integer
    or out of range, ValueError where an epoch would have no batch.
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
        given = {"batch_size": batch_size, "seed": seed, "rank": rank, "ranks": ranks}
        for name, value in given.items():
            check_value(name, value, int, {"at least": 0 if name in ("seed", "rank") else 1})
        if rank >= ranks:
            raise ValueError(f"rank {rank} is not one of {ranks} ranks: they count from 0")
        self._samples, self._batch_size, self._seed = samples, batch_size, seed
        self._shuffle, self._drop_last = shuffle, drop_last
        self._rank, self._ranks = rank, ranks
        if len(self) == 0:
            reason = " (drop_last is set)" * drop_last
            raise ValueError(
                f"batch_size {batch_size} leaves no batch of {samples} samples{reason}"
            )
        self._epoch = 0
        self._position = 0  # batches of this epoch yielded so far
        self._restored = False  # the next iteration continues at the position
        self._ordered: tuple[tuple[int, int], Tensor] | None = None  # the order of (seed, epoch)

    @abstractmethod
    def _batches_from(self, first: int) -> Iterator[Batch]:
        """Yield the batches of the epoch from position ``first`` on (see ``_part``)."""

    def close(self) -> None:
        """Release what making the batches holds; the next epoch acquires it again."""
        return  # batches in memory hold nothing

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch, wherever in it the position is."""
        whole, rest = divmod(self._samples, self._batch_size)
        return whole + (rest > 0 and not self._drop_last)

    def __iter__(self) -> Iterator[Batch]:
        # A generator: nothing changes before the first batch is requested. Lightning makes
        # iterators that it does not use, and one more before it restores a position.
        if not self._restored and self._position > 0:
            self._epoch, self._position = self._epoch + 1, 0
        self._restored = False
        first = self._position
        for position, batch in enumerate(self._batches_from(first), first):
            # Counted before it is yielded: a state saved while it is used does not repeat it.
            self._position = position + 1
            yield batch

    @property
    def samples(self) -> int:
        """The number of samples, N."""
        return self._samples

    @property
    def indices(self) -> Tensor:
        """The samples of the batch yielded last: places in stored order, int64 (B,), on the CPU."""
        window, _ = self._part(self._position - 1)
        return self._order()[window]

    @property
    def epoch(self) -> int:
        """The epoch of the batch yielded last, or of the next one if there was none yet."""
        return self._epoch

    def set_epoch(self, epoch: int) -> None:
        """Make ``epoch`` (≥ 0) the next one; a restored position in this same epoch is kept."""
        check_value("epoch", epoch, int, {"at least": 0})
        if not (self._restored and epoch == self._epoch):
            self._epoch, self._position, self._restored = epoch, 0, False

    def state_dict(self) -> dict[str, int]:
        """Return seed, epoch and position (batches yielded), and the sizes they are valid for."""
        names = ("seed", "epoch", "position", "batch_size", "samples")
        return {name: getattr(self, f"_{name}") for name in names}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue where ``state`` was saved: after the last batch of an epoch, with the next one.

        Raises TypeError or ValueError for a damaged state or one of another data or batch size.
        """
        own = self.state_dict()
        if missing := [key for key in own if key not in state]:
            raise ValueError(f"the saved position lacks {', '.join(missing)}")
        for key in own:
            check_value(f"saved {key}", state[key], int, {"at least": 0})
        for key in ("batch_size", "samples"):
            if state[key] != own[key]:
                raise ValueError(
                    f"the saved position is for {key} {state[key]}, this run has {own[key]}: "
                    f"resume with the {key} it was saved with, or start a new run"
                )
        if state["position"] > len(self):
            raise ValueError(f"saved position {state['position']} is past {len(self)} batches")
        self._seed = state["seed"]
        epochs, self._position = divmod(state["position"], len(self))
        self._epoch = state["epoch"] + epochs
        self._restored = True

    def _order(self) -> Tensor:
        """Return the order of the epoch, a permutation int64 (N,) on the CPU."""
        key = (self._seed, self._epoch)
        if self._ordered is None or self._ordered[0] != key:
            n = self._samples
            shuffled = torch.randperm(n, generator=self._generator()) if self._shuffle else None
            self._ordered = key, torch.arange(n) if shuffled is None else shuffled
        return self._ordered[1]

    def _generator(self, key: tuple[int, ...] = ()) -> torch.Generator:
        # SeedSequence mixes the pair, so that (0, 1) and (1, 0) have nothing to do with each other.
        mixed = np.random.SeedSequence((self._seed, self._epoch), spawn_key=key)
        # Drawn on the CPU: a CUDA generator would give another order for the same seed.
        return torch.Generator().manual_seed(int(mixed.generate_state(1, np.uint64)[0]))

    def _part(self, position: int) -> tuple[slice, float]:
        """Return which places of the order are for this rank, and the weight of their mean."""
        first = position * self._batch_size
        size = min(self._batch_size, self._samples - first)
        start, stop = (rank * size // self._ranks for rank in (self._rank, self._rank + 1))
        weight = (stop - start) * self._ranks / size
        # An empty part would leave this rank a batch short, and the others waiting for it: a sample
        # of a neighbour stands in.
        return slice(first + start, first + max(stop, start + 1)), weight


class Batches(EpochLoader):
    """Iterate over ``inputs`` (N, C, ...) and ``targets`` (N, ...) in batches, on their device.

    ``normalization`` makes inputs float32. Without it and without ``shuffle`` a ``Batch`` is a view
    of the stored tensors: do not write to it. ``augmentation`` changes images (N, C, H, W), as
    float32 and before the normalization, by (``seed``, epoch) and the place of the sample in the
    order alone: equally after ``load_state_dict``, with any number of ranks, on every device.
    ``settings``: those of ``EpochLoader``.

    Raises ValueError for lengths or devices that differ, for a normalization of another channel
    count, and for an augmentation of inputs that are not images.
    """

    def __init__(
        self,
        inputs: Tensor,
        targets: Tensor,
        *,
        normalization: "Normalization | None" = None,
        augmentation: Sequence[Augmentation] = (),
        **settings: Any,
    ) -> None:
        if len(inputs) != len(targets):
            raise ValueError(f"{len(inputs)} inputs but {len(targets)} targets")
        if inputs.device != targets.device:
            raise ValueError(f"inputs are on {inputs.device}, targets on {targets.device}")
        super().__init__(len(inputs), **settings)
        self._inputs, self._targets = inputs, targets
        self._normalize = None
        if normalization is not None:
            self._normalize = normalization.on(inputs.shape[1:], inputs.device)
        self._augmentation = tuple(augmentation)
        if self._augmentation and inputs.ndim != 4:
            raise ValueError(f"augmentation needs images (N, C, H, W), not {tuple(inputs.shape)}")

    def _batches_from(self, first: int) -> Iterator[Batch]:
        device, generator = self._inputs.device, self._generator(_AUGMENTATION)
        order = self._order().to(device) if self._shuffle else None
        # Of all places of the order, once per epoch
        drawn = [one.draw(self._samples, generator).to(device) for one in self._augmentation]
        for position in range(first, len(self)):
            window, weight = self._part(position)
            inputs, targets = (
                _taken(each, order, window) for each in (self._inputs, self._targets)
            )
            for one, values in zip(self._augmentation, drawn, strict=True):
                inputs = one.apply(inputs.float(), values[window])
            if self._normalize is not None:
                inputs = self._normalize(inputs)
            yield Batch(inputs, targets, weight)


def _taken(stored: Tensor, order: Tensor | None, window: slice) -> Tensor:
    # index_select copies whole rows; stored[order[window]] would copy entry by entry on the CPU.
    return stored[window] if order is None else stored.index_select(0, order[window])


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

    def configured(self, setting: object) -> Self:
        """Return this normalization with the constants that ``setting`` chooses.

        "published": these constants. "none": mean 0 and std 1, so that x / scale is unchanged.
        A mapping of ``mean`` and ``std``: each one number, or one for each channel. Raises
        TypeError or ValueError, naming the key, for anything else.
        """
        if setting == "published":
            return self
        if setting == "none":
            setting = {"mean": 0.0, "std": 1.0}
        if not isinstance(setting, Mapping) or set(setting) != {"mean", "std"}:
            raise ValueError(
                "normalization must be published, none, or {mean: NUMBERS, std: NUMBERS}, "
                f"not {setting!r}"
            )
        mean = self._by_channel("normalization.mean", setting["mean"], {})
        std = self._by_channel("normalization.std", setting["std"], {"above": 0})
        return replace(self, mean=mean, std=std)

    def on(self, shape: Sequence[int], device: torch.device) -> Callable[[Tensor], Tensor]:
        """Return the normalization of samples of ``shape`` (C, ...), to float32 on ``device``.

        Raises ValueError for another number of channels.
        """
        channels = shape[0] if shape else 0
        if channels != len(self.mean):
            raise ValueError(
                f"normalization has {len(self.mean)} channels, the inputs have {channels}"
            )
        mean, std = (  # (C, 1, ...)
            torch.tensor(values, dtype=torch.float32, device=device).view(-1, *[1] * len(shape[1:]))
            for values in (self.mean, self.std)
        )
        shifts, scales = any(self.mean), set(self.std) != {1.0}

        def normalize(inputs: Tensor) -> Tensor:
            values = inputs.float() / self.scale
            if shifts:
                values -= mean
            if scales:
                values /= std
            return values

        return normalize

    def _by_channel(self, name: str, value: Any, bounds: dict[str, float]) -> tuple[float, ...]:
        channels = len(self.mean)
        is_list = isinstance(value, Sequence) and not isinstance(value, str)
        values = value if is_list else [value] * channels
        if len(values) != channels:
            raise ValueError(
                f"{name} must be a number or a list of {channels}, one for each channel, "
                f"not {list(values)!r}"
            )
        for one in values:
            check_value(name, one, float, bounds)
        return tuple(float(one) for one in values)
