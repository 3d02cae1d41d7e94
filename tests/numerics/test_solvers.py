"""Properties of every solver, on every problem: a new solver joins as one row of
`problems.SOLVERS`."""

import pytest
import torch
from torch import Tensor

from fastdeq.norms import sample_norm
from fastdeq.solution import SolveResult, Status
from fastdeq.solvers import (
    AbstractSolver,
    ContinuousSolver,
    Picard,
    solve,
)
from tests.loops import each
from tests.numerics.solves import TOL, run
from tests.problems import FACTORIES, HOPELESS, SOLVERS, Scripted, problem_named, tanh

MAX_STEPS = 4000  # vcab3 on nearly_singular takes 2500
# At a rate above 0.9913 per step, 30 steps differ by less than the factor 1.3 of the stall rule.
STALLS = {("picard_damped", "nearly_singular"), ("vcab3", "nearly_singular")}

every_solver = pytest.mark.parametrize("name", SOLVERS)
pairs = [(solver, problem) for solver in SOLVERS for problem in FACTORIES]
every_pair = pytest.mark.parametrize(("name", "problem_name"), pairs)


def made(name: str, **fields) -> AbstractSolver:
    return SOLVERS[name](**{"tol": TOL, "max_steps": MAX_STEPS, **fields})


def assert_same_statistics(one: SolveResult, other: SolveResult) -> None:
    for name in ("status", "steps", "nfe"):
        assert getattr(one, name).tolist() == getattr(other, name).tolist(), name


# Conformance: every solver × every problem


@every_pair
def test_the_answer_is_within_the_residual_times_the_amplification(name, problem_name):
    problem = problem_named(problem_name)
    result = run(made(name), problem)
    assert torch.isfinite(result.value).all()
    if (name, problem_name) in HOPELESS:
        assert (result.status == Status.DIVERGED).all()
        return
    here = problem.solvable
    stalls = (name, problem_name) in STALLS
    assert (result.status[here] == (Status.STALLED if stalls else Status.CONVERGED)).all()
    assert (result.status[~here] == Status.DIVERGED).all()
    assert (result.relative_residual[here] <= (3 * TOL if stalls else TOL)).all()
    # z − z* = (I − J)⁻¹ g, exactly where f is linear; 2 allows for curvature, and the last
    # term for rounding in f.
    error = sample_norm(result.value - problem.exact)[here]
    amplification = problem.rows(here).amplification
    rounding = 1e-14 * sample_norm(problem.exact)[here]
    assert (error <= 2 * amplification * (result.residual[here] + rounding)).all()


@every_pair
def test_the_statistics_describe_the_returned_state(name, problem_name):
    problem = problem_named(problem_name)
    result = run(made(name, max_steps=7), problem)
    assert torch.isfinite(result.value).all()
    here = problem.solvable
    with torch.no_grad():
        output = problem.flat_f(result.value)
    residual = sample_norm(output - result.value)[here]
    # The same evaluation of f, made in another batch: equal to rounding of f.
    torch.testing.assert_close(result.residual[here], residual, rtol=1e-9, atol=1e-13)
    relative = residual / sample_norm(output)[here]
    torch.testing.assert_close(result.relative_residual[here], relative, rtol=1e-9, atol=1e-13)
    assert (result.steps <= 7).all()
    assert (result.nfe[here] >= 1 + (result.steps[here] > 0)).all()


@every_solver
def test_a_sample_whose_f_is_nan_does_not_disturb_the_others(name):
    problem = problem_named("nan_for_one_sample")
    alone = problem.rows(problem.solvable)
    result, without = run(made(name), problem), run(made(name), alone)
    for name in ("status", "steps", "nfe"):
        together = getattr(result, name)[problem.solvable]
        assert together.tolist() == getattr(without, name).tolist(), name
    # To rounding: matrix products of another batch size may sum in another order.
    torch.testing.assert_close(result.value[problem.solvable], without.value, rtol=0, atol=1e-12)
    lost = ~problem.solvable
    assert torch.equal(result.value[lost], problem.flat_z0[lost])
    assert result.nfe[lost].tolist() == [1]


@every_solver
def test_a_sample_that_was_never_evaluated_well_shows_no_small_residual(name):
    problem = problem_named("nan_for_one_sample")
    lost = ~problem.solvable
    result = run(made(name), problem, trace="residuals")
    assert torch.isinf(result.residual[lost]).all()
    assert torch.isinf(result.trace.residuals[:, lost]).all()


@every_solver
def test_a_sample_does_not_depend_on_the_rest_of_the_batch(name):
    whole = tanh(batch=64)
    solver = made(name)
    together = run(solver, whole)
    assert (together.status == Status.CONVERGED).all()
    assert len(together.steps.unique()) > 1, "the test needs samples that end at different steps"
    for i in range(0, 64, 9):
        alone = run(solver, whole.rows(torch.tensor([i])))
        for name in ("status", "steps", "nfe"):
            assert int(getattr(alone, name)) == int(getattr(together, name)[i]), name
        # Rounding of f, amplified by at most 2 per solve; quasi-Newton steps repeat it a few times.
        torch.testing.assert_close(alone.value[0], together.value[i], rtol=0, atol=1e-12)


@every_solver
def test_a_finished_sample_is_frozen(name):
    problem = problem_named("tanh")
    result = run(made(name), problem, trace="states")
    states = result.trace.states
    assert len(result.steps.unique()) > 1
    for i, steps in enumerate(result.steps.tolist()):
        assert (states[steps:, i] == result.value[i]).all()
        longer = run(made(name), problem.rows(torch.tensor([i])))
        assert int(longer.nfe) == int(result.nfe[i]), "it is still counted"


@every_solver
def test_f_is_shown_the_frozen_state_of_a_finished_sample(name):
    problem = problem_named("tanh")
    shown = []

    def watched(z: Tensor) -> Tensor:
        shown.append(z.detach().clone())
        return problem.flat_f(z)

    with torch.no_grad():
        result = solve(made(name), watched, problem.flat_z0)
    early = result.steps < result.steps.max()
    assert early.any()
    assert torch.equal(shown[-1][early], result.value[early])


@every_solver
def test_the_trace_has_one_row_per_step_and_its_residuals_are_those_of_its_states(name):
    problem = problem_named("tanh")
    result = run(made(name, max_steps=20), problem, trace="states")
    length = int(result.steps.max()) + 1
    assert result.trace.residuals.shape == (length, *problem.exact.shape[:1])
    assert result.trace.states.shape == (length, *problem.exact.shape)
    assert torch.equal(result.trace.states[0], problem.flat_z0)
    for residual, z in zip(result.trace.residuals, result.trace.states, strict=True):
        expected = sample_norm(problem.flat_f(z) - z).detach()
        torch.testing.assert_close(residual, expected, rtol=1e-9, atol=1e-14)  # f's rounding
    short = run(made(name, max_steps=20), problem, trace="residuals")
    assert torch.equal(short.trace.residuals, result.trace.residuals)
    assert short.trace.states is None
    assert run(made(name, max_steps=20), problem).trace is None


@every_solver
@pytest.mark.parametrize("problem_name", ["tanh", "non_contractive", "nan_for_one_sample"])
def test_reading_the_device_less_often_changes_nothing(name, problem_name):
    problem = problem_named(problem_name)
    often = run(made(name), problem)
    for every in (3, 7):
        rarely = run(made(name, check_every=every), problem)
        assert_same_statistics(often, rarely)
        assert torch.equal(often.value, rarely.value)
        assert torch.equal(often.residual, rarely.residual)


@every_solver
def test_every_evaluation_that_is_made_is_counted(name):
    problem = problem_named("tanh").rows(torch.tensor([0]))  # batch 1: one call, one evaluation
    calls = 0

    def counted(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return problem.flat_f(z)

    with torch.no_grad():
        result = solve(made(name), counted, problem.flat_z0)
    assert int(result.nfe) == calls


@every_solver
def test_a_row_of_nan_in_z0_ends_as_diverged_at_zero(name):
    problem = problem_named("tanh")
    z0 = problem.flat_z0.clone()
    z0[1, 3] = torch.nan
    result, clean = run(made(name), problem, z0), run(made(name), problem)
    assert result.status.tolist() == [0, int(Status.DIVERGED), 0, 0, 0]
    assert (result.value[1] == 0).all()
    assert int(result.steps[1]) == 0
    others = torch.tensor([0, 2, 3, 4])
    torch.testing.assert_close(result.value[others], clean.value[others], rtol=0, atol=1e-12)


@every_solver
@each("per_sample", [True, False])
def test_a_sample_that_overflows_keeps_a_finite_state_and_does_not_disturb_the_others(
    name, per_sample
):
    # f = 1.5 − 0.5 z for samples 0 and 2; z = z + exp(4 |z|) has no solution and soon overflows.
    def f(z: Tensor) -> Tensor:
        wild = torch.tensor([[False], [True], [False]])
        return torch.where(wild, z + torch.exp(4 * z.abs()), 1.5 - 0.5 * z)

    z0 = torch.full((3, 2), 2.0, dtype=torch.float64)
    with torch.no_grad():
        result = solve(made(name, max_steps=200, per_sample=per_sample), f, z0)
    assert torch.isfinite(result.value).all()
    assert torch.isfinite(result.residual).all()
    assert int(result.status[1]) != Status.CONVERGED
    if per_sample:  # a shared norm leaves the sample out only once it has ended
        assert result.status[[0, 2]].tolist() == [0, 0]
        assert ((result.value[[0, 2]] - 1).abs() <= 2 * TOL).all()  # ‖(I − J)⁻¹‖ ‖f‖ = √2 / 1.5


@every_solver
def test_whole_batch_mode_stops_all_samples_at_the_same_step(name):
    problem = problem_named("tanh")
    result = run(made(name, per_sample=False), problem)
    assert (result.status == Status.CONVERGED).all()
    assert len(result.steps.unique()) == 1
    whole = float(result.residual.norm() / (problem.flat_f(result.value)).norm().detach())
    assert whole <= TOL * (1 + 1e-6)  # f evaluated again, another rounding


@every_solver
def test_whole_batch_norms_are_taken_over_the_samples_that_are_alive(name):
    problem = problem_named("nan_for_one_sample")
    here = problem.solvable
    result = run(made(name, per_sample=False), problem)
    without = run(made(name, per_sample=False), problem.rows(here))
    assert (result.status[here] == Status.CONVERGED).all()
    assert (result.status[~here] == Status.DIVERGED).all()
    if isinstance(made(name), ContinuousSolver):
        # Its error is a root mean square over all entries, including those of the diverged sample.
        torch.testing.assert_close(result.value[here], problem.exact[here], rtol=0, atol=1e-6)
    else:
        assert result.steps[here].tolist() == without.steps.tolist()
        torch.testing.assert_close(result.value[here], without.value, rtol=0, atol=1e-12)


@every_solver
def test_whole_batch_mode_continues_when_a_sample_becomes_nan(name):
    # Towards its equilibrium at −1/0.7, sample 1 enters z < 0.5, where f takes a negative root.
    def f(z: Tensor) -> Tensor:
        wild = torch.tensor([[False], [True], [False]])
        return torch.where(wild, 0.3 * z - 1 + 0 * torch.sqrt(z - 0.5), 0.3 * z + 1)

    z0 = torch.ones(3, 2, dtype=torch.float64) * torch.tensor([[1.0], [1.0], [2.0]])
    with torch.no_grad():
        result = solve(made(name, per_sample=False, max_steps=300), f, z0)
    assert torch.isfinite(result.value).all()
    assert result.status.tolist() == [0, int(Status.DIVERGED), 0]
    # ‖(I − J)⁻¹‖ = 1/0.7, ‖z*‖ = 3 over the whole batch: 1e-7 is ample for a tol of 1e-8.
    torch.testing.assert_close(
        result.value[[0, 2]], torch.full_like(z0[:2], 1 / 0.7), atol=1e-7, rtol=0
    )


@each("every", [1, 3])
def test_a_proposed_state_that_is_not_finite_does_not_reach_the_others_through_f(every):
    def f(z: Tensor) -> Tensor:
        coupled = 0.5 * z + 0.1 * z.mean(dim=0) + 1
        return coupled.index_fill(0, torch.tensor(1), 0.0)

    script = ((0.0, 0.0), (1.0, float("nan")), (2.0, 1.0), (2.2, 1.0), (2.5, 1.0))
    solver = Scripted(script=script, tol=1e-9, max_steps=4, per_sample=False, check_every=every)
    with torch.no_grad():
        result = solve(solver, f, torch.zeros(2, 2, dtype=torch.float64))
    assert result.status.tolist() == [int(Status.STEP_LIMIT), int(Status.DIVERGED)]
    # The lost sample is held at its start, 0: f is 0.55 z + 1 for the other, best at 2.2.
    assert result.value.tolist() == [[2.2] * 2, [0.0] * 2]
    assert result.steps.tolist() == [4, 1]


@every_solver
@pytest.mark.parametrize("problem_name", ["linear", "tanh", "two_scale"])
def test_float32_is_solved_to_a_float32_tolerance(name, problem_name):
    problem = problem_named(problem_name)
    result = run(made(name, tol=1e-5), problem.in_float32())
    assert result.value.dtype == torch.float32
    assert (result.status == Status.CONVERGED).all()
    # tol · ‖f‖ · amplification, and rounding 6e-8 · ‖f‖ of the float32 problem itself
    error = sample_norm(result.value.double() - problem.exact)
    assert (error <= 2 * 1e-5 * problem.amplification * sample_norm(problem.exact)).all()


def test_damping_reaches_an_equilibrium_that_repels_plain_picard():
    problem = problem_named("non_contractive")
    plain, damped = (
        run(Picard(tol=TOL), problem),
        run(Picard(tol=TOL, damping=0.4, max_steps=200), problem),
    )
    assert (plain.status == Status.DIVERGED).all()
    assert (damped.status == Status.CONVERGED).all()


@every_solver
def test_a_start_at_the_equilibrium_costs_one_evaluation(name):
    z0 = torch.zeros(3, 2, dtype=torch.float64)
    with torch.no_grad():
        result = solve(made(name), lambda z: 0.5 * z, z0)
    assert result.steps.tolist() == [0, 0, 0]
    assert result.nfe.tolist() == [1, 1, 1]
    assert (result.status == Status.CONVERGED).all()


@every_solver
@each("per_sample", [True, False])
def test_no_sample_ends_before_min_steps_and_later_ends_are_as_before(name, per_sample):
    problem = problem_named("tanh")
    plain = run(made(name, per_sample=per_sample), problem)
    few = int(plain.steps.min())
    assert_same_statistics(plain, run(made(name, per_sample=per_sample, min_steps=few), problem))
    longer = int(plain.steps.max()) + 3
    result = run(made(name, per_sample=per_sample, min_steps=longer, check_every=2), problem)
    assert (result.steps >= longer).all()
    assert (result.status == Status.CONVERGED).all()


@every_solver
def test_a_start_at_the_equilibrium_stays_there_for_min_steps(name):
    z0 = torch.zeros(3, 2, dtype=torch.float64)
    with torch.no_grad():
        result = solve(made(name, min_steps=4), lambda z: 0.5 * z, z0)
    assert result.steps.tolist() == [4, 4, 4]
    assert (result.value == 0).all()
    assert (result.status == Status.CONVERGED).all()


def test_min_steps_above_max_steps_is_refused():
    with pytest.raises(ValueError, match="min_steps is 9, but must be at most max_steps"):
        Picard(min_steps=9, max_steps=8)
