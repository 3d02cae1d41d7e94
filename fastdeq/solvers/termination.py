"""L1: the nine termination modes, per sample or over the whole batch.

With du = f(z) − z and u = z, over one sample or the whole batch vector:

| mode                                  | done when                                                |
|---------------------------------------|----------------------------------------------------------|
| `abs` / `rel`                         | every entry: |du| ≤ abstol / |du| ≤ reltol · |u|         |
| `abs_norm` / `rel_norm`               | ‖du‖ ≤ abstol / ‖du‖ ≤ reltol · ‖du + u‖                 |
| `norm`                                | both of the two above                                    |
| `abs_deq_default` / `rel_deq_default` | the norm test; or stalled within 3 tol; or broke away    |
| `abs_deq_best` / `rel_deq_best`       | the same, and the best iterate is returned               |

The `*_deq_default` modes return the last good iterate, all others the best one seen (for a
converged sample the two are the same). "Broke away" is the protective break at 1e3 × length × the
first value. On ‖du‖ it guards every mode here, since no method should have to overflow before it is
stopped; the `*_deq_*` modes apply it to their objective too, as published.
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
    """What the tests read off an iterate, each (B,); the last two are pooled."""

    residual: Tensor
    relative: Tensor
    du: Tensor
    objective: Tensor


@dataclass(frozen=True)
class Termination:
    """A mode with its tolerances. A sample is done when its objective is at most `threshold`."""

    mode: TerminationMode
    abstol: float
    reltol: float

    @property
    def threshold(self) -> float:
        """What the objective is held against; 1 for `norm`, whose objective is scaled."""
        if self.mode == "norm":
            return 1.0
        return self.abstol if self.mode.startswith("abs") else self.reltol

    @property
    def watches_progress(self) -> bool:
        """Whether stalls, and growth of the objective, end a sample too."""
        return "deq" in self.mode

    @property
    def returns_best(self) -> bool:
        """Whether the best iterate is returned, or the last good one."""
        return not self.mode.endswith("deq_default")

    def measure(self, at: Iterate, pooling: Pooling, alive: Tensor) -> Measures:
        """Residual, relative residual and objective of an iterate."""
        residual, f_norm = at.residual, sample_norm(at.z + at.g)
        relative = _ratio(residual, f_norm)
        du, f_pooled = pooling.norm(residual, alive), pooling.norm(f_norm, alive)
        match self.mode:
            case "abs":
                objective = pooling.largest(sample_largest(at.g), alive)
            case "rel":
                ratios = sample_largest(_ratio(at.g.abs(), at.z.abs()))
                objective = pooling.largest(ratios, alive)
            case "norm":
                # One number, comparable between steps, that is at most 1 exactly when both tests
                # hold.
                objective = torch.maximum(
                    _over(du, self.abstol), _over(_ratio(du, f_pooled), self.reltol)
                )
            case "abs_norm" | "abs_deq_default" | "abs_deq_best":
                objective = du
            case "rel_norm" | "rel_deq_default" | "rel_deq_best":
                # Norms that are not pooled come back as they are.
                objective = relative if du is residual else _ratio(du, f_pooled)
        return Measures(residual, relative, du, objective)


def _ratio(du: Tensor, u: Tensor) -> Tensor:
    """du / u with 0 / 0 = 0: an exact equilibrium at the origin is an equilibrium."""
    return (du / u).masked_fill(du == 0, 0.0)


def _over(value: Tensor, tolerance: float) -> Tensor:
    return _ratio(value, torch.full_like(value, tolerance))


class Progress:
    """The course of the objectives so far: tells breaks and stalls, each (B,) bool."""

    def __init__(self, rule: Termination, first: Measures, length: int) -> None:
        self.rule = rule
        self.du_cap = first.du * (PROTECTIVE_FACTOR * length)
        self.objective_cap = first.objective * (PROTECTIVE_FACTOR * length)
        self.window: list[Tensor] = []

    def broke_away(self, measures: Measures) -> Tensor:
        """Grown past the protective factor."""
        grown = measures.du > self.du_cap
        if self.rule.watches_progress:
            grown = grown | (measures.objective > self.objective_cap)
        return grown

    def stalled(self, measures: Measures) -> Tensor | None:
        """Near the tolerance, and for a whole window of steps no longer moving towards it; None
        where nothing can have stalled yet."""
        self.window = [*self.window, measures.objective][-STALL_WINDOW:]
        if not self.rule.watches_progress or len(self.window) < STALL_WINDOW:
            return None
        window = torch.stack(self.window)
        flat = window.amax(dim=0) < STALL_RATIO * window.amin(dim=0)
        return flat & (measures.objective <= STALL_SLACK * self.rule.threshold)
