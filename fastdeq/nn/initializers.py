"""The initial state of the solver: the difference between DEQ, Skip DEQ and Skip Reg. DEQ."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from fastdeq.flatten import is_channels_last, map_scales
from fastdeq.nn.inputs import tensors_in
from fastdeq.notation import State, StateMap
from fastdeq.settings import check_value


class AbstractInitializer(nn.Module):
    """Makes z₀ from the input; `predicts`: whether z₀ is a prediction of the equilibrium."""

    predicts: bool = True

    @abstractmethod
    def forward(self, f: StateMap, x: Any) -> State:
        """z₀ from the cell with its input bound, and from the input."""


class Zeros(AbstractInitializer):
    """z₀ = 0, the vanilla start.

    shape: of one sample's state, without the batch axis; None takes the input's, a tensor or a
        list or tuple of them. A list or a dictionary of shapes makes a state of several
        scales.

    With a shape, the input may be of any structure (see `tensors_in`): its first tensor with a
    batch axis gives B, the device and the memory format (contiguous or channels_last).

    Raises (when called): TypeError for an input without such a tensor, and, without a shape, for
    one that is neither a tensor nor tensors.
    """

    predicts = False

    def __init__(
        self, shape: int | list[int] | list[list[int]] | dict[str, list[int]] | None = None
    ) -> None:
        super().__init__()
        self.shape = [shape] if isinstance(shape, int) else shape

    def forward(self, f: StateMap, x: Any) -> State:
        if self.shape is None:
            return _zeros_like(x)
        reference = _batched_tensor(x)
        # Integers (tokens, which the cell embeds) are an input, but not a state.
        dtype = reference.dtype if reference.is_floating_point() else torch.get_default_dtype()
        if isinstance(self.shape, dict):
            return {name: _zeros(reference, shape, dtype) for name, shape in self.shape.items()}
        if not self.shape or isinstance(self.shape[0], int):
            return _zeros(reference, self.shape, dtype)
        return tuple(_zeros(reference, shape, dtype) for shape in self.shape)


def _zeros(reference: Tensor, shape: Any, dtype: torch.dtype) -> Tensor:
    """(B, *shape), in the memory format of the reference where both are images."""
    if len(shape) in (3, 4) and is_channels_last(reference):
        channels, *rest = shape
        return reference.new_zeros(reference.shape[0], *rest, channels, dtype=dtype).movedim(-1, 1)
    return reference.new_zeros(reference.shape[0], *shape, dtype=dtype)


def _zeros_like(x: Any) -> State:
    if isinstance(x, Tensor):
        return torch.zeros_like(x)
    if not isinstance(x, list | tuple) or not all(isinstance(scale, Tensor) for scale in x):
        raise TypeError(
            f"Zeros() takes the shape of the input, which is a {type(x).__name__} and not a tensor "
            "or a tuple of tensors: give the shape of one sample's state, Zeros(shape)"
        )
    return tuple(torch.zeros_like(scale) for scale in x)


def _batched_tensor(x: Any) -> Tensor:
    for tensor in tensors_in(x):
        if tensor.ndim:
            return tensor
    raise TypeError(
        f"the input is a {type(x).__name__} without a tensor whose first axis is the batch, so the "
        "batch size of z₀ is unknown: put such a tensor into the input, or give an initializer"
    )


def zeros_of(cell: nn.Module) -> Zeros:
    """The zero state of a cell: of its `scales`, if it has that attribute, or the input's shape."""
    scales = getattr(cell, "scales", None)
    return Zeros(None if scales is None else [list(shape) for shape in scales])


class RandomNormal(AbstractInitializer):
    """z₀ ~ N(0, std²) in training, from torch's generator, and 0 in evaluation.

    Starts of one sample that differ from call to call let training see whether its equilibrium
    depends on the start. `zeros` is the 0, whose shape z₀ has.

    Raises: ValueError for a std that is not above 0.
    """

    predicts = False

    def __init__(self, std: float = 1.0, zeros: Zeros | None = None) -> None:
        super().__init__()
        check_value("RandomNormal.std", std, float, {"above": 0})
        self.std, self.zeros = std, Zeros() if zeros is None else zeros

    def forward(self, f: StateMap, x: Any) -> State:
        z0: State = self.zeros(f, x)
        if not self.training:
            return z0
        return map_scales(lambda scale: self.std * torch.randn_like(scale), z0)


class ExplicitNetwork(AbstractInitializer):
    """z₀ = g_φ(x): an explicit network predicts z* (Skip DEQ; arXiv 2201.12240, §3.2)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):  # a function's parameters would be missing here
            raise TypeError(f"the explicit network is {network!r}: give an nn.Module, x ↦ z₀")
        self.network = network

    def forward(self, f: StateMap, x: Any) -> State:
        z0: State = self.network(x)
        return z0


class FirstEvaluation(AbstractInitializer):
    """z₀ = f(0, x): the cell itself predicts, without further parameters (Skip Reg.; same section).

    This evaluation is not in the NFE, which counts the solve. `zeros` is the 0.
    """

    def __init__(self, zeros: Zeros | None = None) -> None:
        super().__init__()
        self.zeros = Zeros() if zeros is None else zeros

    def forward(self, f: StateMap, x: Any) -> State:
        return f(self.zeros(f, x))
