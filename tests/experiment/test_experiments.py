"""Every shipped experiment composes with every choice that it supports, and trains."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from fastdeq.experiment.build import build_model, build_task
from fastdeq.report.published import TABLES, published_row, read_table
from tests.commands import ROOT, CommandLine
from tests.configurations import GROUPS, NEEDS, composed
from tests.data.cifar_svhn_files import (
    ARCHIVE,
    archive,
    cifar_files,
    small_cifar,
    small_svhn,
    svhn_files,
    write_folder,
)
from tests.data.idx_files import samples, small_mnist, write_files
from tests.data.image_folders import images, write_images
from tests.problems import CONTINUOUS

pytestmark = pytest.mark.slow

EXPERIMENTS = GROUPS["experiment"]
FULLY_CONNECTED = ["deq", "skip_deq", "skip_reg_deq"]
MULTISCALE = ["mdeq", "skip_mdeq", "skip_reg_mdeq"]
MODELS = {
    **{experiment: [*MULTISCALE, "neural_ode"] for experiment in EXPERIMENTS},
    **dict.fromkeys(
        ["polynomial_fitting", "dynamics", "mnist_fc", "mnist_fc_tsit5"], FULLY_CONNECTED
    ),
    "imagenet_small": MULTISCALE,
}
"""Those that the published rows compare."""

TRAINED = [(experiment, model) for experiment in EXPERIMENTS for model in MODELS[experiment]]
INDEPENDENT = {group: GROUPS[group] for group in ("optimizer", "scheduler", "trainer", "logger")}
TOGETHER = [
    " ".join(f"{group}={choices[n % len(choices)]}" for group, choices in INDEPENDENT.items())
    for n in range(max(map(len, INDEPENDENT.values())))
]
"""Every choice of groups that do not depend on each other, in as few words as that takes."""
VARIED = [(experiment, f"model={model}") for experiment, model in TRAINED] + [
    (experiment, choice)
    for experiment in EXPERIMENTS
    for choice in (
        *(f"{group}={choice}" for group in ("solver", "adjoint") for choice in GROUPS[group]),
        *TOGETHER,
    )
]
SOLVER_OF = {
    "adjoint=reversible": ("solver=reversible",),
    "adjoint=shine": ("solver=lbroyden",),
}
"""Adjoints that need a solver of their own."""
SETTINGS: dict[str, dict[str, object]] = {
    "mnist_fc": {
        "arch.initialization": "glorot",
        "arch.stem_activation": "torch.nn.ReLU",
        "data.normalization": "none",
        "data.batch_size": 192,
        "solver.tol": 5e-3,
        "solver.max_steps": 50,
        "adjoint.solver.max_steps": 15,
        "optimizer.lr": 1e-3,
        "optimizer.weight_decay": 2.5e-6,
        "trainer.max_epochs": 25,
        "loss.skip": 5.0,
        "scheduler._target_": "fastdeq.training.Cosine",
        "solver._target_": "fastdeq.solvers.LimitedMemoryBroydenSolver",
    },
    "mnist_fc_tsit5": {
        "data.batch_size": 32,
        "arch.initialization": "glorot",
        "solver.method": "tsit5",
        "loss.skip": 0.01,
        "solver.tol": 5e-3,
        "solver.ode_tol": 5e-3,
        "trainer.max_epochs": 25,
    },
    "polynomial_fitting": {
        "data.batch_size": 32,
        "data.samples": 512,
        "data.test_samples": 128,
        "data.noise": 0.005,
        "solver.method": "bs3",
        "solver.tol": 1e-3,
        "solver.ode_tol": 1e-3,
        "solver.max_steps": 50,
        "optimizer.lr": 1e-3,
        "trainer.max_epochs": 300,
        "loss.skip": 1e-2,
        "loss.residual": 1e-3,
    },
    "dynamics": {"arch.hidden": 50, "solver.tol": 1e-3, "solver.ode_tol": 1e-3},
    "cifar10_tiny": {
        "data.batch_size": 128,
        "data.augmentation": [],
        "arch.channels": [24, 24],
        "arch.dropout": 0.2,
        "solver.tol": 5e-2,
        "solver.max_steps": 18,
        "solver.per_sample": False,
        "adjoint.solver.tol": 5e-2,
        "adjoint.solver.max_steps": 20,
        "adjoint.solver.per_sample": False,
        "optimizer.lr": 1e-3,
        "optimizer.weight_decay": 2.5e-6,
        "trainer.max_steps": 20000,
        "loss.skip": 0.01,
        "callbacks.pretraining.steps": 3000,
        "callbacks.pretraining.depth": 5,
    },
}
"""As published (arXiv 2201.12240 and the first release's scripts)."""
SETTINGS["cifar10_large"] = SETTINGS["cifar10_tiny"] | {
    "arch.channels": [32, 64, 128, 256],
    "arch.dropout": 0.3,
    "arch.weight_norm": True,
    "data.augmentation": [
        {"_target_": "fastdeq.data.RandomFlip", "share": 0.5},
        {"_target_": "fastdeq.data.ResizeCrop", "resize": 42, "size": 32},
    ],
    "solver.termination": "rel_deq_best",
    "trainer.max_steps": 90_000,
}
SETTINGS["imagenet_small"] = {
    "data.batch_size": 64,
    "arch.channels": [32, 64, 128, 256],
    "arch.dropout": 0.0,
    "arch.weight_norm": True,
    "solver.max_steps": 27,
    "solver.termination": "abs_deq_best",
    "solver.per_sample": False,
    "adjoint.solver.max_steps": 28,
    "optimizer._target_": "torch.optim.SGD",
    "optimizer.lr": 0.05,
    "optimizer.momentum": 0.9,
    "optimizer.nesterov": True,
    "optimizer.weight_decay": 1e-6,
    "scheduler.at": [0.2, 0.3, 0.5],
    "scheduler.factor": 0.1,
    "trainer.max_steps": 500_000,
    "task.top5": True,
}
SETTINGS["mnist_mdeq"] = {
    "data.normalization": "none",
    "data.batch_size": 64,
    "arch.channels": [8, 16],
    "arch.normalization": "group",
    "solver.tol": 1e-2,
    "solver.max_steps": 50,
    "solver.per_sample": True,
    "optimizer._target_": "torch.optim.AdamW",
    "optimizer.lr": 1e-3,
    "optimizer.weight_decay": 2.5e-6,
    "scheduler.minimum": 1e-6,
    "trainer.max_epochs": 25,
    "loss.skip": 1.0,
    "loss.residual": 1e-3,
}
SETTINGS["svhn"] = {
    "data._target_": "fastdeq.data.SvhnDataModule",
    "data.batch_size": 32,
    "arch.channels": [24, 24],
    "arch.dropout": 0.25,
    "arch.normalization": "group",
    "solver._target_": "fastdeq.solvers.LimitedMemoryBroydenSolver",
    "solver.tol": 5e-2,
    "solver.max_steps": 20,
    "solver.termination": "rel_deq_best",
    "optimizer._target_": "torch.optim.AdamW",
    "optimizer.lr": 1e-3,
    "optimizer.weight_decay": 2.5e-6,
    "scheduler.minimum": 1e-6,
    "trainer.max_epochs": 50,
    "callbacks.pretraining.steps": 0,
    "loss.skip": 0.01,
}
SETTINGS["cifar10_mdeq"] = SETTINGS["svhn"] | {"data._target_": "fastdeq.data.Cifar10DataModule"}


NARROW = "arch.channels=[8,8,8,8]"
SMALLER: dict[str, tuple[str, ...]] = {
    "cifar10_large": (NARROW,),
    "imagenet_small": (NARROW, "data.size=64", "sizes.outputs=5", "data.workers=0", "adjoint=jfb"),
}
"""What makes an experiment small beside the data."""


@pytest.fixture
def data(command: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Overrides that make any experiment small."""
    monkeypatch.setattr("fastdeq.data.MnistDataModule.source", small_mnist())
    monkeypatch.setattr("fastdeq.data.Cifar10DataModule.source", small_cifar())
    write_files(tmp_path / "data" / "mnist", samples())
    monkeypatch.setattr("fastdeq.data.SvhnDataModule.source", small_svhn())
    write_folder(tmp_path / "data" / "cifar10", {ARCHIVE: archive(cifar_files())})
    write_folder(tmp_path / "data" / "svhn", svhn_files())
    if find_spec(NEEDS["data=image_folder"]):
        five = images(("ant", "bee", "cat", "dog", "eel"))
        write_images(tmp_path / "data" / "image_folder", five)
    monkeypatch.setenv("FASTDEQ_DATA", str(tmp_path / "data"))
    return ["trainer.max_epochs=1", "trainer.limit_train_batches=2", "trainer.accelerator=cpu"]


@pytest.mark.slow
@pytest.mark.parametrize(("experiment", "model"), TRAINED)
def test_every_experiment_trains_with_every_model(
    command: CommandLine, data: list[str], experiment: str, model: str
) -> None:
    if needed := NEEDS.get(f"model={model}"):
        pytest.importorskip(needed)
    if experiment == "imagenet_small":
        pytest.importorskip(NEEDS["data=image_folder"])
    smaller = SMALLER.get(experiment, ())
    if model not in FULLY_CONNECTED:  # untrained, they would use all the evaluations they may
        limits = ("trainer.limit_val_batches=1", "trainer.limit_test_batches=1")
        smaller = (*smaller, "solver.max_steps=3", *limits)
    words = (f"experiment={experiment}", f"model={model}", "data.batch_size=10", *smaller)
    answer = command(*words, *data)
    assert answer.status == 0, answer.err
    (path,) = (path for path in answer.files if path.name == "summary.json")
    summary = json.loads(path.read_text())
    assert summary["steps"] == 2
    assert path.parent.parent.name.startswith(model)
    published = bool(read_table(experiment))
    assert ("published" in answer.out) == published
    assert (summary["reference"] is not None) == published


@pytest.mark.parametrize(("experiment", "choice"), VARIED)
def test_every_experiment_composes_with_every_choice(experiment: str, choice: str) -> None:
    if needed := NEEDS.get(choice):
        pytest.importorskip(needed)
    words = (f"experiment={experiment}", *choice.split(), *SOLVER_OF.get(choice, ()))
    cfg = composed(*words)
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    for key in ("solver", "adjoint", "loss", "scheduler", "data"):
        instantiate(cfg[key], _convert_="all")
    build_task(cfg)
    # Published continuous runs; discrete ones have no such key.
    local = cfg.solver.tol if cfg.solver.get("method") in CONTINUOUS else None
    assert cfg.solver.get("ode_tol") == local


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_settings_are_the_published_ones(experiment: str) -> None:
    cfg = composed(f"experiment={experiment}")
    wanted = SETTINGS[experiment]
    found = {key: OmegaConf.select(cfg, key) for key in wanted}
    assert found == wanted


def test_the_local_tolerance_of_a_published_run_is_tol_unless_it_is_given() -> None:
    words = ("experiment=cifar10_large", "solver=vcab3", "solver.tol=0.03")
    assert composed(*words).solver.ode_tol == 0.03
    assert composed(*words, "solver.ode_tol=2").solver.ode_tol == 2
    assert composed("data=cifar10", "solver=vcab3").solver.ode_tol == 0.5  # not a published run


def check_table(table: dict[str, Any]) -> None:
    """Every key is one that reports read, with a value of its kind."""
    kinds = {"source": str, "seeds": int, "steps": int, "epochs": int, "rows": list}
    assert {"source", "seeds", "rows"} <= set(table)
    assert all(isinstance(value, kinds[key]) for key, value in table.items())
    for row in table["rows"]:
        assert {"where", "metrics", "deviations"} <= set(row)
        assert set(row) <= {"where", "metrics", "deviations", "parameters", "training_minutes"}
        assert row["where"]["model"] in GROUPS["model"]
        assert all(name.split("/")[0] in ("train", "test") for name in row["metrics"])
        assert all(isinstance(value, float) for value in row["metrics"].values())
        assert set(row["deviations"]) <= set(row["metrics"])


def plain(cfg: DictConfig) -> dict[str, Any]:
    resolved: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    return resolved


def choices_of_the_last_configuration() -> dict[str, str]:
    return {str(key): str(value) for key, value in HydraConfig.get().runtime.choices.items()}


@pytest.mark.slow
def test_every_row_of_a_reference_can_be_reached_and_names_its_source() -> None:
    for experiment in EXPERIMENTS:
        reference = read_table(experiment)
        if not reference:
            continue
        check_table(reference)
        for row in reference["rows"]:
            choices = [f"{key}={value}" for key, value in row["where"].items()]
            cfg = composed(f"experiment={experiment}", *choices)
            length = cfg.trainer.max_steps if "steps" in reference else cfg.trainer.max_epochs
            assert length == reference.get("steps", reference.get("epochs"))
            found = published_row(plain(cfg), choices_of_the_last_configuration())
            assert found is not None
            assert found["metrics"] == row["metrics"]
            if "parameters" in row:
                built = build_model(cfg)
                count = sum(parameter.numel() for parameter in built.parameters())
                assert count == pytest.approx(row["parameters"], rel=1e-3)  # printed as 10.63M


@pytest.mark.parametrize(
    ("experiment", "rows"),
    [("mnist_fc", 6), ("cifar10_tiny", 7), ("cifar10_large", 7), ("imagenet_small", 6)],
)
def test_every_published_row_has_a_reference_of_its_own(experiment: str, rows: int) -> None:
    found = read_table(experiment)["rows"]
    assert len({str(row["where"]) for row in found}) == len(found) == rows
    assert len({str(row["metrics"]) for row in found}) == rows


def test_every_published_table_is_of_an_experiment() -> None:
    assert {path.stem for path in TABLES.iterdir()} <= set(EXPERIMENTS)


def test_nothing_is_claimed_of_the_published_gpu_but_what_the_scripts_assume() -> None:
    claim = "(its cluster scripts assume V100s with 32 GB)"
    found = 0
    pages = (ROOT / "docs").rglob("*.md")
    for path in [*pages, *(ROOT / "conf").rglob("*.yaml"), *TABLES.glob("*.yaml")]:
        text = path.read_text(encoding="utf-8")
        assert text.count("V100") == text.count(claim), path
        found += text.count(claim)
    assert found == 5  # four experiments have published times; so does docs/runs.md
