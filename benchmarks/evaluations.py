"""Evaluations of f: of continuous solvers, and rows of f that a batch computes and needs."""

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.measuring import Row
from fastdeq.solvers import ContinuousSolver, LimitedMemoryBroydenSolver, Picard, solve
from fastdeq.solvers.base import AbstractSolver

METHODS = ("tsit5", "vcab3", "bs3")


def rows(quick: bool) -> Iterator[Row]:
    """To a steady state at two tolerances, and over a batch of easy and hard samples."""
    f = tanh_problem(64, 64)
    for tol in (1e-3, 1e-5):
        for method in METHODS:
            solver = ContinuousSolver(method=method, tol=tol, max_steps=2000)  # type: ignore[arg-type]
            yield _solved(f"{method} to {tol:.0e}", solver, f)
        yield _solved(
            f"L-Broyden to {tol:.0e}", LimitedMemoryBroydenSolver(tol=tol, max_steps=500), f
        )
    yield _rows_of_f()


def tanh_problem(batch: int, size: int):  # type: ignore[no-untyped-def]  # a lambda
    """f(z) = tanh(W z + x) with ‖W‖₂ = 0.9."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=draw)
    weight = 0.9 * weight / torch.linalg.matrix_norm(weight, 2)
    x = torch.randn(batch, size, generator=draw)
    return lambda z: torch.tanh(z @ weight.T + x)


def _solved(case: str, solver: AbstractSolver, f) -> Row:  # type: ignore[no-untyped-def]
    found = solve(solver, f, torch.zeros(64, 64))
    lost = int((~found.converged).sum())
    return Row(
        section="steady state",
        case=case,
        unit="evaluations",
        values={"fastdeq": float(found.nfe.double().mean())},
        note=f"{lost} of {len(found.status)} samples did not converge" if lost else "",
    )


def _rows_of_f() -> Row:
    """f(z) = g z + 1, with g from 0.05 to 0.98 over the batch."""
    gain, computed = torch.linspace(0.05, 0.98, 64)[:, None], 0

    def f(z: Tensor) -> Tensor:
        nonlocal computed
        computed += len(z)
        return gain[: len(z)] * z + 1

    found = solve(Picard(tol=1e-4, max_steps=500), f, torch.zeros(64, 16))
    return Row(
        section="easy and hard samples",
        case="Picard, 64 samples",
        unit="rows of f",
        values={"f alone": float(found.nfe.sum()), "fastdeq": float(computed)},
        note="f alone: as many as the samples need",
    )
