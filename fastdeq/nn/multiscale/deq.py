"""The published names of equilibria of several scales (Bai et al. 2020, arXiv 2006.08656)."""

from torch import nn

from fastdeq.adjoints import AbstractAdjoint
from fastdeq.autocast import Precision
from fastdeq.nn.deq import DeepEquilibriumNetwork, SkipDeepEquilibriumNetwork
from fastdeq.nn.multiscale.cell import MultiScaleCell
from fastdeq.nn.random_steps import RandomSteps
from fastdeq.solvers import AbstractSolver


class MultiScaleDeepEquilibriumNetwork(DeepEquilibriumNetwork):
    """An equilibrium of all scales of `cell` together, from zero; z* is a tuple with one tensor per
    scale.

    The other arguments and the errors are those of `DeepEquilibriumNetwork`; also TypeError for
    another cell.
    """

    def __init__(
        self,
        cell: MultiScaleCell,
        *,
        solver: AbstractSolver | None = None,
        adjoint: AbstractAdjoint | None = None,
        precision: Precision | None = None,
        steps: RandomSteps | None = None,
        compile: bool = False,
    ) -> None:
        _check_scales(cell)
        super().__init__(
            cell,
            solver=solver,
            adjoint=adjoint,
            precision=precision,
            steps=steps,
            compile=compile,
        )


class MultiScaleSkipDeepEquilibriumNetwork(SkipDeepEquilibriumNetwork):
    """The same from a prediction of all scales (Pal et al. 2022, arXiv 2201.12240, §3.2).

    explicit: the network g_φ, x ↦ z₀, a tuple with the scales of the cell (Skip DEQ). None takes
        z₀ = f(0, x) (Skip Reg.).
    The other arguments and the errors are those of `SkipDeepEquilibriumNetwork`; also TypeError for
    another cell.
    """

    def __init__(
        self,
        cell: MultiScaleCell,
        explicit: nn.Module | None = None,
        *,
        solver: AbstractSolver | None = None,
        adjoint: AbstractAdjoint | None = None,
        precision: Precision | None = None,
        steps: RandomSteps | None = None,
        compile: bool = False,
    ) -> None:
        _check_scales(cell)
        super().__init__(
            cell,
            explicit,
            solver=solver,
            adjoint=adjoint,
            precision=precision,
            steps=steps,
            compile=compile,
        )


def _check_scales(cell: nn.Module) -> None:
    if not isinstance(cell, MultiScaleCell):
        raise TypeError(
            f"the cell is a {type(cell).__name__}, which has no scales: give a MultiScaleCell (a "
            "multiscale arch, such as arch=digits_conv), or use DeepEquilibriumNetwork (model=deq)"
        )
