"""The Arnoldi process of GMRES, for a batch of problems: eager, and in compiled chunks."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastdeq.compilation import run_compiled
from fastdeq.history import History, add_combination, project
from fastdeq.norms import sample_norm
from fastdeq.notation import FlatMap
from fastdeq.rows import Compaction, traceable

_LITTLE = 0.2  # of a vector: what is left is orthogonalized again (0.1 to 0.7 in the literature)


class Cycle:
    """One Arnoldi process A V_k = V_{k+1} H with its least-squares problem, for `active` samples.

    The basis V, k + 1 rows, has the dtype of the residual; the small matrices are float64. Of H,
    (k + 1) × k, the vector n with nᵀ H = 0 and n_0 = 1 is kept: the smallest residual is β / ‖n‖. A
    column that a sample does not use (it was finished before) is a unit column below all others.
    """

    def __init__(
        self,
        matvec: FlatMap,
        r: Tensor,
        beta: Tensor,
        target: Tensor,
        active: Tensor,
        size: int,
        check_every: int,
        compact: float | None,
    ) -> None:
        self.matvec, self.target, self.active, self.size = matvec, target.double(), active, size
        self.check_every = check_every
        self.compaction = Compaction(matvec, compact, len(r))
        self.rows: Tensor | None = None  # (n,), of the samples that A is applied to; None: all
        # With a look at every product, the host also decides what may be left out.
        self.looks = check_every == 1
        self.basis = History(size + 1)
        inverse = beta.reciprocal().masked_fill(~active, 0.0)[:, None]  # active: not 0, not NaN
        torch.mul(r.masked_fill(~active[:, None], 0.0), inverse, out=self.basis.slot(r))
        self.beta = beta.masked_fill(~active, 0.0).double()
        self.left = self.beta  # the norm of the residual, by the recurrence
        self.history: list[Tensor] | None = None  # of `left`, after every product
        self.hessenberg = self.beta.new_zeros(len(r), size + 1, size)
        self.null = self.beta.new_zeros(len(r), size + 1)
        self.null[:, 0].fill_(1.0)
        self.null_norm = torch.ones_like(self.beta)
        self.count = 0  # columns
        self.used = torch.zeros(len(r), dtype=torch.int64, device=r.device)
        self.broken = torch.zeros_like(active)
        self.largest = torch.zeros_like(beta)  # a bound of ‖A v‖ over the basis so far

    @property
    def vectors(self) -> Tensor:
        """The basis, (B, k, D)."""
        return self.basis.rows

    def run(self) -> int:
        """Extend the basis until no sample needs more; returns how many products were needed.

        With a larger `check_every`, products are made that are not needed: they change nothing.
        """
        for j in range(self.size):
            v = self.basis.rows[:, j]
            # Of A v, v itself lies in the basis: without it, what remains is often much smaller, as
            # for A = I − J, and then so is the rounding of its orthogonalization.
            change = self._applied(v) - v
            length = sample_norm(change)
            self.largest = torch.maximum(self.largest, 1 + length)  # ‖v‖ = 1
            column, rest, plain = self._orthogonalize(change, length)
            column[:, j] += 1
            self._append(j, column.double(), rest, plain)
            # Waits for the device; saves products with A.
            if (j + 1) % self.check_every == 0:
                left = int(self.active.sum())
                if not left:
                    break
                self._narrow(left)
        self.count = j + 1
        if not self.looks:
            # What was made but not needed is neither used nor counted: one more wait.
            self.count = min(self.count, max(1, int(self.used.amax())))
        return self.count

    def _narrow(self, left: int) -> None:
        restrict = self.compaction.due(left)
        if restrict is not None:
            self.rows = self.active.nonzero()[:, 0]
            self.matvec = restrict(self.rows)

    def _applied(self, v: Tensor) -> Tensor:
        if self.rows is None:
            return self.matvec(v)
        # v is zero for the others, which are finished.
        return torch.zeros_like(v).index_copy(0, self.rows, self.matvec(v[self.rows]))

    def _orthogonalize(self, v: Tensor, length: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Classical Gram–Schmidt: the next row of the basis, from v (B, D) of this length, (B,).

        Returns the products of v with the basis, (B, j + 1), the length of the rest, (B,), and
        whether it is known to be usable for all samples, as in most steps. A second pass follows
        where the first one leaves little: relative to that, its rounding is not small.
        """
        basis = self.basis.rows
        column = project(basis, v)
        left = add_combination(v, basis, column, scale=-1.0)
        rest = sample_norm(left)
        eps = torch.finfo(rest.dtype).eps
        enough = (rest >= _LITTLE * length) & (rest < torch.inf)  # False for NaN
        plain = self.active & enough & (rest > 10 * eps * self.largest)
        if self.looks and bool(plain.all()):
            torch.mul(left, rest.reciprocal()[:, None], out=self.basis.slot(left))
            return column, rest, True
        healthy = length < torch.inf
        self.broken = self.broken | (self.active & ~healthy)
        self.active = self.active & healthy
        out, again = ~self.active[:, None], (self.active & ~enough)[:, None]
        column, left = column.masked_fill(out, 0.0), left.masked_fill(out, 0.0)
        more = project(basis, left)
        column = torch.where(again, column + more, column)
        left = torch.where(again, add_combination(left, basis, more, scale=-1.0), left)
        rest = sample_norm(left)
        # What is left is rounding: the space is invariant and holds the solution.
        nothing = ~(rest > 10 * eps * self.largest)
        inverse = rest.masked_fill(nothing, torch.inf).reciprocal()
        torch.mul(left, inverse[:, None], out=self.basis.slot(left))
        return column, rest.masked_fill(nothing, 0.0), False

    def _append(self, j: int, column: Tensor, rest: Tensor, plain: bool) -> None:
        """Add column j to H, and test which samples are finished. plain: for all, it is usable."""
        rest = rest.double()
        overlap = torch.linalg.vecdot(self.null[:, : j + 1], column)
        entry, usable = overlap / rest, self.active
        if not plain:
            # The pivot of the column in a QR factorization. If it is zero to rounding, A is
            # singular on this space: the column would add a huge, undefined multiple of the null
            # vector; it cannot be used, and none comes after.
            pivot = torch.hypot(overlap / self.null_norm, rest)
            usable = usable & (pivot > 10 * torch.finfo(self.largest.dtype).eps * self.largest)
            out = ~usable
            entry, column = entry.masked_fill(out, 0.0), column.masked_fill(out[:, None], 0.0)
        torch.neg(entry, out=self.null[:, j + 1])
        self.null_norm = torch.hypot(self.null_norm, entry)
        self.hessenberg[:, : j + 1, j] = column
        self.hessenberg[:, j + 1, j] = rest if plain else rest.masked_fill(out, 1.0)
        self.used = self.used + self.active
        left = self.beta / self.null_norm
        self.left = left if plain else torch.where(usable, left, self.left)
        if self.history is not None:
            self.history.append(self.left)
        going = self.left > self.target
        self.active = going if plain else usable & (rest > 0) & going

    def correction(self) -> Tensor:
        """The combination of the basis that minimizes each sample's residual, (B, D)."""
        k = self.count
        q, r = torch.linalg.qr(self.hessenberg[:, : k + 1, :k])
        right = self.beta[:, None] * q[:, 0]
        y = torch.linalg.solve_triangular(r, right[:, :, None], upper=True)
        basis = self.vectors[:, :k]
        return torch.bmm(y.mT.to(basis.dtype), basis)[:, 0]


class _Arnoldi(NamedTuple):
    """What the products of a compiled cycle continue from: as in `Cycle`, of full size from the
    start, and `j`, (1,), the number of columns."""

    j: Tensor
    basis: Tensor
    hessenberg: Tensor
    null: Tensor
    null_norm: Tensor
    left: Tensor
    active: Tensor
    broken: Tensor
    largest: Tensor
    used: Tensor


class CompiledCycle(Cycle):
    """The same in compiled chunks of `check_every` products. The second orthogonalization is
    always computed."""

    @property
    def vectors(self) -> Tensor:
        return self._vectors

    def run(self) -> int:
        """As `Cycle.run`."""
        chunks = -(-self.size // self.check_every)
        width = chunks * self.check_every
        state = self._start(width)
        size = torch.full_like(state.j, self.size)
        for _ in range(chunks):
            state = run_compiled(
                _extend,
                None,
                state.basis.device,
                self.matvec,
                state,
                self.beta.clone(),
                self.target,
                size,
                self.check_every,
            )
            if not bool(state.active.any()):
                break
        self.count = max(1, int(state.used.amax()))
        self._vectors, self.hessenberg = state.basis, state.hessenberg
        self.left, self.active, self.broken, self.used = (
            state.left,
            state.active,
            state.broken,
            state.used,
        )
        return self.count

    def _start(self, width: int) -> _Arnoldi:
        first, batch = self.basis.rows[:, 0], len(self.beta)
        basis = first.new_zeros(batch, width + 1, first.shape[1])
        basis[:, 0] = first
        null = self.beta.new_zeros(batch, width + 1)
        null[:, 0].fill_(1.0)
        return _Arnoldi(
            j=torch.zeros(1, dtype=torch.int64, device=first.device),
            basis=basis,
            hessenberg=self.beta.new_zeros(batch, width + 1, width),
            null=null,
            null_norm=torch.ones_like(self.beta),
            left=self.beta.clone(),
            active=self.active.clone(),
            broken=torch.zeros_like(self.active),
            largest=self.largest,
            used=torch.zeros_like(self.used),
        )


def _extend(
    matvec: FlatMap, s: _Arnoldi, beta: Tensor, target: Tensor, size: Tensor, products: int
) -> _Arnoldi:
    """`products` further columns, of which at most `size` in all are used."""
    apply = traceable(matvec)
    numbers = torch.arange(s.basis.shape[1], device=s.basis.device)
    eps = torch.finfo(s.basis.dtype).eps
    for _ in range(products):
        v = s.basis.index_select(1, s.j)[:, 0]
        change = apply(v) - v  # as in `Cycle.run`
        length = sample_norm(change)
        largest = torch.maximum(s.largest, 1 + length)
        healthy = length < torch.inf
        broken, active = s.broken | (s.active & ~healthy), s.active & healthy
        change = change.masked_fill(~active[:, None], 0.0)
        column = project(s.basis, change)
        rest = add_combination(change, s.basis, column, scale=-1.0)
        more = project(s.basis, rest)
        column, rest = column + more, add_combination(rest, s.basis, more, scale=-1.0)
        h = sample_norm(rest)
        nothing = ~(h > 10 * eps * largest)
        inverse = h.masked_fill(nothing, torch.inf).reciprocal()[:, None]
        h = h.masked_fill(nothing, 0.0).double()
        column = (column + (numbers == s.j)).double()

        overlap = torch.linalg.vecdot(s.null, column)
        pivot = torch.hypot(overlap / s.null_norm, h)
        usable = active & (pivot > 10 * eps * largest)
        entry = (overlap / h).masked_fill(~usable, 0.0)
        below = h.masked_fill(~usable, 1.0)[:, None]
        column = torch.where(numbers == s.j + 1, below, column.masked_fill(~usable[:, None], 0.0))
        null_norm = torch.hypot(s.null_norm, entry)
        left = torch.where(usable, beta / null_norm, s.left)
        s = _Arnoldi(
            j=s.j + 1,
            basis=s.basis.index_copy(1, s.j + 1, (rest * inverse)[:, None]),
            hessenberg=s.hessenberg.index_copy(2, s.j, column[:, :, None]),
            null=s.null.index_copy(1, s.j + 1, -entry[:, None]),
            null_norm=null_norm,
            left=left,
            active=usable & (h > 0) & (left > target) & (s.j + 1 < size),
            broken=broken,
            largest=largest,
            used=s.used + active,
        )
    return s
