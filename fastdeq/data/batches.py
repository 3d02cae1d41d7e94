"""Batches cut from tensors that lie whole on one device: no worker processes, no copies."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import torch
from torch import Tensor

from fastdeq.data.augmentation import Augmentation
from fastdeq.data.checks import require_number
from fastdeq.data.passes import Batch, Passes

_AUGMENTATION = (2,)  # spawn key: keeps what is drawn for it apart from the order's numbers


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
        A mapping of ``mean`` and ``std``: each one number, or one for each channel.

        Raises ValueError, naming the key, for anything else and for a std that is not positive.
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
        mean, std = (
            _numbers(f"normalization.{key}", setting[key], channels=len(self.mean))
            for key in ("mean", "std")
        )
        if min(std) <= 0:
            raise ValueError(f"normalization.std must be above 0, not {setting['std']!r}")
        return replace(self, mean=mean, std=std)

    def on(self, shape: Sequence[int], device: torch.device) -> Callable[[Tensor], Tensor]:
        """Return the normalization of samples of ``shape`` (C, ...), to float32 on ``device``.

        Raises ValueError for another number of channels.
        """
        mean, std = (_by_channel(values, shape, device) for values in (self.mean, self.std))
        return partial(_normalize, scale=self.scale, mean=mean, std=std)


class Batches(Passes):
    """Iterate over ``inputs`` (N, C, ...) and ``targets`` (N, ...) in batches, on their device.

    The batches, their order and what of them is this process's are those of ``Passes``.

    A ``Batch`` has float32, normalized inputs if ``normalization`` is given. Without it and without
    ``shuffle`` it is a view of the stored tensors: do not write to it.

    ``augmentation`` changes images (N, C, H, W), as float32 and before the normalization. What is
    random in it depends on (``seed``, epoch) and the sample's place in the epoch's order alone: it
    is the same again after ``load_state_dict``, with any number of ranks, and on every device.

    Raises ValueError for lengths or devices that differ, for a normalization of another channel
    count, for an augmentation of inputs that are no images, and what ``Passes`` raises.
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
        super().__init__(
            len(inputs),
            batch_size=batch_size,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
            rank=rank,
            ranks=ranks,
        )
        self._inputs, self._targets = inputs, targets
        self._normalize = (
            None if normalization is None else normalization.on(inputs.shape[1:], inputs.device)
        )
        self._augmentation = tuple(augmentation)
        if self._augmentation and inputs.ndim != 4:
            raise ValueError(f"augmentation needs images (N, C, H, W), not {tuple(inputs.shape)}")

    def _pass(self, first: int) -> Iterator[Batch]:
        order = self._order().to(self._inputs.device) if self._shuffle else None
        drawn = self._draw()
        for position in range(first, len(self)):
            window, weight = self._part(position)
            index = window if order is None else order[window]
            yield self._batch(index, weight, [values[window] for values in drawn])

    def _draw(self) -> list[Tensor]:
        """Return what is random in each augmentation, for all places of the epoch's order."""
        generator = self._generator(_AUGMENTATION)
        drawn = (one.draw(len(self._inputs), generator) for one in self._augmentation)
        return [values.to(self._inputs.device) for values in drawn]  # once an epoch, as the order

    def _batch(self, index: slice | Tensor, weight: float, drawn: Sequence[Tensor]) -> Batch:
        inputs, targets = self._inputs[index], self._targets[index]
        for one, values in zip(self._augmentation, drawn, strict=True):
            inputs = one.apply(inputs.float(), values)
        if self._normalize is not None:
            inputs = self._normalize(inputs)
        return Batch(inputs, targets, weight)


def _numbers(name: str, value: object, *, channels: int) -> tuple[float, ...]:
    """Return the numbers of a setting, one for each channel; raise ValueError naming it if not."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return (require_number(name, value),) * channels
    if len(value) != channels:
        raise ValueError(
            f"{name} must be a number or a list of {channels}, one for each channel, "
            f"not {list(value)!r}"
        )
    return tuple(require_number(name, one) for one in value)


def _normalize(inputs: Tensor, scale: float, mean: Tensor, std: Tensor) -> Tensor:
    return (inputs.float() / scale - mean) / std


def _by_channel(values: tuple[float, ...], shape: Sequence[int], device: torch.device) -> Tensor:
    """Return ``values`` as float32 (C, 1, ...), to be broadcast over (N, C, ...)."""
    channels = shape[0] if shape else 0
    if len(values) != channels:
        raise ValueError(f"normalization has {len(values)} channels, the inputs have {channels}")
    tensor = torch.tensor(values, dtype=torch.float32, device=device)
    return tensor.view(-1, *(1 for _ in shape[1:]))
