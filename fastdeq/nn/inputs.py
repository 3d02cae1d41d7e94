"""The tensors of an input, whatever its structure."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def tensors_in(x: Any) -> Iterator[Tensor]:
    """The tensors in x, in order: x itself, or those in nested mappings, lists and tuples."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, Mapping | list | tuple):
        for part in x.values() if isinstance(x, Mapping) else x:
            yield from tensors_in(part)
