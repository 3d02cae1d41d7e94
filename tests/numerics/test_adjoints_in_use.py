"""Adjoints when things go wrong, inside modules, in mixed precision, and under regularization."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdeq import GMRES, fixed_point
from fastdeq.adjoints import Implicit, JacobianFree, Phantom, Unrolled
from fastdeq.regularizers import jacobian_loss
from fastdeq.solution import Status
from fastdeq.solvers import LimitedMemoryBroydenSolver, NewtonKrylov, Picard
from tests.loops import each
from tests.numerics.gradients import BACKWARD, FORWARD, cotangent, flat, gradients, solved
from tests.problems import problem_named

# When the backward pass meets NaN


class _NanBehind(torch.autograd.Function):
    """The identity, whose backward pass gives NaN for the samples in `bad`."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, bad: Tensor) -> Tensor:
        ctx.save_for_backward(bad)
        return z.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:
        (bad,) = ctx.saved_tensors
        return cotangents[0].masked_fill(bad[:, None], torch.nan), None


@pytest.mark.parametrize(
    "solver", [GMRES(tol=1e-12), LimitedMemoryBroydenSolver(tol=1e-12)], ids=["gmres", "lbroyden"]
)
def test_a_sample_whose_jacobian_product_is_nan_falls_back_to_the_jacobian_free_gradient(solver):
    problem = problem_named("tanh")
    bad = torch.arange(5) == 3

    def f(z: Any) -> Any:
        return problem.f(_NanBehind.apply(z, bad))

    solution = fixed_point(
        f, problem.z0, solver=FORWARD["broyden"], adjoint=Implicit(solver=solver)
    )
    with pytest.warns(RuntimeWarning, match="backward solve failed for 1 of 5 samples"):
        got = torch.autograd.grad(flat(problem, solution), problem.leaves, cotangent(problem))
    assert all(torch.isfinite(g).all() for g in got)
    assert solution.backward.stats is not None
    assert solution.backward.stats.status.tolist() == [0, 0, 0, int(Status.DIVERGED), 0]
    # The gradient of x is a sample's own: exact for the others, Jacobian-free for this one.
    exact = problem.gradient(cotangent(problem))[0]
    free = gradients(problem, FORWARD["broyden"], JacobianFree())[0]
    expected = torch.where(bad[:, None], free, exact)
    torch.testing.assert_close(got[0], expected, rtol=0, atol=1e-9)


def test_an_incoming_gradient_that_is_not_finite_is_reported_as_that():
    problem = problem_named("tanh")
    w = cotangent(problem)
    w[2, 0] = torch.nan
    value = flat(problem, solved(problem, FORWARD["broyden"], Implicit()))
    with pytest.warns(RuntimeWarning, match="incoming gradient is not finite already"):
        (got,) = torch.autograd.grad(value, [problem.x], w)
    assert torch.isfinite(got[[0, 1, 3, 4]]).all()


def test_a_sample_whose_f_is_nan_is_reported_and_the_input_gradient_of_the_others_is_exact():
    problem = problem_named("nan_for_one_sample")
    here = problem.solvable
    with pytest.warns(RuntimeWarning, match="f is not finite at the returned state of 1 of 5"):
        solution = solved(problem, FORWARD["broyden"], BACKWARD["gmres"])
    value = flat(problem, solution)
    assert torch.isfinite(value).all()
    assert solution.status.tolist() == [0, 0, int(Status.DIVERGED), 0, 0]
    w = cotangent(problem)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the backward solve of the diverged sample
        (got,) = torch.autograd.grad(value, [problem.x], w)
    rest = problem.rows(here)
    expected = rest.gradient(w[here])[0]
    torch.testing.assert_close(got[here], expected, rtol=1e-8, atol=1e-10)


def test_a_backward_solve_without_any_progress_is_jacobian_free_and_not_zero():
    # I − Jᵀ is a cyclic shift: GMRES gains nothing before step D, and its x stays 0.
    size = 12
    shift = torch.roll(torch.eye(size), 1, 0)
    x = torch.zeros(1, size, requires_grad=True)
    adjoint = Implicit(solver=GMRES(max_steps=5))
    solution = fixed_point(lambda z: z - z @ shift.T + x, torch.zeros(1, size), adjoint=adjoint)
    w = torch.zeros(1, size)
    w[0, 3] = 1
    assert isinstance(solution.value, Tensor)
    with pytest.warns(RuntimeWarning, match="no progress.*max_steps"):
        (gradient,) = torch.autograd.grad(solution.value, x, w)
    assert torch.equal(gradient, w)
    assert solution.backward.stats is not None
    assert not solution.backward.stats.converged.any()


# Modules, precisions and modes


class _Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 8)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.2, 0.2, generator=generator)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        # `inner` is used twice in one evaluation: still one accumulation.
        return torch.tanh(self.outer(torch.tanh(self.inner(z))) + self.inner(x))


@pytest.mark.parametrize(
    "adjoint",
    [Implicit(), Implicit(solver=Picard()), JacobianFree(), Phantom(), Unrolled()],
    ids=repr,
)
def test_every_parameter_gets_its_gradient_once_per_backward_pass(adjoint):
    cell = _Cell()
    calls = dict.fromkeys(dict(cell.named_parameters()), 0)

    def count(name: str) -> Any:
        def hook(parameter: Tensor) -> None:
            calls[name] += 1

        return hook

    for name, parameter in cell.named_parameters():
        parameter.register_post_accumulate_grad_hook(count(name))
    x = torch.linspace(-1, 1, 24).view(3, 8)
    solution = fixed_point(
        lambda z: cell(z, x), torch.zeros(3, 8), solver=Picard(), adjoint=adjoint
    )
    assert isinstance(solution.value, Tensor)
    solution.value.square().sum().backward()
    assert set(calls.values()) == {1}
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in cell.parameters())


@pytest.mark.parametrize("adjoint", [Implicit(), JacobianFree(), Phantom(), Unrolled()], ids=repr)
def test_under_autocast_values_are_float32_and_gradients_near_those_without(adjoint):
    def run(autocast: bool) -> tuple[Tensor, Tensor]:
        cell = _Cell()
        x = torch.linspace(-1, 1, 24).view(3, 8)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            assert cell(x, x).dtype == (torch.bfloat16 if autocast else torch.float32)
            solution = fixed_point(
                lambda z: cell(z, x), torch.zeros(3, 8), solver=Picard(tol=1e-2), adjoint=adjoint
            )
        assert isinstance(solution.value, Tensor)
        assert solution.converged.all()
        solution.value.square().sum().backward()
        grads = [p.grad.flatten() for p in cell.parameters() if p.grad is not None]
        return solution.value.detach(), torch.cat(grads)

    (value, grad), (reference, reference_grad) = run(True), run(False)
    assert value.dtype == grad.dtype == torch.float32
    assert torch.isfinite(grad).all()
    # bfloat16 has 8 bits: 0.4 % per operation, about ten operations deep.
    torch.testing.assert_close(value, reference, rtol=0, atol=0.02)
    assert float((grad - reference_grad).norm() / reference_grad.norm()) <= 0.05


def test_unrolled_refuses_a_solver_that_autograd_cannot_run_through():
    with pytest.raises(ValueError, match="NewtonKrylov: use the Implicit"):
        solved(problem_named("tanh"), NewtonKrylov(), Unrolled())


@pytest.mark.parametrize(
    ("adjoint", "reached"),
    [(Implicit(), False), (JacobianFree(), False), (Phantom(), False), (Unrolled(), True)],
    ids=repr,
)
def test_the_start_gets_a_gradient_from_unrolling_alone(adjoint, reached):
    problem = problem_named("tanh")
    z0 = problem.flat_z0.clone().requires_grad_()
    solution = fixed_point(problem.f, z0, solver=Picard(max_steps=3), adjoint=adjoint)
    assert isinstance(solution.value, Tensor)
    (grad,) = torch.autograd.grad(solution.value.sum(), [z0], allow_unused=True)
    assert (grad is not None and bool((grad != 0).any())) == reached


@each("name", ["gmres", "unrolled"])
@each("mode", [torch.no_grad, torch.inference_mode])
def test_a_forward_pass_without_gradients_works_and_gives_the_same_value(name, mode):
    problem = problem_named("two_scale")
    reference = flat(problem, solved(problem, FORWARD["lbroyden"], BACKWARD[name])).detach()
    with mode():
        value = flat(problem, solved(problem, FORWARD["lbroyden"], BACKWARD[name]))
    assert not value.requires_grad
    assert torch.equal(value, reference)


def test_training_through_a_state_that_nothing_depends_on_works():
    # f does not depend on z: J = 0, and the gradient is that of f itself.
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    value = fixed_point(lambda z: x**2, torch.zeros(2, 3, dtype=torch.float64)).value
    assert isinstance(value, Tensor)
    (grad,) = torch.autograd.grad(value.sum(), [x])
    assert torch.equal(grad, torch.full_like(x, 2.0))


# The Jacobian regularization's double backward


@pytest.mark.parametrize("problem_name", ["tanh", "two_scale"])
def test_the_gradient_of_a_jacobian_regularized_loss_equals_finite_differences(problem_name):
    problem = problem_named(problem_name)
    w = cotangent(problem)
    adjoint = Implicit(solver=GMRES(tol=1e-13, max_steps=60))

    def loss(*leaves: Tensor) -> Tensor:
        bound = problem.bound(*leaves)
        solution = solved(bound, FORWARD["broyden"], adjoint)
        torch.manual_seed(3)  # the same ε every time
        return (w * flat(problem, solution)).sum() + 5 * jacobian_loss(bound.f, solution.value)

    # Central differences of step h = 1e-6 of a solve to 1e-13: an error of 1e-13 / h = 1e-7.
    assert torch.autograd.gradcheck(loss, problem.leaves, eps=1e-6, atol=1e-6, rtol=1e-5)


def test_the_jacobian_loss_reaches_the_input_through_the_equilibrium_too():
    problem = problem_named("tanh")
    value = solved(problem, FORWARD["broyden"], BACKWARD["gmres"]).value
    assert isinstance(value, Tensor)

    def gradient(at: Tensor) -> Tensor:
        torch.manual_seed(0)
        return torch.autograd.grad(jacobian_loss(problem.f, at), problem.x)[0]

    assert not torch.allclose(gradient(value), gradient(value.detach()), rtol=0.1)


# Without gradients


@pytest.mark.parametrize("adjoint", [Implicit(), JacobianFree(), Phantom(), Unrolled()], ids=repr)
def test_the_value_of_a_frozen_f_wants_no_gradient(adjoint):
    x = torch.randn(3, 4)
    solution = fixed_point(lambda z: 0.5 * z + x, torch.zeros(3, 4), adjoint=adjoint)
    assert isinstance(solution.value, Tensor)
    assert not solution.value.requires_grad


def test_without_gradients_the_jacobian_loss_is_a_plain_number():
    weight = torch.randn(4, 4, requires_grad=True)
    with torch.no_grad():
        assert not jacobian_loss(lambda z: z @ weight, torch.ones(2, 4)).requires_grad


def test_the_value_of_phantom_is_untouched_where_its_steps_overflow():
    adjoint, solver = Phantom(), Picard(max_steps=1)
    x = torch.ones(1, 1, requires_grad=True)
    phantom, free = (
        fixed_point(lambda z: 1e10 * (z**2 + x), torch.ones(1, 1), solver=solver, adjoint=a)
        for a in (adjoint, JacobianFree())
    )
    assert torch.equal(torch.as_tensor(phantom.value), torch.as_tensor(free.value))


def test_unrolling_through_a_sample_that_diverged_is_not_silent():
    weight = torch.ones(1, requires_grad=True)
    start = torch.tensor([[1.0], [-3.0]])

    def f(z: Tensor) -> Tensor:  # the second sample leaves the domain of the root after a step
        return weight * torch.sqrt(1.5 - z)

    with pytest.warns(RuntimeWarning, match="diverged"):
        fixed_point(f, start, solver=Picard(), adjoint=Unrolled())


# The trace of the backward solve


def test_a_traced_solve_also_traces_its_backward_solve():
    problem = problem_named("tanh")
    for solver in (GMRES(tol=1e-8), FORWARD["lbroyden"]):
        solution = fixed_point(
            problem.f, problem.z0, adjoint=Implicit(solver=solver), trace="residuals"
        )
        (flat(problem, solution) * cotangent(problem)).sum().backward()
        report = solution.backward
        assert report.stats is not None
        assert report.stats.trace is not None
        assert report.stats.trace.residuals.shape[0] == int(report.stats.steps.max()) + 1
        assert report.value is not None
        untraced = fixed_point(problem.f, problem.z0, adjoint=Implicit(solver=solver))
        flat(problem, untraced).sum().backward()
        assert untraced.backward.stats is not None
        assert untraced.backward.stats.trace is None
