"""A number of solver steps that is drawn at random in training."""

import random

import torch
from torch import nn

from fastdeq.settings import check_value


class RandomSteps(nn.Module):
    """The number of steps of an equilibrium layer: in training, each call takes exactly n steps, n
    uniform in least, ..., most; in evaluation, at most factor · most steps, and fewer where the
    tolerance is met.

    A model that is trained with one number of steps often fails beyond it (looped models,
    recurrent-depth models). n is a draw from the seed and the number of the call, which is a
    buffer: all processes of a run agree, and a resumed run repeats it. Reading it waits for the
    device.

    Raises: TypeError or ValueError for least < 1, most < least, or a factor that is not above 0.
    """

    calls: torch.Tensor

    def __init__(self, least: int, most: int, *, factor: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        check_value("RandomSteps.least", least, int, {"at least": 1})
        check_value("RandomSteps.most", most, int, {"at least": least})
        check_value("RandomSteps.factor", factor, float, {"above": 0})
        check_value("RandomSteps.seed", seed, int, {})
        self.least, self.most, self.factor, self.seed = least, most, factor, seed
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self) -> int:
        """The number of steps of a call."""
        if not self.training:
            return max(1, round(self.factor * self.most))
        call = int(self.calls)
        self.calls += 1
        return random.Random(f"{self.seed} {call}").randint(self.least, self.most)

    def extra_repr(self) -> str:
        return f"{self.least}, {self.most}, factor={self.factor}, seed={self.seed}"
