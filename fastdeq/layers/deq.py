"""L4: the equilibrium layer, and its two skip variants as compositions."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastdeq.adjoints import AbstractAdjoint, Implicit
from fastdeq.fixed_point import check_settings, fixed_depth, fixed_point
from fastdeq.layers.call import CellCall, check_cell
from fastdeq.layers.initializers import (
    AbstractInitializer,
    ExplicitNetwork,
    FirstEvaluation,
    Zeros,
)
from fastdeq.layers.weight_norm import parametrizations_cached
from fastdeq.notation import State
from fastdeq.regularizers import jacobian_loss as hutchinson
from fastdeq.solution import Solution
from fastdeq.solvers import AbstractSolver, LimitedMemoryBroydenSolver


class DeepEquilibriumNetwork(nn.Module):
    """z* = f(z*, x), found by a solver and differentiated by an adjoint (Bai et al. 2019, arXiv
    1909.01377).

    cell: f, an nn.Module called as cell(z, x), that returns a state of the shape of z.
    solver, adjoint: settings; any of either (see `fastdeq.solvers`, `fastdeq.adjoints`).
    initializer: where the solver starts; by default zeros of the input's shape.
    depth: while it is set (an attribute that may change at any time), no equilibrium is solved for:
        the cell is unrolled so many times from z₀ with ordinary backpropagation (pretraining).

    Through all evaluations of one call, backward's included, dropout masks and parametrized weights
    are the same; running statistics of batch norms in the cell move once a call, at z*. A batch
    norm that uses batch statistics couples the samples of a batch: use `per_sample=False` with it.

    Raises: TypeError for a cell that is no module, and for a solver, adjoint or initializer that is
    none; ValueError for ordinary dropout in the cell.
    """

    def __init__(
        self,
        cell: nn.Module,
        *,
        solver: AbstractSolver | None = None,
        adjoint: AbstractAdjoint | None = None,
        initializer: AbstractInitializer | None = None,
        depth: int | None = None,
    ) -> None:
        super().__init__()
        check_cell(cell)
        if not isinstance(initializer, AbstractInitializer | None):
            raise TypeError(
                f"the initializer is a {type(initializer).__name__}: give one of fastdeq.layers, "
                "or an explicit network to SkipDeepEquilibriumNetwork"
            )
        self.cell = cell
        self.solver = LimitedMemoryBroydenSolver() if solver is None else solver
        self.adjoint = Implicit() if adjoint is None else adjoint
        check_settings(self.solver, self.adjoint)
        self.initializer = Zeros() if initializer is None else initializer
        self.depth = depth

    def forward(self, x: Any, *, jacobian_loss: bool = False) -> tuple[State, Solution]:
        """(z*, solution) from the input x, (B, ...) or whatever the cell takes.

        jacobian_loss: also estimate ‖J‖²_F / D at z*, as `solution.jacobian_loss`; see
            `fastdeq.regularizers`.

        Raises and warns as `fixed_point`.
        """
        with parametrizations_cached(self):
            f = CellCall(self.cell, x)
            z0 = _widened_in_autocast(self.initializer(f, x))
            if self.depth is None:
                solution = fixed_point(f, z0, solver=self.solver, adjoint=self.adjoint)
            else:
                solution = fixed_depth(f, z0, depth=self.depth)
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
            z0: State = self.initializer(CellCall(self.cell, x), x)
            return z0

    def extra_repr(self) -> str:
        return f"solver={self.solver}, adjoint={self.adjoint}, depth={self.depth}"


def SkipDeepEquilibriumNetwork(
    cell: nn.Module,
    explicit: nn.Module | None = None,
    *,
    zeros: Zeros | None = None,
    solver: AbstractSolver | None = None,
    adjoint: AbstractAdjoint | None = None,
    depth: int | None = None,
) -> DeepEquilibriumNetwork:
    """A DEQ whose solver starts at a prediction (Pal et al. 2022, arXiv 2201.12240, §3.2).

    explicit: the network g_φ, x ↦ z₀ (Skip DEQ). None takes z₀ = f(0, x) (Skip Reg.), with `zeros`
        to make the 0 where the state has not the input's shape.

    Train it with `regularizers.skip_loss`, which draws prediction and equilibrium together; nothing
    else trains g_φ, since z* does not depend on z₀. The other arguments and the errors are those of
    `DeepEquilibriumNetwork`; also ValueError for `zeros` beside an explicit network.
    """
    if explicit is not None and zeros is not None:
        raise ValueError("an explicit network makes z₀ itself: leave out `zeros`")
    initializer = FirstEvaluation(zeros) if explicit is None else ExplicitNetwork(explicit)
    return DeepEquilibriumNetwork(
        cell, solver=solver, adjoint=adjoint, initializer=initializer, depth=depth
    )


def _widened_in_autocast(z0: State) -> State:
    """Under autocast the state stays float32, whatever f computes in."""
    if isinstance(z0, tuple):
        return tuple(_widen(scale) for scale in z0)
    return _widen(z0)


def _widen(z0: Tensor) -> Tensor:
    if not torch.is_autocast_enabled(z0.device.type) or not z0.is_floating_point():
        return z0
    return z0.to(torch.promote_types(z0.dtype, torch.float32))
