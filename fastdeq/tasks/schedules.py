"""How the learning rate moves over a run: settings that build torch's schedulers.

Lengths are shares of the run, so that a shorter run keeps the shape of a published one.
"""

from abc import ABC, abstractmethod

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, MultiStepLR

from fastdeq.settings import setting, settings


class AbstractSchedule(ABC):
    """Builds a scheduler that is moved on after every optimizer step."""

    @abstractmethod
    def build(self, optimizer: Optimizer, steps: int) -> LRScheduler:
        """The scheduler of a run of `steps` optimizer steps."""


@settings
class Constant(AbstractSchedule):
    """The optimizer's own learning rate throughout."""

    def build(self, optimizer: Optimizer, steps: int) -> LRScheduler:
        return MultiStepLR(optimizer, milestones=[])


@settings
class Cosine(AbstractSchedule):
    """Half a cosine from the optimizer's learning rate down to `minimum` at the last step
    (Loshchilov & Hutter 2017, arXiv 1608.03983, without restarts).
    """

    minimum: float = setting(default=0.0, at_least=0)

    def build(self, optimizer: Optimizer, steps: int) -> LRScheduler:
        return CosineAnnealingLR(optimizer, T_max=steps, eta_min=self.minimum)


@settings
class Staircase(AbstractSchedule):
    """The learning rate times `factor` after each share of the run that is listed in `at`.

    Raises: ValueError for shares that do not lie between 0 and 1 or do not ascend.
    """

    at: list[float] = setting()
    factor: float = setting(default=0.1, above=0)

    def check_together(self) -> None:
        listed = isinstance(self.at, list | tuple)
        numbers = listed and all(isinstance(share, int | float) for share in self.at)
        if not numbers or not all(0 < share < 1 for share in self.at):
            raise ValueError(f"Staircase.at is {self.at}, but must hold shares of the run: [0.5]")
        if list(self.at) != sorted(self.at):
            raise ValueError(f"Staircase.at is {self.at}, but must ascend")

    def build(self, optimizer: Optimizer, steps: int) -> LRScheduler:
        milestones = [round(share * steps) for share in self.at]
        return MultiStepLR(optimizer, milestones=milestones, gamma=self.factor)
