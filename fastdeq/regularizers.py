"""The terms that are added to the task's loss, and the spectral radius, a measure of their effect.

L = task + λ_skip Σ_scales mean|z₀ − z*| + λ_jac E‖εᵀJ‖² / D + λ_res ‖z* − f(z*, x)‖
(Pal et al. 2022, arXiv 2201.12240, §3; Bai et al. 2021, arXiv 2106.14342, for the Jacobian term.)
"""

import torch
from torch import Tensor

from fastdeq.autocast import at_least_float32
from fastdeq.autodiff import unfused_attention, vjp
from fastdeq.flatten import Layout
from fastdeq.norms import sample_norm
from fastdeq.notation import State, StateMap
from fastdeq.solution import Solution


def skip_loss(solution: Solution) -> Tensor:
    """Σ_scales mean|z₀ − z*|, a scalar; gradients flow into both, z₀ and z*."""
    pairs = zip(_scales(solution.z0), _scales(solution.value), strict=True)
    return torch.stack([at_least_float32(z0 - z).abs().mean() for z0, z in pairs]).sum()


def residual_loss(solution: Solution) -> Tensor:
    """‖z_sol − f(z_sol, x)‖, mean over the batch, a scalar.

    The state is treated as a constant: the derivative through the equilibrium would cancel to zero,
    since the residual vanishes there for all parameters. (The unrolled adjoint and a fixed depth
    differentiate it through their steps.) Needs no further evaluation.
    """
    return sample_norm(at_least_float32(solution.defect)).mean()


def jacobian_loss(f: StateMap, z: State, *, samples: int = 1) -> Tensor:
    """E‖εᵀJ‖² / D with ε ~ N(0, I): Hutchinson's estimate of ‖J‖²_F / D, mean over the batch, a
    scalar.

    f: the cell with its input bound, dense or convolutional. z: where J is taken; gradients flow
    into it where it requires them. samples: how many ε are drawn for each sample of the batch.
    One evaluation of f and `samples` vjps; differentiable (a double backward,
    for which attention is computed without its fused kernels).

    Raises: ValueError for samples below 1; RuntimeError in inference mode, which cannot
    differentiate.
    """
    _check_can_differentiate("jacobian_loss")
    if samples < 1:
        raise ValueError(f"samples is {samples}, but must be at least 1")
    layout, keeps_graph = Layout.of(z, "z"), torch.is_grad_enabled()
    with torch.enable_grad():
        at = _differentiable(layout.flatten(z))
        with unfused_attention():
            output = layout.flatten_output(f(layout.unflatten(at)), at)
        products = [
            vjp(output, at, torch.randn_like(output), create_graph=keeps_graph)
            for _ in range(samples)
        ]
    return at_least_float32(torch.stack(products)).square().sum() / (samples * at.numel())


def spectral_radius(f: StateMap, z: State, *, iterations: int = 60) -> Tensor:
    """|λ|max of J at z for every sample, (B,), by the power method on Jᵀ.

    The estimate is the mean growth over the second half of the iterations, which also converges
    where the largest eigenvalues are a complex pair. Below 1 the equilibrium attracts Picard
    iteration. The result has no derivatives.

    Raises: ValueError for iterations below 1; RuntimeError in inference mode, which cannot
    differentiate.
    """
    _check_can_differentiate("spectral_radius")
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}, but must be at least 1")
    layout = Layout.of(z, "z")
    with torch.enable_grad():
        at = layout.flatten(z).detach().requires_grad_()
        output = layout.flatten_output(f(layout.unflatten(at)), at)
    v = torch.randn_like(at)
    log_growth = []
    for _ in range(iterations):
        v = v / sample_norm(v).clamp(min=torch.finfo(v.dtype).tiny)[:, None]
        v = vjp(output, at, v)
        log_growth.append(sample_norm(v).log())
    late = torch.stack(log_growth[iterations // 2 :])
    return late.mean(dim=0).exp().detach()


def _check_can_differentiate(name: str) -> None:
    if torch.is_inference_mode_enabled():
        raise RuntimeError(f"{name} differentiates f: leave inference mode, use torch.no_grad()")


def _differentiable(z: Tensor) -> Tensor:
    return z if z.requires_grad else z.clone().requires_grad_()  # detaching would drop its tangent


def _scales(state: State) -> tuple[Tensor, ...]:
    return (state,) if isinstance(state, Tensor) else state
