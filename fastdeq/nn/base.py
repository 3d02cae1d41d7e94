"""The base of all layers around a cell: equilibria, unrolled networks, neural ODEs."""

from abc import abstractmethod
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastdeq._fixed_point import fixed_depth
from fastdeq.autocast import Precision, check_precision
from fastdeq.nn.call import CellCall, check_cell
from fastdeq.nn.initializers import AbstractInitializer, zeros_of
from fastdeq.nn.weight_norm import parametrizations_cached
from fastdeq.notation import State, StateMap
from fastdeq.regularizers import jacobian_loss as hutchinson
from fastdeq.solution import Solution, TraceKind


class AbstractCellLayer(nn.Module):
    """From x to a state, by evaluations of one cell from z₀ (see `solve`).

    cell: f, an nn.Module called as cell(z, x), that returns a state of the shape of z.
    initializer: makes z₀; by default zeros, of the cell's scales or else of the input's shape.
    precision: "bf16" computes f and its derivatives under autocast to bfloat16, while a float32
        state, its residuals and histories stay float32. None: as the code around the layer.

    Dropout masks and parametrized weights are the same in all evaluations of one call, including
    those of the backward pass; running statistics of batch norms in the cell are updated once per
    call, at the result.

    Raises: TypeError for a cell that is not a module, and for an initializer that is not an
    `AbstractInitializer`; ValueError for ordinary dropout in the cell and for another precision.
    """

    def __init__(
        self,
        cell: nn.Module,
        initializer: AbstractInitializer | None,
        precision: Precision | None = None,
    ) -> None:
        super().__init__()
        check_cell(cell)
        check_precision(precision)
        if not isinstance(initializer, AbstractInitializer | None):
            raise TypeError(
                f"the initializer is a {type(initializer).__name__}: give one of fastdeq.nn, "
                "or an explicit network to SkipDeepEquilibriumNetwork"
            )
        self.cell = cell
        self.initializer = zeros_of(cell) if initializer is None else initializer
        self.precision = precision

    @abstractmethod
    def solve(self, f: StateMap, z0: State, trace: TraceKind | None) -> Solution:
        """The state and what is known about it, from the cell with its input bound; with the
        history that `trace` names, where the layer has one.
        """

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The settings of `solve` by name, to be shown."""

    def forward(
        self,
        x: Any,
        *,
        jacobian_loss: bool = False,
        depth: int | None = None,
        trace: TraceKind | None = None,
    ) -> tuple[State, Solution]:
        """(z, solution) from the input x, (B, ...) or whatever the cell takes.

        jacobian_loss: also estimate ‖J‖²_F / D at z, as `solution.jacobian_loss`; see
            `fastdeq.regularizers`.
        depth: unroll the cell this many times from z₀ with ordinary backpropagation instead
            (pretraining).
        trace: "residuals" or "states": keep the history of the forward solve, as `solution.trace`
            (equilibrium layers only).

        Raises and warns as `solve`.
        """
        with parametrizations_cached(self):
            f = CellCall(self.cell, x, self.precision)
            z0 = _widened_in_autocast(self.initializer(f, x))
            if depth is None:
                solution = self.solve(f, z0, trace)
            else:
                solution = fixed_depth(f, z0, depth=depth)
            if jacobian_loss:
                solution = replace(solution, jacobian_loss=hutchinson(f, solution.value))
            f.move_statistics(solution.value)
        return solution.value, solution

    def explicit(self, x: Any) -> State:
        """The prediction z₀ alone, without a solve.

        Raises: ValueError where the layer does not predict (it starts at zero).
        """
        if not self.initializer.predicts:
            raise ValueError(
                "this layer starts at zero and has no explicit prediction: use "
                "SkipDeepEquilibriumNetwork, with or without an explicit network"
            )
        with parametrizations_cached(self):
            z0: State = self.initializer(CellCall(self.cell, x, self.precision), x)
            return z0

    def extra_repr(self) -> str:
        shown = self.settings
        if self.precision is not None:
            shown = {**shown, "precision": self.precision}
        return ", ".join(f"{name}={value}" for name, value in shown.items())


def _widened_in_autocast(z0: State) -> State:
    """Under autocast the state stays float32, whatever f computes in."""
    if isinstance(z0, tuple):
        return tuple(_widen(scale) for scale in z0)
    return _widen(z0)


def _widen(z0: Tensor) -> Tensor:
    if not torch.is_autocast_enabled(z0.device.type) or not z0.is_floating_point():
        return z0
    return z0.to(torch.promote_types(z0.dtype, torch.float32))
