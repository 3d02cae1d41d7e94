"""Several solutions as one: of the equilibria of a network, for its losses and metrics."""

from collections.abc import Sequence
from typing import Any

import torch

from fastdeq.flatten import scales_of
from fastdeq.solution import BackwardReport, Solution, SolveStats
from fastdeq.timer import Seconds


def joined(solutions: Sequence[Solution]) -> Solution:
    """The solution of several equilibria of one batch; a single one is returned as it is.

    value and z0: the scales of all, in order, in one tuple; defect: of all, (B, ΣD). residual: of
    all together. relative_residual: the largest. steps, nfe, elapsed, jacobian_loss: sums. status:
    the gravest of each sample. parts: the solutions. backward: joined in the same way, once all
    backward passes have run. trace and states are those of the parts.
    """
    if len(solutions) == 1:
        return solutions[0]
    losses = [each.jacobian_loss for each in solutions if each.jacobian_loss is not None]
    return Solution(
        value=tuple(scale for each in solutions for scale in scales_of(each.value)),
        z0=tuple(scale for each in solutions for scale in scales_of(each.z0)),
        defect=torch.cat([each.defect for each in solutions], dim=1),
        jacobian_loss=torch.stack(losses).sum() if losses else None,
        backward=_JoinedReport([each.backward for each in solutions]),
        parts=tuple(solutions),
        **_statistics(solutions),
    )


def _statistics(parts: Sequence[SolveStats]) -> dict[str, Any]:
    residuals, relative, steps, nfe, status = (
        torch.stack([getattr(each, name) for each in parts])
        for name in ("residual", "relative_residual", "steps", "nfe", "status")
    )
    return {
        "residual": residuals.square().sum(dim=0).sqrt(),
        "relative_residual": relative.amax(dim=0),
        "steps": steps.sum(dim=0),
        "nfe": nfe.sum(dim=0),
        "status": status.amax(dim=0),
        "elapsed": Seconds(tuple(each.elapsed for each in parts)),
    }


class _JoinedReport(BackwardReport):
    """The reports of several backward passes, read when they have run."""

    def __init__(self, parts: Sequence[BackwardReport]) -> None:
        self._parts = tuple(parts)
        self.solves = all(each.solves for each in parts)

    @property
    def stats(self) -> SolveStats | None:  # type: ignore[override]  # read-only here
        found = [each.stats for each in self._parts if each.stats is not None]
        return SolveStats(**_statistics(found)) if found else None
