"""Data parallelism in which the averaging of gradients is all that a step exchanges."""

from collections.abc import Callable
from inspect import signature
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from pytorch_lightning import Trainer
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor
from torch.futures import Future
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from fastdeq.training.task import AbstractTask

Offer: TypeAlias = Callable[[], Tensor]

_SYNC_BUFFERS = "forward_sync_buffers"
if _SYNC_BUFFERS not in signature(DistributedDataParallel).parameters:
    _SYNC_BUFFERS = "broadcast_buffers"  # before torch 2.13


class CarryingDDP(DDPStrategy):
    """DistributedDataParallel, whose last message of a backward pass carries what else processes
    must know of each other's step:

    - the numbers that callbacks offer (`carry`), which then are there on all processes (`arrived`);
    - running statistics, whose mean over all samples takes the place of each process's own. (DDP
      itself would broadcast those of the first process before every evaluation of the network.)
      Other buffers are each process's own.

    Batches whose gradients are only accumulated send nothing. Where parameters are left unused
    (find_unused_parameters) DDP itself adds a message, of which they were.

    options: DistributedDataParallel's, and those of Lightning's strategy.

    Raises: ValueError for another communication hook.
    """

    def __init__(self, **options: Any) -> None:
        if any(options.get(f"ddp_comm_{name}") is not None for name in ("hook", "wrapper")):
            raise ValueError(
                "CarryingDDP averages gradients by a hook of its own: leave ddp_comm_hook and "
                "ddp_comm_wrapper out"
            )
        super().__init__(**{_SYNC_BUFFERS: False, **options})
        self._offers: dict[str, Offer] = {}
        self._arrived: dict[str, Tensor] = {}
        self._statistics: list[Tensor] = []

    def carry(self, name: str, offer: Offer) -> None:
        """From now on, send what `offer` gives, (n,), with n the same on all processes. It is
        called in the backward pass, when the gradients of this process are complete.
        """
        self._offers[name] = offer

    def arrived(self, name: str) -> Tensor | None:
        """What all processes have sent since the last call, (processes, n) float32, rows in order
        of rank; None where that was nothing.
        """
        return self._arrived.pop(name, None)

    def setup_distributed(self) -> None:
        """Join the processes, and part their random numbers."""
        super().setup_distributed()  # gives all of them the same seed, after the weights were made
        # What is drawn while training (dropout, ε) must not be the same for all.
        torch.manual_seed(torch.initial_seed() + self.global_rank)

    def _register_ddp_hooks(self) -> None:
        # Lightning's own registers hooks on GPUs alone.
        network = self.model
        assert isinstance(network, DistributedDataParallel)
        self._statistics = [
            statistic
            for module in network.modules()
            if isinstance(module, _NormBase) and module.track_running_stats
            for statistic in (module.running_mean, module.running_var)
            if statistic is not None
        ]
        network.register_comm_hook(None, lambda _, bucket: self._average(bucket))

    def _average(self, bucket: Any) -> Future[Tensor]:
        """Average a bucket of gradients (torch.distributed.GradBucket)."""
        gradient = bucket.buffer()
        if bucket.is_last():
            # Nothing is left to be computed beside it: to wait for it costs nothing.
            self._average_and_carry(gradient)
            done: Future[Tensor] = Future(
                devices=[gradient.device] if gradient.device.type == "cuda" else []
            )
            done.set_result(gradient)
            return done
        work = dist.all_reduce(gradient.div_(self.world_size), async_op=True)
        averaged: Future[Tensor] = work.get_future().then(lambda sums: sums.value()[0])
        return averaged

    def _average_and_carry(self, gradient: Tensor) -> None:
        # A number on the host must not wait for the device.
        mine = {
            name: offer().to(gradient.device, non_blocking=True)
            for name, offer in self._offers.items()
        }
        parts = [
            gradient / self.world_size,
            *(statistic.flatten() * self._share() for statistic in self._statistics),
            *(self._row(offered) for offered in mine.values()),
        ]
        # In bf16 a count of samples above 256 would be rounded.
        exact = torch.promote_types(gradient.dtype, torch.float32)
        message = torch.cat([part.to(exact) for part in parts])
        dist.all_reduce(message)
        averaged, *others = message.split([part.numel() for part in parts])
        gradient.copy_(averaged)
        statistics, rows = others[: len(self._statistics)], others[len(self._statistics) :]
        for statistic, mean in zip(self._statistics, statistics, strict=True):
            statistic.copy_(mean.view_as(statistic))
        self._arrived = {
            name: row.view(self.world_size, -1).float()
            for name, row in zip(mine, rows, strict=True)
        }

    def _share(self) -> float:
        """Of this process in the samples of the step."""
        task = self.lightning_module
        return (task.share if isinstance(task, AbstractTask) else 1.0) / self.world_size

    def _row(self, offered: Tensor) -> Tensor:
        """Among zeros for the other processes, so that the sum has the numbers of all."""
        rows = offered.new_zeros(self.world_size, offered.numel())
        rows[self.global_rank] = offered
        return rows.flatten()


def carrying(trainer: Trainer) -> CarryingDDP | None:
    """The strategy that carries numbers between processes; None where there is only one.

    Raises: TypeError where another strategy joins several.
    """
    strategy = trainer.strategy
    if isinstance(strategy, CarryingDDP):
        return strategy if trainer.world_size > 1 else None
    if trainer.world_size > 1:
        raise TypeError(
            f"several processes need trainer.strategy._target_=fastdeq.training.CarryingDDP, as "
            f"trainer=ddp and trainer=ddp_cpu have it, not {type(strategy).__name__}"
        )
    return None
