"""Gradients that can be used in a graph, but not differentiated."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdeq.autodiff import carries_tangent


def differentiable_once(gradient: Tensor, parents: Sequence[Tensor], message: str) -> Tensor:
    """The gradient unchanged, for `create_graph=True` too; differentiating it, in reverse or in
    forward mode, raises RuntimeError.

    parents: tensors that together depend on everything that the gradient depends on. A second
        derivative with respect to any of it then raises, also where the incoming cotangent is a
        constant and the gradient itself would have no graph.
    message: of the error; it names what to use instead.
    """
    if not torch.is_grad_enabled() and not any(carries_tangent(t) for t in (gradient, *parents)):
        return gradient
    once: Tensor = _Refusal.apply(message, gradient, *parents)  # type: ignore[no-untyped-call]
    return once


class _Refusal(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(message: str, gradient: Tensor, *parents: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.message = inputs[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise RuntimeError(ctx.message)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(ctx.message)
