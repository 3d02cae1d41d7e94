"""An exported model takes a fixed number of steps and gives the answer of the eager one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdeq
from fastdeq import DeepEquilibriumNetwork, DEQChain, SkipDeepEquilibriumNetwork
from fastdeq.nn import (
    DenseCell,
    MultiScaleDeepEquilibriumNetwork,
    MultiScaleResidualCell,
)
from fastdeq.solution import Status
from fastdeq.solvers import (
    AbstractSolver,
    Anderson,
    LimitedMemoryBroydenSolver,
    NewtonKrylov,
    Picard,
    solve,
)
from fastdeq.solvers.fixed import iterate
from tests.loops import each
from tests.numerics.test_solvers import made
from tests.problems import problem_named

FIXED = ["picard", "anderson", "lbroyden", "reversible"]


class Branching(nn.Module):
    """A cell with an `if` on a value."""

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z + x) if z.sum() > 0 else torch.tanh(x - z)


def chain(solver: AbstractSolver, cell: nn.Module | None = None) -> DEQChain:
    cell = DenseCell(5) if cell is None else cell
    with torch.no_grad():
        for p in cell.parameters():
            p.mul_(0.8)
    deq = SkipDeepEquilibriumNetwork(cell, solver=solver)
    return DEQChain(nn.Linear(3, 5), deq, nn.Linear(5, 2))


# The steps, without tracing them


@each("name", FIXED)
@each("problem_name", ["linear", "tanh", "two_scale", "nearly_singular"])
@each("steps", [1, 4, 25])
@each("per_sample", [True, False])
def test_a_fixed_number_of_steps_returns_what_the_solve_returns(
    name, problem_name, steps, per_sample
):
    problem = problem_named(problem_name)
    for fields in ({"tol": 1e-3}, {"tol": 1e-3, "min_steps": 2, "max_steps": 50}):
        solver = made(name, per_sample=per_sample, **fields)
        limited = made(
            name,
            per_sample=per_sample,
            **{**fields, "max_steps": max(steps, solver.min_steps or 0)},
        )
        with torch.no_grad():
            result = solve(limited, problem.flat_f, problem.flat_z0)
            found = iterate(solver, problem.flat_f, problem.flat_z0, limited.max_steps)
        assert not ((result.status == Status.STALLED) | (result.status == Status.DIVERGED)).any()
        assert torch.equal(found, result.value)


def test_a_sample_that_turns_nan_keeps_its_best_finite_state():
    problem = problem_named("nan_for_one_sample")
    with torch.no_grad():
        found = iterate(made("picard"), problem.flat_f, problem.flat_z0, 5)
    assert torch.isfinite(found).all()
    assert torch.equal(found[2], problem.flat_z0[2])


# Programs


@each(
    "solver",
    [
        Picard(tol=0.1, max_steps=6),  # samples converge on the way
        Anderson(memory=1, max_steps=3, per_sample=False),
        LimitedMemoryBroydenSolver(memory=1, max_steps=3),  # with a restart
    ],
)
def test_the_program_gives_the_eager_answer_for_any_batch_size(solver):
    model = chain(solver)
    program = fastdeq.export(model, torch.randn(3, 3)).module()
    for batch in (1, 3, 7):
        x = torch.randn(batch, 3)
        expected = model(x)[0]
        torch.testing.assert_close(program(x), expected, rtol=1e-5, atol=1e-6)


def test_the_explicit_prediction_exports_too():
    model = chain(NewtonKrylov())  # its solver is not used
    x = torch.randn(4, 3)
    program = fastdeq.export(model.explicit, torch.randn(2, 3))
    torch.testing.assert_close(program.module()(x), model.explicit(x))


def test_steps_replace_the_limit_of_the_solver_and_the_model_stays_as_it_was():
    model = chain(Picard(tol=1e-9, max_steps=40))
    model.train()
    x = torch.randn(2, 3)
    before = model(x)[0]
    program = fastdeq.export(model, x, steps=2).module()
    assert model.training
    assert all(each.training for each in model.modules())
    assert torch.equal(model(x)[0], before)
    two = DEQChain(model.get_submodule("0"), model.equilibrium, model.get_submodule("2"))
    two.equilibrium.solver = Picard(tol=1e-9, max_steps=2)  # type: ignore[assignment]
    torch.testing.assert_close(program(x), two(x)[0])


def test_a_program_is_saved_read_and_differentiated(tmp_path):
    model = chain(Picard(max_steps=3))
    torch.export.save(fastdeq.export(model, torch.randn(2, 3)), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2").module()
    x = torch.randn(5, 3, requires_grad=True)
    torch.testing.assert_close(program(x), model(x)[0])
    program(x).sum().backward()
    assert x.grad is not None


def test_a_state_of_several_scales_exports():
    cell = MultiScaleResidualCell((3, 8, 8), channels=[4, 4], expansion=1)
    deq = MultiScaleDeepEquilibriumNetwork(
        cell, solver=Anderson(memory=1, max_steps=2, per_sample=False)
    )
    x = torch.randn(2, 4, 8, 8)
    found, expected = fastdeq.export(deq, x).module()(x), deq.eval()(x)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_onnx_takes_the_program():
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    program = fastdeq.export(chain(Picard(max_steps=2)), torch.randn(2, 3))
    assert torch.onnx.export(program) is not None


# Wrong input


def refused(error: type[Exception], sentence: str, *arguments: Any, **options: Any) -> None:
    with pytest.raises(error, match=sentence):
        fastdeq.export(*arguments, **options)


def test_what_cannot_be_exported_is_refused_with_the_cure():
    x = torch.randn(2, 3)
    model = chain(Picard(max_steps=2))
    refused(TypeError, "takes an nn.Module or its method `explicit`", lambda x: x, x)
    refused(ValueError, "steps is 0, but must be finite and at least 1", model, x, steps=0)
    refused(ValueError, "at least two samples", model, x[:1])
    refused(
        ValueError, "cannot trace NewtonKrylov.*build the layer with Pi", chain(NewtonKrylov()), x
    )
    branching = DeepEquilibriumNetwork(Branching(), solver=Picard(max_steps=2))
    refused(ValueError, "use torch.where in place of `if`", branching, x)
