"""Limited-memory good Broyden, the solver of the published discrete runs."""

from typing import TypeAlias

import torch
from torch import Tensor

from fastdeq.history import (
    FixedHistory,
    History,
    HistoryDtype,
    add_combination,
    project,
    writable,
)
from fastdeq.settings import setting, settings
from fastdeq.solvers.base import AbstractSolver, Problem, Step, check_history
from fastdeq.solvers.termination import Iterate

_LARGEST = 0.25  # over a unit of rounding: ‖s‖² over the denominator of an update


class _Product:
    """B = −(I + s_k ω_{k−1} s_{k−1}ᵀ) … (I + s_1 ω_0 s_0ᵀ), from the steps s_j = z_{j+1} − z_j.

    The products c_j of s_j with what the first j factors make of a vector x are c_j = s_j·x +
    Σ_{i<j} (s_j·s_{i+1}) ω_i c_i: a triangular system, whose matrix gets one row with every step.
    """

    def __init__(self, memory: int, dtype: HistoryDtype | None, like: Tensor) -> None:
        self.steps = History(memory, dtype)
        # Entries on the diagonal, which stands for ones, and above it are not read.
        self._matrix = like.new_zeros(like.shape[0], memory, memory)
        self._weights = like.new_zeros(like.shape[0], memory)  # ω

    @property
    def full(self) -> bool:
        """Whether there is no place for another step."""
        return len(self.steps) == self.steps.memory

    def push(self, step: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Add a step, (B, D), whose factor gets its weight later.

        Returns −B x, (B, D), with the factors before; its product with the step, which is c_k; and
        the squared length of the step, each (B,).
        """
        k = self.steps.push(step)
        rows = self.steps.rows
        overlap, right = project(rows, step), project(rows, x)
        if not k:
            return x, right[:, 0], overlap[:, 0]
        self._matrix = writable(self._matrix)
        self._matrix[:, k, :k] = (overlap[:, 1:] * self._weights[:, :k]).neg()
        products = torch.linalg.solve_triangular(
            self._matrix[:, : k + 1, : k + 1], right[:, :, None], upper=False, unitriangular=True
        )[:, :, 0]
        coefficients = products[:, :k] * self._weights[:, :k]
        applied = add_combination(x, rows[:, 1:], coefficients)
        return applied, products[:, k], overlap[:, k]

    def weigh(self, weight: Tensor) -> None:
        """Set ω of the last step, (B,)."""
        self._weights = writable(self._weights)
        self._weights[:, len(self.steps) - 1] = weight

    def adjoint(self, following: Tensor, w: Tensor) -> Tensor:
        """−Bᵀ w, (B, D). following: the step after the last one that was added."""
        rows = self.steps.rows if len(self.steps) else following[:, None][:, :0]
        for j in reversed(range(len(self.steps))):
            product = self._weights[:, j] * torch.linalg.vecdot(following, w)
            following = rows[:, j].to(w.dtype)
            w = w + product[:, None] * following
        return w

    def or_restart(self, direction: Tensor, g: Tensor) -> Tensor:
        """The next direction: the given one unless the method has restarted, else g, (B, D)."""
        return direction


class _FixedProduct:
    """The same with tensors of fixed shape, for compiled solves.

    The place of the last step is a tensor, so that what has not been written since the last restart
    is masked. The triangular matrix is kept as its inverse, to which a step adds a row as well.
    """

    def __init__(self, memory: int, like: Tensor) -> None:
        self.steps = FixedHistory(memory, like)
        unit = torch.eye(memory, dtype=like.dtype, device=like.device)
        self._inverse = unit.repeat(len(like), 1, 1)
        self._weights = like.new_zeros(len(like), memory)
        self._numbers = torch.arange(memory, device=like.device)
        self._place = self.steps.place
        # Whether there was no place for the last step.
        self._restarts = torch.zeros(1, dtype=torch.bool, device=like.device)

    def push(self, step: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `_Product.push`."""
        # The step after a full history begins a new one at place 0, without being part of it.
        full = self.steps.place == self.steps.memory
        k = self._place = self.steps.place.masked_fill(full, 0)
        self.steps.place = k
        self.steps.push(step)
        self.steps.place = (k + 1).masked_fill(full, 0)
        self._restarts = full
        rows, old = self.steps.rows, self._numbers < k
        overlap, right = project(rows, step), project(rows, x)
        weights = torch.where(old, self._weights, 0.0)
        row = torch.where(old, overlap.roll(-1, 1), 0.0) * weights
        row = project(self._inverse.mT, row) + (self._numbers == k)
        self._inverse = self._inverse.index_copy(1, k, row[:, None])
        products = project(self._inverse, torch.where(old | (self._numbers == k), right, 0.0))
        coefficients = (torch.where(old, products, 0.0) * weights).roll(1, 1)
        applied = add_combination(x, rows, coefficients)
        return applied, products.index_select(1, k)[:, 0], overlap.index_select(1, k)[:, 0]

    def weigh(self, weight: Tensor) -> None:
        """As `_Product.weigh`."""
        self._weights = self._weights.index_copy(1, self._place, weight[:, None])

    def or_restart(self, direction: Tensor, g: Tensor) -> Tensor:
        """As `_Product.or_restart`."""
        return torch.where(self._restarts, g, direction)


_Memory: TypeAlias = _Product | _FixedProduct


@settings
class LimitedMemoryBroydenSolver(AbstractSolver):
    """z ← z − B g with B ≈ (∂g/∂z)⁻¹ held as −I plus rank-one terms (Broyden 1965, the good method;
    as in MDEQ, Bai et al. 2020, arXiv 2006.08656).

    memory: rank-one terms kept. When they are full the method restarts from −I at the current
        state: a sum without its oldest terms would no longer satisfy any secant equation. One
        evaluation per step; no line search, as in the reference.
    history: "bfloat16" keeps the steps in half the memory, as in `Anderson`.

    Departures from the reference:
    1. B is kept as a product of factors I + s₊ sᵀ / ‖s‖² of successive steps (Kelley, Iterative
       Methods for Linear and Nonlinear Equations, §7.3), instead of a sum of terms u vᵀ: the same
       matrix from one history instead of two, applied in two passes over it.
    2. An update whose denominator vanishes to rounding is skipped for that sample.
    """

    compiles_steps = takes_one_evaluation = True

    memory: int = setting(default=20, at_least=1)
    history: HistoryDtype | None = setting(default=None)

    def validate(self) -> None:
        """Also refuse a history in another dtype for compiled steps."""
        super().validate()
        check_history(self)

    def init(self, problem: Problem, first: Iterate) -> tuple[Tensor, _Memory]:
        if problem.fixed_shapes:
            return first.g, _FixedProduct(self.memory, first.z)
        return first.g, _Product(self.memory, self.history, first.z)

    def step(
        self, problem: Problem, current: Iterate, memory: tuple[Tensor, _Memory]
    ) -> tuple[Step, tuple[Tensor, _Memory]]:
        direction, b = memory
        new = problem.evaluate(current.z + direction)
        if isinstance(b, _Product) and b.full:
            b.steps.clear()
            return Step(new), (new.g, b)
        newton, product, squared = b.push(direction, new.g)
        # The update's denominator is s·B (g₊ − g), since B g = −s.
        denominator = squared - product
        good = denominator.abs() > torch.finfo(new.g.dtype).eps / _LARGEST * squared
        if not problem.all_active:  # no update by a step that a frozen sample has not taken
            good = good & problem.active
        skipped = ~good
        # Filled before the divisions: slopes at 0 would be NaN however they are masked later.
        factor = squared.masked_fill(skipped, 1.0) / denominator.masked_fill(skipped, 1.0)
        b.weigh(squared.masked_fill(skipped, torch.inf).reciprocal())
        return Step(new), (b.or_restart(newton * factor[:, None], new.g), b)

    def adjoint_estimate(self, memory: tuple[Tensor, _Product], w: Tensor) -> Tensor:
        """−Bᵀ w, which estimates (I − Jᵀ)⁻¹ w, both (B, D). memory: after the last step."""
        following, b = memory
        return b.adjoint(following, w)
