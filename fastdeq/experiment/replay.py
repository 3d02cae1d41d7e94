"""Replays a failed training step (mode=replay), unchanged or with other settings."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from fastdeq.experiment.build import build_task
from fastdeq.experiment.checkpoint import load_weights, read_checkpoint
from fastdeq.experiment.checks import check_values, count_ranks
from fastdeq.experiment.job import make_trainer
from fastdeq.experiment.keys import RunSettings
from fastdeq.runs.files import is_sealed, seal_of
from fastdeq.runs.folder import FAILURE
from fastdeq.solution import Solution, Trace
from fastdeq.training import (
    AbstractTask,
    Diagnosis,
    Failures,
    joined,
    measure,
    set_random_state,
    status_counts,
    trend_of,
    with_norm,
)


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """The result. gradients: of the parameters by name, means over the processes."""

    diagnosis: Diagnosis
    gradients: dict[str, Tensor]
    failed: bool


def replay(cfg: DictConfig) -> Replayed:
    """Repeat the step of a failure.ckpt, forward and backward, and print the result. The step has
    the same weights, batch and random state, and the settings of `cfg`. It runs on one device,
    makes no run folder and needs no data set; parts of several processes are computed in turn.

    Raises: ValueError, TypeError, FileNotFoundError or Hydra's InstantiationException for settings
        or a file that cannot be used.
    """
    path = _path(check_values(cfg))
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    failure = _read(path)
    alone = {**config["trainer"], "devices": 1, "strategy": "auto"}
    count_ranks(alone)
    task = build_task(cfg)
    load_weights(task, path)
    trainer = make_trainer({**config, "trainer": alone}, task)
    precision = trainer.precision_plugin
    task = precision.convert_module(task).to(trainer.strategy.root_device)  # type: ignore[assignment]
    with (
        warnings.catch_warnings(record=True) as warned,
        torch.autograd.set_detect_anomaly(config["debug"]),
        precision.train_step_context(),
    ):
        warnings.simplefilter("always")
        diagnosis, gradients, trace = _again(task.train(), failure)
    again = diagnosis.failed(_threshold(config))
    _print(path, failure, diagnosis, trace, again)
    for text in dict.fromkeys(str(warning.message) for warning in warned):
        print(f"warning: {text}")
    return Replayed(diagnosis=diagnosis, gradients=gradients, failed=again)


def _path(settings: RunSettings) -> Path:
    if settings.checkpoint is not None:
        path = Path(settings.checkpoint)
    else:
        assert settings.from_run is not None  # or RunSettings had refused it
        path = Path(settings.from_run) / FAILURE
    if not path.is_file():
        raise FileNotFoundError(
            f"mode=replay: {path} does not exist: give a run of which a step has failed, or "
            "checkpoint=PATH"
        )
    return path


def _read(path: Path) -> dict[str, Any]:
    if seal_of(path).exists() and not is_sealed(path):
        raise ValueError(f"mode=replay: {path} is damaged: its SHA-256 is another one")
    failure = read_checkpoint(path).get("failure")
    if not isinstance(failure, dict):
        raise ValueError(
            f"mode=replay: {path} holds no failed step: give {FAILURE} of a run, or mode=test to "
            "evaluate a checkpoint"
        )
    return failure


def _again(
    task: AbstractTask, failure: dict[str, Any]
) -> tuple[Diagnosis, dict[str, Tensor], Trace | None]:
    """Compute each process's part in turn, and average the gradients as DistributedDataParallel
    does. Every part starts from the weights and buffers of the first process.
    """
    before = {name: buffer.clone() for name, buffer in task.named_buffers()}
    share = 1 / len(failure["ranks"])
    total: dict[str, Tensor] = {}
    rows, solutions = [], []
    for part in failure["ranks"]:
        for name, buffer in task.named_buffers():
            buffer.copy_(before[name])
        task.zero_grad()
        row, its = _part_of_step(task, part, failure)
        rows.append(row)
        solutions += its
        for name, parameter in task.named_parameters():
            if parameter.grad is not None:
                mine = parameter.grad if share == 1 else parameter.grad * share
                total[name] = total[name] + mine if name in total else mine
    trace, status = _joined(solutions)
    trend = None if trace is None else trend_of(trace, status)
    row = with_norm(torch.stack(rows), total.values())
    return Diagnosis.of(row.tolist(), trend), total, trace


def _part_of_step(
    task: AbstractTask, part: dict[str, Any], failure: dict[str, Any]
) -> tuple[Tensor, list[Solution]]:
    """Accumulate the gradients of one process's batches; return their joint measures."""
    found = [_batch(task, each, part["device"] or 0, failure) for each in _batches_of(part)]
    return joined([row for row, _ in found]), [solution for _, solution in found]


def _batches_of(part: dict[str, Any]) -> list[dict[str, Any]]:
    return [part, *part.get("accumulated", [])]


def _batch(
    task: AbstractTask, kept: dict[str, Any], device: int, failure: dict[str, Any]
) -> tuple[Tensor, Solution]:
    """Compute forward and backward; return the measures and the solution."""
    x, targets, weight = kept["batch"]
    batch = (x.to(task.device), targets.to(task.device), weight)
    random = dict(kept["random"])
    # The process had its own device; here there is one, or none.
    random["cuda"] = random["cuda"][device : device + 1] if torch.cuda.is_available() else []
    set_random_state(random)
    start = kept.get("start")
    if start is not None:
        single = isinstance(start, Tensor)
        start = start.to(task.device) if single else tuple(z.to(task.device) for z in start)
    loss, solution, _ = task.evaluate(
        batch, failure["step"], z0=start, depth=failure["depth"], trace="residuals"
    )
    loss = loss / failure.get("accumulates", 1)
    loss.backward()
    return measure(batch, solution, loss.detach()), solution


def _joined(solutions: Sequence[Solution]) -> tuple[Trace | None, Tensor]:
    """The histories of all parts side by side, shorter ones padded with their last value; and the
    statuses.
    """
    status = torch.cat([solution.status for solution in solutions])
    traces = [solution.trace for solution in solutions]
    known = [trace.residuals.detach() for trace in traces if trace is not None]
    if len(known) < len(traces):
        return None, status
    length = max(len(residuals) for residuals in known)
    held = [torch.cat([r, r[-1:].expand(length - len(r), -1)]) for r in known]
    return Trace(residuals=torch.cat(held, dim=1)), status


def _threshold(config: dict[str, Any]) -> float | None:
    node = (config.get("callbacks") or {}).get("failures")
    watching = Failures() if node is None else instantiate(node)
    assert isinstance(watching, Failures)
    return watching.unconverged


def _print(
    path: Path, failure: dict[str, Any], now: Diagnosis, trace: Trace | None, again: bool
) -> None:
    ranks = failure["ranks"]
    batches = [each["batch"] for part in ranks for each in _batches_of(part)]
    samples = sum(len(batch[0]) for batch in batches if batch[2])
    processes = f" on {len(ranks)} processes" if len(ranks) > 1 else ""
    print(f"step {failure['step']:,} of {path}: {samples} samples{processes}")
    for title, diagnosis in (("then", _saved_diagnosis(failure)), ("now", now)):
        print(f"{title:<9} {_numbers(diagnosis)}")
    if trace is not None:
        print(f"residual  {_history(trace)}")
    if again:
        print(f"it fails again: {now.symptom}; what helps: {now.advice}")
    else:
        print("it does not fail")


def _saved_diagnosis(failure: dict[str, Any]) -> Diagnosis:
    saved = dict(failure["diagnosis"])
    if "course" in saved:  # of an earlier version
        saved["trend"] = saved.pop("course")
    return Diagnosis(**saved)


def _numbers(diagnosis: Diagnosis) -> str:
    solves = (("forward", diagnosis.forward), ("backward", diagnosis.backward))
    statuses = [f"{name} {status_counts(counts)}" for name, counts in solves if any(counts)]
    numbers = f"loss {diagnosis.loss:.6g}, gradient norm {diagnosis.gradient_norm:.6g}"
    return "; ".join([numbers, *statuses])


def _history(trace: Trace) -> str:
    """Median residuals over the samples, at the start, at quarters of the steps and at the end."""
    last = len(trace.residuals) - 1
    places = sorted({last * quarter // 4 for quarter in range(5)})
    medians = [f"{float(trace.residuals[place].median()):.1e}" for place in places]
    return f"{' → '.join(medians)} after {', '.join(map(str, places))} steps (median of samples)"
