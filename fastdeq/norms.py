"""Norms of a batch, sample by sample or pooled over the whole batch vector."""

from typing import Protocol

import torch
from torch import Tensor


def sample_norm(v: Tensor) -> Tensor:
    """Euclidean norm of every sample: (B, D) → (B,)."""
    norm: Tensor = torch.linalg.vector_norm(v, dim=1)
    return norm


def sample_largest(v: Tensor) -> Tensor:
    """Largest absolute entry of every sample: (B, D) → (B,)."""
    return v.abs().amax(dim=1)


def finite(values: Tensor) -> Tensor:
    """Whether each entry is neither NaN nor infinite (`torch.isfinite` with half the kernels)."""
    return values.abs() < torch.inf


class Pooling(Protocol):
    """Maps per-sample norms, (B,) → (B,), before they are compared with a tolerance.

    `alive` (B,) leaves diverged samples out of a shared norm, and so is a norm that is not finite.
    """

    shared: bool
    """Whether all samples get the same norm."""

    def norm(self, norms: Tensor, alive: Tensor) -> Tensor:
        """Pool Euclidean norms."""

    def largest(self, largest: Tensor, alive: Tensor) -> Tensor:
        """Pool largest entries."""

    def length(self, z: Tensor) -> int:
        """How many entries of the (B, D) tensor z one pooled norm covers."""


class PerSample:
    """Every sample keeps its own norm: no sample depends on the others."""

    shared = False

    def norm(self, norms: Tensor, alive: Tensor) -> Tensor:
        return norms

    def largest(self, largest: Tensor, alive: Tensor) -> Tensor:
        return largest

    def length(self, z: Tensor) -> int:
        return z.shape[1]


class WholeBatch:
    """One norm for the batch vector, repeated B times, as published: samples stop together."""

    shared = True

    def norm(self, norms: Tensor, alive: Tensor) -> Tensor:
        whole: Tensor = torch.linalg.vector_norm(_of_the_living(norms, alive))
        return whole.expand(norms.shape[0])

    def largest(self, largest: Tensor, alive: Tensor) -> Tensor:
        return _of_the_living(largest, alive).amax().expand(largest.shape[0])

    def length(self, z: Tensor) -> int:
        return z.numel()


def _of_the_living(norms: Tensor, alive: Tensor) -> Tensor:
    return torch.where(alive & finite(norms), norms, 0.0)


def pooling(per_sample: bool) -> Pooling:
    """The pooling of a solver's `per_sample` field."""
    return PerSample() if per_sample else WholeBatch()
