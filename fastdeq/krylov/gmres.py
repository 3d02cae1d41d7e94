"""Batched, matrix-free GMRES: one small least-squares problem per sample, stopped one by one."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fastdeq.autocast import full_precision
from fastdeq.flatten import check_floating
from fastdeq.krylov.arnoldi import CompiledCycle, Cycle
from fastdeq.norms import finite, sample_largest, sample_norm
from fastdeq.notation import FlatMap
from fastdeq.rows import wrapped
from fastdeq.settings import setting, settings
from fastdeq.solution import SolveResult, Status, Trace
from fastdeq.timer import Stopwatch

_STAGNATION = 0.999  # a cycle that reduces the residual by less than 0.1 % ends the sample


@settings
class GMRES:
    """Settings of a linear solve A x = b (Saad & Schultz 1986).

    tol: done when ‖b − A x‖ ≤ tol · ‖b‖.
    max_steps: products with A at most, not counting those that measure residuals.
    restart: size of the Krylov basis, hence the memory; None keeps all of max_steps. A sample
        continues as long as a cycle gains 0.1 %, so that even restart=1 solves symmetric definite
        systems of condition κ up to 2,000 (‖r‖ falls by (κ − 1)/(κ + 1) per cycle or faster; Saad,
        Iterative Methods for Sparse Linear Systems, §5.3); a cycle that gains less is STALLED.
    per_sample: one Krylov space per sample. False builds one space for the whole batch vector,
        needed where A couples the samples (batch norm in a cell).
    check_every: number of products between two reads of whether all samples are done; more means
        fewer waits for the device and a few unused products (results are the same). With 1, the
        host also looks whether any sample needs a second orthogonalization; with more, it is always
        computed. Each cycle also waits twice.
    compact: once this share of the samples that A is applied to has ended, A is applied to the rest
        alone; None: always to all. Needs an f that can be restricted to some samples (see
        `fixed_point`). The same results to rounding, for one evaluation of f each time.
    compile: run `check_every` products, with all that belongs to them, as one graph of
        `torch.compile`; see `AbstractSolver`. In a backward solve each graph begins with an
        evaluation of f, from which its products with the Jacobian are made.

    Departures from the reference:
    1. The reported residual is measured, b − A x, at the end of each cycle, not taken from the
       recurrence, so that it is right where A couples the samples. With `per_sample=False` nothing
       can be coupled: the recurrence is then exact to rounding, and one product is saved, unless
       `tol` is within a factor 100 of rounding.
    2. A sample whose basis breaks down, or becomes non-finite, ends alone with its current
       solution.
    """

    tol: float = setting(default=1e-4, above=0)
    max_steps: int = setting(default=30, at_least=1)
    restart: int | None = setting(default=None, at_least=1)
    per_sample: bool = setting(default=True)
    check_every: int = setting(default=1, at_least=1)
    compact: float | None = setting(default=None, above=0, at_most=1)
    compile: bool = setting(default=False)

    def validate(self) -> None:
        """Refuse `compact` for one problem of the whole batch, and for compiled products."""
        if self.compact is not None and self.compile:
            raise ValueError(
                "GMRES.compact changes the shapes that `compile` has compiled A for: leave one of "
                "the two out"
            )
        if self.compact is not None and not self.per_sample:
            raise ValueError(
                "GMRES.compact applies A to samples apart from each other, but per_sample=False "
                "says that they are coupled: leave one of the two out"
            )

    def solve(
        self, matvec: FlatMap, b: Tensor, *, x0: Tensor | None = None, trace: bool = False
    ) -> SolveResult:
        """Solve A x = b from x = 0, or from a multiple of x0. matvec: (B, D) → (B, D), linear. b,
        x0: (B, D).

        x0: the start is the multiple with the smallest residual, per sample, which is at most ‖b‖:
            a poor x0 costs the one product that it takes, and no accuracy.
        trace: also return the residual norms after every product, by the recurrence.

        A sample that cannot be solved keeps its best finite x, and its status reports it. Not
        differentiable itself: the adjoints differentiate equilibria, not this iteration.
        """
        watch = Stopwatch(b.device)
        with torch.no_grad(), full_precision(matvec, b.device) as product:
            solved = _scaled if self.per_sample else _shared
            result = solved(self, product, b, x0, trace)
        return replace(result, elapsed=watch.stop())


def gmres(
    matvec: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    tol: float = 1e-6,
    max_steps: int = 50,
    restart: int | None = None,
    per_sample: bool = True,
) -> SolveResult:
    """Solve A x = b for every sample of a batch; see `GMRES` for the settings.

    matvec: v ↦ A v, from (B, ...) to the same shape, where it is linear. b: (B, ...).
    Returns a record whose `value` has the shape of b, with residual, steps and status per sample.
    Not differentiable itself: the adjoints differentiate equilibria, not this iteration.

    Raises: TypeError or ValueError for settings out of range, for a b that is not a non-empty
    batch, and for a complex or integer b or A v.
    """
    solver = GMRES(tol=tol, max_steps=max_steps, restart=restart, per_sample=per_sample)
    check_floating(b, "b")
    if b.ndim < 2 or b.numel() == 0:
        raise ValueError(f"b has shape {tuple(b.shape)}: gmres takes a non-empty (B, ...) tensor")

    def flat_matvec(v: Tensor) -> Tensor:
        product = matvec(v.view(b.shape))
        if product.shape != b.shape:
            raise ValueError(f"A v has shape {tuple(product.shape)}, b has {tuple(b.shape)}")
        check_floating(product, "A v")
        return product.reshape(len(b), -1)

    result = solver.solve(flat_matvec, b.reshape(len(b), -1))
    return replace(result, value=result.value.view(b.shape))


def _shared(
    settings: GMRES, matvec: FlatMap, b: Tensor, x0: Tensor | None, trace: bool
) -> SolveResult:
    """One problem for the whole batch vector; every sample gets its statistics."""
    shape = b.shape

    def of_the_whole(product: FlatMap) -> FlatMap:
        return lambda v: product(v.view(shape)).reshape(1, -1)

    start = None if x0 is None else x0.reshape(1, -1)
    flat = _scaled(settings, wrapped(matvec, of_the_whole), b.reshape(1, -1), start, trace)
    traced = (
        None if flat.trace is None else Trace(residuals=flat.trace.residuals.expand(-1, len(b)))
    )
    return SolveResult(
        value=flat.value.view(shape),
        trace=traced,
        **{
            name: getattr(flat, name).expand(len(b)).clone()
            for name in ("residual", "relative_residual", "steps", "nfe", "status")
        },
    )


def _scaled(
    settings: GMRES, matvec: FlatMap, b: Tensor, x0: Tensor | None, trace: bool
) -> SolveResult:
    """Solve for b with entries of order 1, and scale back.

    Squares of tiny gradients underflow in float32, and a norm of 0 would count as solved.
    """
    largest = sample_largest(b)
    largest = largest.masked_fill(~finite(largest), 0.0).amax()
    # A power of two, so that no sample's rounding depends on its batch mates; one for all, so that
    # an operator that couples the samples stays the same.
    unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)
    history: list[Tensor] | None = [] if trace else None
    result = _restarted(settings, matvec, b / unit, x0, history)
    traced = None if history is None else Trace(residuals=torch.stack(history) * unit)
    return replace(result, value=result.value * unit, residual=result.residual * unit, trace=traced)


def _restarted(
    settings: GMRES,
    matvec: FlatMap,
    b: Tensor,
    x0: Tensor | None,
    history: list[Tensor] | None,
) -> SolveResult:
    """Cycles of GMRES until every sample is solved, stuck, or out of steps."""
    scale = sample_norm(b)
    x, r = (torch.zeros_like(b), b) if x0 is None else closest_multiple(matvec, b, x0)
    residual = scale if x0 is None else sample_norm(r)
    steps = torch.zeros(len(b), dtype=torch.int64, device=b.device)
    nfe, target = torch.full_like(steps, x0 is not None), settings.tol * scale
    exact = not settings.per_sample and settings.tol >= 100 * torch.finfo(b.dtype).eps
    broken = ~finite(scale)
    stuck = torch.zeros_like(broken)
    taken = 0
    if history is not None:
        history.append(residual)
    while taken < settings.max_steps:
        active = (residual > target) & ~broken & ~stuck
        # Waits for the device once per cycle, in addition to the cycle's own waits.
        if not bool(active.any()):
            break
        size = min(settings.restart or settings.max_steps, settings.max_steps - taken)
        kind = CompiledCycle if settings.compile and history is None else Cycle
        cycle = kind(
            matvec, r, residual, target, active, size, settings.check_every, settings.compact
        )
        cycle.history = None if history is None else []
        taken += cycle.run()
        if history is not None and cycle.history is not None:
            history += [
                torch.where(active, left.to(residual.dtype), residual)
                for left in cycle.history[: cycle.count]
            ]
        steps, nfe = steps + cycle.used, nfe + cycle.used
        trial = x + cycle.correction()
        if exact and _is_last(cycle, taken >= settings.max_steps):
            x, residual = trial, cycle.left.to(residual.dtype)
            break
        nfe = nfe + active
        remainder = b - matvec(trial)
        new = sample_norm(remainder)
        better = active & (new < residual)  # False for NaN
        broken = broken | (active & cycle.broken)
        if taken < settings.max_steps:  # the last cycle may have been cut short
            stuck = stuck | (active & ~(new < _STAGNATION * residual))
        x = torch.where(better[:, None], trial, x)
        # Where A couples the samples, another's step may have changed the residual of a solved one.
        seen = better | (~active & torch.isfinite(new))
        r = torch.where(seen[:, None], remainder, r)
        residual = torch.where(seen, new, residual)
    status = torch.full_like(steps, int(Status.STEP_LIMIT))
    for here, code in (
        (stuck, Status.STALLED),
        (broken, Status.DIVERGED),
        ((residual <= target) & ~broken, Status.CONVERGED),
    ):
        status = status.masked_fill(here, int(code))
    relative = (residual / scale).masked_fill(~(scale > 0), 0.0)
    return SolveResult(
        value=x, residual=residual, relative_residual=relative, steps=steps, nfe=nfe, status=status
    )


def closest_multiple(
    matvec: FlatMap, b: Tensor, x0: Tensor, *, per_sample: bool = True
) -> tuple[Tensor, Tensor]:
    """x = α x0 with the α that minimizes ‖b − A x‖, per sample or for the whole batch, and b − A x,
    both (B, D); x = 0 where A x0 is zero or not finite. One product."""
    if not per_sample:
        x, left = closest_multiple(
            lambda v: matvec(v.view(b.shape)).reshape(1, -1), b.reshape(1, -1), x0.reshape(1, -1)
        )
        return x.view(b.shape), left.view(b.shape)
    length = sample_norm(x0)
    unusable = ~((length > 0) & finite(length))
    x = (x0 / length[:, None]).masked_fill(unusable[:, None], 0.0)
    product = matvec(x)
    squared = torch.linalg.vecdot(product, product)
    alpha = torch.linalg.vecdot(product, b) / squared
    out = ~((squared > 0) & finite(alpha))[:, None]
    alpha = alpha[:, None]
    return (alpha * x).masked_fill(out, 0.0), b - (alpha * product).masked_fill(out, 0.0)


def _is_last(cycle: Cycle, out_of_steps: bool) -> bool:
    """Whether no cycle follows one of the whole batch vector, which is one sample here."""
    ended = out_of_steps or bool((cycle.left <= cycle.target).all())
    return ended and not bool(cycle.broken.any())
