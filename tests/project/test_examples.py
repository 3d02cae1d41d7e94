"""The programs and notebooks of examples/ run, and reach what they show."""

import json
import runpy
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fastdeq import data
from tests.data.idx_files import samples, write_files

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


def cells(name: str) -> list[dict[str, Any]]:
    notebook = json.loads((EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def executed(name: str, **changes: str) -> dict[str, Any]:
    """The names of a notebook after all its cells; changes: in their text."""
    names: dict[str, Any] = {}
    for cell in cells(name):
        code = "".join(cell["source"])
        for old, new in changes.items():
            code = code.replace(old, new)
        exec(compile(code, name, "exec"), names)
    return names


def test_the_notebooks_keep_their_outputs() -> None:
    for name in ("from_scratch", "mnist"):
        assert [cell["execution_count"] for cell in cells(name)] == [
            *range(1, len(cells(name)) + 1)
        ]
        assert any(cell["outputs"] for cell in cells(name))


def test_the_notebook_from_scratch_runs_and_learns() -> None:
    assert executed("from_scratch")["loss"] < 0.5


def test_the_notebook_on_mnist_runs_on_files_of_its_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path, samples())
    monkeypatch.setenv("FASTDEQ_DATA", str(tmp_path))
    module = partial(data.MnistDataModule, verify=False, store=tmp_path / "store")
    monkeypatch.setattr(data, "MnistDataModule", module)
    names = executed("mnist", **{"STEPS = 400": "STEPS = 2"})
    assert set(names["results"]) == {"DEQ", "skip DEQ"}
