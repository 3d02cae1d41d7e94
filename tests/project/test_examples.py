"""The programs and notebooks of examples/ run, and reach what they show."""

import runpy
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[2] / "examples"


def result(name: str) -> Any:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]()


def test_the_own_cell_is_solved() -> None:
    assert result("own_cell").converged.all()


def test_the_own_solver_converges_where_picard_does_not() -> None:
    found = result("own_solver")
    assert not found["Picard"].converged.any()
    assert found["HeavyBall"].converged.all()


def test_the_own_adjoint_approaches_the_exact_gradient() -> None:
    exact, one, twenty = result("own_adjoint").values()
    assert (one - exact).norm() > 0.1 * exact.norm()
    assert (twenty - exact).norm() < 1e-3 * exact.norm()


def test_the_own_data_are_learned() -> None:
    assert result("own_data") > 0.95


def test_the_own_module_restores_points() -> None:
    before, after = result("own_module")
    assert after < 0.8 * before
