"""L1: the histories of quasi-Newton methods and Anderson, (B, k, D) with k at most `memory`, and
their algebra."""

import torch
from torch import Tensor


def push(history: Tensor | None, row: Tensor, memory: int) -> Tensor:
    """Append `row` (B, D) as the newest; the oldest goes once `memory` rows are kept.

    Out of place, so that the unrolled adjoint may differentiate through it.
    """
    if history is None:
        return row[:, None]
    return torch.cat((history[:, max(0, history.shape[1] + 1 - memory) :], row[:, None]), dim=1)


def project(history: Tensor, v: Tensor) -> Tensor:
    """Inner products of v (B, D) with every row: (B, k)."""
    return torch.bmm(history, v[:, :, None])[:, :, 0]


def combine(history: Tensor, coefficients: Tensor) -> Tensor:
    """The sum of the rows with (B, k) coefficients: (B, D)."""
    return torch.bmm(coefficients[:, None, :], history)[:, 0]


def safe_inverse(v: Tensor, dg: Tensor) -> Tensor:
    """1 / (v · dg) a sample, (B,), and 0 where the product vanishes to rounding."""
    product = (v * dg).sum(dim=1)
    floor = torch.finfo(v.dtype).eps * v.norm(dim=1) * dg.norm(dim=1)
    usable = product.abs() > floor
    return torch.where(usable, 1.0 / torch.where(usable, product, 1.0), 0.0)
