"""The diagnosis of a training step: how its solves ended, whether it is finite, what helps."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from fastdeq.solution import Solution, SolveStats, Status, Trace

Trend: TypeAlias = Literal["falling", "level", "growing"]
"""How the residuals of the unconverged samples changed at the end of the solve."""

_KINDS = len(Status)
_LOSS, _NORM, _FINITE = -3, -2, -1  # columns of the measures, after the counts
_UNCONVERGED = (Status.STEP_LIMIT, Status.STALLED, Status.DIVERGED)
_FALLING = (
    0.9  # the last quarter of the steps reduced the smallest residual to less than this share
)
_GROWING = 2.0  # the last residual is at least this many times the smallest one


def measure(batch: tuple[Tensor, Tensor, float], solution: Solution, loss: Tensor) -> Tensor:
    """The numbers of a batch that `Diagnosis.of` reads, (13,) on the inputs' device, without the
    norm of the gradients (`with_norm`). Does not wait for the device.

    batch: inputs, targets, weight; a batch of weight 0 counts nothing. solution: after its backward
        pass.
    """
    inputs, _, weight = batch
    device = inputs.device
    zero = torch.zeros((), device=device)
    forward, backward = (solution, solution.backward.stats) if weight else (None, None)
    # A NaN or an infinity is also the smallest or the largest entry.
    finite = torch.isfinite(torch.stack(inputs.aminmax())).all()
    scalars = [loss.to(device) if weight else zero, zero, finite]
    return torch.cat(
        [
            _counts(forward, device),
            _counts(backward, device),
            torch.stack([scalar.to(torch.float32) for scalar in scalars]),
        ]
    )


def joined(batches: Sequence[Tensor]) -> Tensor:
    """The measures (13,) of all batches of one step: counts and losses are summed."""
    if len(batches) == 1:
        return batches[0]
    rows = torch.stack(list(batches))
    total = rows.sum(dim=0)
    total[_FINITE] = rows[:, _FINITE].amin()
    return total


def with_norm(measures: Tensor, gradients: Iterable[Tensor]) -> Tensor:
    """The same measures (..., 13) with the norm of these gradients."""
    measures = measures.clone()
    measures[..., _NORM] = nn.utils.get_total_norm(list(gradients)).to(measures)
    return measures


def _counts(stats: SolveStats | None, device: torch.device) -> Tensor:
    """How many samples ended with each status, (5,)."""
    if stats is None:
        return torch.zeros(_KINDS, device=device)
    kinds = torch.arange(_KINDS, device=device)  # bincount would wait for the device
    return (stats.status[:, None] == kinds).sum(dim=0, dtype=torch.float32)


class Reading:
    """Numbers that are being copied to the host. Reading them waits for the work that computes
    them, not for later work of the device.

    values: (rows, columns).
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._ready: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(values.device))

    def rows(self) -> list[list[float]]:
        """The numbers."""
        if self._ready is not None:
            self._ready.synchronize()
        rows: list[list[float]] = self._values.tolist()
        return rows


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """How a training step went, over the samples of all processes.

    forward, backward: number of samples that ended with each `Status`, in its order.
    loss: mean over processes, weighted by their samples.
    gradient_norm: Euclidean norm over all parameters; non-finite if it is so on any process.
    finite_inputs: whether all inputs are finite. trend: of the residuals, if the solve was traced.
    """

    forward: tuple[int, ...]
    backward: tuple[int, ...]
    loss: float
    gradient_norm: float
    finite_inputs: bool = True
    trend: Trend | None = None

    @classmethod
    def of(cls, rows: Sequence[Sequence[float]], trend: Trend | None = None) -> "Diagnosis":
        """From the measures of each process, whose losses are weighted already."""
        counts = [sum(round(row[i]) for row in rows) for i in range(2 * _KINDS)]
        losses, norms, finite = ([row[i] for row in rows] for i in (_LOSS, _NORM, _FINITE))
        return cls(
            forward=tuple(counts[:_KINDS]),
            backward=tuple(counts[_KINDS:]),
            loss=sum(losses) / len(rows),
            gradient_norm=next((norm for norm in norms if not math.isfinite(norm)), norms[0]),
            finite_inputs=all(finite),
            trend=trend,
        )

    @property
    def finite(self) -> bool:
        """Whether the loss and the norm of the gradient are finite."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)

    def failed(self, most: float | None) -> bool:
        """Whether the step is not finite, or the share of unconverged samples in the forward or in
        the backward solve is above `most` (None: no limit).
        """
        shares = (_share(self.forward), _share(self.backward))
        return not self.finite or (most is not None and max(shares) > most)

    @property
    def symptom(self) -> str:
        """A sentence that says what is wrong."""
        if not self.finite_inputs:
            return "the inputs of the batch are not finite"
        if not math.isfinite(self.loss):
            return f"the loss is {self.loss}"
        if not self.finite:
            return f"the loss is {self.loss:.4g}, and the norm of its gradient {self.gradient_norm}"
        forward = _share(self.forward) >= _share(self.backward)
        counts = self.forward if forward else self.backward
        name = "forward" if forward else "backward"
        return (
            f"{_unconverged(counts)} of {sum(counts)} samples did not converge in the {name} solve "
            f"({status_counts(counts)})"
        )

    @property
    def advice(self) -> str:
        """A sentence that says what helps, with keys of the configuration."""
        if not self.finite_inputs:
            return "look at the data"
        if not self.finite:
            return _STEPS if _worst(self.forward) != Status.DIVERGED else f"{_STEPS}; {_CONTRACT}"
        if _share(self.backward) > _share(self.forward):
            return _BACKWARD[_worst(self.backward)]
        worst = _worst(self.forward)
        if worst == Status.STEP_LIMIT and self.trend in ("growing", "level"):
            return f"{_CONTRACT} (more steps would not help: the residuals are {self.trend})"
        return _FORWARD[worst]


_STEPS = "a smaller optimizer.lr, or trainer.gradient_clip_val=1"
_CONTRACT = "loss.jacobian=1 keeps f contractive, callbacks.pretraining.steps=N unrolls it at first"
_LOOSEN = "a larger solver.tol, or another solver"
_FORWARD = {
    Status.STEP_LIMIT: "a larger solver.max_steps or solver.tol",
    Status.STALLED: _LOOSEN,
    Status.DIVERGED: _CONTRACT,
}
_BACKWARD = {
    Status.STEP_LIMIT: "a larger adjoint.solver.max_steps or adjoint.solver.tol",
    Status.STALLED: "a larger adjoint.solver.tol, or loss.jacobian=1",
    Status.DIVERGED: "loss.jacobian=1 keeps f contractive; or another adjoint.solver",
}


def trend_of(trace: Trace, status: Tensor) -> Trend | None:
    """The median trend of the residuals (K + 1, B) of the samples that did not converge; None if
    all converged, or after fewer than two steps.
    """
    left = torch.isin(status, torch.tensor(_UNCONVERGED, device=status.device))
    residuals = trace.residuals[:, left].double()
    if not left.any() or len(residuals) < 3:
        return None
    smallest = residuals.cummin(dim=0).values
    earlier = smallest[-1 - max(1, len(residuals) // 4)]
    if (residuals[-1] / smallest[-1]).median() >= _GROWING:
        return "growing"
    return "falling" if (smallest[-1] / earlier).median() < _FALLING else "level"


def status_counts(counts: Sequence[int]) -> str:
    """The number of samples per status: '3 converged, 2 step_limit'."""
    return ", ".join(f"{n} {Status(i).name.lower()}" for i, n in enumerate(counts) if n)


def _unconverged(counts: Sequence[int]) -> int:
    return sum(counts[status] for status in _UNCONVERGED)


def _share(counts: Sequence[int]) -> float:
    """The share of unconverged samples; 0 if nothing was solved (pretraining)."""
    return _unconverged(counts) / (sum(counts) or 1)


def _worst(counts: Sequence[int]) -> Status:
    """The most frequent status of the unconverged samples."""
    return max(_UNCONVERGED, key=lambda status: counts[status])
