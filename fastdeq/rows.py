"""Maps of a batch that can be restricted to some of its samples, or linearized in compiled code."""

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


@dataclass(frozen=True)
class Linearized:
    """A linear map of flat states, (B, D) → (B, D), such as a product with the Jacobian of f.

    linearize: makes the same map from f, for compiled code, which cannot run through the graph that
    autograd has recorded.
    """

    call: FlatMap
    linearize: Callable[[], FlatMap]

    def __call__(self, v: Tensor) -> Tensor:
        return self.call(v)


def traceable(f: FlatMap) -> FlatMap:
    """f in a form for compiled code; called within it."""
    return f.linearize() if isinstance(f, Linearized) else f


def wrapped(f: FlatMap, wrap: Callable[[FlatMap], FlatMap]) -> FlatMap:
    """wrap(f); where f can be restricted or linearized, the results of that are wrapped, too."""
    if isinstance(f, Linearized):
        linearize = f.linearize
        return Linearized(wrap(f.call), lambda: wrap(linearize()))
    if not isinstance(f, BatchMap):
        return wrap(f)
    restrict = f.restrict
    return BatchMap(wrap(f.call), lambda rows: wrapped(restrict(rows), wrap))


class Compaction:
    """When a map is next restricted to the samples that have not ended.

    share: of ended samples, of those that the map is applied to, from which it is; None: never.
    batch: how many it is applied to at first.
    """

    def __init__(self, f: FlatMap, share: float | None, batch: int) -> None:
        self._restrict = f.restrict if isinstance(f, BatchMap) and share is not None else None
        self._most, self._applied = 1 - (share or 0), batch

    def due(self, left: int) -> Callable[[Tensor], FlatMap] | None:
        """The restriction to make now that `left` samples have not ended; None: none is due."""
        if self._restrict is None or left > self._most * self._applied:
            return None
        self._applied = left
        return self._restrict


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
