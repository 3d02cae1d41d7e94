"""The precision of the arithmetic around f: never below that of the states."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fastdeq.notation import FlatMap


@contextmanager
def full_precision(f: FlatMap, device: torch.device) -> Iterator[FlatMap]:
    """Disable autocast inside, except in the f that is yielded, which computes as outside.

    Without this, matrix products of float32 states, such as a solver's histories, would run in
    bfloat16.
    """
    kind = device.type
    if not torch.is_autocast_enabled(kind):
        yield f
        return
    dtype, caches = torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled()

    def as_outside(z: Tensor) -> Tensor:
        with torch.autocast(kind, dtype=dtype, cache_enabled=caches):
            return f(z)

    with torch.autocast(kind, enabled=False):
        yield as_outside


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor in float32 where its dtype is narrower, such as bfloat16; else unchanged.

    For losses and metrics: bfloat16 rounds a mean to three digits.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))
