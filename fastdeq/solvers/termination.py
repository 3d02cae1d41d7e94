"""The nine termination modes, per sample or over the whole batch.

With du = f(z) − z and u = z, over one sample or the whole batch vector:

| mode                                  | done when                                                |
|---------------------------------------|----------------------------------------------------------|
| `abs` / `rel`                         | every entry: |du| ≤ abstol / |du| ≤ reltol · |u|         |
| `abs_norm` / `rel_norm`               | ‖du‖ ≤ abstol / ‖du‖ ≤ reltol · ‖du + u‖                 |
| `norm`                                | both of the two above                                    |
| `abs_deq_default` / `rel_deq_default` | the norm test; or stalled within 3 tol; or broke away    |
| `abs_deq_best` / `rel_deq_best`       | the same, and the best iterate is returned               |

The `*_deq_default` modes return the last good iterate, all others the one of the smallest ‖du‖ (a
converged sample returns the iterate that passed the test). "Broke away" is the protective break at
1e3 × length × the first value. On ‖du‖ it guards every mode here, so that methods stop before they
overflow; the `*_deq_*` modes apply it to their objective too, as published.

Departures from the published tests, which also pass where no equilibrium exists (f(z) = z + c: any
residual or pre-norm cell whose residual does not vanish; NonlinearSolve.jl issue 1149):
1. The denominator of a relative test is at most s₀ + κ max ‖du‖, s₀ = ‖f(z₀)‖ and the maximum over
   the iterates so far, κ = min(10, 1 / (2 reltol)). An iteration that only makes ‖z‖ grow cannot
   pass: the residual itself must fall. A cell with ‖(I − J)⁻¹‖ up to κ is judged as published.
2. Beyond that bound, a residual is undefined once rounding of ‖z‖ reaches half of the largest
   residual seen (its root mean square, for a norm): z + c rounds to z. The sample has diverged.
3. A sample beyond the bound whose residual is not below half of the largest one has run away: this
   iterate is never the best one, and at the step limit the status is DIVERGED.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fastdeq.norms import Pooling, sample_largest, sample_norm

TerminationMode: TypeAlias = Literal[
    "abs",
    "rel",
    "abs_norm",
    "rel_norm",
    "norm",
    "abs_deq_default",
    "rel_deq_default",
    "abs_deq_best",
    "rel_deq_best",
]

STALL_WINDOW = 30  # steps whose objectives must lie within a factor STALL_RATIO of each other
STALL_RATIO = 1.3
STALL_SLACK = 3.0  # times the tolerance: how near a stalled sample must be to stop
PROTECTIVE_FACTOR = 1e3  # times the vector's length: growth that counts as divergence
_GROWTH = 10.0  # κ: times the largest residual, growth of ‖f(z)‖ that an equilibrium may explain
_FALLEN = 0.5  # of the largest residual: below it, the residual has fallen
_ROUNDING = 4.0  # units of rounding of ‖f(z)‖ that f(z) − z may be wrong by


@dataclass(frozen=True)
class Iterate:
    """A state and its residual, both (B, D): g = f(z) − z."""

    z: Tensor
    g: Tensor

    @cached_property
    def residual(self) -> Tensor:
        """‖g‖ of every sample, (B,), without a graph."""
        return sample_norm(self.g.detach())


@dataclass(frozen=True)
class Measures:
    """What the tests measure at an iterate, each (B,); the last three are pooled.

    du, size: ‖f(z) − z‖ and ‖f(z)‖ in the norm of the mode (largest entry for `abs` and `rel`).
    """

    residual: Tensor
    f_norm: Tensor
    du: Tensor
    size: Tensor
    objective: Tensor

    @property
    def relative(self) -> Tensor:
        """‖f(z) − z‖ / ‖f(z)‖ of every sample, (B,)."""
        return ratio(self.residual, self.f_norm)


@dataclass(frozen=True)
class Termination:
    """A mode with its tolerances. A sample is done when its objective is at most `threshold`."""

    mode: TerminationMode
    abstol: float
    reltol: float

    @property
    def threshold(self) -> float:
        """The bound of the objective; 1 for `norm`, whose objective is scaled."""
        if self.mode == "norm":
            return 1.0
        return self.abstol if self.mode.startswith("abs") else self.reltol

    @property
    def watches_progress(self) -> bool:
        """Whether stalls, and growth of the objective, also end a sample."""
        return "deq" in self.mode

    @property
    def returns_best(self) -> bool:
        """Whether the best iterate is returned, or the last good one."""
        return not self.mode.endswith("deq_default")

    @property
    def entrywise(self) -> bool:
        """Whether the test is of every entry, or of a Euclidean norm."""
        return self.mode in ("abs", "rel")

    @property
    def growth(self) -> float:
        """κ of the module's docstring; κ · reltol stays at most 1/2."""
        return min(_GROWTH, 0.5 / self.reltol) if self.reltol > 0 else _GROWTH

    def measure(
        self, at: Iterate, pooling: Pooling, alive: Tensor, bound: Tensor | None = None
    ) -> Measures:
        """Measure an iterate.

        bound: (B,), the largest denominator of a relative test (`Progress.bound`); None: any.
        """
        f_z = at.z + at.g
        residual, f_norm = at.residual, sample_norm(f_z)
        if self.entrywise:
            du = pooling.largest(sample_largest(at.g), alive)
            size = pooling.largest(sample_largest(f_z), alive)
        else:
            du, size = pooling.norm(residual, alive), pooling.norm(f_norm, alive)
        scale = size if bound is None else torch.minimum(size, bound)
        match self.mode:
            case "rel":
                each = at.z.abs() if bound is None else torch.minimum(at.z.abs(), bound[:, None])
                objective = pooling.largest(sample_largest(ratio(at.g.abs(), each)), alive)
            case "norm":
                # One number, comparable between steps, that is at most 1 exactly when both tests
                # hold.
                objective = torch.maximum(
                    _over(du, self.abstol), _over(ratio(du, scale), self.reltol)
                )
            case "abs" | "abs_norm" | "abs_deq_default" | "abs_deq_best":
                objective = du
            case "rel_norm" | "rel_deq_default" | "rel_deq_best":
                objective = ratio(du, scale)
        return Measures(residual, f_norm, du, size, objective)


def ratio(du: Tensor, u: Tensor) -> Tensor:
    """du / u with 0 / 0 = 0: an exact equilibrium at the origin is an equilibrium."""
    return (du / u).masked_fill(du == 0, 0.0)


def _over(value: Tensor, tolerance: float) -> Tensor:
    return ratio(value, torch.full_like(value, tolerance))


class Progress:
    """Detects divergence and stalls from the iterates so far, each (B,) bool.

    length: how many entries one pooled measure covers. eps: unit of rounding of the states.
    """

    def __init__(self, rule: Termination, first: Measures, length: int, eps: float) -> None:
        self.rule = rule
        self.du_cap = first.du * (PROTECTIVE_FACTOR * length)
        self.objective_cap = first.objective * (PROTECTIVE_FACTOR * length)
        self.first_size = first.size
        entries = 1 if rule.entrywise else length
        # Growth, in units of the peak, at which rounding reaches the part of it that counts.
        lost = _FALLEN / (_ROUNDING * eps * entries**0.5)
        self.lost = max(rule.growth, lost)
        self.window: list[Tensor] = []

        self._raise_peak(first.du)

    def update(self, measures: Measures) -> None:
        """Record an iterate that has been tested."""
        self._raise_peak(torch.maximum(self.peak, measures.du))

    def _raise_peak(self, peak: Tensor) -> None:
        self.peak = peak
        # (B,): ‖f(z)‖ up to which growth is explained by the residuals seen.
        self.bound = torch.add(self.first_size, peak, alpha=self.rule.growth)

    def diverged(self, measures: Measures) -> Tensor:
        """Grown past the protective factor, or so far that the residual is lost in rounding."""
        grown = measures.du > self.du_cap
        if self.rule.watches_progress:
            grown = grown | (measures.objective > self.objective_cap)
        return grown | (measures.size > torch.add(self.first_size, self.peak, alpha=self.lost))

    def ran_away(self, measures: Measures) -> Tensor:
        """Whether ‖f(z)‖ has outgrown its bound while the residual has not fallen."""
        return (measures.size > self.bound) & (measures.du > _FALLEN * self.peak)

    def stalled(self, measures: Measures) -> Tensor | None:
        """Near the tolerance, without progress for a whole window of steps; None where nothing
        can have stalled yet."""
        self.window = [*self.window, measures.objective][-STALL_WINDOW:]
        if not self.rule.watches_progress or len(self.window) < STALL_WINDOW:
            return None
        window = torch.stack(self.window)
        flat = window.amax(dim=0) < STALL_RATIO * window.amin(dim=0)
        return flat & (measures.objective <= STALL_SLACK * self.rule.threshold)
