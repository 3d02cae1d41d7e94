"""A data module of your own, and the task, callbacks and trainer of fastdeq around it."""

import math
from functools import partial
from typing import Any

import torch
from pytorch_lightning import Trainer
from torch import nn

from fastdeq import DEQChain, SkipDeepEquilibriumNetwork
from fastdeq.data import InMemoryDataModule, Samples
from fastdeq.nn import DenseCell
from fastdeq.training import ClassificationTask, LossWeights


class Rings(InMemoryDataModule):
    """Points (2,) with labels: 0 on the inner ring, 1 on the outer one."""

    input_shape = (2,)
    outputs = 2

    def __init__(self, *, samples: int = 512, **shared: Any) -> None:
        super().__init__(**shared)
        self.samples = samples

    def load(self) -> tuple[Samples, Samples]:
        return rings(self.samples, seed=0), rings(128, seed=1)


def rings(count: int, seed: int) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (count,), generator=generator)
    angles = 2 * math.pi * torch.rand(count, generator=generator)
    circle = torch.stack((angles.cos(), angles.sin()), dim=1)
    noise = 0.1 * torch.randn(count, 2, generator=generator)
    return Samples((1 + labels)[:, None] * circle + noise, labels)


def main() -> float:
    torch.manual_seed(0)
    deq = SkipDeepEquilibriumNetwork(DenseCell(16), explicit=nn.Linear(16, 16))
    task = ClassificationTask(
        model=DEQChain(nn.Linear(2, 16), deq, nn.Linear(16, 2)),
        optimizer=partial(torch.optim.Adam, lr=0.01),
        weights=LossWeights(skip=1.0),
    )
    trainer = Trainer(
        max_epochs=5,
        accelerator="cpu",
        logger=False,
        inference_mode=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = Rings(batch_size=32, eval_batch_size=128)
    trainer.fit(task, datamodule=data)
    trainer.test(task, datamodule=data, verbose=False)
    accuracy, nfe = (
        float(trainer.callback_metrics[f"test/{name}"]) for name in ("accuracy", "nfe")
    )
    print(f"test accuracy {accuracy:.3f}, NFE {nfe:.1f}")
    return accuracy


if __name__ == "__main__":
    main()
