"""L0: products with the Jacobian of f and with its transpose, exact and matrix-free."""

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from fastdeq.notation import FlatMap


def transposed_product(
    output: Tensor, z: Tensor, v: Tensor, *, create_graph: bool = False
) -> Tensor:
    """Jᵀ v, (B, D), through the graph from z to output = f(z), which is kept for the next product.

    Differentiates with respect to z alone: parameters are not reached.
    """
    if not output.requires_grad:  # f does not depend on z
        return torch.zeros_like(v)
    with torch.enable_grad():
        (product,) = torch.autograd.grad(
            output, z, v, retain_graph=True, create_graph=create_graph, materialize_grads=True
        )
    return product


def forward_product(f: FlatMap, z: Tensor, v: Tensor) -> Tensor:
    """J v at z, (B, D), by forward-mode differentiation of f."""
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(z, v))).tangent
        return torch.zeros_like(z) if tangent is None else tangent.to(z.dtype)
