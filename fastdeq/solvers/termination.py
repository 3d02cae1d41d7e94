"""The nine termination modes, per sample or over the whole batch.

With du = f(z) − z and u = z, over one sample or the whole batch vector:

| mode                                  | done when                                                |
|---------------------------------------|----------------------------------------------------------|
| `abs` / `rel`                         | every entry: |du| ≤ abstol / |du| ≤ reltol · |u|         |
| `abs_norm` / `rel_norm`               | ‖du‖ ≤ abstol / ‖du‖ ≤ reltol · ‖du + u‖                 |
| `norm`                                | both of the two above                                    |
| `abs_deq_default` / `rel_deq_default` | the norm test; or stalled within 3 tol; or broke away    |
| `abs_deq_best` / `rel_deq_best`       | the same, and the best iterate is returned               |

The `*_deq_default` modes return the last good iterate, all others the one of the smallest ‖du‖ (a
converged sample returns the iterate that passed the test). "Broke away" is the protective break at
1e3 × length × the first value. On ‖du‖ it guards every mode here, so that methods stop before they
overflow; the `*_deq_*` modes apply it to their objective too, as published.

Departures from the published tests, which also pass where no equilibrium exists (f(z) = z + c: any
residual or pre-norm cell whose residual does not vanish; NonlinearSolve.jl issue 1149):
1. The denominator of a relative test is at most s₀ + κ max ‖du‖, s₀ = ‖f(z₀)‖ and the maximum over
   the iterates so far, κ = min(10, 1 / (2 reltol)). An iteration that only makes ‖z‖ grow cannot
   pass: the residual itself must fall. A cell with ‖(I − J)⁻¹‖ up to κ is judged as published.
2. Beyond that bound, a residual is undefined once rounding of ‖z‖ reaches half of the largest
   residual seen (its root mean square, for a norm): z + c rounds to z. The sample has diverged.
3. A sample beyond the bound whose residual is not below half of the largest one has run away: this
   iterate is never the best one, and at the step limit the status is DIVERGED.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastdeq.norms import Pooling, finite, sample_largest, sample_norm
from fastdeq.solution import Status

TerminationMode: TypeAlias = Literal[
    "abs",
    "rel",
    "abs_norm",
    "rel_norm",
    "norm",
    "abs_deq_default",
    "rel_deq_default",
    "abs_deq_best",
    "rel_deq_best",
]

STALL_WINDOW = 30  # steps whose objectives must lie within a factor STALL_RATIO of each other
STALL_RATIO = 1.3
STALL_SLACK = 3.0  # times the tolerance: how near a stalled sample must be to stop
PROTECTIVE_FACTOR = 1e3  # times the vector's length: growth that counts as divergence
_GROWTH = 10.0  # κ: times the largest residual, growth of ‖f(z)‖ that an equilibrium may explain
_FALLEN = 0.5  # of the largest residual: below it, the residual has fallen
_ROUNDING = 4.0  # units of rounding of ‖f(z)‖ that f(z) − z may be wrong by

_CARRIED = ("status", "active", "alive", "residual", "f_norm", "_best", "_peak", "_bound")

_RUNNING = -1  # a status that no finished sample has


class Iterate:
    """A state and its residual, both (B, D): g = f(z) − z. Each norm is computed once."""

    def __init__(self, z: Tensor, g: Tensor) -> None:
        self.z, self.g = z, g
        # Not cached_property, whose lock torch.compile cannot trace before Python 3.12.
        self._residual: Tensor | None = None
        self._f_norm: Tensor | None = None

    @property
    def residual(self) -> Tensor:
        """‖g‖ of every sample, (B,), without a graph."""
        if self._residual is None:
            self._residual = sample_norm(_plain(self.g))
        return self._residual

    @property
    def f_norm(self) -> Tensor:
        """‖f(z)‖ of every sample, (B,), without a graph."""
        if self._f_norm is None:
            self._f_norm = sample_norm(_plain(self.z) + _plain(self.g))
        return self._f_norm


def _plain(v: Tensor) -> Tensor:
    return v.detach() if v.requires_grad else v


class Measures(NamedTuple):
    """The norms of an iterate, each (B,). They are computed on its device; the tests read them on
    the host.

    residual, f_norm: ‖f(z) − z‖ and ‖f(z)‖ of every sample. du, size: the same in the norm of the
    mode (the largest entry for `abs` and `rel`), after `pooled` that of the whole batch.
    """

    residual: Tensor
    f_norm: Tensor
    du: Tensor
    size: Tensor

    def pooled(self, rule: "Termination", pooling: Pooling, alive: Tensor) -> "Measures":
        """With `du` and `size` shared by the samples of a batch, where `pooling` does so."""
        if not pooling.shared:
            return self
        pool = pooling.largest if rule.entrywise else pooling.norm
        return self._replace(du=pool(self.du, alive), size=pool(self.size, alive))


@dataclass(frozen=True)
class Termination:
    """A mode with its tolerances."""

    mode: TerminationMode
    abstol: float
    reltol: float

    @property
    def watches_progress(self) -> bool:
        """Whether stalls, and growth of the objective, also end a sample."""
        return "deq" in self.mode

    @property
    def returns_best(self) -> bool:
        """Whether the best iterate is returned, or the last good one."""
        return not self.mode.endswith("deq_default")

    @property
    def entrywise(self) -> bool:
        """Whether the test is of every entry, or of a Euclidean norm."""
        return self.mode in ("abs", "rel")

    @property
    def relative(self) -> bool:
        """Whether the objective is ‖du‖/‖du + u‖, or ‖du‖."""
        return self.mode.startswith("rel")

    @property
    def threshold(self) -> float:
        """The tolerance of the objective, where there is one (not for `norm`)."""
        return self.reltol if self.relative else self.abstol

    @property
    def growth(self) -> float:
        """κ of the module's docstring; κ · reltol stays at most 1/2."""
        return min(_GROWTH, 0.5 / self.reltol) if self.reltol > 0 else _GROWTH

    def measure(self, at: Iterate) -> Measures:
        """Measure an iterate, on its device."""
        residual, f_norm = at.residual, at.f_norm
        if not self.entrywise:
            return Measures(residual, f_norm, residual, f_norm)
        g = at.g.detach()
        largest = sample_largest(g), sample_largest(at.z.detach() + g)
        return Measures(residual, f_norm, *largest)

    def passed(self, at: Iterate, m: Measures, scale: Tensor) -> Tensor:
        """Which samples meet the tolerance, (B,); for `rel`, which compares entries, each alone.

        scale: (B,), at most this is the denominator of a relative test.
        """
        if self.mode == "rel":
            z, g = _plain(at.z).abs(), _plain(at.g).abs()
            each = torch.minimum(z, scale.to(z.device)[:, None])
            return (g <= self.reltol * each).all(dim=1).to(scale.device)
        return self.passed_norm(m.du, scale)

    def passed_norm(self, du: Tensor, scale: Tensor) -> Tensor:
        """The same in the modes that compare norms, (B,)."""
        # A product, not a quotient: 0 ≤ 0 at an exact equilibrium at the origin.
        if self.relative:
            return du <= self.reltol * scale
        absolute = du <= self.abstol
        return absolute & (du <= self.reltol * scale) if self.mode == "norm" else absolute


def ratio(du: Tensor, u: Tensor) -> Tensor:
    """du / u with 0 / 0 = 0: an exact equilibrium at the origin is an equilibrium."""
    return (du / u).masked_fill(du == 0, 0.0)


def _is_within(value: Tensor, least: Tensor | None, most: Tensor) -> bool:
    return torch.equal(value.clamp(least, most), value)  # False for NaN


class Progress:
    """How far every sample of a solve has come, and how it ended; each tensor is (B,).

    All of it is on the host, whatever the device of the states: a step of a solver computes norms,
    and everything is decided from them once they have been read.

    active: which samples are still iterated. alive: which have not diverged.
    good: whether the last iterate was a good one. residual, f_norm: ‖f(z) − z‖ and ‖f(z)‖ at the
    best iterate, infinite where f was never good.
    """

    def __init__(
        self,
        rule: Termination,
        pooling: Pooling,
        z: Tensor,
        min_steps: int = 0,
        *,
        on_host: bool = True,
    ) -> None:
        """z: the start, (B, D), which is read for its shape and dtype. min_steps: before this many,
        no sample ends for its residual.

        on_host: where looking at a tensor costs less than computing with it. Without, tests make no
            decision on the host, and all tensors are on the device of z.
        """
        self.rule, self.pooling, self._on_host = rule, pooling, on_host
        batch, device = z.shape[0], torch.device("cpu") if on_host else z.device
        self._early: int | Tensor = (
            min_steps  # tests, the first of them of the start, that end no sample
        )
        self.active = self.alive = self.good = torch.ones(batch, dtype=torch.bool, device=device)
        self.status = torch.full((batch,), _RUNNING, device=device)
        self.ran_away: Tensor | None = None  # by the last iterate; None: no sample
        kind = torch.finfo(z.dtype)
        unknown = torch.full((batch,), torch.inf, dtype=z.dtype, device=device)
        self.residual = self.f_norm = self._best = unknown
        # Of the iterates so far: the largest ‖du‖, and ‖f(z)‖ up to which it explains growth. All
        # finite values are within bounds before the first one.
        self._peak = self._bound = unknown
        self._first: tuple[Tensor, Tensor] | None = None  # du and size
        self._caps: tuple[Tensor, Tensor | None] | None = None  # computed where they are needed
        self._largest = kind.max
        self._all_active = on_host  # as far as it is known there
        length = pooling.length(z)
        self._factor = PROTECTIVE_FACTOR * length
        entries = 1 if rule.entrywise else length
        # Growth, in units of the peak, at which rounding reaches the part of it that counts.
        self._lost = max(rule.growth, _FALLEN / (_ROUNDING * kind.eps * entries**0.5))
        self._window: deque[tuple[Tensor, Tensor]] = deque(maxlen=STALL_WINDOW)
        self._rolling: Tensor | None = None  # the objectives of the window, where it is a tensor

    def tensors(self, *, stalls: bool = False) -> dict[str, Tensor]:
        """All that later tests depend on, once the first iterate was tested.

        stalls: with the last objectives, (STALL_WINDOW, B), which a solve of fewer steps does not
            need; a restored progress has them or not.
        """
        assert self._first is not None
        kept = {name: getattr(self, name) for name in _CARRIED}
        kept |= {"first_du": self._first[0], "first_size": self._first[1]}
        kept["ran_away"] = torch.zeros_like(self.active) if self.ran_away is None else self.ran_away
        if isinstance(self._early, Tensor) or self._early > 0:
            kept["early"] = torch.as_tensor(self._early, device=self.active.device)
        if self._rolling is not None:
            kept["rolling"] = self._rolling
        elif stalls and self.rule.watches_progress and self._on_host:
            seen = self._objectives()
            before = seen.new_full((STALL_WINDOW - len(seen), seen.shape[1]), torch.inf)
            kept["rolling"] = torch.cat((before, seen))
        return kept

    @staticmethod
    def restored(
        rule: Termination, pooling: Pooling, z: Tensor, kept: Mapping[str, Tensor]
    ) -> "Progress":
        """The progress of `tensors`, whose tests make no decision on the host: for compiled solves,
        on any device."""
        progress = Progress(rule, pooling, z, on_host=False)
        for name in _CARRIED:
            setattr(progress, name, kept[name])
        progress._first = kept["first_du"], kept["first_size"]
        progress.ran_away = kept["ran_away"]
        progress._rolling = kept.get("rolling")
        progress._early = kept.get("early", 0)
        return progress

    def test(self, at: Iterate, m: Measures, stuck: Tensor | None = None) -> Tensor | None:
        """Test the new iterate of every active sample; returns for which it is the best, (B,), or
        None where it is the best of all.

        m: of the iterate, on the host. stuck: (B,) which samples cannot continue.
        """
        good = self.active
        early, self._early = self._early > 0, self._early - 1
        if self.pooling.shared:
            m, good = self._pooled(m)
        if stuck is None and good is self.active and self._improves(m, early):
            return None
        du, size = m.du, m.size
        first_size, du_cap, objective_cap = self._bounds()
        good = good & (du <= du_cap)  # False for NaN
        better = du <= self._best if self.rule.returns_best else good
        bound = self._bound
        beyond = size > bound
        scale, self.ran_away = size, None
        if not self._on_host or bool(beyond.any()):
            scale = torch.minimum(size, bound)
            good = good & (size <= torch.add(first_size, self._peak, alpha=self._lost))
            self.ran_away = beyond & (du > _FALLEN * self._peak)
            better = better & ~self.ran_away
        if objective_cap is not None:
            good = good & (du <= objective_cap * scale)
        passed = self.rule.passed(at, m, bound if self.rule.mode == "rel" else scale)
        if self.pooling.shared:
            passed = (passed | ~self.alive).all().expand_as(passed)
        stalled = self._stalled(du, scale)
        if isinstance(early, Tensor):
            passed = passed & ~early
            stalled = None if stalled is None else stalled & ~early
        elif early:
            passed, stalled = torch.zeros_like(passed), None
        going = good & ~passed
        for here in (stuck, stalled):
            if here is not None:
                going = going & ~here
        better = better & good
        if not self._on_host or not torch.equal(going, self.active):
            passed = passed & good
            better = better | passed
            self._end(good, passed, going)
        self._move_bounds(du, size)
        self.good = good
        return self._keep(m, better)

    def _pooled(self, m: Measures) -> tuple[Measures, Tensor]:
        """With the norms that the batch shares, and which active samples they are taken over."""
        if self._all_active:
            pool = torch.amax if self.rule.entrywise else torch.linalg.vector_norm
            du, size = pool(m.du), pool(m.size)
            if math.isfinite(float(du + size)):
                return m._replace(du=du.expand_as(m.du), size=size.expand_as(m.size)), self.active
        # One bad sample must not spoil a norm that all share.
        good = self.active & finite(m.residual)
        self.alive = self.alive & (good | ~self.active)
        return m.pooled(self.rule, self.pooling, self.alive), good

    def _improves(self, m: Measures, early: bool | Tensor) -> bool:
        """Whether every sample is active, better than before, within all bounds, and not done (as
        none is in `early` steps): the usual case. Then it is recorded, with a third of the
        operations."""
        du, size, rule = m.du, m.size, self.rule
        if not self._all_active or rule.mode == "rel" or len(self._window) >= STALL_WINDOW - 1:
            return False
        if self._first is None:
            if not bool((du <= self._largest).all()):
                return False
        # A size in between also keeps the objective below its cap, where du is not above the first.
        elif not _is_within(size, self._floor, self._bound) or not _is_within(du, None, self._best):
            return False
        if not early and bool(rule.passed_norm(du, size).any()):
            return False
        if self._first is None:
            self._move_bounds(du, size)
        self.residual, self.f_norm, self._best, self.ran_away = m.residual, m.f_norm, du, None
        if rule.watches_progress:
            self._window.append((du, size))
        return True

    def _end(self, good: Tensor, passed: Tensor, going: Tensor) -> None:
        """Give the active samples that are not in `going` their status."""
        ended = self.active & ~going
        for here, status in (
            (ended, Status.STALLED),  # unless one of the others is the reason
            (ended & passed, Status.CONVERGED),
            (ended & ~good, Status.DIVERGED),
        ):
            self.status = self.status.masked_fill(here, int(status))
        self.alive = self.status != int(Status.DIVERGED)  # an IntEnum is not traced
        self.active, self._all_active = going, False

    def _keep(self, m: Measures, better: Tensor) -> Tensor | None:
        if self._on_host and bool(better.all()):  # as in most steps: nothing to select
            self.residual, self.f_norm, self._best = m.residual, m.f_norm, m.du
            return None
        self.residual = torch.where(better, m.residual, self.residual)
        self.f_norm = torch.where(better, m.f_norm, self.f_norm)
        self._best = torch.where(better, m.du, self._best)
        return better

    def _stalled(self, du: Tensor, scale: Tensor) -> Tensor | None:
        """Near the tolerance, without progress for a whole window of steps; None where nothing
        can have stalled yet."""
        if not self.rule.watches_progress:
            return None
        if self._on_host:
            self._window.append((du, scale))
            if len(self._window) < STALL_WINDOW:
                return None
            window = self._objectives()
        elif self._rolling is None:
            return None
        else:
            window = torch.cat((self._rolling[1:], self._objective(du, scale)[None]))
            self._rolling = window
        flat = window.amax(dim=0) < STALL_RATIO * window.amin(dim=0)
        return flat & (window[-1] <= STALL_SLACK * self.rule.threshold)

    def _objectives(self) -> Tensor:
        return torch.stack([self._objective(*pair) for pair in self._window])

    def _objective(self, du: Tensor, scale: Tensor) -> Tensor:
        return ratio(du, scale) if self.rule.relative else du

    def _move_bounds(self, du: Tensor, size: Tensor) -> None:
        if self._first is None:
            self._first, self._peak, self._floor = (du, size), du, size / self._factor
        else:
            self._peak = torch.maximum(self._peak, du)
        self._bound = torch.add(self._first[1], self._peak, alpha=self.rule.growth)

    def _bounds(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """‖f(z₀)‖, and the protective bounds of ‖du‖ and, where there is one, of the objective."""
        if self._first is None:
            most = torch.full_like(self.residual, self._largest)
            return torch.zeros_like(most), most, None
        if self._caps is None:
            du, size = self._first
            relative = self.rule.watches_progress and self.rule.relative
            self._caps = (
                (du * self._factor).clamp(max=self._largest),
                ratio(du, size) * self._factor if relative else None,
            )
        return self._first[1], *self._caps

    def ended(self) -> Tensor:
        """The status of every sample, (B,): those still active have reached the step limit."""
        running = self.status == _RUNNING
        ended = self.status.masked_fill(running, int(Status.STEP_LIMIT))
        if self.ran_away is not None:
            ended = ended.masked_fill(running & self.ran_away, int(Status.DIVERGED))
        return ended
