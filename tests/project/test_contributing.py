"""The documents for contributors are true: the examples of CONTRIBUTING.md run, and do what they
promise."""

import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor

import fastdeq
from fastdeq.adjoints import AbstractAdjoint, Implicit
from fastdeq.data import InMemoryDataModule
from fastdeq.data.command import SETS
from fastdeq.data.command import main as data_command
from fastdeq.experiment.build import build_task
from fastdeq.flatten import Layout
from fastdeq.norms import sample_norm
from fastdeq.solution import Status
from fastdeq.solvers import AbstractSolver, NewtonKrylov, solve
from tests.problems import FACTORIES, Problem, problem_named, tanh

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
DECISIONS = ROOT / "docs" / "decisions"


def examples(language: str) -> dict[str, str]:
    """Of every code block in `language`, the text, by the file that the step above names."""
    pattern = rf"here `([\w/.]+)`|configuration, `([\w/.]+)`|```{language}\n(.*?)```"
    found, file = {}, ""
    for python, config, code in re.findall(pattern, GUIDE, re.DOTALL):
        file = python or config or file
        if code:
            found[file] = textwrap.dedent(code)
    return found


CODE, CONFIGURATION = examples("python"), examples("yaml")


def example(kind: str) -> Any:
    """The class that the example for `kind` defines, from a module of its file's name."""
    file = next(name for name in CODE if name.startswith(f"fastdeq/{kind}/"))
    module = ModuleType(file.removesuffix(".py").replace("/", "."))
    sys.modules[module.__name__] = module  # dataclasses look their annotations up there
    try:
        exec(compile(CODE[file], file, "exec"), module.__dict__)
        (name,) = re.findall(r"^class ([A-Z]\w*)", CODE[file], re.MULTILINE)
        return getattr(module, name)
    finally:
        del sys.modules[module.__name__]


HeavyBall: Callable[..., AbstractSolver] = example("solvers")
Truncated: Callable[..., AbstractAdjoint] = example("adjoints")
RingsDataModule: Callable[..., InMemoryDataModule] = example("data")


def test_every_code_block_of_the_guide_is_run_here():
    assert len(CODE) == GUIDE.count("```python") == 3
    assert len(CONFIGURATION) == GUIDE.count("```yaml") == 3


# The solver


@pytest.mark.parametrize("name", FACTORIES)
def test_the_solver_of_the_guide_finds_every_equilibrium(name):
    problem = problem_named(name)
    with torch.no_grad():
        result = solve(HeavyBall(tol=1e-8, max_steps=2000), problem.flat_f, problem.flat_z0)
    here = problem.solvable
    assert (result.status[here] == Status.CONVERGED).all()
    assert (result.status[~here] == Status.DIVERGED).all()
    # z − z* = (I − J)⁻¹ g, exactly where f is linear; 2 allows for curvature.
    error = sample_norm(result.value - problem.exact)[here]
    assert (error <= 2 * problem.rows(here).amplification * result.residual[here] + 1e-13).all()


def test_the_solver_of_the_guide_keeps_samples_independent():
    whole = tanh(batch=16)
    solver = HeavyBall(tol=1e-8, max_steps=500)
    with torch.no_grad():
        together = solve(solver, whole.flat_f, whole.flat_z0)
        assert len(together.steps.unique()) > 1
        for i in range(0, 16, 5):
            part = whole.rows(torch.tensor([i]))
            alone = solve(solver, part.flat_f, part.flat_z0)
            assert int(alone.nfe) == int(together.nfe[i])
            # Matrix products of another batch size may sum in another order.
            torch.testing.assert_close(alone.value[0], together.value[i], rtol=0, atol=1e-12)


# The adjoint


def gradients(problem: Problem, adjoint: AbstractAdjoint, **options: Any) -> Any:
    solver = NewtonKrylov(tol=1e-13)
    value = fastdeq.fixed_point(problem.f, problem.z0, solver=solver, adjoint=adjoint).value
    flat = Layout.of(problem.z0).flatten(value)
    return torch.autograd.grad(flat, problem.leaves, torch.ones_like(flat), **options)


def error(problem: Problem, got: Any) -> float:
    exact = problem.gradient(torch.ones_like(problem.exact))
    return max(float((a - b).norm() / b.norm()) for a, b in zip(got, exact, strict=True))


@pytest.mark.parametrize("name", ["linear", "tanh", "two_scale"])
def test_the_adjoint_of_the_guide_is_approximate_and_tends_to_the_dense_gradient(name):
    assert "Approximate:" in str(Truncated.__doc__)
    problem = problem_named(name)
    assert error(problem, gradients(problem, Truncated(terms=1))) > 1e-3
    # ‖J‖₂ ≤ 0.8 in these problems, and 0.8¹⁰¹ = 2e-10.
    assert error(problem, gradients(problem, Truncated(terms=100))) <= 1e-8


def test_the_adjoint_of_the_guide_adds_the_terms_that_it_states():
    problem = problem_named("linear")
    jacobian, w = problem.jacobian, torch.ones_like(problem.exact)
    v, term = w.reshape(-1), w.reshape(-1)
    for _ in range(3):
        term = jacobian.mT @ term
        v = v + term
    expected = torch.autograd.grad(problem.flat_f(problem.exact), problem.leaves, v.view_as(w))
    for got, wanted in zip(gradients(problem, Truncated(terms=3)), expected, strict=True):
        # A linear problem has the same J everywhere: what is left is rounding.
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)


def test_the_adjoint_of_the_guide_leaves_the_value_alone():
    problem = problem_named("two_scale")
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            one, other = (
                fastdeq.fixed_point(problem.f, problem.z0, adjoint=adjoint).value
                for adjoint in (Truncated(), Implicit())
            )
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))  # two scales


def test_the_adjoint_of_the_guide_wants_no_gradient_where_f_is_frozen():
    def f(z: Any) -> Any:
        return 0.5 * z + 1

    value = fastdeq.fixed_point(f, torch.zeros(2, 3), adjoint=Truncated()).value
    assert isinstance(value, Tensor)
    assert not value.requires_grad


def test_the_adjoint_of_the_guide_refuses_a_second_derivative():
    problem = problem_named("tanh")
    first = gradients(problem, Truncated(), create_graph=True)
    with pytest.raises(RuntimeError, match="once, not twice"):
        torch.autograd.grad(sum(one.sum() for one in first), problem.leaves)


# The data set


def test_the_data_set_of_the_guide_yields_batches_as_it_says():
    data = RingsDataModule(batch_size=32)
    data.prepare_data()
    data.setup()
    batches = list(data.train_dataloader())
    assert len(batches) == 16
    inputs = torch.cat([batch.inputs for batch in batches])
    labels = torch.cat([batch.targets for batch in batches])
    assert inputs.shape == (512, 2)
    assert inputs.dtype == torch.float32
    assert labels.shape == (512,)
    assert labels.dtype == torch.int64
    # Five standard errors of the mean radius; noise across the radius adds 0.1²/2 and less to it.
    for label in (0, 1):
        radii = inputs[labels == label].norm(dim=1)
        assert float((radii.mean() - 1 - label).abs()) <= 0.005 + 5 * 0.1 / len(radii) ** 0.5


def test_the_data_set_of_the_guide_is_shuffled_by_its_seed_and_keeps_its_points():
    def points(seed: int) -> Tensor:
        data = RingsDataModule(seed=seed)
        data.setup()
        return torch.cat([batch.inputs for batch in data.train_dataloader()])

    one, other = points(0), points(1)
    assert not torch.equal(one, other)
    assert torch.equal(one.sort(dim=0).values, other.sort(dim=0).values)


def test_the_data_command_describes_the_data_set_of_the_guide(monkeypatch, capsys):
    monkeypatch.setitem(SETS, "rings", RingsDataModule)
    assert data_command(["rings", "--samples=10"]) == 0
    printed = capsys.readouterr().out
    assert "10 samples" in printed
    assert "generated" in printed


# All three, by their configuration


def test_the_three_examples_compose_from_their_files_and_train_a_step(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    for file, text in CONFIGURATION.items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    for kind, cls in (("solvers", HeavyBall), ("adjoints", Truncated), ("data", RingsDataModule)):
        monkeypatch.setattr(f"fastdeq.{kind}.{cls.__name__}", cls, raising=False)
    with initialize_config_dir(version_base="1.3", config_dir=str(tmp_path / "conf")):
        cfg = compose("train", overrides=["data=rings", "solver=heavy_ball", "adjoint=truncated"])
    task, data = build_task(cfg), instantiate(cfg.data, _convert_="all")
    assert task.model.equilibrium.solver == HeavyBall(tol=cfg.solver.tol)
    assert task.model.equilibrium.adjoint == Truncated()
    assert (data.input_shape, data.outputs) == (tuple(cfg.sizes.input), cfg.sizes.outputs)
    batch = data.sample_batch(8)
    prediction, solution = task.model(batch.inputs)
    assert solution.converged.all()
    task.criterion(prediction, batch.targets).backward()
    for name, parameter in task.model.named_parameters():
        if "initializer" not in name:  # trained by the skip loss alone
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


# What the documents name


def test_the_make_commands_of_the_guide_have_their_targets():
    commands = re.findall(r"^(make .*)$|`(make [^`]+)`", GUIDE, re.MULTILINE)
    assert len(commands) >= 6
    for block, inline in commands:
        words = shlex.split(block or inline)
        answer = subprocess.run(
            [*words, "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert answer.returncode == 0, answer.stderr


def test_the_files_that_the_guide_and_the_records_name_exist():
    made_here = {*CODE, *CONFIGURATION, "tests/test_rings.py"}
    texts = [GUIDE, *(path.read_text(encoding="utf-8") for path in DECISIONS.glob("*.md"))]
    names = re.findall(r"`((?:tests|fastdeq|conf|docs)/[\w/.-]*\w)/?`", "\n".join(texts))
    assert len(names) > 40
    for name in names:
        assert name in made_here or (ROOT / name).exists(), name


def test_the_lists_that_the_guide_names_exist():
    for file, name in (
        ("problems", "SOLVERS"),
        ("problems", "HOPELESS"),
        ("test_solvers", "STALLS"),
        ("test_adjoints", "SLOW"),
        ("gradients", "BACKWARD"),
        ("test_adjoints", "APPROXIMATE"),
        ("test_wrong_input", "ADJOINTS"),
        ("test_configuration", "ARCHS"),
    ):
        assert f"`{name}`" in GUIDE
        (path,) = (ROOT / "tests").rglob(f"{file}.py")
        source = path.read_text(encoding="utf-8")
        assert re.search(rf"^{name}\b.*=", source, re.MULTILINE), name


def test_citation_and_changelog_are_of_the_version_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)  # required by CFF 1.2.0
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == fastdeq.__version__
    assert f"## [{fastdeq.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_every_decision_record_is_in_the_index_and_has_its_four_parts():
    index = (DECISIONS / "README.md").read_text(encoding="utf-8")
    records = sorted(DECISIONS.glob("0*.md"))
    assert sorted(re.findall(r"\]\((0[\w-]+\.md)\)", index)) == [record.name for record in records]
    for record in records:
        text = record.read_text(encoding="utf-8")
        assert re.findall(r"^## (\w+)", text, re.MULTILINE) == [
            *("Status", "Context", "Decision", "Consequences")
        ]


def test_what_the_source_distribution_includes_exists():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for name in settings["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]:
        assert (ROOT / name.lstrip("/")).exists(), name
