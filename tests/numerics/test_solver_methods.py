"""Properties of single solvers, and the loop's bookkeeping by a scripted solver."""

from dataclasses import replace

import pytest
import torch

from fastdeq.norms import sample_norm
from fastdeq.solution import SolveResult, Status
from fastdeq.solvers import (
    Anderson,
    BroydenSolver,
    ContinuousSolver,
    LimitedMemoryBroydenSolver,
    NewtonKrylov,
    Picard,
    solve,
)
from fastdeq.solvers.base import Problem as Evaluations
from tests.loops import each
from tests.numerics.solves import TOL, run
from tests.problems import Scripted, problem_named

# Properties of single methods


def test_newton_converges_in_one_step_on_a_linear_problem_solved_exactly():
    result = run(NewtonKrylov(tol=1e-9, krylov_tol=1e-12), problem_named("linear"))
    assert (result.steps == 1).all()


def test_the_line_search_tames_newton_and_only_who_searches_pays():
    # g(z) = −arctan z: full Newton steps diverge from |z| > 1.39, where sample 1 is and 0 is not.
    z0 = torch.tensor([[0.5], [3.0]], dtype=torch.float64)

    def solved(line_search_steps: int) -> SolveResult:
        solver = NewtonKrylov(termination="abs_norm", tol=1e-8, line_search_steps=line_search_steps)
        with torch.no_grad():
            return solve(solver, lambda z: z - torch.arctan(z), z0)

    with_search, without = solved(4), solved(0)
    assert with_search.converged.tolist() == [True, True]
    assert without.converged.tolist() == [True, False]
    assert with_search.nfe[0] == without.nfe[0]
    # Per step: the evaluation at its end, one jvp and one that measures the solve.
    assert with_search.nfe[0] == 1 + 3 * with_search.steps[0]
    assert with_search.nfe[1] > 1 + 3 * with_search.steps[1]


def test_newton_in_inference_mode_names_the_cure():
    problem = problem_named("tanh")
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode=False"):
        solve(NewtonKrylov(), problem.flat_f, problem.flat_z0)


def test_broyden_refuses_a_state_above_max_dim():
    with pytest.raises(ValueError, match="LimitedMemoryBroydenSolver"):
        run(BroydenSolver(max_dim=7), problem_named("tanh"))


@each(
    "solver, history", [(LimitedMemoryBroydenSolver(memory=3), "steps"), (Anderson(memory=3), "dg")]
)
def test_the_history_is_no_longer_than_memory(solver, history):
    problem = problem_named("nearly_singular")
    with torch.no_grad():
        evaluations = Evaluations(problem.flat_f, problem.flat_z0, solver.pooling)
        current = evaluations.evaluate(problem.flat_z0)
        memory = solver.init(evaluations, current)
        lengths = []
        for _ in range(12):
            step, memory = solver.step(evaluations, current, memory)
            current = step.iterate
            held = memory[1] if isinstance(memory, tuple) else memory
            lengths.append(len(getattr(held, history)))
    assert max(lengths) == 3
    # Anderson drops the oldest row; Broyden restarts, after which it steps by the residual.
    assert lengths == ([1, 2, 3, 0] * 3 if history == "steps" else [1, 2] + [3] * 10)


def test_limited_memory_broyden_steps_by_the_residual_after_a_restart():
    problem = problem_named("tanh")
    result = run(
        LimitedMemoryBroydenSolver(tol=1e-14, memory=2, max_steps=5), problem, trace="states"
    )
    states = result.trace.states
    for k in (0, 3):  # the first step, and the one after the restart
        expected = problem.flat_f(states[k]).detach()
        torch.testing.assert_close(states[k + 1], expected, rtol=0, atol=1e-14)


@each("solver", [LimitedMemoryBroydenSolver(memory=2), Anderson(memory=1)])
def test_a_short_memory_still_converges(solver):
    solver = replace(solver, tol=TOL, max_steps=200)
    result = run(solver, problem_named("tanh"))
    assert (result.status == Status.CONVERGED).all()


@each("damping", [1.0, 0.5])
def test_anderson_steps_by_the_least_squares_formula(damping):
    # z₊ = z + β g − (ΔZ + β ΔG) γ, γ = argmin ‖g − ΔG γ‖, by a dense least-squares solver
    problem = problem_named("tanh")
    solver = Anderson(tol=1e-12, memory=3, damping=damping, ridge=0.0, max_steps=6)
    z = run(solver, problem, trace="states").trace.states
    g = torch.stack([problem.flat_f(row) - row for row in z]).detach()
    for k in range(1, 6):
        past = slice(max(0, k - 3), k + 1)
        dz, dg = z[past].diff(dim=0).permute(1, 2, 0), g[past].diff(dim=0).permute(1, 2, 0)
        gamma = torch.linalg.lstsq(dg, g[k][:, :, None]).solution
        step = damping * g[k] - ((dz + damping * dg) @ gamma)[:, :, 0]
        # Relative to the step: 1e-16 times the square of the condition of ΔG, up to 1e4 here
        assert (sample_norm(z[k + 1] - z[k] - step) <= 1e-7 * sample_norm(step)).all(), k


def test_limited_memory_broyden_is_broyden_without_line_search():
    problem = problem_named("non_contractive")
    limited = run(LimitedMemoryBroydenSolver(tol=1e-10), problem, trace="residuals")
    dense = run(BroydenSolver(tol=1e-10, line_search_steps=0), problem, trace="residuals")
    first = slice(0, 8)  # rounding grows from step to step: 1e-16 · 3⁸ · ‖B‖ a few times
    torch.testing.assert_close(
        limited.trace.residuals[first], dense.trace.residuals[first], rtol=1e-8, atol=1e-10
    )


def test_a_step_below_min_step_is_a_stall_of_the_continuous_solver():
    problem = problem_named("non_contractive")
    solver = ContinuousSolver(method="bs3", first_step=5.0, min_step=2.0)
    result = run(solver, problem)
    assert (result.status == Status.STALLED).all()
    assert torch.equal(result.value, problem.flat_z0)


# The loop's bookkeeping, by a script of residuals: f(z) = 2z, so that g(z) = z.


def play(*samples: tuple[float, ...], **fields) -> SolveResult:
    """One tuple of residuals per sample: row 0 is its start, the others are its steps."""
    script = tuple(zip(*samples, strict=True))
    settings = {"termination": "abs_norm", "tol": 0.1, "max_steps": len(script) - 1, **fields}
    z0 = torch.tensor(script[0], dtype=torch.float64)[:, None]
    return solve(Scripted(script=script, **settings), lambda z: 2 * z, z0, trace="states")


def test_each_sample_ends_at_the_first_step_that_meets_the_tolerance():
    result = play((1, 0.05, 7, 7), (1, 0.5, 0.5, 0.01), (0.1, 9, 9, 9))
    assert result.status.tolist() == [0, 0, 0]
    assert result.steps.tolist() == [1, 3, 0]
    assert result.nfe.tolist() == [2, 4, 1]
    assert result.value[:, 0].tolist() == [0.05, 0.01, 0.1]


def test_the_best_iterate_is_returned_at_the_step_limit():
    result = play((5, 1, 3, 4), (5, 6, 7, 2))
    assert (result.status == Status.STEP_LIMIT).all()
    assert result.value[:, 0].tolist() == [1, 2]
    assert result.residual.tolist() == [1, 2]
    assert result.trace is not None
    assert result.trace.residuals.T.tolist() == [[5, 1, 3, 4], [5, 6, 7, 2]]


def test_a_sample_that_turns_nan_keeps_its_best_iterate_and_the_others_continue():
    nan, inf = float("nan"), float("inf")
    result = play((5, 2, nan, 0), (5, 2, 1, 0.1), (5, 6, inf, 0))
    assert [Status(s) for s in result.status.tolist()] == [
        Status.DIVERGED,
        Status.CONVERGED,
        Status.DIVERGED,
    ]
    assert result.value[:, 0].tolist() == [2, 0.1, 5]
    assert result.steps.tolist() == [2, 3, 2]


def test_a_solver_that_gives_up_makes_a_sample_stalled_unless_it_has_converged():
    result = play((5, 2, 1), (5, 2, 0.1), gives_up_at=2)
    assert [Status(s) for s in result.status.tolist()] == [Status.STALLED, Status.CONVERGED]


@each("z0", [torch.ones(3), torch.ones(0, 2), torch.ones(2, 0), torch.ones(2, 2, 2)])
def test_a_start_that_is_not_a_batch_of_vectors_is_refused(z0):
    with pytest.raises(ValueError, match="non-empty"):
        solve(Picard(), lambda z: z, z0)


def test_integers_are_refused_as_a_start():
    with pytest.raises(TypeError, match="convert it with"):
        solve(Picard(), lambda z: z, torch.ones(2, 2, dtype=torch.int64))


def test_an_f_that_changes_the_shape_is_refused():
    with pytest.raises(ValueError, match="restore the shape"):
        solve(Picard(), lambda z: z[:, :1], torch.ones(2, 2))
