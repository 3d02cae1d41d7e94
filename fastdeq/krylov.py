"""Batched, matrix-free GMRES: one small least-squares problem per sample, stopped one by one."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fastdeq.autocast import full_precision
from fastdeq.flatten import check_floating
from fastdeq.history import History, project
from fastdeq.norms import finite, sample_largest, sample_norm
from fastdeq.notation import FlatMap
from fastdeq.settings import setting, settings
from fastdeq.solution import SolveResult, Status
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
        fewer waits for the device and a few unused products (results are the same). Each cycle also
        waits twice.

    Departures from the reference:
    1. The reported residual is measured, b − A x, at the end of each cycle, not taken from the
       recurrence, so that it is right where A is not linear, or couples the samples.
    2. A sample whose basis breaks down, or becomes non-finite, ends alone with its current
       solution.
    """

    tol: float = setting(default=1e-4, above=0)
    max_steps: int = setting(default=30, at_least=1)
    restart: int | None = setting(default=None, at_least=1)
    per_sample: bool = setting(default=True)
    check_every: int = setting(default=1, at_least=1)

    def solve(self, matvec: FlatMap, b: Tensor) -> SolveResult:
        """Solve A x = b from x = 0. matvec: (B, D) → (B, D), linear. b: (B, D).

        A sample that cannot be solved keeps its best finite x, and its status reports it. Not
        differentiable itself: the adjoints differentiate equilibria, not this iteration.
        """
        watch = Stopwatch(b.device)
        with torch.no_grad(), full_precision(matvec, b.device) as product:
            result = _scaled(self, product, b) if self.per_sample else _shared(self, product, b)
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


def _shared(settings: GMRES, matvec: FlatMap, b: Tensor) -> SolveResult:
    """One problem for the whole batch vector; every sample gets its statistics."""
    shape = b.shape
    flat = _scaled(settings, lambda v: matvec(v.view(shape)).reshape(1, -1), b.reshape(1, -1))
    return SolveResult(
        value=flat.value.view(shape),
        **{
            name: getattr(flat, name).expand(len(b)).clone()
            for name in ("residual", "relative_residual", "steps", "nfe", "status")
        },
    )


def _scaled(settings: GMRES, matvec: FlatMap, b: Tensor) -> SolveResult:
    """Solve for b with entries of order 1, and scale back.

    Squares of tiny gradients underflow in float32, and a norm of 0 would count as solved.
    """
    largest = sample_largest(b)
    largest = largest.masked_fill(~finite(largest), 0.0).amax()
    # A power of two, so that no sample's rounding depends on its batch mates; one for all, so that
    # an operator that couples the samples stays the same.
    unit = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)
    result = _restarted(settings, matvec, b / unit)
    return replace(result, value=result.value * unit, residual=result.residual * unit)


def _restarted(settings: GMRES, matvec: FlatMap, b: Tensor) -> SolveResult:
    """Cycles of GMRES until every sample is solved, stuck, or out of steps."""
    scale = sample_norm(b)
    x, r, residual = torch.zeros_like(b), b, scale
    steps = torch.zeros(len(b), dtype=torch.int64, device=b.device)
    nfe, target = steps.clone(), settings.tol * scale
    broken = ~finite(scale)
    stuck = torch.zeros_like(broken)
    taken = 0
    while taken < settings.max_steps:
        active = (residual > target) & ~broken & ~stuck
        # Waits for the device once per cycle, in addition to the cycle's own waits.
        if not bool(active.any()):
            break
        size = min(settings.restart or settings.max_steps, settings.max_steps - taken)
        cycle = _Cycle(matvec, r, residual, target, active, size)
        taken += cycle.run(settings.check_every)
        steps, nfe = steps + cycle.used, nfe + cycle.used + active
        trial = x + cycle.correction()
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


class _Cycle:
    """One Arnoldi process A V_k = V_{k+1} H with its least-squares problem, for `active` samples.

    The basis V, k + 1 rows, has the dtype of the residual. H is kept as Q H = R, with R triangular
    and Q the product of all Givens rotations so far; these small matrices are float64. A column
    that a sample does not use (it was finished before) is a unit column with weight zero.
    """

    def __init__(
        self, matvec: FlatMap, r: Tensor, beta: Tensor, target: Tensor, active: Tensor, size: int
    ) -> None:
        self.matvec, self.target, self.active, self.size = matvec, target.double(), active, size
        self.basis = History(size + 1)
        inverse = beta.reciprocal().masked_fill(~active, 0.0)[:, None]  # active: not 0, not NaN
        torch.mul(r.masked_fill(~active[:, None], 0.0), inverse, out=self.basis.slot(r))
        self.beta = beta.masked_fill(~active, 0.0).double()
        eye = torch.eye(size + 1, dtype=torch.float64, device=r.device)
        self.rotation = eye.repeat(len(r), 1, 1)  # Q
        self.no_turn = eye[0, :2]  # cosine 1, sine 0
        self.hessenberg = torch.zeros_like(self.rotation)  # H, its columns as rows
        self.columns: list[Tensor] = []  # of R, (B, size + 1); undefined below the diagonal
        self.usable: list[Tensor] = []  # (B,) for each column
        self.used = torch.zeros(len(r), dtype=torch.int64, device=r.device)
        self.broken = torch.zeros_like(active)
        self.largest = torch.zeros_like(beta)  # ‖A v‖ over the basis so far, at most ‖A‖

    def run(self, check_every: int) -> int:
        """Extend the basis until no sample needs more; returns how many products were needed.

        With a larger `check_every`, products are made that are not needed: they change nothing.
        """
        for j in range(self.size):
            product = self.matvec(self.basis.rows[:, j])
            length = sample_norm(product)
            healthy = length < torch.inf  # False for NaN
            self.broken = self.broken | (self.active & ~healthy)
            self.active = self.active & healthy
            product = product.masked_fill(~self.active[:, None], 0.0)
            self.largest = torch.maximum(self.largest, length.masked_fill(~self.active, 0.0))
            rest = self._orthogonalize(j, product, length)
            self._append(j, rest)
            # Waits for the device; saves products with A.
            if (j + 1) % check_every == 0 and not bool(self.active.any()):
                break
        if check_every > 1:
            # What was made but not needed is neither used nor counted: one more wait.
            del self.columns[max(1, int(self.used.amax())) :]
        return len(self.columns)

    def _orthogonalize(self, j: int, product: Tensor, length: Tensor) -> Tensor:
        """Classical Gram–Schmidt, twice, in place: column j of H without its last entry, which is
        returned, (B,), and the next row of the basis."""
        basis, column = self.basis.rows, self.hessenberg[:, j]
        for _ in range(2):
            overlap = project(basis, product)
            product[:, None].baddbmm_(overlap[:, None], basis, alpha=-1.0)
            column[:, : j + 1] += overlap
        rest = sample_norm(product)
        # What is left is rounding: the space is invariant and holds the solution.
        nothing = ~(rest > 10 * torch.finfo(rest.dtype).eps * length)
        inverse = rest.reciprocal().masked_fill(nothing, 0.0)
        torch.mul(product, inverse[:, None], out=self.basis.slot(product))
        return rest.masked_fill(nothing, 0.0)

    def _append(self, j: int, rest: Tensor) -> None:
        """Rotate column j of H into the triangular factor, and test which samples are finished."""
        self.hessenberg[:, j, j + 1] = rest
        column = project(self.rotation, self.hessenberg[:, j])
        pivot = torch.hypot(column[:, j], column[:, j + 1])
        # A pivot that is zero to rounding: A is singular on this space. Its column would add a
        # huge, undefined multiple of the null vector; it cannot be used, and none comes after.
        usable = self.active & (pivot > 10 * torch.finfo(rest.dtype).eps * self.largest)
        unusable = ~usable[:, None]
        divisor = pivot.masked_fill(unusable[:, 0], 1.0)
        turn = torch.where(unusable, self.no_turn, column[:, j : j + 2] / divisor[:, None])
        self._rotate(j, turn)
        column.masked_fill_(unusable, 0.0)
        column[:, j] = divisor
        self.columns.append(column)
        self.usable.append(usable)
        self.used = self.used + self.active
        left = (self.beta * self.rotation[:, j + 1, 0]).abs()  # the residual, by the recurrence
        self.active = usable & (rest > 0) & (left > self.target)

    def _rotate(self, j: int, turn: Tensor) -> None:
        """Turn rows j and j + 1 of Q by (cosine, sine), (B, 2)."""
        across = torch.stack((-turn[:, 1], turn[:, 0]), dim=1)
        rows = self.rotation[:, j : j + 2]
        rows.copy_(torch.bmm(torch.stack((turn, across), dim=1), rows))

    def correction(self) -> Tensor:
        """The combination of the basis that minimizes each sample's residual, (B, D)."""
        k = len(self.columns)
        triangle = torch.stack([column[:, :k] for column in self.columns], dim=2)
        right = self.beta[:, None] * self.rotation[:, :k, 0]
        right = right.masked_fill(~torch.stack(self.usable[:k], dim=1), 0.0)
        y = torch.linalg.solve_triangular(triangle, right[:, :, None], upper=True)
        basis = self.basis.rows[:, :k]
        return torch.bmm(y.mT.to(basis.dtype), basis)[:, 0]
