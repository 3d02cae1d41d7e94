"""The terms that are added to the task's loss, and the spectral radius, a measure of their effect.

L = task + λ_skip Σ_scales mean|z₀ − z*| + λ_jac E‖εᵀJ‖² / D + λ_res ‖z* − f(z*, x)‖
  + λ_cor Σ_i w_i task(z_i)
(Pal et al. 2022, arXiv 2201.12240, §3; Bai et al. 2021, arXiv 2106.14342, for the Jacobian term;
Bai et al. 2022, arXiv 2204.08442, for the correction.)
"""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from fastdeq.autocast import at_least_float32
from fastdeq.autodiff import unfused_attention, vjp
from fastdeq.flatten import Layout, scales_of
from fastdeq.norms import sample_norm
from fastdeq.notation import State, StateMap
from fastdeq.solution import Solution

CorrectionWeights: TypeAlias = Literal["constant", "linear", "exponential"]


def skip_loss(solution: Solution) -> Tensor:
    """Σ_scales mean|z₀ − z*|, a scalar; gradients flow into both, z₀ and z*."""
    pairs = zip(scales_of(solution.z0), scales_of(solution.value), strict=True)
    return torch.stack([at_least_float32(z0 - z).abs().mean() for z0, z in pairs]).sum()


def residual_loss(solution: Solution) -> Tensor:
    """‖z_sol − f(z_sol, x)‖, mean over the batch, a scalar.

    The state is treated as a constant: the derivative through the equilibrium would cancel to zero,
    since the residual vanishes there for all parameters. (The unrolled adjoint and a fixed depth
    differentiate it through their steps.) Needs no further evaluation.
    """
    return sample_norm(at_least_float32(solution.defect)).mean()


def correction_loss(
    loss: Callable[[Any], Tensor],
    solution: Solution,
    *,
    weights: CorrectionWeights = "exponential",
    decay: float = 0.8,
) -> Tensor:
    """Σ_i w_i loss(z_i), over the states on the way z_1 … z_n: the fixed-point correction (Bai et
    al. 2022, arXiv 2204.08442), a scalar.

    loss: the task's loss of a state, such as z ↦ cross_entropy(head(z), labels). That of the
        equilibrium itself, of weight 1, is the task's and is not included.
    weights: w_i = 1 ("constant"), i / (n + 1) ("linear") or decay^(n + 1 − i) ("exponential").

    Raises: ValueError for a solution without states, for other weights, and for a decay that is not
    positive.
    """
    n = len(solution.states)
    if not n:
        raise ValueError("the solution has no states on the way: give the layer states=3")
    if weights not in get_args(CorrectionWeights) or not decay > 0:
        names = ", ".join(get_args(CorrectionWeights))
        raise ValueError(
            f"weights is {weights!r} and decay {decay}, but must be one of {names}, and above 0"
        )
    parts = []
    for i, state in enumerate(solution.states, 1):
        weight = {"constant": 1.0, "linear": i / (n + 1), "exponential": decay ** (n + 1 - i)}
        parts.append(weight[weights] * loss(state))
    return torch.stack(parts).sum()


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
    check_can_differentiate("jacobian_loss")
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
    check_can_differentiate("spectral_radius")
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


def check_can_differentiate(name: str) -> None:
    """Raises: RuntimeError in inference mode, which cannot differentiate."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError(f"{name} differentiates f: leave inference mode, use torch.no_grad()")


def _differentiable(z: Tensor) -> Tensor:
    return z if z.requires_grad else z.clone().requires_grad_()  # detaching would drop its tangent
