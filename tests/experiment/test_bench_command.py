"""``fastdeq bench``: one training step with several solvers, adjoints and precisions."""

import json
import re
import sys
from pathlib import Path

import pytest

from benchmarks import run
from fastdeq import cli
from fastdeq.adjoints import Implicit, JacobianFree
from fastdeq.bench.compare import Comparison, Measured, combinations
from fastdeq.bench.table import advice
from fastdeq.experiment.parts import build_choices
from fastdeq.solvers import Anderson, Picard
from tests.loops import each

SECONDS = ("--seconds", "100")
"""More than 20 repetitions take on a busy machine, after which a comparison ends."""
SHORT = (*SECONDS, "--precisions", "float32")
MINE = """
import torch
from torch import nn

torch.manual_seed(0)
linear, x = nn.Linear(8, 8), torch.randn(4, 8)
nn.init.orthogonal_(linear.weight, 0.8)
number = 3


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = linear

    def forward(self, z, x):
        return torch.tanh(self.linear(z) + x)


def cell():
    return Cell(), x


def function():
    return lambda z: torch.tanh(linear(z) + x), torch.zeros(4, 8)


def other():
    return 3


def not_finite():
    return lambda z: torch.tanh(linear(z) + x) * torch.nan, torch.zeros(4, 8)


def constant():
    return lambda z: torch.tanh(0.5 * z + x), torch.zeros(4, 8)


def takes(argument):
    return argument


def fails():
    raise RuntimeError("no such file")
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of a user, in the current folder."""
    (tmp_path / "mine.py").write_text(MINE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)


def bench(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Status, stdout and stderr of the command in this process."""
    capsys.readouterr()
    status = cli.dispatch(["bench", *words])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_a_configured_step_is_compared_and_overrides_are_recommended(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("model=skip_deq", "data=digits", "--solvers", "anderson,picard", "solver.tol=1e-3")
    status, out, err = bench(capsys, *words, "--adjoints", "implicit,jfb", *SHORT)
    assert (status, err) == (0, "")
    rows = re.findall(r"^(anderson|picard) +(implicit|jfb) +float32 ", out, re.MULTILINE)
    assert len(set(rows)) == 4
    # An untrained cell: the Jacobian-free gradient is not within the cosine of 0.99.
    assert re.search(r"^recommended: solver=(anderson|picard) adjoint=implicit$", out, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []  # no run folder


@each("name", ["cell", "function"])
def test_a_users_function_is_compared_and_settings_are_recommended(name, capsys, mine):
    words = (f"mine:{name}", "--solvers", "picard", "--adjoints", "implicit", *SECONDS)
    status, out, err = bench(capsys, *words)
    assert (status, err) == (0, "")
    assert re.search(r"^picard +implicit +bf16 ", out, re.MULTILINE)
    assert "\nrecommended: solver=picard adjoint=implicit" in out
    assert "\nsettings: solver=Picard(tol=0.005," in out


@each(
    "words, status, text",
    [
        ("none_of_mine:cell", 1, "cannot be imported: No module named 'none_of_mine'"),
        ("mine:cel", 1, "mine:cel cannot be imported: module 'mine' has no attribute 'cel'"),
        ("mine:number", 1, "mine:number is of type int, but must be a function"),
        ("mine:takes", 1, "mine:takes must be a function without arguments"),
        ("mine:fails", 1, "mine:fails raises RuntimeError: no such file"),
        ("mine:other", 1, "mine:other returns one int, but must return (cell, x)"),
        ("mine:not_finite", 1, "f of mine:not_finite is not finite at its start"),
        ("mine:constant", 1, "depends on no tensor that requires a gradient"),
        ("mine:cell mine:function", 2, "'mine:function' is one function too many"),
        ("mine:cell model=deq", 2, "model=deq has no effect on mine:cell"),
        ("mine:cell solver.tol=-1", 1, "tol is -1, but must be finite and above 0"),
        ("model=residual", 1, "without a solver and an adjoint to compare: choose model=deq"),
        ("model=dqe", 1, "there is no model=dqe"),
        ("model", 1, "'model' sets nothing: write model=VALUE"),
        ("--secnds 3", 2, "unknown option '--secnds': did you mean --seconds?"),
        ("--seconds 0", 2, "--seconds is 0.0, but must be above 0"),
        ("--solvers lbryden mine:cell", 2, "unknown solver 'lbryden': did you mean lbroyden?"),
        ("mine:cell --seconds 1e-9", 1, "the exact gradient takes longer than 3e-10 seconds"),
    ],
)
def test_wrong_input_is_refused_in_one_line(words, status, text, capsys, mine):
    found, out, err = bench(capsys, *words.split())
    assert (found, out) == (status, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert text in err


def test_settings_of_the_chosen_solver_are_left_out_for_the_others():
    found = build_choices(["solver=anderson", "solver.memory=3", "solver.tol=1e-2"])
    assert found.solvers["anderson"] == Anderson(
        tol=1e-2, memory=3, max_steps=50, termination="rel_deq_best"
    )
    assert next(iter(found.solvers)) == "anderson"
    assert {solver.tol for solver in found.solvers.values()} == {1e-2}
    assert found.solvers["lbroyden"].memory == 20  # type: ignore[attr-defined]
    assert found.refused == {}


def _measured(seconds: float, converged: float, cosine: float, place: int) -> Measured:
    solvers = {"picard": Picard(), "anderson": Anderson()}
    every = combinations(
        solvers, {"implicit": Implicit(), "jfb": JacobianFree()}, {"float32": None, "bf16": "bf16"}
    )
    return Measured(
        combination=every[place],
        nfe=5.0,
        vjps=None,
        residual=1e-3,
        converged=converged,
        cosine=cosine,
        memory=0,
        forward=[seconds],
        backward=[0.0],
    )


def test_the_fastest_that_converges_with_the_right_gradient_is_recommended():
    rows = [
        _measured(1.0, 0.5, 1.0, 1),  # does not converge
        _measured(2.0, 1.0, 0.9, 2),  # another gradient
        _measured(3.0, 1.0, float("nan"), 4),
        _measured(4.0, 1.0, 0.995, 3),
        _measured(8.0, 1.0, 1.0, 0),
    ]
    found = Comparison(measured=rows, refused={}, late=[], exact_residual=0.0)
    assert found.recommended is rows[3]
    names, best = rows[4].combination.names, rows[3].combination.names
    lines = list(advice(found, {}, configured=names, seconds=1, own=False))
    expected = f"recommended: solver={best[0]} adjoint={best[1]}"
    assert lines[-1].startswith(expected)
    assert lines[-1].endswith("  (2.00 times as fast as configured)")


def test_without_a_good_combination_the_cure_is_named():
    found = Comparison(
        measured=[_measured(1.0, 0.5, 1.0, 0)],
        refused={},
        late=[_measured(1.0, 1.0, 1.0, 1).combination],
        exact_residual=1e-2,
    )
    lines = list(
        advice(
            found,
            {"broyden implicit float32": "too large", "broyden jfb bf16": "too large"},
            configured=("picard", "implicit", "float32"),
            seconds=7,
            own=False,
        )
    )
    assert lines[0] == "left out: broyden: too large"
    assert lines[1].startswith("not measured within --seconds 7: ")
    assert "relative residual of 1.0e-02" in lines[2]
    assert "raise solver.max_steps" in lines[-1]


def test_the_first_combinations_differ_least_from_the_configured_one():
    every = combinations(
        {"a": Picard(), "b": Anderson()}, {"c": Implicit(), "d": JacobianFree()}, {"e": None}
    )
    assert [one.names for one in every] == [
        ("a", "c", "e"),
        ("a", "d", "e"),
        ("b", "c", "e"),
        ("b", "d", "e"),
    ]


# make bench


def test_the_benchmarks_print_a_table_and_write_the_same_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "benchmarks.json"
    only = "dense,scaling,multiscale,evaluations"  # the others start processes
    assert run.main(["--quick", "--only", only, "--json", str(path)]) == 0
    out = capsys.readouterr().out
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["about"]["quick"] is True
    assert {row["section"] for row in content["rows"]} >= {"dense solve", "steady state"}
    for row in content["rows"]:
        assert f"| {row['case']} " in out
        assert row["values"]["fastdeq"] > 0
    ratio = content["rows"][0]["ratios"]["fastdeq / f alone"]
    assert ratio > 0


@pytest.mark.slow
def test_the_benchmarks_that_start_processes_run(tmp_path: Path) -> None:
    path = tmp_path / "benchmarks.json"
    assert run.main(["--quick", "--only", "memory,train", "--json", str(path)]) == 0
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert [row["unit"] for row in rows][-1] == "ms per step"


def test_an_unknown_section_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--only", "dnse"])
    assert "there is no section 'dnse'; choose from dense," in capsys.readouterr().err
