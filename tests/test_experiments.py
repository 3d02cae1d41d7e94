"""Every shipped experiment composes with every choice that goes with it, and trains."""

import json
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from tests.commands import CommandLine
from tests.images import samples, small_mnist, write_files
from tests.test_configuration import GROUPS, composed

EXPERIMENTS = GROUPS["experiment"]
MODELS = ["deq", "skip_deq", "skip_reg_deq"]
"""Those that the published rows compare; the multiscale ones need a multiscale arch."""

VARIED = [f"model={model}" for model in MODELS] + [
    f"{group}={choice}"
    for group in ("solver", "adjoint", "optimizer", "scheduler", "trainer", "logger")
    for choice in GROUPS[group]
]
SETTINGS: dict[str, dict[str, object]] = {
    "mnist_fc": {
        "data.batch_size": 32,
        "solver.tol": 5e-3,
        "solver.max_steps": 50,
        "adjoint.solver.max_steps": 15,
        "optimizer.lr": 1e-3,
        "optimizer.weight_decay": 2.5e-6,
        "trainer.max_epochs": 25,
        "skip_weight": 5.0,
        "scheduler._target_": "fastdeq.tasks.Cosine",
        "solver._target_": "fastdeq.solvers.LimitedMemoryBroydenSolver",
    },
    "mnist_fc_tsit5": {
        "solver.method": "tsit5",
        "skip_weight": 0.01,
        "solver.tol": 5e-3,
        "trainer.max_epochs": 25,
    },
    "polynomial_fitting": {
        "data.batch_size": 32,
        "data.samples": 512,
        "data.test_samples": 128,
        "data.noise": 0.005,
        "solver.method": "bs3",
        "solver.tol": 1e-3,
        "solver.max_steps": 50,
        "optimizer.lr": 1e-3,
        "trainer.max_epochs": 300,
        "skip_weight": 1e-2,
        "loss.residual": 1e-3,
    },
    "dynamics": {"arch.hidden": 50},
}
"""As published (arXiv 2201.12240 and the first release's scripts)."""


@pytest.fixture
def data(command: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides that make any experiment small."""
    monkeypatch.setattr("fastdeq.data.MnistDataModule.source", small_mnist())
    write_files(tmp_path / "data" / "mnist", samples())
    monkeypatch.setenv("FASTDEQ_DATA", str(tmp_path / "data"))
    return ["trainer.max_epochs=1", "trainer.limit_train_batches=2", "trainer.accelerator=cpu"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_trains_with_every_model(
    command: CommandLine, data: list[str], experiment: str, model: str
) -> None:
    answer = command(f"experiment={experiment}", f"model={model}", "data.batch_size=15", *data)
    assert answer.status == 0, answer.err
    (path,) = (path for path in answer.files if path.name == "summary.json")
    summary = json.loads(path.read_text())
    assert summary["steps"] == 2
    assert path.parent.parent.name.startswith(model)
    reference = composed(f"experiment={experiment}", f"model={model}").get("reference")
    published = bool(reference and reference.rows)
    assert ("published" in answer.out) == published
    assert (summary["reference"] is not None) == published


@pytest.mark.parametrize("choice", VARIED)
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_with_every_choice(experiment: str, choice: str) -> None:
    cfg = composed(f"experiment={experiment}", choice)
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    for key in ("solver", "adjoint", "loss", "scheduler", "data", "task"):
        instantiate(cfg[key], _convert_="all")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_settings_are_the_published_ones(experiment: str) -> None:
    cfg = composed(f"experiment={experiment}")
    wanted = SETTINGS[experiment]
    found = {key: OmegaConf.select(cfg, key) for key in wanted}
    assert found == wanted


def test_every_row_of_a_reference_can_be_reached_and_names_its_source() -> None:
    for experiment in EXPERIMENTS:
        reference = composed(f"experiment={experiment}").get("reference")
        if not reference:
            continue
        assert reference.source
        for row in reference.rows:
            assert row.where.model in GROUPS["model"]
            assert all(name.startswith("test/") for name in row.figures)
