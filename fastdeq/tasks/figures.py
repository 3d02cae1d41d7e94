"""L6: means of named figures, exact over any number of batches and processes."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import Metric

from fastdeq.solution import Solution, SolveStats, Status


class FigureMeans(Metric):
    """Weighted means of figures that are known by name; a figure may be missing from an update.

    names: of all figures that may come. Sums are kept in float64 and added up over the processes
    when `compute` is called, which makes the mean of an uneven last batch, or part of one, exact.
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

    def update(self, figures: Mapping[str, Tensor | float], weight: float) -> None:
        """Add figures, each a mean over `weight` samples (or over one batch: weight 1).

        Raises: KeyError for a figure without a name here.
        """
        columns = [self._places[name] for name in figures]
        values = [torch.as_tensor(value, device=self.totals.device) for value in figures.values()]
        self.totals[columns] += weight * torch.stack([value.double() for value in values])
        self.weights[columns] += weight

    def saved(self) -> dict[str, Tensor]:
        """The sums so far, of this process alone; `load` takes them back."""
        return {"totals": self.totals.detach().clone(), "weights": self.weights.detach().clone()}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Put back what `saved` gave, of the same names."""
        self.totals.copy_(saved["totals"])
        self.weights.copy_(saved["weights"])

    def compute(self) -> dict[str, Tensor]:
        """The means of the figures that came; waits for the device."""
        means = self.totals / self.weights
        seen = self.weights.tolist()
        return {
            name: mean for name, mean, weight in zip(self.names, means, seen, strict=True) if weight
        }


def solver_figures(solution: Solution) -> dict[str, Tensor]:
    """Means over the samples of a forward solve, or of a pass of fixed depth."""
    figures = {"nfe": solution.nfe.float().mean()}
    # A pretraining batch was not solved: it has a residual, but nothing that could converge.
    unsolved = solution.status == Status.NOT_SOLVED
    figures["residual"] = solution.relative_residual.float().mean()
    figures["unconverged"] = (~solution.converged & ~unsolved).float().mean()
    return figures


def backward_figures(stats: SolveStats) -> dict[str, Tensor]:
    """Means over the samples of the adjoint's solve."""
    return {
        "nfe_backward": stats.nfe.float().mean(),
        "residual_backward": stats.relative_residual.float().mean(),
        "unconverged_backward": (~stats.converged).float().mean(),
    }
