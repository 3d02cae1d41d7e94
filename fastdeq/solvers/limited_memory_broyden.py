"""Limited-memory good Broyden, the solver of the published discrete runs."""

import torch
from torch import Tensor

from fastdeq.history import History, add_combination, project, writable
from fastdeq.settings import setting, settings
from fastdeq.solvers.base import AbstractSolver, Problem, Step
from fastdeq.solvers.termination import Iterate

_LARGEST = 0.25  # over a unit of rounding: ‖s‖² over the denominator of an update


class _Product:
    """B = −(I + s_k ω_{k−1} s_{k−1}ᵀ) … (I + s_1 ω_0 s_0ᵀ), from the steps s_j = z_{j+1} − z_j.

    The products c_j of s_j with what the first j factors make of a vector x are c_j = s_j·x +
    Σ_{i<j} (s_j·s_{i+1}) ω_i c_i: a triangular system, whose matrix gets one row with every step.
    """

    def __init__(self, memory: int, like: Tensor) -> None:
        self.steps = History(memory)
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
            following = rows[:, j]
            w = w + product[:, None] * following
        return w


@settings
class LimitedMemoryBroydenSolver(AbstractSolver):
    """z ← z − B g with B ≈ (∂g/∂z)⁻¹ held as −I plus rank-one terms (Broyden 1965, the good method;
    as in MDEQ, Bai et al. 2020, arXiv 2006.08656).

    memory: rank-one terms kept. When they are full the method restarts from −I at the current
        state: a sum without its oldest terms would no longer satisfy any secant equation. One
        evaluation per step; no line search, as in the reference.

    Departures from the reference:
    1. B is kept as a product of factors I + s₊ sᵀ / ‖s‖² of successive steps (Kelley, Iterative
       Methods for Linear and Nonlinear Equations, §7.3), instead of a sum of terms u vᵀ: the same
       matrix from one history instead of two, applied in two passes over it.
    2. An update whose denominator vanishes to rounding is skipped for that sample.
    """

    takes_one_evaluation = True

    memory: int = setting(default=20, at_least=1)

    def init(self, problem: Problem, first: Iterate) -> tuple[Tensor, _Product]:
        return first.g, _Product(self.memory, first.z)

    def step(
        self, problem: Problem, current: Iterate, memory: tuple[Tensor, _Product]
    ) -> tuple[Step, tuple[Tensor, _Product]]:
        direction, b = memory
        new = problem.evaluate(current.z + direction)
        if b.full:
            b.steps.clear()
            return Step(new), (new.g, b)
        # A frozen sample stays where it is.
        step = direction if problem.all_active else new.z - current.z
        newton, product, squared = b.push(step, new.g)
        # The update's denominator is s·B (g₊ − g), since B g = −s.
        denominator = squared - product
        good = _LARGEST * denominator.abs() > torch.finfo(new.g.dtype).eps * squared
        # Filled before the divisions: slopes at 0 would be NaN however they are masked later.
        factor = torch.where(good, squared, 1.0) / torch.where(good, denominator, 1.0)
        b.weigh(torch.where(good, squared, torch.inf).reciprocal())
        return Step(new), (newton * factor[:, None], b)

    def adjoint_estimate(self, memory: tuple[Tensor, _Product], w: Tensor) -> Tensor:
        """−Bᵀ w, which estimates (I − Jᵀ)⁻¹ w, both (B, D). memory: after the last step."""
        following, b = memory
        return b.adjoint(following, w)
