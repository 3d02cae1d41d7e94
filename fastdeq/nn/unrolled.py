"""The explicit baseline: a cell repeated a set number of times."""

from typing import Any

from torch import nn

from fastdeq._fixed_point import fixed_depth
from fastdeq.autocast import Precision
from fastdeq.nn.base import AbstractCellLayer
from fastdeq.nn.initializers import AbstractInitializer
from fastdeq.notation import State, StateMap
from fastdeq.solution import Solution, TraceKind


class UnrolledNetwork(AbstractCellLayer):
    """z ← f(z, x), `steps` times from z₀ with shared weights and ordinary backpropagation.

    With steps = 1 and a cell that ignores z it is an ordinary explicit network of x. Its solution's
    status is NOT_SOLVED, its residual that of the last step, its NFE `steps`.

    cell, initializer, precision: as in `AbstractCellLayer`.

    Raises: as `AbstractCellLayer`; also ValueError for steps below 1.
    """

    def __init__(
        self,
        cell: nn.Module,
        *,
        steps: int,
        initializer: AbstractInitializer | None = None,
        precision: Precision | None = None,
    ) -> None:
        super().__init__(cell, initializer, precision)
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps is {steps!r}, but must be a whole number of at least 1")
        self.steps = steps

    def solve(self, f: StateMap, z0: State, trace: TraceKind | None) -> Solution:
        """Raises as `fixed_depth`."""
        return fixed_depth(f, z0, depth=self.steps)

    @property
    def settings(self) -> dict[str, Any]:
        return {"steps": self.steps}
