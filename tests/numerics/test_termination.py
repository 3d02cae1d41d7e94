"""The nine termination modes against their definitions, by iterates made by hand."""

import math
from collections.abc import Callable
from functools import cache
from typing import get_args

import torch
from torch import Tensor

from fastdeq.norms import PerSample, Pooling, WholeBatch
from fastdeq.solution import SolveResult, Status
from fastdeq.solvers import Iterate, solve
from fastdeq.solvers.termination import (
    PROTECTIVE_FACTOR,
    STALL_RATIO,
    STALL_SLACK,
    STALL_WINDOW,
    Progress,
    Termination,
    TerminationMode,
)
from tests.loops import each
from tests.problems import Scripted

MODES: tuple[TerminationMode, ...] = get_args(TerminationMode)
DEQ_MODES = [mode for mode in MODES if "deq" in mode]
ABSTOL, RELTOL = 0.1, 0.01

# The definition of "done", independently of the library: of du = g(z) and u = z, one sample or all.
DEFINITIONS: dict[str, Callable[[Tensor, Tensor], bool]] = {
    "abs": lambda du, u: bool((du.abs() <= ABSTOL).all()),
    "rel": lambda du, u: bool((du.abs() <= RELTOL * u.abs()).all()),
    "abs_norm": lambda du, u: bool(du.norm() <= ABSTOL),
    "rel_norm": lambda du, u: bool(du.norm() <= RELTOL * (du + u).norm()),
    "norm": lambda du, u: DEFINITIONS["abs_norm"](du, u) and DEFINITIONS["rel_norm"](du, u),
}
for _mode in DEQ_MODES:
    DEFINITIONS[_mode] = DEFINITIONS[_mode[:3] + "_norm"]


def rule(mode: TerminationMode) -> Termination:
    return Termination(mode=mode, abstol=ABSTOL, reltol=RELTOL)


@cache
def iterates() -> list[Iterate]:
    """600 (4, 3) iterates whose entries lie on both sides of every tolerance, zeros included."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for k in range(600):
        scale = 10.0 ** torch.randint(-3, 4, (4, 1), generator=generator)
        z = scale * torch.randn(4, 3, generator=generator, dtype=torch.float64)
        # Also iterates with all four samples near the tolerance, for the whole-batch tests.
        size = 10.0 ** (4 * torch.rand(4, 1, generator=generator) - 4) if k % 2 else 0.01 * scale
        g = size * torch.rand(4, 3, generator=generator, dtype=torch.float64)
        g[torch.rand(4, 3, generator=generator) < 0.2] = 0.0
        made.append(Iterate(z, g))
    return made


def progress_at(at: Iterate, mode: TerminationMode, pooling: Pooling) -> Progress:
    """After the test of a first iterate, which no earlier one bounds."""
    progress = Progress(rule(mode), pooling, at.z)
    progress.test(at, rule(mode).measure(at))
    return progress


@each("mode", MODES)
def test_a_sample_is_done_exactly_when_its_definition_says(mode):
    seen = set()
    for at in iterates():
        done = progress_at(at, mode, PerSample()).status == Status.CONVERGED
        expected = [DEFINITIONS[mode](at.g[i], at.z[i]) for i in range(4)]
        assert done.tolist() == expected
        seen |= set(expected)
    assert seen == {True, False}, "the iterates must lie on both sides"


@each("mode", MODES)
@each("lost", [None, 2])
def test_the_whole_batch_is_done_exactly_when_the_vector_of_its_living_samples_is(mode, lost):
    alive = torch.arange(4) != (-1 if lost is None else lost)
    seen = set()
    for at in iterates():
        if lost is not None:
            at = Iterate(at.z, at.g.masked_fill(~alive[:, None], torch.nan))
        status = progress_at(at, mode, WholeBatch()).status
        expected = DEFINITIONS[mode](at.g[alive].flatten(), at.z[alive].flatten())
        assert (status == Status.CONVERGED).tolist() == [expected and here for here in alive]
        assert ((status == Status.DIVERGED) == ~alive).all()
        seen.add(expected)
    assert seen == {True, False}, "the iterates must lie on both sides"


@each("mode", MODES)
def test_residuals_are_reported_per_sample_whatever_is_tested(mode):
    at = iterates()[0]
    progress = progress_at(at, mode, WholeBatch())
    torch.testing.assert_close(progress.residual, at.g.norm(dim=1))
    torch.testing.assert_close(progress.f_norm, (at.z + at.g).norm(dim=1))


@each("mode", MODES)
def test_an_exact_equilibrium_at_the_origin_is_done(mode):
    zero = torch.zeros(2, 3)
    assert (progress_at(Iterate(zero, zero), mode, PerSample()).status == Status.CONVERGED).all()


def test_abstol_and_reltol_take_the_place_of_tol():
    solver = Scripted(script=(), tol=0.5, reltol=0.25)
    assert (solver.rule.abstol, solver.rule.reltol) == (0.5, 0.25)


# In time, by scripts of objectives


def play(mode: TerminationMode, *samples: list[float], tol: float, **fields) -> SolveResult:
    """One list of objectives per sample, its start first, realized by states of one entry.

    Absolute modes: f(z) = 2z, so that |du| = |z|. Relative ones: f(z) = 1, so that |du| / |du + u|
    = |1 − z|.
    """
    absolute = mode.startswith("abs")
    states = [tuple(o if absolute else 1 - o for o in row) for row in zip(*samples, strict=True)]

    def f(z: Tensor) -> Tensor:
        return 2 * z if absolute else torch.ones_like(z)

    settings = {"termination": mode, "tol": tol, "max_steps": len(states) - 1, **fields}
    z0 = torch.tensor(states[0], dtype=torch.float64)[:, None]
    return solve(Scripted(script=tuple(states), **settings), f, z0)


def returned(result: SolveResult, mode: TerminationMode) -> list[float]:
    """The objectives of the returned states; 1 − (1 − o) is o up to rounding."""
    kept = result.residual if mode.startswith("abs") else result.relative_residual
    return [round(value, 9) for value in kept.tolist()]


@each("mode", ["abs_norm", "rel_norm", *DEQ_MODES])
def test_deq_default_returns_the_last_good_iterate_and_every_other_mode_the_best(mode):
    result = play(mode, [5, 1, 3, 4], [5, 1, 3, math.nan], tol=0.1)
    assert result.status.tolist() == [Status.STEP_LIMIT, Status.DIVERGED]
    assert returned(result, mode) == ([4, 3] if mode.endswith("default") else [1, 1])


@each("mode", DEQ_MODES)
def test_thirty_steps_within_a_factor_of_1_3_and_three_tolerances_are_a_stall(mode):
    assert (STALL_WINDOW, STALL_RATIO, STALL_SLACK, PROTECTIVE_FACTOR) == (30, 1.3, 3.0, 1e3)
    length = 45
    near = [0.2 * (1.29 if k % 2 else 1.0) for k in range(length)]
    too_wide = [0.2 * (1.31 if k % 2 else 1.0) for k in range(length)]
    too_far = [0.31] * length
    falling = [0.29 * 0.98**k for k in range(length)]  # 0.98⁻²⁹ = 1.8
    later = [1.0, 0.5, *near[2:]]
    result = play(mode, near, too_wide, too_far, falling, later, tol=0.1)
    names = [Status(status).name for status in result.status.tolist()]
    assert names == ["STALLED", "STEP_LIMIT", "STEP_LIMIT", "STEP_LIMIT", "STALLED"]
    # The window holds 30 objectives, which may be those from the start on.
    assert result.steps.tolist() == [29, length - 1, length - 1, length - 1, 31]


@each("mode", ["abs_norm", "rel_norm"])
def test_the_plain_modes_do_not_detect_stalls(mode):
    result = play(mode, [0.2] * 45, tol=0.1)
    assert result.status.tolist() == [Status.STEP_LIMIT]


@each("mode", DEQ_MODES)
def test_growth_past_the_protective_factor_is_divergence(mode):
    # One entry: the break is at 1e3 × 1 × the first objective.
    result = play(mode, [0.5, 499, 501, 0], [0.5, 499, 499, 0.01], tol=0.1)
    assert [Status(s) for s in result.status.tolist()] == [Status.DIVERGED, Status.CONVERGED]
    assert result.steps.tolist() == [2, 3]
    # f(z) = 2z of the absolute modes runs away with its residual: 499 must not be returned.
    last = 499 if mode == "rel_deq_default" else 0.5
    assert returned(result, mode) == ([0.5, 0.01] if mode.endswith("best") else [last, 0.01])


@each("mode", MODES)
@each("per_sample, length", [(True, 3), (False, 6)])
def test_the_protective_factor_counts_the_entries_of_one_pooled_norm(mode, per_sample, length):
    def steps_after_growth(growth: float) -> list[int]:
        """f(z) = 2z with z grown as a whole: ‖du‖ by `growth`, the relative objective not."""
        z0 = torch.ones(2, 3, dtype=torch.float64)
        script = ((1.0, 1.0), (growth, growth), (0.5, 0.5))
        solver = Scripted(script=script, termination=mode, per_sample=per_sample, max_steps=2)
        result = solve(solver, lambda z: 2 * z, z0)
        (status,), (steps,) = result.status.unique().tolist(), result.steps.unique().tolist()
        return [status, steps]

    assert steps_after_growth(1e3 * length * 0.99) == [Status.STEP_LIMIT, 2]
    assert steps_after_growth(1e3 * length * 1.01) == [Status.DIVERGED, 1]


def test_in_whole_batch_mode_samples_converge_together_though_some_are_there_before():
    # ‖(0.3, 0.4)‖ = 0.5 > tol although 0.3 and 0.4 are both below it.
    rows = [0.9, 0.3, 0.3], [0.9, 0.4, 0.1]
    apart = play("abs_norm", *rows, tol=0.45)
    together = play("abs_norm", *rows, tol=0.45, per_sample=False)
    assert apart.steps.tolist() == [1, 1]
    assert together.steps.tolist() == [2, 2]
