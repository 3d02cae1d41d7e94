"""Run folders as train.py leaves them, cut down to what a report reads."""

import json
from pathlib import Path
from typing import Any

import yaml

MNIST = {
    "source": "arXiv 2201.12240, table of MNIST, fully connected",
    "seeds": 3,
    "epochs": 25,
    "where": {"model": "deq", "loss.jacobian": 0.0},
    "metrics": {"test/accuracy": 0.97926, "test/nfe": 18.345, "test/seconds": 0.038},
    "deviations": {"test/accuracy": 0.00107, "test/nfe": 0.732},
    "training_minutes": 5.197,
}
"""A published row as summary.json holds it."""

METRICS = {
    "train/loss": 0.0138,
    "train/seconds": 0.01,
    "train/backward_seconds": 0.004,
    "test/loss": 0.067,
    "test/accuracy": 0.98,
    "test/nfe": 7.5,
    "test/seconds": 0.004,
}


def configuration(**settings: Any) -> dict[str, Any]:
    """A resolved configuration; settings: by dotted keys, from which model and task are made."""
    config: dict[str, Any] = {
        "arch": {"width": 128, "cell": {"_target_": "fastdeq.nn.DenseCell", "width": 128}},
        "solver": {"_target_": "fastdeq.solvers.LimitedMemoryBroydenSolver", "tol": 0.005},
        "adjoint": {"_target_": "fastdeq.adjoints.Implicit"},
        "loss": {"skip": 0.0, "jacobian": 0.0, "residual": 0.0},
        "optimizer": {"_target_": "torch.optim.Adam", "lr": 0.001},
        "data": {"_target_": "fastdeq.data.MnistDataModule", "root": "/data", "batch_size": 32},
        "sizes": {"input": [1, 28, 28], "features": 784, "outputs": 10},
        "trainer": {
            "max_epochs": 25,
            "max_steps": -1,
            "limit_train_batches": 1.0,
            "limit_test_batches": 1.0,
            "overfit_batches": 0,
            "accelerator": "cpu",
            "devices": 1,
            "strategy": "auto",
        },
        "logger": {},
        "paths": {"outputs": "outputs", "run": None},
        "name": "mnist_fc/deq_lbroyden",
        "seed": 1,
        "mode": "train",
        "checkpoint": None,
        "from_run": None,
        "skip_weight": 5.0,
        "reference": None,
    }
    for key, value in settings.items():
        *nodes, last = key.split(".")
        node = config
        for name in nodes:
            node = node.setdefault(name, {})
        node[last] = value
    config["data"]["seed"] = config["seed"]
    config["model"] = {
        "_target_": "fastdeq.DEQChain",
        "deq": {"cell": config["arch"]["cell"], "solver": config["solver"]},
    }
    parts = {"model": config["model"], "weights": config["loss"], "seed": config["seed"]}
    config["task"] = {"_target_": "fastdeq.training.ClassificationTask", **parts}
    return config


def summary(
    config: dict[str, Any],
    choices: dict[str, str],
    metrics: dict[str, float],
    reference: dict[str, Any] | None,
    others: dict[str, Any],
) -> dict[str, Any]:
    """What a run of the configuration writes about itself."""
    return {
        "format": 2,
        "metrics": {**METRICS, **metrics},
        "train_seconds": 480.0,
        "mode": config["mode"],
        "epochs": 25,
        "steps": 46875,
        "parameters": 134538,
        "seed": config["seed"],
        "devices": 1,
        "name": config["name"],
        "choices": {
            **{"sweep": "None", "experiment": "mnist_fc", "model": "deq", "solver": "lbroyden"},
            **{"data": "mnist", "arch": "fc", "trainer": "default", **choices},
        },
        "reference": reference,
        "device": "cpu",
        "commit": "4dcf6a63ea63cb46df2b7b447b645316ca7d8459",
        "dirty": False,
        "finished": "2026-11-25T07:18:34+00:00",
        **others,
    }


def write_run(
    folder: Path,
    *,
    settings: dict[str, Any] | None = None,
    choices: dict[str, str] | None = None,
    metrics: dict[str, float] | None = None,
    reference: dict[str, Any] | None = None,
    **others: Any,
) -> Path:
    """A finished run; others: keys of its summary."""
    unfinished_run(folder)
    config = configuration(**(settings or {}))
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    content = summary(config, choices or {}, metrics or {}, reference, others)
    (folder / "summary.json").write_text(json.dumps(content))
    return folder


def unfinished_run(folder: Path) -> Path:
    """What a run has written before it trains."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(configuration()))
    (folder / "overrides.json").write_text("[]")
    return folder


def write_job(
    sweep: Path, number: int, folder: Path | None, error: str | None = None, **overrides: str
) -> None:
    """The record of a sweep's job."""
    (sweep / "jobs").mkdir(parents=True, exist_ok=True)
    record = {
        "overrides": overrides,
        "folder": None if folder is None else str(folder),
        "error": error,
    }
    (sweep / "jobs" / f"{number}.json").write_text(json.dumps(record))
