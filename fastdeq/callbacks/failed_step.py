"""L7: a training step that waits for its verdict, and the file in which a failed one is kept."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Trainer
from torch import Tensor

from fastdeq.callbacks.diagnosis import Diagnosis, measure
from fastdeq.callbacks.ranks import as_plain, gathered
from fastdeq.callbacks.storage import SealedCheckpointIO
from fastdeq.solution import Solution
from fastdeq.tasks import AbstractTask

FAILURE = "failure.ckpt"


@dataclass(frozen=True, kw_only=True)
class Step:
    """A training step as it began; `kept`: tensors of the task that it may change."""

    number: int
    epoch: int
    depth: int | None
    batch: Any
    random: tuple[Any, ...] | None
    kept: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class MadeStep:
    """A step after its backward pass, with its figures on this process (`measure`)."""

    step: Step
    states: dict[str, Any]
    figures: Tensor


def made(step: Step, task: AbstractTask, gradients: list[Tensor]) -> MadeStep:
    """The step, at the end of its backward pass."""
    under_way, inputs = task.step_under_way, step.batch[0]
    solution, loss = None, torch.zeros((), device=inputs.device)
    if under_way is not None:
        solution, loss = under_way[0], under_way[1]["loss"] * step.batch[2]
    return MadeStep(
        step=step,
        states={} if solution is None or step.random is None else _states(solution),
        figures=measure(solution, inputs, loss, gradients),
    )


def _states(solution: Solution) -> dict[str, Any]:
    """Start, equilibrium and how each sample ended, without graphs."""
    scales = {"z0": solution.z0, "z_star": solution.value}
    backward = solution.backward.stats
    return {
        **{
            name: [z.detach() for z in ((state,) if isinstance(state, Tensor) else state)]
            for name, state in scales.items()
        },
        "status": solution.status,
        "residual": solution.residual.detach(),
        "relative_residual": solution.relative_residual.detach(),
        "status_backward": None if backward is None else backward.status,
    }


def save_failure(
    failed: MadeStep, diagnosis: Diagnosis, trainer: Trainer, task: AbstractTask
) -> None:
    """Write failure.ckpt, on all processes together: to each its part of the batch."""
    step = failed.step
    device = task.device.index if task.device.type == "cuda" else None
    mine = {
        "batch": list(step.batch),
        "random": None if step.random is None else as_plain(step.random),
        "device": device,
        **failed.states,
    }
    ranks = gathered(_on_host(mine), trainer)
    if not trainer.is_global_zero:
        return
    weights = task.state_dict()
    weights |= {name: tensor for name, tensor in step.kept.items() if name in weights}
    content = {
        "state_dict": weights,
        "failure": {
            "step": step.number,
            "epoch": step.epoch,
            "depth": step.depth,
            "diagnosis": vars(diagnosis),
            "ranks": ranks,
        },
    }
    SealedCheckpointIO().save_checkpoint(content, Path(trainer.default_root_dir) / FAILURE)


def _on_host(node: Any) -> Any:
    if isinstance(node, Tensor):
        return node.cpu()
    if isinstance(node, dict):
        return {name: _on_host(value) for name, value in node.items()}
    return [_on_host(value) for value in node] if isinstance(node, list) else node
