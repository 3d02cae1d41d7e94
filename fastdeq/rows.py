"""Maps of a batch that can be restricted to some of its samples."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastdeq.notation import FlatMap


@dataclass(frozen=True)
class BatchMap:
    """A map of flat states, (B, D) → (B, D), and its restrictions.

    restrict: rows, (n,) int64, ↦ the map of these samples alone, (n, D) → (n, D).
    """

    call: FlatMap
    restrict: Callable[[Tensor], FlatMap]

    def __call__(self, z: Tensor) -> Tensor:
        return self.call(z)


def wrapped(f: FlatMap, wrap: Callable[[FlatMap], FlatMap]) -> FlatMap:
    """wrap(f); where f can be restricted, its restrictions are wrapped, too."""
    if not isinstance(f, BatchMap):
        return wrap(f)
    restrict = f.restrict
    return BatchMap(wrap(f.call), lambda rows: wrapped(restrict(rows), wrap))


def select_rows(value: Any, rows: Tensor, batch: int) -> Any:
    """The given rows of every tensor in a nest of tuples, lists and mappings.

    batch: B, the length of the first axis of each. What is not a tensor stays as it is.

    Raises: ValueError for a tensor with another first axis.
    """
    if isinstance(value, Tensor):
        if value.ndim == 0 or len(value) != batch:
            raise ValueError(
                f"the input has a tensor of shape {tuple(value.shape)}, whose first axis is not "
                f"the batch of {batch}: set solver.compact=null, or repeat it for every sample"
            )
        return value[rows]  # keeps the memory format, as index_select does not
    if isinstance(value, dict):
        return {name: select_rows(each, rows, batch) for name, each in value.items()}
    if isinstance(value, tuple | list):
        kept = [select_rows(each, rows, batch) for each in value]
        return type(value)(kept) if type(value) in (tuple, list) else type(value)(*kept)
    return value
