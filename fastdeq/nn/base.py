"""The base of all layers around a cell: equilibria, unrolled networks, neural ODEs."""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastdeq._fixed_point import fixed_depth
from fastdeq.adjoints import AbstractAdjoint
from fastdeq.adjoints.states import StatesAt
from fastdeq.autocast import Precision, check_precision
from fastdeq.flatten import map_scales, scales_of
from fastdeq.nn.call import CellCall, check_cell
from fastdeq.nn.initializers import AbstractInitializer, zeros_of
from fastdeq.nn.weight_norm import parametrizations_cached
from fastdeq.notation import State, StateMap
from fastdeq.regularizers import jacobian_loss as hutchinson
from fastdeq.solution import Solution, TraceKind


class AbstractSolvingModule(nn.Module):
    """A module whose call returns (output, solution): an equilibrium layer, or a network with some.

    Its `forward` takes the options of `AbstractCellLayer.forward`.
    """

    @property
    @abstractmethod
    def equilibria(self) -> tuple["AbstractCellLayer", ...]:
        """The equilibrium layers, in order."""

    @abstractmethod
    def explicit(self, x: Any) -> Any:
        """The output without a solve, from the predictions z₀.

        Raises: ValueError where an equilibrium layer does not predict.
        """

    @property
    def predicts(self) -> bool:
        """Whether all equilibrium layers predict their z₀."""
        return all(layer.initializer.predicts for layer in self.equilibria)


class AbstractCellLayer(AbstractSolvingModule):
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

    solves: ClassVar[bool] = False
    """Whether `solve` takes `v0`, `states` and `states_adjoint`: an equilibrium layer."""

    def __init__(
        self,
        cell: nn.Module,
        initializer: AbstractInitializer | None,
        precision: Precision | None = None,
    ) -> None:
        super().__init__()
        if isinstance(cell, AbstractCellLayer):
            raise TypeError(
                f"the cell is a {type(cell).__name__}, which returns (z, solution): give a cell "
                "that calls it and returns a state, such as self.inner(z + x)[0]"
            )
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

    @property
    def equilibria(self) -> tuple["AbstractCellLayer", ...]:
        return (self,)

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
        z0: State | None = None,
        v0: Tensor | None = None,
        jacobian_loss: bool = False,
        depth: int | None = None,
        trace: TraceKind | None = None,
        states: StatesAt | None = None,
        states_adjoint: AbstractAdjoint | None = None,
    ) -> tuple[State, Solution]:
        """(z, solution) from the input x, (B, ...) or whatever the cell takes.

        z0: start here instead of at the initializer's state: at the equilibrium of the last frame
            or step, for example. It becomes `solution.z0`; gradients flow into it from the skip
            loss, and from the result with the Unrolled adjoint or `depth`. `z0.detach()` stops
            them, and frees the graph behind it.
        v0: as in `fixed_point` (equilibrium layers only).
        jacobian_loss: also estimate ‖J‖²_F / D at z, as `solution.jacobian_loss`; see
            `fastdeq.regularizers`.
        depth: unroll the cell this many times from z₀ with ordinary backpropagation instead
            (pretraining).
        trace: "residuals" or "states": keep the history of the forward solve, as `solution.trace`
            (equilibrium layers only).
        states, states_adjoint: as in `fixed_point` (equilibrium layers only).

        Raises and warns as `solve`; also ValueError for a z0 of another shape than the state's, and
        for states or a v0 where there is no solver.
        """
        options = self._options(depth, v0, states, states_adjoint)
        with parametrizations_cached(self):
            f = CellCall(self.cell, x, self.precision)
            start = _widened_in_autocast(self.initializer(f, x) if z0 is None else z0)
            with _start_checked(f, z0):
                if depth is None:
                    solution = self.solve(f, start, trace, **options)
                else:
                    solution = fixed_depth(f, start, depth=depth)
            if jacobian_loss:
                solution = replace(solution, jacobian_loss=hutchinson(f, solution.value))
            f.move_statistics(solution.value)
        bound = getattr(self.cell, "lipschitz", None)
        if bound is not None and self.precision is None:  # bfloat16 rounds beyond any bound
            solution = replace(solution, error_bound=solution.residual / (1 - bound))
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

    def _options(
        self,
        depth: int | None,
        v0: Tensor | None,
        states: StatesAt | None,
        states_adjoint: AbstractAdjoint | None,
    ) -> dict[str, Any]:
        if v0 is None and states is None:
            return {}
        if not self.solves or depth is not None:
            name = "v0" if states is None else "states"
            raise ValueError(
                f"without a solver there is no `{name}`: leave it out for a "
                f"{type(self).__name__}" + (" with a depth" if self.solves else "")
            )
        return {"v0": v0, "states": states, "states_adjoint": states_adjoint}

    def extra_repr(self) -> str:
        shown = self.settings
        if self.precision is not None:
            shown = {**shown, "precision": self.precision}
        return ", ".join(f"{name}={value}" for name, value in shown.items())


@contextmanager
def _start_checked(f: CellCall, z0: State | None) -> Iterator[None]:
    """Name a given z0 in the error of a cell that does not take it: its first evaluation fails."""
    try:
        yield
    except RuntimeError as error:
        if z0 is None or _takes(f, z0):
            raise
        shapes = [tuple(scale.shape) for scale in scales_of(z0)]
        raise ValueError(
            f"z0 has shape {', '.join(map(str, shapes))}, which the cell does not take "
            f"({str(error).splitlines()[0]}): give a state of the shape that the layer returns"
        ) from error


def _takes(f: CellCall, z0: State) -> bool:
    try:
        with torch.no_grad():
            f(z0)
    except RuntimeError:
        return False
    return True


def _widened_in_autocast(z0: State) -> State:
    """Under autocast the state stays float32, whatever f computes in."""
    return map_scales(_widen, z0)


def _widen(z0: Tensor) -> Tensor:
    if not torch.is_autocast_enabled(z0.device.type) or not z0.is_floating_point():
        return z0
    return z0.to(torch.promote_types(z0.dtype, torch.float32))
