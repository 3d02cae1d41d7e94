"""Means of named metrics, exact over any number of batches and processes."""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, SupportsFloat, TypeAlias

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from fastdeq.solution import BackwardReport, Solution, Status

Value: TypeAlias = Tensor | SupportsFloat
"""A scalar on the device, a number, or an object that becomes one when it is read (stopwatch)."""

_PATIENCE = 256  # metrics that may stay unread: the device has long computed older ones


class MeanMetrics(Metric):
    """Weighted means of named metrics; a metric may be missing from an update.

    names: of all metrics that may occur. Sums are kept in float64, even if the module is cast to
        another dtype (Lightning 18620), and added up over the processes when `compute` is called.
        So means are exact for uneven last batches.

    An update does not wait for the device: tensors are added on their device, and stopwatches are
    read when the means are computed, or many updates later.
    """

    full_state_update = False
    totals: Tensor
    weights: Tensor

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.names = names
        self._places = {name: place for place, name in enumerate(names)}
        for state in ("totals", "weights"):
            zeros = torch.zeros(len(names), dtype=torch.float64)
            self.add_state(state, default=zeros, dist_reduce_fx="sum")
        self._indices: dict[tuple[str, ...], Tensor] = {}
        self._forget()

    def update(self, metrics: Mapping[str, Value], weight: float) -> None:
        """Add metrics, each a mean over `weight` samples (or over one batch: weight 1).

        Raises: KeyError for a metric without a name here.
        """
        places = [self._places[name] for name in metrics]
        tensors = {name: value for name, value in metrics.items() if isinstance(value, Tensor)}
        if tensors:
            values = torch.stack([value.to(self.totals.device) for value in tensors.values()])
            values = values.to(self.totals.dtype)
            self.totals.index_add_(0, self._index_of(tuple(tensors)), values, alpha=weight)
        for place, value in zip(places, metrics.values(), strict=True):
            self._counted[place] += weight
            if not isinstance(value, Tensor):
                self._waiting.append((place, weight, value))
        self._read(all_but=_PATIENCE)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Add the sums kept on the host to the states, then synchronize these."""
        self._read(all_but=0)
        for state, sums in ((self.totals, self._summed), (self.weights, self._counted)):
            state += torch.tensor(sums, dtype=state.dtype, device=state.device)
        self._forget()
        super().sync(*args, **kwargs)

    def reset(self) -> None:
        """Set all sums to zero."""
        super().reset()
        self._forget()

    def saved(self) -> dict[str, Tensor]:
        """The sums so far, of this process alone; `load` takes them back."""
        self._read(all_but=0)
        return {
            name: values + torch.tensor(sums, dtype=values.dtype, device=values.device)
            for name, values, sums in (
                ("totals", self.totals, self._summed),
                ("weights", self.weights, self._counted),
            )
        }

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Restore the sums that `saved` returned, for the same names."""
        self._forget()
        self.totals.copy_(saved["totals"])
        self.weights.copy_(saved["weights"])

    def compute(self) -> dict[str, Tensor]:
        """The means of the metrics that occurred; waits for the device."""
        means = self.totals / self.weights
        seen = self.weights.tolist()
        return {
            name: mean for name, mean, weight in zip(self.names, means, seen, strict=True) if weight
        }

    def _apply(
        self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ""
    ) -> nn.Module:
        """Move with the module to another device, and keep the dtype of the sums."""
        moved: nn.Module = super()._apply(lambda t: t.to(fn(t).device), exclude_state)
        return moved

    def _forget(self) -> None:
        self._summed, self._counted = [0.0] * len(self.names), [0.0] * len(self.names)
        self._waiting: deque[tuple[int, float, SupportsFloat]] = deque()

    def _read(self, all_but: int) -> None:
        """Add the oldest unread metrics to the sums."""
        while len(self._waiting) > all_but:
            place, weight, value = self._waiting.popleft()
            self._summed[place] += weight * float(value)

    def _index_of(self, names: tuple[str, ...]) -> Tensor:
        """The places of metrics as a tensor; cached, since creating it waits for the device."""
        index = self._indices.get(names)
        if index is None or index.device != self.totals.device:
            places = [self._places[name] for name in names]
            index = self._indices[names] = torch.tensor(places, device=self.totals.device)
        return index


def mean_metrics(batches: Sequence[tuple[Mapping[str, Value], float]]) -> dict[str, float]:
    """Weighted means of the metrics of some batches; waits for the device."""
    totals: dict[str, float] = {}
    weights: dict[str, float] = {}
    for metrics, weight in batches:
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0.0) + weight * float(value)
            weights[name] = weights.get(name, 0.0) + weight
    return {name: total / weights[name] for name, total in totals.items()}


def solver_metrics(solution: Solution) -> dict[str, Tensor]:
    """Means over the samples of a forward solve, or of a pass of fixed depth."""
    # A pretraining batch is not solved: it has a residual, but cannot be unconverged.
    unconverged = (solution.status != Status.CONVERGED) & (solution.status != Status.NOT_SOLVED)
    return {
        "nfe": _mean(solution.nfe),
        "residual": _mean(solution.relative_residual),
        "unconverged": _mean(unconverged),
    }


def backward_metrics(report: BackwardReport) -> dict[str, Tensor]:
    """Means over the samples of the backward solve's statistics."""
    stats = report.stats
    if stats is None:
        return {}
    metrics = {"nfe_backward": _mean(stats.nfe)}
    if report.solves:
        metrics["residual_backward"] = _mean(stats.relative_residual)
        metrics["unconverged_backward"] = _mean(stats.status != Status.CONVERGED)
    return metrics


def _mean(values: Tensor) -> Tensor:
    return values.mean(dtype=torch.float32)
