"""One call of an equilibrium layer: the cell with its input bound and its random state fixed."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from fastdeq.autocast import Precision, in_bf16
from fastdeq.flatten import scales_of
from fastdeq.nn.dropout import Masks, VariationalDropout, masks_of_call
from fastdeq.nn.weight_norm import computed_parametrizations, parametrizations_restored
from fastdeq.notation import State
from fastdeq.rows import select_rows


class CellCall:
    """z ↦ cell(z, x), the same function at every evaluation of one call.

    Parametrized weights are those that were computed when it was made.
    Dropout masks are drawn once and belong to this call: later evaluations (of the backward pass)
    use them too, whatever calls came in between. Running statistics of batch and instance norms
    are frozen, and updated once by `move_statistics`.
    """

    def __init__(self, cell: nn.Module, x: Any, precision: Precision | None = None) -> None:
        self.cell, self.x, self.precision = cell, x, precision
        self._masks: Masks = {}
        self._weights = computed_parametrizations(cell)
        self._batch = 0  # of the last evaluation
        self._dropouts = [m for m in cell.modules() if isinstance(m, VariationalDropout)]
        self._tracking = [
            m
            for m in cell.modules()
            if isinstance(m, _NormBase) and m.training and m.track_running_stats
        ]

    def __call__(self, z: State) -> State:
        self._batch = scales_of(z)[0].shape[0]
        with ExitStack() as contexts:
            if self._weights:
                contexts.enter_context(parametrizations_restored(self._weights))
            if self._dropouts:
                contexts.enter_context(masks_of_call(self._dropouts, self._masks))
            if self._tracking:
                contexts.enter_context(_statistics_frozen(self._tracking))
            return self._evaluated(z)

    def select(self, rows: Tensor) -> "CellCall":
        """This call for some samples of the batch alone, rows (n,) int64.

        Raises: ValueError for a batch norm in training, which couples the samples, and for an input
        that is not one row per sample.
        """
        if self._tracking:
            raise ValueError(
                f"the cell has a {type(self._tracking[0]).__name__} in training, which couples the "
                "samples of a batch: set solver.compact=null and per_sample=false"
            )
        part = copy.copy(self)
        part.x = select_rows(self.x, rows, self._batch)
        part._masks = {place: mask[rows] for place, mask in self._masks.items()}
        return part

    def move_statistics(self, z: State) -> None:
        """Update the running statistics of batch norms in training, once, at the equilibrium z.

        Costs an evaluation, only where there are such statistics.
        """
        if self._tracking:
            with torch.no_grad(), masks_of_call(self._dropouts, self._masks):
                self._evaluated(z)

    def _evaluated(self, z: State) -> State:
        if self.precision is not None:
            return in_bf16(lambda at: self.cell(at, self.x), z)
        output: State = self.cell(z, self.x)
        return output


@contextmanager
def _statistics_frozen(modules: list[_NormBase]) -> Iterator[None]:
    # A batch norm in training that does not track still normalizes by the batch; an instance norm
    # writes to its statistics even then, but with momentum 0 they keep their values.
    fields = [
        "momentum" if isinstance(m, _InstanceNorm) else "track_running_stats" for m in modules
    ]
    before = [getattr(module, field) for module, field in zip(modules, fields, strict=True)]
    for module, field in zip(modules, fields, strict=True):
        setattr(module, field, 0.0 if field == "momentum" else False)
    try:
        yield
    finally:
        for module, field, kept in zip(modules, fields, before, strict=True):
            setattr(module, field, kept)


def check_cell(cell: nn.Module) -> None:
    """Refuse a cell that would be another function at every evaluation.

    Raises: TypeError for what is not a module; ValueError for ordinary dropout inside.
    """
    if not isinstance(cell, nn.Module):
        raise TypeError(
            f"the cell is a {type(cell).__name__}: give an nn.Module called as cell(z, x), or use "
            "fixed_point for a plain function"
        )
    for name, module in cell.named_modules():
        drops = isinstance(module, _DropoutNd) and module.p > 0
        drops = drops or (isinstance(module, nn.MultiheadAttention) and module.dropout > 0)
        drops = drops or (isinstance(module, nn.RNNBase) and module.dropout > 0)
        if drops:
            raise ValueError(
                f"the cell contains {type(module).__name__} ('{name}'), which draws a new mask at "
                "every evaluation, so that no equilibrium exists: "
                "use fastdeq.nn.VariationalDropout"
            )
