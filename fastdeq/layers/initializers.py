"""L4: where the solver starts: what tells DEQ, Skip DEQ and Skip Reg. DEQ apart."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from fastdeq.notation import State, StateMap


class AbstractInitializer(nn.Module):
    """Makes z₀ from the input; `predicts` tells whether z₀ is worth reading on its own."""

    predicts: bool = True

    @abstractmethod
    def forward(self, f: StateMap, x: Any) -> State:
        """z₀ from the cell with its input bound, and from the input."""


class Zeros(AbstractInitializer):
    """z₀ = 0, the vanilla start.

    shape: of one sample's state, without the batch axis; None takes the input's. A list of shapes
        makes a state of several scales.
    """

    predicts = False

    def __init__(self, shape: int | list[int] | list[list[int]] | None = None) -> None:
        super().__init__()
        self.shape = [shape] if isinstance(shape, int) else shape

    def forward(self, f: StateMap, x: Any) -> State:
        reference: Tensor = x if isinstance(x, Tensor) else x[0]
        if self.shape is None:
            if isinstance(x, Tensor):
                return torch.zeros_like(x)
            return tuple(torch.zeros_like(scale) for scale in x)
        # Whole numbers (tokens, which the cell embeds) are an input but no state.
        dtype = reference.dtype if reference.is_floating_point() else torch.get_default_dtype()
        if not self.shape or isinstance(self.shape[0], int):
            return reference.new_zeros(len(reference), *self.shape, dtype=dtype)
        return tuple(
            reference.new_zeros(len(reference), *shape, dtype=dtype) for shape in self.shape
        )


def zeros_of(cell: nn.Module) -> Zeros:
    """The zero state of a cell: of its `scales`, if it has that attribute, or the input's shape."""
    scales = getattr(cell, "scales", None)
    return Zeros(None if scales is None else [list(shape) for shape in scales])


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

    This evaluation is not in the NFE, which counts the solve. `zeros` makes the 0.
    """

    def __init__(self, zeros: Zeros | None = None) -> None:
        super().__init__()
        self.zeros = Zeros() if zeros is None else zeros

    def forward(self, f: StateMap, x: Any) -> State:
        return f(self.zeros(f, x))
