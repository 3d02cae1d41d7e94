"""The regression problem of FastDEQ's first release (arXiv 2201.12240): a noisy curve on a line."""

from typing import final

import numpy as np
import torch
from torch import Tensor

from fastdeq.data.checks import require_integer, require_number
from fastdeq.data.memory import InMemoryDataModule, Samples


def polynomial(x: Tensor) -> Tensor:
    """Return h(x) = 3x³/2 + x² − 5x + 2 sin x − 3, elementwise."""
    return 3 * x**3 / 2 + x**2 - 5 * x + 2 * torch.sin(x) - 3


@final
class PolynomialDataModule(InMemoryDataModule):
    """Batches of points x float32 (B, 1) with targets h(x) float32 (B, 1) (see ``polynomial``).

    Training: ``samples`` points uniform at random in [``low``, ``high``), their targets with
    ``noise`` · N(0, 1) added. Test: ``test_samples`` equally spaced points from ``low`` to ``high``
    without noise. ``seed`` draws points and noise too, beside the order of the batches: runs with
    other seeds see other samples. The global random state is left alone.

    Raises ValueError for counts that are not integers ≥ 1, for ``low`` ≥ ``high``, for ``noise`` <
    0, and what ``InMemoryDataModule`` raises.
    """

    input_shape = (1,)
    outputs = 1
    normalization = None

    def __init__(
        self,
        *,
        samples: int = 512,
        test_samples: int = 128,
        low: float = -1.0,
        high: float = 1.0,
        noise: float = 0.005,
        batch_size: int = 64,
        eval_batch_size: int = 128,
        seed: int = 0,
        validation: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            seed=seed,
            validation=validation,
        )
        self.samples = require_integer("samples", samples, minimum=1)
        self.test_samples = require_integer("test_samples", test_samples, minimum=1)
        self.low, self.high = require_number("low", low), require_number("high", high)
        self.noise = require_number("noise", noise)
        if not self.low < self.high:
            raise ValueError(f"low must be less than high: low is {low}, high is {high}")
        if self.noise < 0:
            raise ValueError(f"noise must be at least 0, not {noise}")

    def load(self) -> tuple[Samples, Samples]:
        """Draw the training points and compute all targets, in float64 until the end."""
        # Mixed: the order of an epoch is drawn from this seed too, and must not repeat the points.
        mixed = np.random.SeedSequence((self.seed,), spawn_key=(1,)).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(mixed[0]))
        unit = torch.rand(self.samples, 1, dtype=torch.float64, generator=generator)
        noise = torch.randn(self.samples, 1, dtype=torch.float64, generator=generator)
        x = self._rounded(self.low + (self.high - self.low) * unit)
        train = Samples(x.float(), (polynomial(x) + self.noise * noise).float())
        x = torch.linspace(self.low, self.high, self.test_samples, dtype=torch.float64)
        x = self._rounded(x.unsqueeze(1))
        self.facts = {
            "function": "h(x) = 3x³/2 + x² − 5x + 2 sin x − 3",
            "noise": f"{self.noise:g} · N(0, 1) on the training targets",
            "source": "FastDEQ's first release, arXiv 2201.12240",
        }
        return train, Samples(x.float(), polynomial(x).float())

    @staticmethod
    def _rounded(x: Tensor) -> Tensor:
        """Round to float32, so that a target is h of the very point that a model is given."""
        return x.float().double()
