"""Small tasks, their batches and trainers."""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Trainer
from torch import nn

from fastdeq import DeepEquilibriumNetwork, DEQChain, SkipDeepEquilibriumNetwork
from fastdeq.adjoints import AbstractAdjoint
from fastdeq.data import Batch, Batches
from fastdeq.nn import DenseCell
from fastdeq.training import (
    AbstractTask,
    ClassificationTask,
    LossWeights,
)

CLASSES, FEATURES, WIDTH = 3, 2, 4


def network(
    start: str = "explicit", adjoint: AbstractAdjoint | None = None, outputs: int = CLASSES
) -> DEQChain:
    """Stem, equilibrium and head on four features; the solve starts as `start` says."""
    cell = DenseCell(WIDTH)
    deq: DeepEquilibriumNetwork
    if start == "explicit":
        deq = SkipDeepEquilibriumNetwork(cell, nn.Linear(WIDTH, WIDTH), adjoint=adjoint)
    elif start == "first":
        deq = SkipDeepEquilibriumNetwork(cell, adjoint=adjoint)
    else:
        deq = DeepEquilibriumNetwork(cell, adjoint=adjoint)
    return DEQChain(stem=nn.Linear(FEATURES, WIDTH), deq=deq, head=nn.Linear(WIDTH, outputs))


def make_task(
    kind: type[AbstractTask] = ClassificationTask,
    *,
    model: DEQChain | None = None,
    lr: float = 0.0,
    **weights: Any,
) -> AbstractTask:
    """A task around `network()`; with the learning rate 0 its parameters stay what they are."""
    return kind(
        model=network() if model is None else model,
        optimizer=partial(torch.optim.SGD, lr=lr),
        weights=LossWeights(**weights),
    )


def samples(n: int, kind: type[AbstractTask] = ClassificationTask) -> Batch:
    """The same n samples whenever asked."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, FEATURES, generator=generator)
    if issubclass(kind, ClassificationTask):
        return Batch(x, torch.randint(CLASSES, (n,), generator=generator))
    return Batch(x, torch.randn(n, CLASSES, generator=generator))


class Listed:
    """Batches in this order (of a plain list, Lightning makes a loader of each entry)."""

    def __init__(self, *batches: Batch) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def make_trainer(folder: Path, **options: Any) -> Trainer:
    """A silent trainer on the CPU that writes nothing by itself."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "max_epochs": 1,
        "default_root_dir": folder,
    }
    return Trainer(**quiet | options)


def metrics_of(trainer: Trainer, stage: str) -> dict[str, float]:
    """What the epoch's end has logged, without the stage's prefix."""
    return {
        name.removeprefix(f"{stage}/"): value.item()
        for name, value in trainer.callback_metrics.items()
        if name.startswith(f"{stage}/")
    }


def take_step_settings(task: AbstractTask, options: dict[str, Any]) -> None:
    """Give the task its own of a trainer's options, as `fastdeq.experiment` does."""
    for name in ("accumulate_grad_batches", "gradient_clip_val"):
        if name in options:
            setattr(task, name, options.pop(name))


def trained(task: AbstractTask, batches: Iterable[Batch], folder: Path, **options: Any) -> Trainer:
    """Train an epoch of these batches, from the same random state, without validation."""
    torch.manual_seed(1)
    take_step_settings(task, options)
    trainer = make_trainer(folder, **{"limit_val_batches": 0} | options)
    loader = Listed(*batches)
    trainer.fit(task, train_dataloaders=loader, val_dataloaders=loader)
    return trainer


def train_metrics(
    task: AbstractTask, batches: Iterable[Batch], folder: Path, **options: Any
) -> dict[str, float]:
    return metrics_of(trained(task, batches, folder, **options), "train")


def evaluated(
    task: AbstractTask, batches: Iterable[Batch], folder: Path, **options: Any
) -> dict[str, float]:
    trainer = make_trainer(folder, **options)
    loader = batches if isinstance(batches, Batches) else Listed(*batches)
    trainer.validate(task, dataloaders=loader, verbose=False)
    return metrics_of(trainer, "val")


def untimed(metrics: dict[str, float]) -> dict[str, float]:
    return {name: metric for name, metric in metrics.items() if "seconds" not in name}
