"""The precision of the arithmetic around f: never below that of the states."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from fastdeq.flatten import map_scales, scales_of
from fastdeq.notation import FlatMap, State, StateMap
from fastdeq.rows import wrapped

Precision: TypeAlias = Literal["bf16"]
"""`bf16`: bfloat16 where autocast has it (convolutions, matrix products), float32 elsewhere."""


def check_precision(precision: Precision | None) -> None:
    """Raises: ValueError for another precision than those of `Precision`, and None."""
    if precision not in ("bf16", None):
        raise ValueError(f"precision is {precision!r}, but must be 'bf16' or None")


def in_bf16(f: StateMap, z: State) -> State:
    """f(z) under autocast to bfloat16, but in the dtype of z."""
    first = scales_of(z)[0]
    # No cache of cast weights: inside another autocast it outlives this evaluation, and may hold
    # weights in another dtype.
    with torch.autocast(first.device.type, torch.bfloat16, cache_enabled=False):
        output = f(z)
    return map_scales(partial(_from_bf16, dtype=first.dtype), output)


def _from_bf16(y: Tensor, dtype: torch.dtype) -> Tensor:
    return y.to(dtype) if isinstance(y, Tensor) and y.dtype == torch.bfloat16 else y


@contextmanager
def full_precision(f: FlatMap, device: torch.device) -> Iterator[FlatMap]:
    """Disable autocast inside, except in the f that is yielded, which computes as outside.

    Without this, matrix products of float32 states, such as a solver's histories, would run in
    bfloat16.
    """
    if not torch.is_autocast_enabled(device.type):
        yield f
        return
    as_outside = wrapped(f, partial(as_here, device=device))
    with torch.autocast(device.type, enabled=False):
        yield as_outside


def as_here(f: FlatMap, device: torch.device) -> FlatMap:
    """f, computing wherever it is called in the precision of the autocast around this call."""
    kind = device.type
    enabled, caches = torch.is_autocast_enabled(kind), torch.is_autocast_cache_enabled()
    dtype = torch.get_autocast_dtype(kind)

    def evaluated(z: Tensor) -> Tensor:
        with torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=caches):
            return f(z)

    return evaluated


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor in float32 where its dtype is narrower, such as bfloat16; else unchanged.

    For losses and metrics: bfloat16 rounds a mean to three digits.
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))
