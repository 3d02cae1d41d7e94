"""Compiled solves against the eager ones. Most are traced without generating code, which takes
seconds instead of minutes: the graph is the same."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from fastdeq import GMRES, compilation, fixed_point
from fastdeq.adjoints import Implicit, Shine
from fastdeq.nn import DeepEquilibriumNetwork, VariationalDropout
from fastdeq.nn.random_steps import RandomSteps
from fastdeq.solution import SolveResult, Status
from fastdeq.solvers import (
    AbstractSolver,
    Anderson,
    BroydenSolver,
    ContinuousSolver,
    LimitedMemoryBroydenSolver,
    NewtonKrylov,
    Picard,
    ReversibleSolver,
    solve,
)
from fastdeq.solvers.termination import TerminationMode
from tests.loops import each

SOLVERS: dict[str, AbstractSolver] = {
    "picard": Picard(),
    "anderson": Anderson(),
    "anderson with a large memory": Anderson(memory=8),
    "lbroyden, which restarts": LimitedMemoryBroydenSolver(memory=4),
    "tsit5": ContinuousSolver(),
    "broyden": BroydenSolver(),
    "newton_krylov": NewtonKrylov(),
    "vcab3": ContinuousSolver(method="vcab3"),
    "reversible": ReversibleSolver(),
}
BATCH, SIZE = 6, 8
# Samples that need from a few steps to more than the limit.
GAIN = torch.linspace(0.02, 1.2, BATCH)[:, None]
WEIGHT = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(1)) / SIZE**0.5
X = torch.randn(BATCH, SIZE, generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def _traced_only(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if "generated" not in request.node.name:
        monkeypatch.setattr(compilation, "BACKEND", "eager")
    torch._dynamo.reset()
    compilation._compiled.cache_clear()
    yield
    torch._dynamo.reset()


def f(z: Tensor) -> Tensor:
    return torch.tanh(GAIN.to(z) * (z @ WEIGHT.to(z).T)) + X.to(z)


def both(solver: AbstractSolver, check_every: int = 4) -> tuple[SolveResult, SolveResult]:
    """The eager and the compiled solve."""
    start = torch.zeros(BATCH, SIZE, dtype=torch.float64)
    compiled = replace(solver, compile=True, check_every=check_every)
    with torch.no_grad():
        return solve(solver, f, start), solve(compiled, f, start)


def check_same(eager: SolveResult, compiled: SolveResult) -> None:
    torch.testing.assert_close(compiled.value, eager.value, rtol=0, atol=1e-9)
    for name in ("status", "steps", "nfe"):
        assert torch.equal(getattr(compiled, name), getattr(eager, name)), name


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@each("name", SOLVERS)
@each("per_sample", (True, False))
def test_every_solver_returns_the_states_counts_and_statuses_of_the_eager_solve(name, per_sample):
    solver = replace(SOLVERS[name], per_sample=per_sample, max_steps=14)
    check_same(*both(solver))


@each("mode", get_args(TerminationMode))
def test_every_termination_mode_ends_where_it_ends_in_the_eager_solve(mode: TerminationMode):
    check_same(*both(Picard(termination=mode, max_steps=14, min_steps=3, damping=0.8)))


def test_a_sample_that_stalls_does_so_in_a_compiled_solve_too():
    def turned(z: Tensor) -> Tensor:  # its residual is √2 ‖z‖ at every step
        return torch.stack((-z[:, 1], z[:, 0]), dim=1)

    solver, start = Picard(tol=0.7, max_steps=60), torch.ones(2, 2)
    with torch.no_grad():
        eager = solve(solver, turned, start)
        compiled = solve(replace(solver, compile=True, check_every=4), turned, start)
    assert (eager.status == Status.STALLED).all()
    check_same(eager, compiled)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch about itself
def test_generated_code_returns_the_answers_of_the_eager_solve():
    check_same(*both(Anderson(max_steps=10, memory=2), check_every=2))


class Cell(nn.Module):
    """tanh of a linear map, with what makes a cell another function from call to call."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear = nn.Linear(SIZE, SIZE)
        if kind == "weight norm":
            nn.utils.parametrizations.weight_norm(self.linear)
        self.dropout = VariationalDropout(0.3 if kind == "dropout" else 0.0)
        self.norm = nn.BatchNorm1d(SIZE) if kind == "batch norm" else nn.Identity()

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(self.dropout(0.5 * self.linear(z)) + x))


def trained(kind: str, compiles: bool, backward: Any, **autocast: Any) -> list[Tensor]:
    """What a layer returns in three training steps: states, counts and gradients."""
    torch.manual_seed(0)
    alone = kind != "batch norm"
    layer = DeepEquilibriumNetwork(
        Cell(kind),
        solver=Anderson(tol=1e-4, max_steps=12, per_sample=alone),
        adjoint=Implicit(solver=replace(backward, tol=1e-5, max_steps=10, per_sample=alone)),
        compile=compiles,
    )
    found, seen = [], []
    for step in range(3):
        torch.manual_seed(step)
        x = torch.randn(BATCH, SIZE, requires_grad=True)
        with torch.autocast("cpu", **autocast):
            z, solution = layer(x)
        z.float().square().sum().backward()
        found += [z.detach(), solution.nfe, solution.backward.stats.nfe, x.grad]
        found += [p.grad.clone() for p in layer.parameters() if p.grad is not None]
        with torch.no_grad():
            for p in layer.parameters():
                p.add_(0.01 * torch.randn_like(p))
        seen.append(graphs())
    assert not compiles or seen[0] == seen[-1], "a step compiled again"
    return found


@each(
    "kind, backward",
    [
        *(("plain", GMRES()), ("plain", Picard()), ("dropout", Picard())),
        *(("weight norm", GMRES()), ("batch norm", Picard())),
    ],
)
def test_a_layer_trains_as_without_compile_and_is_compiled_once(kind, backward):
    runs = [trained(kind, compiles, backward, enabled=False) for compiles in (False, True)]
    for eager, compiled in zip(*runs, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=2e-6)


def test_autocast_around_the_layer_holds_within_compiled_solves():
    runs = [
        trained("plain", compiles, Picard(), enabled=True, dtype=torch.bfloat16)
        for compiles in (False, True)
    ]
    for eager, compiled in zip(*runs, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-2, atol=1e-2)


def test_another_number_of_steps_is_not_compiled_again_and_another_shape_is():
    layer = DeepEquilibriumNetwork(
        Cell("plain"), solver=Picard(tol=1e-30), steps=RandomSteps(2, 9), compile=True
    )
    counts = []
    with torch.no_grad():
        for batch in (4, 4, 4, 5, 5):
            layer(torch.randn(batch, SIZE))
            counts.append(graphs())
    assert counts[0] == counts[1] == counts[2] < counts[3] == counts[4]


def test_the_first_call_announces_that_it_compiles_and_reports_the_time(caplog):
    solver, start = Picard(compile=True), torch.zeros(BATCH, SIZE)
    with caplog.at_level("WARNING", logger="fastdeq"), torch.no_grad():
        for _ in range(2):
            solve(solver, f, start)
    begin, end = (record.getMessage() for record in caplog.records)
    assert begin.startswith("compiling a solve")
    assert end.startswith("compiled a solve in ")


def test_the_layers_option_sets_both_solvers_and_keeps_a_given_chunk():
    layer = DeepEquilibriumNetwork(
        Cell("plain"), solver=Picard(check_every=3), adjoint=Implicit(), compile=True
    )
    assert (layer.solver.compile, layer.solver.check_every) == (True, 3)
    assert isinstance(layer.adjoint, Implicit)
    backward = layer.adjoint.solver
    assert (backward.compile, backward.check_every) == (True, 6)


def test_what_cannot_be_compiled_is_refused_with_the_cure():
    def branching(z: Tensor) -> Tensor:
        return 0.5 * z if float(z.sum()) > 0 else 0.4 * z + 1

    with pytest.raises(RuntimeError, match="control flow that depends on values") as found:
        fixed_point(branching, torch.zeros(2, 3), solver=Picard(compile=True))
    assert "\n" not in str(found.value)
    for kind in (Picard, GMRES):
        with pytest.raises(ValueError, match="compact changes the shapes"):
            kind(compact=0.5, compile=True)
    with pytest.raises(ValueError, match="leave compile out"):
        DeepEquilibriumNetwork(Cell("plain"), adjoint=Shine(), compile=True)
