"""An optimizer step that waits for its verdict, and the file that keeps a failed one."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Trainer
from torch import Tensor

from fastdeq.solution import Solution
from fastdeq.training.checkpoint_io import SealedCheckpointIO
from fastdeq.training.diagnosis import Diagnosis, joined, measure
from fastdeq.training.random_state import as_plain, gathered
from fastdeq.training.task import AbstractTask

FAILURE = "failure.ckpt"


@dataclass(kw_only=True)
class StepBatch:
    """A batch of a step, and the random numbers before it; `figures`, of this process (`measure`),
    and `states` come with its backward pass.
    """

    batch: Any
    random: tuple[Any, ...] | None
    figures: Tensor | None = None
    states: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Step:
    """An optimizer step as it began, and its batches up to now.

    kept: tensors of the task that the step may change. accumulates: by how many batches the loss is
    divided.
    """

    number: int
    epoch: int
    depth: int | None
    accumulates: int
    kept: dict[str, Tensor]
    batches: list[StepBatch] = field(default_factory=list)

    def end_batch(self, task: AbstractTask) -> None:
        """Measure the last batch at the end of its backward pass; once."""
        last = self.batches[-1]
        if last.figures is not None:
            return
        inputs, solution, loss = last.batch[0], None, None
        if (under_way := task.step_under_way) is not None:
            solution = under_way[0]
            loss = under_way[1]["loss"] * last.batch[2] / self.accumulates
        if loss is None:
            loss = torch.zeros((), device=inputs.device)
        # Gradients are accumulated where memory is short: states are then not held.
        if solution is not None and last.random is not None and self.accumulates == 1:
            last.states = _states(solution)
        last.figures = measure(solution, inputs, loss)

    @property
    def figures(self) -> Tensor:
        """Of all its batches on this process, (13,), but for the norm of the gradients."""
        return joined([each.figures for each in self.batches if each.figures is not None])


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


def save_failure(step: Step, diagnosis: Diagnosis, trainer: Trainer, task: AbstractTask) -> None:
    """Write failure.ckpt, on all processes together: to each its parts of the batches."""
    first, *others = [_kept(each) for each in step.batches]
    device = task.device.index if task.device.type == "cuda" else None
    mine = {**first, "device": device, "accumulated": others}
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
            "accumulates": step.accumulates,
            "diagnosis": vars(diagnosis),
            "ranks": ranks,
        },
    }
    SealedCheckpointIO().save_checkpoint(content, Path(trainer.default_root_dir) / FAILURE)


def _kept(each: StepBatch) -> dict[str, Any]:
    random = None if each.random is None else as_plain(each.random)
    return {"batch": list(each.batch), "random": random, **each.states}


def _on_host(node: Any) -> Any:
    if isinstance(node, Tensor):
        return node.cpu()
    if isinstance(node, dict):
        return {name: _on_host(value) for name, value in node.items()}
    return [_on_host(value) for value in node] if isinstance(node, list) else node
