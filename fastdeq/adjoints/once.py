"""Gradients that can be used in a graph, but not differentiated."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def differentiable_once(gradient: Tensor, parents: Iterable[Tensor], message: str) -> Tensor:
    """The gradient unchanged, for `create_graph=True` too; differentiating it raises RuntimeError.

    parents: tensors that together depend on everything that the gradient depends on. A second
        derivative with respect to any of it then raises, also where the incoming cotangent is a
        constant and the gradient itself would have no graph.
    message: of the error; it names what to use instead.
    """
    if not torch.is_grad_enabled():
        return gradient
    once: Tensor = _Refusal.apply(message, gradient, *parents)  # type: ignore[no-untyped-call]
    return once


class _Refusal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, message: str, gradient: Tensor, *parents: Tensor) -> Tensor:
        ctx.message = message
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise RuntimeError(ctx.message)
