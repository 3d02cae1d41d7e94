"""The derivatives of a fixed point z = h(z), of any order: linear systems with I − ∂h/∂z."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from fastdeq.adjoints.once import differentiable_once
from fastdeq.autodiff import carries_tangent, jvp_by_transforms, jvp_by_vjps, primal, vjp_here
from fastdeq.krylov import GMRES
from fastdeq.krylov.gmres import closest_multiple
from fastdeq.norms import sample_norm
from fastdeq.notation import FlatMap
from fastdeq.rows import BatchMap, Linearized, wrapped
from fastdeq.solution import BackwardReport, SolveResult, Status, TraceKind
from fastdeq.solvers import AbstractSolver, solve
from fastdeq.transforms import check_not_batched, plain, transformed, transforms_of

_ROUNDING = 32  # units of rounding of P v by which two computations of it may differ


@dataclass(frozen=True, kw_only=True)
class LinearSolver(ABC):
    """What solves (I − P) v = w at once, or approximates v: see `linear.py` and `shine.py`.

    per_sample, compact, compile: as in `GMRES`.
    reverse_only: whether it is for P = Jᵀ alone.
    """

    per_sample: bool = True
    compact: float | None = None
    compile: bool = False
    reverse_only: ClassVar[bool] = False

    @abstractmethod
    def solve(self, product: FlatMap, w: Tensor) -> SolveResult | Tensor:
        """v from v ↦ P v and w: with its record, or, for an approximation, alone."""


Solver: TypeAlias = GMRES | AbstractSolver | LinearSolver


@dataclass(frozen=True)
class Kind:
    """What a resolvent is, beside its tensors.

    solver: GMRES, a fixed-point solver for v ← P v + w from v = w, or a `LinearSolver`.
    order: how many derivatives of v are known: 0 where z_in lacks its own.
    inner: whether it belongs to a start (see `_Start`) and not to the fixed point itself.
    refusal: the error of a further derivative.
    report: filled in by the last solve.
    restrict: rows ↦ the product for these samples alone; None: not known.
    linearize: makes the product again, for compiled code; None: not known.
    forward: whether P is J, not Jᵀ.
    axes: of the batch, (N_1 … N_k B, D), those that torch.vmap maps, the last first: its length,
        and whether all along it have the same P.
    clip: the most ‖v‖ / ‖w‖, of cotangents; what is longer is scaled down.
    start: v0, (B, D), whose best multiple a solve begins with; None: 0 for GMRES, w for others.
    """

    solver: Solver
    order: int
    inner: bool
    refusal: str
    report: BackwardReport = field(default_factory=BackwardReport)
    restrict: Callable[[Tensor], FlatMap] | None = None
    linearize: Callable[[], FlatMap] | None = None
    forward: bool = False
    axes: tuple[tuple[int, bool], ...] = ()
    clip: float | None = None
    start: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Resolvent:
    """w ↦ v with (I − P) v = w, both (B, D), where P is Jᵀ or J of output = f(z_in).

    lost: the samples, (B,), of which P is taken to be 0.

    v is computed without a graph. It is the fixed point of v ↦ P v + w, and so are its derivatives.

    A sample whose solve becomes non-finite, or ends without any progress, gets v = w with a warning
    (RuntimeWarning): never zeros, never a silent NaN.
    """

    output: Tensor
    z_in: Tensor
    lost: Tensor | None
    kind: Kind

    def __call__(self, w: Tensor) -> Tensor:
        v, lost = self._solved(w)
        if not (
            torch.is_grad_enabled()
            or transformed()
            or carries_tangent(w)
            or carries_tangent(self.output)
        ):
            return v
        check_not_batched(w)
        if not self.kind.order:
            return differentiable_once(v, (w, self.output), self.kind.refusal)
        known = self if lost is None else replace(self, lost=lost)

        def step(v: Tensor, order: int) -> tuple[Tensor, Resolvent]:
            return known.product(v) + w, known.transposed(order, self.kind.order)

        return with_derivatives(step, v, step(v, 0), v, self.kind.order)

    def transposed(self, order: int, most: int) -> "Resolvent":
        """That of Pᵀ, whose result has `order` derivatives, for a fixed point with `most`. It is
        not restricted to samples.
        """
        kind = replace(
            self.kind,
            forward=not self.kind.forward,
            order=order,
            inner=order < most - 1,
            solver=replace(self.kind.solver, compact=None, compile=False),
            report=BackwardReport(),
            restrict=None,
            linearize=None,
            start=None,
        )
        return replace(self, kind=kind)

    @property
    def of_tangents(self) -> "Resolvent":
        """That of Pᵀ for a rule of forward mode, in which tangents of P itself do not count."""
        changed = self.transposed(self.kind.order, self.kind.order)
        return replace(changed, output=primal(self.output))

    @cached_property
    def product(self) -> FlatMap:
        """v ↦ P v; with a graph, where gradients are enabled, to all that P depends on."""
        output, z_in, kind = self.output, self.z_in, self.kind
        once: FlatMap = partial(vjp_here, output, z_in)
        if kind.forward:
            once = (jvp_by_transforms if transformed() else jvp_by_vjps)(output, z_in)
        if self.lost is not None:
            gone = self.lost[:, None]
            if kind.forward:
                return lambda v: self._of_all(once, v.masked_fill(gone, 0.0))
            return lambda v: self._of_all(once, v).masked_fill(gone, 0.0)
        if kind.restrict is not None:
            return BatchMap(once, kind.restrict)
        if kind.linearize is not None:
            return Linearized(once, kind.linearize)
        return partial(self._of_all, once) if kind.axes else once

    def _of_all(self, product: FlatMap, v: Tensor) -> Tensor:
        """product(v) along the mapped axes, too."""
        axes = self.kind.axes[::-1]
        if not axes:
            return product(v)
        each = v.view(*(size for size, _ in axes), -1, v.shape[1])
        same = [place for place, (_, same) in enumerate(axes) if same]
        first = list(range(len(same)))
        each = each.movedim(same, first)
        whole = each.reshape(-1, *each.shape[len(same) :])
        found = torch.vmap(product)(whole) if same else product(each)
        return found.reshape(each.shape).movedim(first, same).reshape(v.shape)

    def constant(self, w: Tensor) -> Tensor:
        """v without derivatives."""
        return self._solved(w)[0]

    def _solved(self, w: Tensor) -> tuple[Tensor, Tensor | None]:
        """v without a graph, and the samples, (B,), that v = w stands in for; None: no sample."""
        with torch.no_grad():
            around = transforms_of(w)
            if around is None:
                return self._plainly(self.kind.solver, self.product, w)
            run = partial(self._plainly, around.settings(self.kind.solver))
            v, lost = around.outside(run, self.product, w)
            return around.within(v), None if lost is None else around.within(lost)

    def _plainly(self, solver: Solver, product: FlatMap, w: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.kind.forward and isinstance(solver, LinearSolver) and solver.reverse_only:
            raise RuntimeError("this adjoint has no forward mode: use the Implicit adjoint")
        product, w = wrapped(product, _constant), primal(w).detach()
        report = self.kind.report
        found = _found(solver, product, w, report.trace, self.kind.start)
        if isinstance(found, SolveResult):
            report.stats = found.stats
            v, lost = found.value, _lost(found, w)
        else:
            v, lost = found, ~torch.isfinite(found).all(dim=1)
        if self.kind.clip is not None and not self.kind.forward:
            v = _clipped(v, self.kind.clip * sample_norm(w))
        report.value = v
        if not bool(lost.any()):
            return v, None
        _warn(lost, w)
        return torch.where(lost[:, None], w, v), lost


def with_derivatives(
    step: Callable[[Tensor, int], tuple[Tensor, Resolvent]],
    z: Tensor,
    first: tuple[Tensor, Resolvent],
    value: Tensor,
    order: int,
) -> Tensor:
    """value, (B, D), with `order` derivatives of the fixed point of h, which z approximates.

    step: z_in, k ↦ h(z_in) with its graph, and the resolvent of cotangents there, for P =
        (∂h/∂z)ᵀ, whose result has k derivatives. It is called once per order, at a z_in that has
        the derivatives of the orders below.
    first: step(z, 0).
    """
    (output, resolvent), value = first, value.detach()
    known = _attached(value, output, z, resolvent, None)
    for each in range(1, order):
        arriving = _Arriving()
        z_in: Tensor = _Start.apply(known, z, arriving)  # type: ignore[no-untyped-call]
        output, resolvent = step(z_in, each)
        known = _attached(value, output, z_in, resolvent, arriving)
    return known


@dataclass
class _Arriving:
    """‖P v‖ of every sample, (B,), of the current backward pass: see `_Start`."""

    size: Tensor | None = None


def _attached(
    value: Tensor, output: Tensor, z_in: Tensor, at: Resolvent, arriving: _Arriving | None
) -> Tensor:
    known: Tensor = _FixedPoint.apply(  # type: ignore[no-untyped-call]
        value, output, z_in, at.output, at.z_in, at.lost, at.kind, arriving
    )
    return known


class _FixedPoint(torch.autograd.Function):
    """value, with the derivatives of output = h(z_in) at constant z_in, times the resolvent.

    The tensors of the resolvent are inputs too: each transform of torch.func has its own.
    arriving: None for a z_in that is a constant. Else z_in is differentiable, for the derivatives
        of this derivative. In this one its part is subtracted: the cotangent −P v goes to z_in.
    """

    @staticmethod
    def forward(value: Tensor, *others: Any) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *_, f_out, f_in, lost, kind, ctx.arriving = inputs
        ctx.resolvent = Resolvent(f_out, f_in, lost, kind)
        ctx.set_materialize_grads(False)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        *tensors, f_out, f_in, lost, kind, arriving = inputs
        size = info.batch_size
        flat = [_folded(*pair, size) for pair in zip(tensors, in_dims, strict=False)]
        same = in_dims[3] is None
        if not same:
            f_out = f_out.movedim(in_dims[3], 0)
            # Not moved: derivatives are taken with respect to this very tensor.
            assert in_dims[4] == 0, "leaf() and _Start map the first axis"
        if lost is not None:
            lost = _folded(lost, in_dims[5], size)
        kind = replace(
            kind,
            axes=(*kind.axes, (size, same)),
            solver=replace(kind.solver, compact=None, compile=False),
            restrict=None,
            linearize=None,
            start=None,
        )
        known = _FixedPoint.apply(*flat, f_out, f_in, lost, kind, arriving)  # type: ignore[no-untyped-call]
        return known.view(size, -1, known.shape[1]), 0

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        (w,) = cotangents
        if w is None:
            return (None,) * 8
        v = ctx.resolvent(w)
        if ctx.arriving is None:
            return None, v, *(None,) * 6
        through_z = ctx.resolvent.product(v)
        ctx.arriving.size = sample_norm(primal(through_z).detach())
        return None, v, -through_z, *(None,) * 5

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        _, dh, dz, *_ = tangents
        kind, resolvent = ctx.resolvent.kind, ctx.resolvent.of_tangents
        if dh is None:
            zeros = torch.zeros_like(resolvent.output)
            return zeros.view(-1, zeros.shape[-1])
        dh = dh if dz is None else dh - resolvent.product(dz)
        # Of a start, what is beyond its order cancels.
        known: Tensor = resolvent.constant(dh) if kind.inner and not kind.order else resolvent(dh)
        return known


class _Start(torch.autograd.Function):
    """z with the derivatives of `known`, the same fixed point, for the next order.

    In that order's own derivative P v arrives here with −P v. What is left is rounding, and is
    dropped, so that the orders below do not solve for it.
    """

    @staticmethod
    def forward(known: Tensor, z: Tensor, arriving: _Arriving) -> Tensor:
        return z.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.arriving = inputs[2]
        ctx.set_materialize_grads(False)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Tensor, int]:
        *tensors, arriving = inputs
        flat = [
            _folded(v, axis, info.batch_size) for v, axis in zip(tensors, in_dims, strict=False)
        ]
        start: Tensor = _Start.apply(*flat, arriving)  # type: ignore[no-untyped-call]
        return start.view(info.batch_size, -1, start.shape[1]), 0

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, None, None]:
        (c,) = cotangents
        size, ctx.arriving.size = ctx.arriving.size, None
        if c is None or size is None:
            return c, None, None
        rounding = _ROUNDING * torch.finfo(c.dtype).eps * size
        left = sample_norm(primal(c).detach()) > rounding
        if not bool(plain(left).any()):
            return None, None, None
        return torch.where(left[:, None], c, 0.0), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return tangents[0]


def _folded(v: Tensor, axis: int | None, size: int) -> Tensor:
    """(N B, ...) from a tensor (B, ...), of which torch.vmap maps N = size along an axis."""
    v = v.expand(size, *v.shape) if axis is None else v.movedim(axis, 0)
    return v.reshape(-1, *v.shape[2:])


def _constant(product: FlatMap) -> FlatMap:
    def constant(v: Tensor) -> Tensor:
        output = product(v)
        return output if torch.compiler.is_compiling() else primal(output).detach()

    return constant


def _found(
    solver: Solver, product: FlatMap, w: Tensor, trace: TraceKind | None, start: Tensor | None
) -> SolveResult | Tensor:
    if isinstance(solver, GMRES):
        system = wrapped(product, _subtracted)
        return solver.solve(system, w, x0=start, trace=trace is not None)
    if not isinstance(solver, AbstractSolver):
        return solver.solve(product, w)
    if start is None:
        return solve(solver, _added(product, w), w, trace=trace)
    v, _ = closest_multiple(_subtracted(product), w, start, per_sample=solver.per_sample)
    found = solve(solver, _added(product, w), v, trace=trace)
    return replace(found, nfe=found.nfe + 1)


def _clipped(v: Tensor, most: Tensor) -> Tensor:
    """v, (B, D), with no sample longer than `most`, (B,)."""
    length = sample_norm(v)
    return torch.where((length > most)[:, None], v * (most / length)[:, None], v)


def _subtracted(product: FlatMap) -> FlatMap:
    return lambda v: v - product(v)


def _added(product: FlatMap, w: Tensor) -> FlatMap:
    def added(v: Tensor) -> Tensor:
        return product(v) + w

    if isinstance(product, Linearized):
        linearize = product.linearize
        return Linearized(added, lambda: _added(linearize(), w))
    if not isinstance(product, BatchMap):
        return added
    restrict = product.restrict
    return BatchMap(added, lambda rows: _added(restrict(rows), w[rows]))


def _lost(result: SolveResult, w: Tensor) -> Tensor:
    unchanged = (result.value == 0).all(dim=1) & (w != 0).any(dim=1)
    return (result.status == Status.DIVERGED) | (unchanged & ~result.converged)


def _warn(lost: Tensor, w: Tensor) -> None:
    if bool(torch.isfinite(w).all()):
        why = (
            "it became non-finite or made no progress, and their gradients are Jacobian-free: "
            "raise max_steps of the adjoint's solver, or use another solver"
        )
    else:
        why = "the incoming gradient is not finite already: look at the loss"
    warnings.warn(
        f"backward solve failed for {int(lost.sum())} of {len(lost)} samples: {why}",
        RuntimeWarning,
        stacklevel=2,
    )
