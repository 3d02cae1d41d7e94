"""Operations of torch, counted, and the memory of their results, watched.

Counts hold on every machine, which times do not.
"""

import time
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "lift_fresh", "_unique2")
"""Operations whose result the host needs, and `lift_fresh`, which brings Python's data and on an
accelerator is mostly followed by a blocking copy."""


class Operations(TorchDispatchMode):
    """Counts the operations within its context, without views.

    kernels, waits: numbers of operations. allocations, allocated: number and bytes of new tensors.
    written: entries written by each of the operations, in their order.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels = self.waits = self.allocations = self.allocated = 0
        self.written: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in WAITS or (name == "index" and _has_mask(args[1])):
            self.waits += 1
        if isinstance(result, Tensor) and not func.is_view and name not in ("detach", "lift_fresh"):
            self.kernels += 1
            self.written.append(result.numel())
            if not func._schema.is_mutable:
                self.allocations += 1
                self.allocated += result.nbytes
        return result


def _has_mask(indices: list[Tensor | None]) -> bool:
    return any(index is not None and index.dtype == torch.bool for index in indices)


class OutOfTime(Exception):
    """The operations within a context have taken longer than they may."""


class Watch(TorchDispatchMode):
    """Watches the operations within its context.

    peak: the most bytes that tensors made inside have had at once; scratch memory inside of an
    operation is not seen.

    Raises: OutOfTime from the first operation that begins more than `limit` seconds after the
    construction.
    """

    def __init__(self, limit: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._end = time.perf_counter() + limit
        self._known: set[int] = set()
        self._live = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if time.perf_counter() > self._end:
            raise OutOfTime
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not func._schema.is_mutable:
            for each in tree_iter(result):
                if isinstance(each, Tensor):
                    self._add(each.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self._live += size
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size
