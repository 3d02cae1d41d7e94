"""What a step costs, as counts that hold on every machine: copies, kernels, waits."""

from functools import partial

import pytest
import torch
from torch import Tensor

from fastdeq import GMRES
from fastdeq._fixed_point import fixed_point
from fastdeq.adjoints import Implicit
from fastdeq.autocast import full_precision
from fastdeq.bench.operations import Operations
from fastdeq.history import History
from fastdeq.norms import PerSample
from fastdeq.solvers import (
    AbstractSolver,
    Anderson,
    BroydenSolver,
    LimitedMemoryBroydenSolver,
    Picard,
    solve,
)
from fastdeq.solvers.base import Problem
from fastdeq.solvers.loop import on_host
from tests.loops import each
from tests.problems import problem_named

BATCH, SIZE = 3, 400  # a state outweighs the small matrices of 15 columns
NEVER = 1e-30  # a tolerance that no solve meets
QUIET = {
    "picard": Picard(tol=NEVER, max_steps=12),
    "anderson": Anderson(tol=NEVER, max_steps=12),
    "lbroyden": LimitedMemoryBroydenSolver(tol=NEVER, max_steps=12, memory=5),
    "broyden": BroydenSolver(tol=NEVER, max_steps=12, line_search_steps=0),
}
"""Solvers whose steps never wait (a line search and vcab3 do, to save evaluations)."""

X = torch.randn(BATCH, SIZE, generator=torch.Generator().manual_seed(1))
SLOPE = torch.linspace(-0.95, 0.95, SIZE)


def bound(z: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(SLOPE * z + x)


cell = partial(bound, x=X)


def operations_of(solver: AbstractSolver | GMRES, steps: int | None = None, every: int = 1):
    """The operations of a solve of `steps` steps."""
    fields = {**vars(solver), "check_every": every}
    solver = type(solver)(**(fields if steps is None else {**fields, "max_steps": steps}))
    operations = Operations()
    with operations, torch.no_grad():
        if isinstance(solver, GMRES):
            solver.solve(lambda v: v - SLOPE * v, X)
        else:
            solve(solver, cell, torch.zeros(BATCH, SIZE))
    return operations


# Waits


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """The number of values in each read of the device by the loop of the solvers."""
    made: list[int] = []

    def counted(values):
        made.append(len(values))
        return on_host(values)

    monkeypatch.setattr("fastdeq.solvers.loop.on_host", counted)
    return made


@each("every", [1, 4, 12])
@pytest.mark.parametrize("name", QUIET)
def test_a_solve_reads_the_device_at_its_start_and_once_per_check_every_steps(name, every, reads):
    reads.clear()
    operations_of(QUIET[name], every=every)
    assert len(reads) == 1 + 12 // every


@pytest.mark.parametrize("name", QUIET)
def test_a_step_reads_nothing_from_the_device(name):
    """`take` decides, from what it has read; all else may run ahead of the host."""
    problem = Problem(cell, torch.zeros(BATCH, SIZE), PerSample(), guarded=True)
    with torch.no_grad():
        at = problem.evaluate(problem.hold)
        memory = QUIET[name].init(problem, at)
        for _ in range(7):
            with Operations() as operations:
                step, memory = QUIET[name].step(problem, at, memory)
            assert operations.waits == 0
            at = step.iterate


@each("every, waits", [(1, 1 + 2 * 12), (4, 1 + 3 + 1), (12, 1 + 1 + 1)])
def test_gmres_waits_at_its_start_and_once_per_check_every_products(every, waits):
    # With 1, each product is followed by the choice of a second pass, too; with more, the last wait
    # is for how many products were needed.
    assert operations_of(GMRES(tol=NEVER, max_steps=12), every=every).waits == waits


def test_a_pass_forward_and_back_waits_for_its_solves_alone(reads):
    x, operations = X.clone().requires_grad_(), Operations()
    solver = LimitedMemoryBroydenSolver(tol=NEVER, max_steps=12, check_every=4)
    adjoint = Implicit(solver=GMRES(tol=NEVER, max_steps=12, check_every=4))
    z = fixed_point(partial(bound, x=x), torch.zeros(BATCH, SIZE), solver=solver, adjoint=adjoint)
    assert len(reads) == 1 + 12 // 4
    assert isinstance(z.value, Tensor)
    with operations:
        z.value.sum().backward()
    assert operations.waits == (1 + 3 + 1) + 1  # GMRES; whether a sample diverged


def test_the_counter_sees_every_kind_of_wait():
    x = torch.arange(4.0)
    for waits in (
        lambda: bool((x > 1).any()),
        lambda: x[2].item(),
        lambda: x[x > 1],
        lambda: torch.nonzero(x),
        lambda: x * torch.tensor([1.0, 2.0, 3.0, 4.0]),
    ):
        with Operations() as operations:
            waits()
        assert operations.waits == 1
    with Operations() as operations:
        x[None].mul(2).masked_fill(x > 1, 0.0)
    assert (operations.waits, operations.kernels) == (0, 3)


@each("restart", [None, 3])
def test_gmres_finds_the_same_for_every_check_every(restart):
    draw = torch.Generator().manual_seed(0)
    a = torch.eye(12) + 0.5 * torch.randn(6, 12, 12, generator=draw) / 12**0.5
    a[1] = torch.eye(12)  # done after one product
    a[2, 0] = torch.nan  # diverges
    b = torch.randn(6, 12, generator=draw)
    often, rarely = (
        GMRES(tol=1e-4, max_steps=20, restart=restart, check_every=every).solve(
            lambda v: torch.bmm(a, v[:, :, None])[:, :, 0], b
        )
        for every in (1, 7)
    )
    for name in ("status", "steps", "nfe"):
        assert torch.equal(getattr(often, name), getattr(rarely, name)), name
    torch.testing.assert_close(often.value, rarely.value)


# Copies and kernels


@each(
    "solver",
    [
        Anderson(tol=NEVER, memory=16),
        LimitedMemoryBroydenSolver(tol=NEVER, memory=16),
        GMRES(tol=NEVER),
    ],
)
def test_a_step_within_the_capacity_of_its_history_writes_no_more_than_a_state_at_once(solver):
    before, after = (operations_of(solver, steps) for steps in (10, 15))
    # Up to step 10, when the capacity of histories is 16 rows, the two runs are the same.
    large = [
        [entries for entries in run.written if entries > BATCH * SIZE] for run in (before, after)
    ]
    assert len(large[0]) == len(large[1])


def test_gmres_writes_its_basis_in_place_a_row_at_a_time():
    basis, row = History(31), torch.ones(BATCH, SIZE)
    with torch.no_grad():
        places = [basis.slot(row).data_ptr() for _ in range(31)]
    moves = [k for k in range(1, 31) if places[k] - places[k - 1] != SIZE * row.element_size()]
    assert set(moves) <= {4, 8, 16}  # where it grew; nowhere else


@pytest.mark.parametrize(
    ("solver", "most"),
    [
        (QUIET["picard"], 15),
        (QUIET["anderson"], 32),
        (LimitedMemoryBroydenSolver(tol=NEVER), 40),
        (QUIET["broyden"], 45),
        (GMRES(tol=NEVER), 38),
        (Picard(tol=NEVER, per_sample=False), 19),
        (LimitedMemoryBroydenSolver(tol=NEVER, per_sample=False), 44),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, int) else "",
)
def test_a_step_takes_at_most_so_many_kernels(solver, most):
    # With torch 2.13 two to four fewer; versions differ in what they fuse. All samples improve in
    # this step, as in most. Three are the cell's (of GMRES two). No history grows here.
    ten, eleven = (operations_of(solver, steps).kernels for steps in (10, 11))
    assert eleven - ten <= most


# Histories


@each("memory", [1, 3, 4, 9])
def test_a_history_holds_the_newest_rows_with_and_without_gradients(memory):
    histories = History(memory), History(memory)
    assert len(histories[0]) == 0
    for k in range(1, 14):
        row = torch.full((2, 5), float(k))
        histories[0].push(row)
        with torch.no_grad():
            histories[1].push(row)
        wanted = [float(i) for i in range(max(1, k - memory + 1), k + 1)]
        for history in histories:
            assert len(history) == len(wanted)
            assert sorted(history.rows[1, :, 4].tolist()) == wanted


def test_a_cleared_history_is_filled_anew():
    history = History(2)
    for rows in ((1.0, 2.0, 3.0), (4.0,)):
        history.clear()
        with torch.no_grad():
            for value in rows:
                history.push(torch.full((1, 1), value))
    assert history.rows.flatten().tolist() == [4.0]


@each("memory", [3, 20, 1000])
def test_a_history_takes_no_more_than_twice_what_it_holds_or_four_rows(memory):
    history, row = History(memory), torch.zeros(2, 5)
    for k in range(1, 41):
        with torch.no_grad():
            history.push(row)
        capacity = history.rows.untyped_storage().nbytes() / row.nbytes
        assert capacity <= min(memory, max(4, 2 * (k - 1)))


def test_rows_that_gradients_flow_through_are_never_written_to():
    history, rows = History(2), [torch.ones(1, 3, requires_grad=True) for _ in range(4)]
    loss = torch.zeros(())
    for row in rows:
        history.push(row)
        loss = loss + history.rows.square().sum()
    loss.backward()  # raises where a buffer was written to after it was read
    # d/dx x² = 2, once for every step at which the row was kept
    gradients = [row.grad for row in rows]
    torch.testing.assert_close(
        gradients, [torch.full((1, 3), slope) for slope in (4.0, 4.0, 4.0, 2.0)]
    )


# Autocast


@pytest.mark.parametrize("name", QUIET)
def test_under_autocast_the_solver_computes_as_without_it(name):
    """f computes in float32 either way here, so that only the solver's arithmetic could differ."""
    w = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(2)) / SIZE**0.5

    def f(z: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return torch.tanh(0.8 * z @ w + X)

    found = []
    for autocast in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(solve(QUIET[name], f, torch.zeros(BATCH, SIZE)).value)
    assert torch.equal(*found)


def test_under_autocast_gmres_computes_as_without_it_and_f_in_half_precision():
    problem, dtypes = problem_named("tanh"), set()
    x = problem.x.detach().float()
    w = 0.1 * torch.ones(x.shape[1], x.shape[1])

    def matvec(v: Tensor) -> Tensor:
        dtypes.add((v @ w).dtype)
        with torch.autocast("cpu", enabled=False):
            return v - v @ w

    plain = GMRES(tol=1e-6).solve(matvec, x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = GMRES(tol=1e-6).solve(matvec, x)
        assert (x @ w).dtype == torch.bfloat16  # outside, all is as before
    assert torch.equal(plain.value, cast.value)
    assert dtypes == {torch.float32, torch.bfloat16}


def test_without_autocast_f_is_handed_back_as_it_is():
    with full_precision(cell, torch.device("cpu")) as f:
        assert f is cell


def test_a_backward_pass_inside_autocast_solves_like_one_outside():
    """Backward belongs outside of autocast, but a user may call it inside."""
    gradients: list[Tensor] = []
    for inside in (False, True):
        x = X.clone().requires_grad_()
        f, adjoint = partial(bound, x=x), Implicit(solver=GMRES(tol=1e-5))
        value = fixed_point(f, torch.zeros(BATCH, SIZE), adjoint=adjoint).value
        assert isinstance(value, Tensor)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            gradients += torch.autograd.grad(value.sum(), x)
    assert torch.equal(*gradients)
