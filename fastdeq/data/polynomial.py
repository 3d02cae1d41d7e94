"""The regression problem of FastDEQ's first release (arXiv 2201.12240): a noisy curve on a line."""

from dataclasses import field
from typing import final

import numpy as np
import torch
from torch import Tensor

from fastdeq.data.module import InMemoryDataModule, Samples, data_module
from fastdeq.settings import setting


def polynomial(x: Tensor) -> Tensor:
    """Return h(x) = 3x³/2 + x² − 5x + 2 sin x − 3, elementwise."""
    return 3 * x**3 / 2 + x**2 - 5 * x + 2 * torch.sin(x) - 3


@final
@data_module
class PolynomialDataModule(InMemoryDataModule):
    """Batches of points x float32 (B, 1) with targets h(x) float32 (B, 1) (see ``polynomial``).

    Training: ``samples`` points uniform at random in [``low``, ``high``), their targets with
    ``noise`` · N(0, 1) added. Test: ``test_samples`` equally spaced points from ``low`` to ``high``
    without noise. ``seed`` determines points and noise beside the order of the batches: runs with
    other seeds have other samples. Raises ValueError for ``low`` ≥ ``high``.
    """

    samples: int = setting(default=512, at_least=1)
    test_samples: int = setting(default=128, at_least=1)
    low: float = setting(default=-1.0)
    high: float = setting(default=1.0)
    noise: float = setting(default=0.005, at_least=0)
    batch_size: int = setting(default=64, at_least=1)
    eval_batch_size: int = setting(default=128, at_least=1)
    augmentation: None = field(default=None, init=False)  # not an argument

    input_shape = (1,)
    outputs = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.low < self.high:
            raise ValueError(f"low must be less than high: low is {self.low}, high is {self.high}")

    def load(self) -> tuple[Samples, Samples]:
        # Mixed: the order of an epoch is drawn from this seed too, and must not repeat the points.
        mixed = np.random.SeedSequence((self.seed,), spawn_key=(1,)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(mixed[0]))
        unit = torch.rand(self.samples, 1, dtype=torch.float64, generator=generator)
        noise = torch.randn(self.samples, 1, dtype=torch.float64, generator=generator)
        x = _rounded(self.low + (self.high - self.low) * unit)
        train = Samples(x.float(), (polynomial(x) + self.noise * noise).float())
        x = torch.linspace(self.low, self.high, self.test_samples, dtype=torch.float64)
        x = _rounded(x.unsqueeze(1))
        self.metadata = {
            "function": "h(x) = 3x³/2 + x² − 5x + 2 sin x − 3",
            "noise": f"{self.noise:g} · N(0, 1) on the training targets",
            "source": "FastDEQ's first release, arXiv 2201.12240",
        }
        return train, Samples(x.float(), polynomial(x).float())


def _rounded(x: Tensor) -> Tensor:
    """Round to float32, so that a target is h of the very point that a model is given."""
    return x.float().double()
