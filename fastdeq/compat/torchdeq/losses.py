"""torchdeq's losses."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_WEIGHTS: dict[str, Callable[..., float]] = {
    "exp": lambda n, k, gamma=0.8: gamma ** (n - k - 1),
    "linear": lambda n, k, gamma=0.9, bias=0.0: 1 - (n - k - 1) / n * gamma + bias,
    "const": lambda n, k, c=1.0: c,
}


def fp_correction(
    crit: Callable[..., Tensor],
    args: Sequence[Any],
    weight_func: str = "exp",
    return_loss_values: bool = False,
    **options: float,
) -> Any:
    """Σ_k weight(n, k) · crit(…) over n states, k from 0; a shorter list of `args` is repeated.

    weight_func: "exp" γ^(n−k−1), "linear" 1 − γ (n − k − 1) / n + bias, or "const" c. options: its
    parameters. return_loss_values: return also the n values without weights.

    Raises: ValueError for another weight_func, TypeError for options that it does not have.
    """
    if weight_func not in _WEIGHTS:
        raise ValueError(f"weight_func is {weight_func!r}, but must be one of {list(_WEIGHTS)}")
    columns = [each if isinstance(each, list | tuple) else [each] for each in args]
    n = max(map(len, columns))
    losses = [crit(*(column[k % len(column)] for column in columns)) for k in range(n)]
    weights = [_WEIGHTS[weight_func](n, k, **options) for k in range(n)]
    total = torch.stack([w * loss for w, loss in zip(weights, losses, strict=True)]).sum()
    return (total, [float(loss) for loss in losses]) if return_loss_values else total


def jac_reg(f0: Tensor, z0: Tensor, vecs: int = 1, create_graph: bool = True) -> Tensor:
    """E‖εᵀJ‖² / numel of J = ∂f0/∂z0, estimated with `vecs` Gaussian vectors ε.

    `fastdeq.regularizers.jacobian_loss` estimates the same from f and z.
    """
    total = torch.zeros((), dtype=z0.dtype, device=z0.device)
    for _ in range(vecs):
        v = torch.randn_like(z0)
        (product,) = torch.autograd.grad(f0, z0, v, retain_graph=True, create_graph=create_graph)
        total = total + product.square().sum()
    return total / vecs / z0.numel()


def power_method(f0: Tensor, z0: Tensor, n_iters: int = 100) -> tuple[Tensor, Tensor]:
    """(vector, |Rayleigh quotient|), the latter (B,), of Jᵀ with J = ∂f0/∂z0 by the power method.

    `fastdeq.diagnosis.spectral_radius` also converges where the largest eigenvalues are a pair.
    """
    v = torch.randn_like(z0)
    value = v.new_zeros(len(v))
    for i in range(n_iters):
        (product,) = torch.autograd.grad(f0, z0, v, retain_graph=i < n_iters - 1)
        flat, before = product.flatten(1), v.flatten(1)
        value = (flat * before).sum(dim=1) / before.square().sum(dim=1)
        v = (flat / flat.norm(dim=1, keepdim=True)).view_as(z0)
    return v, value.abs()
