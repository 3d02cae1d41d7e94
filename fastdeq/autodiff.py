"""Exact, matrix-free vjps and jvps of f, and the helpers for autograd's graphs and kernels that
they need."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastdeq.notation import FlatMap


def vjp(output: Tensor, z: Tensor, v: Tensor, *, create_graph: bool = False) -> Tensor:
    """Jᵀ v, (B, D), through the graph from z to output = f(z), which is retained for the next call.

    Differentiates with respect to z alone: parameters are not reached.
    """
    if not output.requires_grad:  # f does not depend on z
        return torch.zeros_like(v)
    with torch.enable_grad():
        (product,) = torch.autograd.grad(
            output, z, v, retain_graph=True, create_graph=create_graph, materialize_grads=True
        )
    return product


def vjp_here(output: Tensor, z: Tensor, v: Tensor) -> Tensor:
    """Jᵀ v as by `vjp`, with a graph where gradients are enabled."""
    return vjp(output, z, v, create_graph=torch.is_grad_enabled())


def jvp(f: FlatMap, z: Tensor, v: Tensor) -> Tensor:
    """J v at z, (B, D), by forward-mode differentiation of f; call within `unfused_attention`.

    Raises: NotImplementedError for operations in f that have no forward mode.
    """
    try:
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(z, v))).tangent
    except NotImplementedError as error:
        reason = str(error).partition("\n")[0]
        raise NotImplementedError(
            f"an operation in f lacks the forward-mode derivatives of a jvp ({reason}): "
            "use another solver than NewtonKrylov, or another operation"
        ) from error
    return torch.zeros_like(z) if tangent is None else tangent.to(z.dtype)


def jvp_by_vjps(output: Tensor, z: Tensor) -> FlatMap:
    """u ↦ J u, (B, D), through the graph from z to output = f(z): Jᵀ y is linear in y, and J u is
    its vjp with u.

    With gradients enabled, J u has a graph. f needs a double backward, see `unfused_attention`.
    """

    @cache
    def transposed() -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            y = torch.zeros_like(output).requires_grad_()
            return vjp(output, z, y, create_graph=True), y

    return lambda u: vjp_here(*transposed(), u)


def jvp_by_transforms(output: Tensor, z: Tensor) -> FlatMap:
    """The same as `jvp_by_vjps`, within and around transforms of torch.func."""
    transposed = partial(vjp, output, z, create_graph=True)

    def product(u: Tensor) -> Tensor:
        zeros = torch.zeros(u.shape, dtype=u.dtype, device=u.device)
        push = torch.func.vjp(transposed, zeros)[1]
        found: Tensor = push(u)[0]
        return found

    return product


def edges_behind(tensor: Tensor) -> Iterator[tuple[Any, int]]:
    """The edges of the autograd graph behind a tensor: (node, index of its output).

    Lazy: a search that ends early visits only a few nodes.
    """
    waiting, seen = [tensor.grad_fn], set()
    while waiting:
        node = waiting.pop()
        for edge in () if node is None else node.next_functions:
            if edge[0] is not None and edge not in seen:
                seen.add(edge)
                waiting.append(edge[0])
                yield edge


def carries_tangent(v: Tensor) -> bool:
    """Whether v takes part in forward-mode differentiation (torch.func.jvp, forward_ad).

    Of a tensor that torch.vmap maps, it is not known: False.
    """
    functorch = torch._C._functorch
    if functorch.is_batchedtensor(v) or functorch.is_legacy_batchedtensor(v):
        return False
    return forward_ad.unpack_dual(v).tangent is not None


def primal(v: Tensor) -> Tensor:
    """v without its tangent, if it has one."""
    return forward_ad.unpack_dual(v).primal if carries_tangent(v) else v


def is_recorded(v: Tensor) -> bool:
    """Whether derivatives of what is done with v may be recorded, in reverse or in forward mode."""
    return torch.is_grad_enabled() or carries_tangent(v)


@contextmanager
def unfused_attention() -> Iterator[None]:
    """Within, attention is computed operation by operation, without fused kernels.

    PyTorch's fused kernels, which `nn.MultiheadAttention` and the transformer layers also use, have
    neither a double backward nor a forward mode (pytorch issue 116350).
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
