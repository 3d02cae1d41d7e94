"""Tasks and batches whose steps fail."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdeq import DeepEquilibriumNetwork, DEQChain
from fastdeq.data import Batch
from fastdeq.nn import DenseCell
from fastdeq.runs.folder import FAILURE
from fastdeq.solvers import LimitedMemoryBroydenSolver
from fastdeq.training import AbstractTask, ClassificationTask, Cosine, LossWeights
from tests.training.tasks import FEATURES, WIDTH, samples

GOOD, OTHER = samples(5), samples(6)
NAN = Batch(torch.full((5, FEATURES), torch.nan), GOOD.targets)
EARLY = LimitedMemoryBroydenSolver(tol=1e-9, max_steps=1)


def chain(solver: LimitedMemoryBroydenSolver | None = None) -> DEQChain:
    """With running statistics in the stem."""
    torch.manual_seed(0)
    return DEQChain(
        stem=nn.Sequential(nn.Linear(FEATURES, 2 * WIDTH), nn.BatchNorm1d(2 * WIDTH)),
        deq=DeepEquilibriumNetwork(DenseCell(2 * WIDTH), solver=solver),
        head=nn.Linear(2 * WIDTH, 3),
    )


def task_of(
    solver: LimitedMemoryBroydenSolver | None = None, *, cosine: bool = False, lr: float = 0.1
) -> AbstractTask:
    """With an optimizer that has a state."""
    return ClassificationTask(
        model=chain(solver),
        optimizer=partial(torch.optim.AdamW, lr=lr, weight_decay=0.1),
        weights=LossWeights(),
        schedule=Cosine() if cosine else None,
    )


def kept(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(folder / FAILURE, weights_only=True)
    return found
