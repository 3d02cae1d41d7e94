"""The transforms of torch.func around a solve, which itself runs outside of them.

A solver reads norms on the host and writes into buffers, which tensors of `torch.vmap` do not
allow. So it runs on plain tensors, with the dimensions of `torch.vmap` as a part of the batch, and
only its evaluations of f are transformed. This needs functions of torch that are not public; it is
the only module that uses them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor
from torch._C import _functorch

from fastdeq.notation import FlatMap
from fastdeq.solution import SolveResult

_KINDS = _functorch.TransformType
_T = TypeVar("_T")


class _Solver(Protocol):
    """Settings of a solve: a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def per_sample(self) -> bool: ...

    @property
    def compact(self) -> float | None: ...

    @property
    def compile(self) -> bool: ...


_S = TypeVar("_S", bound=_Solver)


def transformed() -> bool:
    """Whether this code runs within a function that torch.func transforms (grad, jvp, vmap)."""
    active: bool = torch._C._are_functorch_transforms_active()
    return active


class Transforms:
    """The transforms around the current code.

    order: how many of them differentiate. forward: how many of these in forward mode.
    mapped: how many calls `torch.vmap` makes one of.
    """

    def __init__(self) -> None:
        self._stack = _functorch.get_interpreter_stack() or []  # the outermost first
        self.order = sum(layer.key() in (_KINDS.Grad, _KINDS.Jvp) for layer in self._stack)
        self.forward = sum(layer.key() == _KINDS.Jvp for layer in self._stack)
        maps = [
            _functorch.CVmapInterpreterPtr(each)
            for each in self._stack
            if each.key() == _KINDS.Vmap
        ]
        self._maps = [(each.level(), each.batchSize()) for each in maps]

    @property
    def mapped(self) -> bool:
        """Whether torch.vmap is among them."""
        return bool(self._maps)

    def settings(self, solver: _S) -> _S:
        """The settings of a solve outside of the transforms. Raises: as `check`."""
        self.check(solver.per_sample)
        # Rows of f within are not rows of the batch here.
        return replace(solver, compact=None, compile=False)

    def check(self, per_sample: bool) -> None:
        """Raises: ValueError for norms that a batch shares, where several batches are mapped."""
        if self.mapped and not per_sample:
            raise ValueError(
                "torch.vmap solves all that it maps as one batch, whose norms per_sample=False "
                "would share: set per_sample=True, or loop over the calls"
            )

    def outside(self, run: Callable[[FlatMap, Tensor], _T], f: FlatMap, z: Tensor) -> _T:
        """run(f, z) outside of the transforms, for plain (N B, D) tensors; f is called within."""
        with _left() as layers:

            def evaluated(at: Tensor) -> Tensor:
                given = self.within(at)
                with _entered(layers):
                    output = f(given)
                return self.plain(output)

            return run(evaluated, self.plain(z))

    def plain(self, v: Tensor) -> Tensor:
        """(N B, ...) from a tensor (B, ...) of the transforms; N calls are mapped."""
        axes: dict[int, int] = {}  # of the mapped dimensions, by level, the outermost last
        while _functorch.is_functorch_wrapped_tensor(v):
            if _functorch.is_batchedtensor(v):
                axes[_functorch.maybe_get_level(v)] = _functorch.maybe_get_bdim(v)
            v = _functorch.get_unwrapped(v)
        with _left():
            left = list(range(v.ndim))
            places = {level: left.pop(axis) for level, axis in reversed(axes.items())}
            missing = [level for level, _ in self._maps if level not in places]
            v = v.permute(*(places[level] for level in sorted(places)), *left)
            for place, (level, size) in enumerate(self._maps):
                if level in missing:
                    v = v.unsqueeze(place).expand(*v.shape[:place], size, *v.shape[place:])
            return v.reshape(-1, *v.shape[len(self._maps) + 1 :])

    def within(self, v: Tensor) -> Tensor:
        """The inverse of `plain`."""
        with _left():
            v = v.reshape(*(size for _, size in self._maps), -1, *v.shape[1:])
            for level, _ in self._maps:
                v = _functorch._add_batch_dim(v, 0, level)
            return v

    def leaf(self, z: Tensor) -> Tensor:
        """As the function of that name."""
        z = self.plain(z)
        with _left():
            z = z.clone().view(*(size for _, size in self._maps), -1, *z.shape[1:])
            z.requires_grad_()
        allowed = _functorch.get_inplace_requires_grad_allowed()
        _functorch.set_inplace_requires_grad_allowed(True)
        try:
            for layer in self._stack:
                if layer.key() == _KINDS.Vmap:
                    z = _functorch._add_batch_dim(z, 0, layer.level())
                else:
                    z = _functorch._wrap_for_grad(z, layer.level()).requires_grad_()
        finally:
            _functorch.set_inplace_requires_grad_allowed(allowed)
        return z

    def record(self, result: SolveResult) -> SolveResult:
        """A record of (N B, ...) tensors, with those of `within`."""
        trace, own = result.trace, vars(result)
        if trace is not None:
            moved = self._along(trace.residuals)
            kept = None if trace.states is None else self._along(trace.states)
            trace = replace(trace, residuals=moved, states=kept)
        mapped: dict[str, Any] = {
            k: self.within(v) for k, v in own.items() if isinstance(v, Tensor)
        }
        states = tuple(self.within(state) for state in result.states)
        return replace(result, trace=trace, states=states, **mapped)

    def _along(self, history: Tensor) -> Tensor:
        """`within` of (K, N B, ...)."""
        return self.within(history.movedim(1, 0)).movedim(0, 1)


class _BatchedGrads(Transforms):
    """The map of a backward pass with `is_grads_batched=True`, which is not one of torch.func."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self._level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        self._size = 1  # has no effect on a tensor that is mapped
        self._size = len(self.plain(w)) // len(w)

    @property
    def mapped(self) -> bool:
        return True

    def outside(self, run: Callable[[FlatMap, Tensor], _T], f: FlatMap, z: Tensor) -> _T:
        return run(lambda at: self.plain(f(self.within(at))), self.plain(z))

    def plain(self, v: Tensor) -> Tensor:
        v = torch._remove_batch_dim(v, self._level, self._size, 0)
        return v.reshape(-1, *v.shape[2:])

    def within(self, v: Tensor) -> Tensor:
        mapped: Tensor = torch._add_batch_dim(v.view(self._size, -1, *v.shape[1:]), 0, self._level)
        return mapped


def transforms_of(w: Tensor) -> Transforms | None:
    """The transforms around the current code, for the cotangent w; None: there are none."""
    if _functorch.is_legacy_batchedtensor(w):
        return _BatchedGrads(w)
    return Transforms() if transformed() else None


def check_not_batched(w: Tensor) -> None:
    """Raises: RuntimeError for a w of `is_grads_batched`, whose gradient has no graph here."""
    if _functorch.is_legacy_batchedtensor(w):
        raise RuntimeError(
            "an equilibrium's gradient with is_grads_batched=True has no derivatives: leave "
            "create_graph=True out, or use torch.func.jacrev"
        )


def mapped_only() -> bool:
    """Whether torch.vmap is the only kind of transform around."""
    return transformed() and not Transforms().order


def plain(v: Tensor) -> Tensor:
    """v for the host to read: (N B, ...) outside of transforms, where N calls are mapped."""
    return Transforms().plain(v) if transformed() else v


def leaf(z: Tensor) -> Tensor:
    """A copy of z that requires gradients, in every transform for itself.

    Each torch.vmap maps its first axis.
    """
    return Transforms().leaf(z) if transformed() else z.clone().requires_grad_()


@contextmanager
def _left() -> Iterator[list[Any]]:
    """Outside of all transforms; yields them, the innermost first."""
    layers: list[Any] = []
    try:
        while _functorch.peek_interpreter_stack() is not None:
            layers.append(_functorch.pop_dynamic_layer_stack())
        yield list(layers)
    finally:
        while layers:
            _functorch.push_dynamic_layer_stack(layers.pop())


@contextmanager
def _entered(layers: list[Any]) -> Iterator[None]:
    entered = 0
    try:
        for layer in reversed(layers):
            _functorch.push_dynamic_layer_stack(layer)
            entered += 1
        yield
    finally:
        for _ in range(entered):
            _functorch.pop_dynamic_layer_stack()
