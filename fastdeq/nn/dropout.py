"""Dropout for cells: one mask per call, the same in all evaluations of that call."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn

Masks: TypeAlias = dict[tuple["VariationalDropout", int], Tensor]
"""The masks of one call, by the module and the index of its use within an evaluation."""


class VariationalDropout(nn.Module):
    """Zero whole features with probability p and scale the rest by 1 / (1 − p), in training (Gal &
    Ghahramani 2016; in equilibrium models Bai et al. 2019).

    Inside an equilibrium layer the mask is drawn at the first evaluation of a call and used in all
    evaluations of that call, including those of the backward pass: the equilibrium is that of one
    function. Outside of one, each call draws a new mask.

    p: in [0, 1). Input (B, C, ...); a feature is an entry of (B, C), shared by all positions after
        it.
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"VariationalDropout: p is {p}, but must be at least 0 and below 1")
        self.p = p
        self._masks: Masks | None = None
        self._in_cell = False
        self._uses = 0  # in the current evaluation

    def forward(self, h: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return h
        if self._in_cell and self._masks is None and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "VariationalDropout in a cell is evaluated again by the backward pass, outside its "
                "call: do not checkpoint inside a cell, the implicit adjoints keep one evaluation"
            )
        place = (self, self._uses)
        self._uses += 1
        mask = None if self._masks is None else self._masks.get(place)
        if mask is None:
            mask = self._draw(h)
            if self._masks is not None:
                self._masks[place] = mask
        return h * mask

    def _draw(self, h: Tensor) -> Tensor:
        shape = (*h.shape[:2], *(1,) * (h.ndim - 2))
        keep = 1 - self.p
        return torch.empty(shape, dtype=h.dtype, device=h.device).bernoulli_(keep) / keep

    def extra_repr(self) -> str:
        return f"p={self.p}"


@contextmanager
def masks_of_call(modules: list[VariationalDropout], masks: Masks) -> Iterator[None]:
    """Within, the modules use the masks of `masks` and add what is missing there.

    A layer that is called in a cell of another one keeps the masks of the outer call: else that
    cell would be another function at every evaluation.
    """
    before = [module._masks for module in modules]
    for module, outer in zip(modules, before, strict=True):
        module._masks, module._in_cell, module._uses = masks if outer is None else outer, True, 0
    try:
        yield
    finally:
        for module, kept in zip(modules, before, strict=True):
            module._masks = kept
