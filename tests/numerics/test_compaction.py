"""With `compact`, f is evaluated for the samples that have not ended, with the same results."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from fastdeq import GMRES, DeepEquilibriumNetwork
from fastdeq._fixed_point import fixed_point
from fastdeq.adjoints import Implicit
from fastdeq.nn import VariationalDropout, Zeros
from fastdeq.rows import BatchMap
from fastdeq.solvers import Picard, solve
from tests.loops import each
from tests.numerics.test_solvers import every_solver, made
from tests.problems import tanh

GAINS = torch.linspace(0.05, 0.98, 64, dtype=torch.float64)[:, None]


class Linear:
    """f(z) = gain · z + c with a count of the rows that it computes."""

    def __init__(self) -> None:
        self.rows = 0

    def select(self, rows: Tensor | slice = slice(None)):
        return partial(self._evaluated, gain=GAINS[rows])

    def _evaluated(self, z: Tensor, gain: Tensor) -> Tensor:
        self.rows += len(z)
        return gain * z + 1


@each("share, most", [(0.5, 1.5), (0.25, 1.25)])
def test_few_rows_of_f_are_computed_that_are_not_needed(share, most):
    f, z0 = Linear(), torch.zeros(64, 3, dtype=torch.float64)
    solver = Picard(tol=1e-6, max_steps=1000, compact=share)
    with torch.no_grad():
        result = solve(solver, BatchMap(f.select(), f.select), z0)
        assert result.converged.all()
        assert f.rows <= most * int(result.nfe.sum())
        f.rows = 0
        assert solve(Picard(tol=1e-6, max_steps=1000), f.select(), z0).converged.all()
        assert f.rows > 5 * int(result.nfe.sum()), "without it, finished samples stay"


@every_solver
@each("every", [1, 4])
def test_compaction_changes_no_result(name, every):
    problem = tanh(batch=12)

    def select(rows: Tensor):
        return problem.rows(rows).flat_f

    solver = made(name, check_every=every)
    with torch.no_grad():
        plain = solve(solver, problem.flat_f, problem.flat_z0)
        solver = made(name, check_every=every, compact=0.2)
        compact = solve(solver, BatchMap(problem.flat_f, select), problem.flat_z0)
    assert len(plain.steps.unique()) > 1 or name == "newton_krylov"
    for field in ("status", "steps", "nfe"):
        assert torch.equal(getattr(plain, field), getattr(compact, field)), field
    torch.testing.assert_close(plain.value, compact.value, rtol=0, atol=1e-12)


@each(
    "backward",
    [
        (GMRES(tol=1e-4), GMRES(tol=1e-4, compact=0.1)),
        (Picard(tol=1e-10, max_steps=400), Picard(tol=1e-10, max_steps=400, compact=0.2)),
    ],
)
def test_compaction_of_the_backward_solve_changes_no_gradient(backward):
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 8, generator=draw, dtype=torch.float64) / 6
    weight.requires_grad_()
    evaluated = []

    def cell(z: Tensor, gain: Tensor) -> Tensor:
        evaluated.append(len(z))
        output: Tensor = gain * torch.tanh(z @ weight.T) + 1
        return output

    def gradient(solver: GMRES | Picard) -> tuple[Tensor, Tensor]:
        solution = fixed_point(
            partial(cell, gain=GAINS),
            torch.zeros(64, 8, dtype=torch.float64),
            solver=Picard(tol=1e-12, max_steps=400),
            adjoint=Implicit(solver=solver),
            select=lambda rows: partial(cell, gain=GAINS[rows]),
        )
        evaluated.clear()
        assert isinstance(solution.value, Tensor)
        (found,) = torch.autograd.grad(solution.value.sin().sum(), weight)
        stats = solution.backward.stats
        assert stats is not None
        return found, stats.nfe

    (plain, nfe), (compact, compact_nfe) = (gradient(solver) for solver in backward)
    assert evaluated, "f was restricted in the backward solve"
    assert max(evaluated) < 64
    assert torch.equal(nfe, compact_nfe)
    torch.testing.assert_close(compact, plain, rtol=1e-9, atol=1e-9)


class Cell(nn.Module):
    """f(z, x) with a mask and an input of several tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = VariationalDropout(0.3)
        self.weight = nn.Parameter(torch.tensor(0.9, dtype=torch.float64))

    def forward(self, z: Tensor, x: tuple[Tensor, dict[str, Tensor]]) -> Tensor:
        gain, named = x
        output: Tensor = self.drop(gain * torch.tanh(self.weight * z)) + named["bias"]
        return output


def test_a_layer_selects_the_rows_of_its_input_and_its_masks():
    found = []
    x = (GAINS, {"bias": torch.linspace(-1, 1, 64 * 3, dtype=torch.float64).view(64, 3)})
    for compact in (None, 0.2):
        layer = DeepEquilibriumNetwork(
            Cell(),
            solver=Picard(tol=1e-11, max_steps=400, compact=compact),
            adjoint=Implicit(solver=Picard(tol=1e-11, max_steps=400, compact=compact)),
            initializer=Zeros([3]),
        )
        torch.manual_seed(0)
        z, solution = layer(x)
        assert solution.converged.all()
        z.square().sum().backward()
        found += [z.detach(), layer.cell.weight.grad]
    torch.testing.assert_close(found[0], found[2], rtol=0, atol=1e-9)
    torch.testing.assert_close(found[1], found[3])


def test_an_input_that_is_not_one_row_per_sample_is_refused():
    class Shared(nn.Module):
        def forward(self, z: Tensor, x: tuple[Tensor, Tensor]) -> Tensor:
            return x[0] * torch.tanh(z) + x[1]

    layer = DeepEquilibriumNetwork(
        Shared(), solver=Picard(max_steps=400, compact=0.1), initializer=Zeros([3])
    )
    with pytest.raises(ValueError, match=r"first axis is not the batch of 64: set solver\.compact"):
        layer((GAINS.float(), torch.ones(3)))


def test_a_batch_norm_in_training_is_refused():
    class Normalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return x * torch.tanh(self.norm(z)) + x

    layer = DeepEquilibriumNetwork(
        Normalized(), solver=Picard(max_steps=400, compact=0.1), initializer=Zeros([3])
    )
    with pytest.raises(ValueError, match="BatchNorm1d in training, which couples the samples"):
        layer(GAINS.float().expand(64, 3))


def test_a_solve_that_cannot_be_restricted_is_refused_with_the_cure():
    z0 = torch.zeros(2, 3)
    for solver, adjoint in (
        (Picard(compact=0.5), Implicit()),
        (Picard(), Implicit(solver=GMRES(compact=0.5))),
    ):
        with pytest.raises(ValueError, match="give `select`, which restricts f"):
            fixed_point(lambda z: 0.5 * z, z0, solver=solver, adjoint=adjoint)
    with pytest.raises(ValueError, match="give fixed_point a `select`"):
        solve(Picard(compact=0.5), lambda z: 0.5 * z, z0)
    for solver_class in (Picard, GMRES):
        with pytest.raises(ValueError, match="per_sample=False says that they are coupled"):
            solver_class(compact=0.5, per_sample=False)
