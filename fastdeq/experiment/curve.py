"""Accuracy against budget (mode=curve): one checkpoint, tested with ever more evaluations of f."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from fastdeq.commands import typed
from fastdeq.experiment.build import build_task
from fastdeq.experiment.checkpoint import load_weights
from fastdeq.experiment.checks import check_values, count_ranks
from fastdeq.experiment.job import make_trainer
from fastdeq.experiment.keys import RunSettings
from fastdeq.nn import DeepEquilibriumNetwork
from fastdeq.runs.files import write_json
from fastdeq.runs.folder import LAST, curve_file
from fastdeq.training import AbstractTask
from fastdeq.training.metrics import Value, mean_metrics, solver_metrics
from fastdeq.training.task import Batch

FORMAT = 1
BUDGETS = [0, 1, 2, 4, 8, 16, 32]
"""Evaluations of f, where `nfe` lists none."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """The test metrics within a budget of evaluations of f.

    how: "explicit", "unrolled", or the limit of the solver, "max_steps=...".
    """

    budget: int
    how: str
    metrics: Mapping[str, float]


def curve(cfg: DictConfig) -> list[Point]:
    """Evaluate a checkpoint on the test set with each budget of `cfg.nfe`; print the metrics, and
    write them to <checkpoint>.curve.json beside it, where `fastdeq report plots` finds them.

    0 is the explicit prediction, where there is one. A budget that is too small for a step of the
    solver evaluates f that many times, from z₀. Any other limits the steps of the solver, which may
    end earlier by its tolerance. Runs on one device and makes no run folder.

    Raises: ValueError, TypeError, FileNotFoundError or Hydra's InstantiationException for settings
        or a checkpoint that cannot be used.
    """
    settings = check_values(cfg)
    path = _checkpoint(settings)
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    alone = {**config["trainer"], "devices": 1, "strategy": "auto"}
    count_ranks(alone)
    task = build_task(cfg)
    load_weights(task, path)
    layer, *others = task.model.equilibria
    if others or not isinstance(layer, DeepEquilibriumNetwork):
        found = f"there are {1 + len(others)}" if others else f"a {type(layer).__name__} has none"
        raise ValueError(
            f"mode=curve limits the steps of one solver, but {found}: use a model with one "
            "equilibrium"
        )
    trainer = make_trainer({**config, "trainer": alone}, task)
    precision = trainer.precision_plugin
    task = precision.convert_module(task).to(trainer.strategy.root_device).eval()  # type: ignore[assignment]
    data = instantiate(OmegaConf.create(config["data"]), _convert_="all")
    data.prepare_data()
    data.setup()

    def batches() -> Iterator[Batch]:
        for x, targets, weight in data.test_dataloader():
            yield x.to(task.device), targets.to(task.device), weight

    with precision.forward_context(), torch.no_grad():
        points = _evaluate(task, layer, batches, settings.nfe or BUDGETS)
    _print(points, task.monitor[0])
    content = {
        "format": FORMAT,
        "checkpoint": path.name,
        "metric": task.monitor[0],
        "solver": str(layer.solver),
        "points": [{**asdict(each), **each.metrics} for each in points],
    }
    write_json(curve_file(path), content)
    print(f"see {curve_file(path)}; {typed('report plots')} {path.parent} draws it")
    return points


def _checkpoint(settings: RunSettings) -> Path:
    if settings.checkpoint is not None:
        return Path(settings.checkpoint)
    assert settings.from_run is not None  # or RunSettings had refused it
    return Path(settings.from_run) / LAST


def _evaluate(
    task: AbstractTask,
    layer: DeepEquilibriumNetwork,
    batches: Callable[[], Iterator[Batch]],
    budgets: list[int],
) -> list[Point]:
    solver = layer.solver
    first, each = _cost_of_steps(task, layer, next(batches()))
    points = []
    for budget in sorted(set(budgets)):
        depth = None
        if budget == 0:
            if not layer.initializer.predicts:
                print("0 evaluations: this model makes no explicit prediction")
                continue
            how = "explicit"
        elif budget < first:
            how, depth = "unrolled", budget
        else:
            layer.solver = replace(solver, max_steps=1 + int((budget - first) // each))
            how = f"max_steps={layer.solver.max_steps}"
        found = [_metrics(task, batch, depth, explicit=budget == 0) for batch in batches()]
        points.append(Point(budget=budget, how=how, metrics=mean_metrics(found)))
    layer.solver = solver
    if not points:
        raise ValueError("nfe has nothing to evaluate: give a budget of at least 1, nfe=[1,2,4,8]")
    return points


def _metrics(
    task: AbstractTask, batch: Batch, depth: int | None, *, explicit: bool
) -> tuple[dict[str, Value], float]:
    """Means over a batch, and its number of samples."""
    x, targets, _ = batch
    metrics: dict[str, Value] = {"nfe": 0.0}
    if explicit:
        prediction = task.model.explicit(x)
    else:
        prediction, solution = task.model(x, depth=depth)
        metrics = {**solver_metrics(solution)}
    metrics["loss"] = task.criterion(prediction, targets)
    return {**metrics, **task.scores(prediction, targets)}, len(targets)


def _cost_of_steps(
    task: AbstractTask, layer: DeepEquilibriumNetwork, batch: Batch
) -> tuple[int, float]:
    """The evaluations of f in a solve of one step, and in each further one, where no sample
    converges.
    """
    solver = layer.solver
    counts = []
    for steps in (1, 3):
        # Tolerances that nothing meets; that of an integrator's step stays as it is.
        changes: dict[str, Any] = dict.fromkeys(("tol", "abstol", "reltol"), 1e-30)
        if hasattr(solver, "ode_tol"):
            changes["ode_tol"] = solver.ode_tol or solver.tol
        layer.solver = replace(solver, max_steps=steps, **changes)
        _, solution = task.model(batch[0])
        counts.append(int(solution.nfe.max()))
    layer.solver = solver
    return counts[0], max(1.0, (counts[1] - counts[0]) / 2)


def _print(points: list[Point], score: str) -> None:
    factor, unit = (100, " %") if score == "accuracy" else (1, "")
    print(f"{'budget':>6}  {'how':<14}{'NFE':>7}{score + unit:>12}{'unconverged %':>15}")
    for point in points:
        value = f"{factor * point.metrics[score]:.4g}"
        solved = point.how.startswith("max_steps")
        unconverged = point.metrics["unconverged"] if solved else None
        share = "" if unconverged is None else f"{100 * unconverged:.1f}"
        print(
            f"{point.budget:>6}  {point.how:<14}{point.metrics['nfe']:>7.2f}{value:>12}{share:>15}"
        )
