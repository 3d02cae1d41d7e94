"""Data parallelism in which a step communicates once: when it averages the gradients."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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

from fastdeq.training.sigterm import SigtermHandler

Payload: TypeAlias = Callable[[], Tensor]
"""Returns numbers (n,) to send, n the same on all processes; called at the end of backward."""

_SYNC_BUFFERS = "forward_sync_buffers"
if _SYNC_BUFFERS not in signature(DistributedDataParallel).parameters:
    _SYNC_BUFFERS = "broadcast_buffers"  # before torch 2.13


class PayloadDDPStrategy(DDPStrategy):
    """DistributedDataParallel that sends a payload with the last message of a backward pass.

    The payload has two parts:

    - The numbers that are registered (`register`), gathered from all processes (`gathered`).
    - Running statistics: their mean over all samples replaces each process's own. (DDP itself
      would broadcast those of the first process before every evaluation of the network.) All other
      buffers stay separate.

    If parameters are unused (find_unused_parameters), DDP adds one message that names them.

    options: of DistributedDataParallel and of Lightning's strategy.

    Raises: ValueError for another communication hook.
    """

    def __init__(self, **options: Any) -> None:
        if any(options.get(f"ddp_comm_{name}") is not None for name in ("hook", "wrapper")):
            raise ValueError(
                "PayloadDDPStrategy averages gradients by a hook of its own: leave ddp_comm_hook "
                "and ddp_comm_wrapper out"
            )
        super().__init__(**{_SYNC_BUFFERS: False, **options})
        self._payloads: dict[str, Payload] = {}
        self._gathered: dict[str, Tensor] = {}
        self._statistics: list[Tensor] = []
        self._weight = 1.0
        self._sigterm: SigtermHandler | None = None

    def register(self, name: str, payload: Payload) -> None:
        """Send this payload with every following step."""
        self._payloads[name] = payload

    def gathered(self, name: str) -> Tensor | None:
        """The payloads of all processes since the last call, (processes, n) float32, one row per
        rank; None if nothing was sent.
        """
        return self._gathered.pop(name, None)

    @contextmanager
    def sending(self, weight: float, payloads: Mapping[str, Payload]) -> Iterator[None]:
        """Also send these payloads in the backward pass inside the block.

        weight: of this process's samples in the mean over all processes; 1 for equal parts.
        """
        before = self._payloads, self._weight
        self._payloads, self._weight = {**self._payloads, **payloads}, weight
        try:
            yield
        finally:
            self._payloads, self._weight = before

    def setup_distributed(self) -> None:
        """Connect the processes, and give each its own random stream."""
        super().setup_distributed()  # sets the same seed on all, after the weights were made
        # Draws during training (dropout, ε) must differ between processes.
        torch.manual_seed(torch.initial_seed() + self.global_rank)

    def setup(self, trainer: Trainer) -> None:
        """Prepare the module, and note the SIGTERM handler before Lightning replaces it."""
        super().setup(trainer)
        self._sigterm = SigtermHandler()

    def barrier(self, name: str | None = None) -> None:
        """Wait for all processes."""
        if name == "run-stage" and self._sigterm is not None:
            self._sigterm.restore()  # Lightning has just registered its handler
        super().barrier(name)

    def configure_ddp(self) -> None:
        """Wrap the module, and register the hook that averages gradients."""
        super().configure_ddp()
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
            # No computation is left to overlap with: waiting for it costs nothing.
            self._average_and_send(gradient)
            done: Future[Tensor] = Future(
                devices=[gradient.device] if gradient.device.type == "cuda" else []
            )
            done.set_result(gradient)
            return done
        work = dist.all_reduce(gradient.div_(self.world_size), async_op=True)
        averaged: Future[Tensor] = work.get_future().then(lambda sums: sums.value()[0])
        return averaged

    def _average_and_send(self, gradient: Tensor) -> None:
        # A number on the host must not wait for the device.
        mine = {
            name: payload().to(gradient.device, non_blocking=True)
            for name, payload in self._payloads.items()
        }
        share = self._weight / self.world_size
        parts = [
            gradient / self.world_size,
            *(statistic.flatten() * share for statistic in self._statistics),
            *(self._row(numbers) for numbers in mine.values()),
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
        self._gathered = {
            name: row.view(self.world_size, -1).float()
            for name, row in zip(mine, rows, strict=True)
        }

    def _row(self, numbers: Tensor) -> Tensor:
        """The numbers in this process's row of zeros: the sum over processes has all rows."""
        rows = numbers.new_zeros(self.world_size, numbers.numel())
        rows[self.global_rank] = numbers
        return rows.flatten()


def payload_strategy(trainer: Trainer) -> PayloadDDPStrategy | None:
    """The strategy that sends payloads between processes; None for a single process.

    Raises: TypeError for another strategy of several processes.
    """
    strategy = trainer.strategy
    if isinstance(strategy, PayloadDDPStrategy):
        return strategy if trainer.world_size > 1 else None
    if trainer.world_size > 1:
        raise TypeError(
            "several processes need trainer.strategy._target_=fastdeq.training.PayloadDDPStrategy, "
            f"as trainer=ddp and trainer=ddp_cpu have it, not {type(strategy).__name__}"
        )
    return None


@contextmanager
def averaged_gradients(
    trainer: Trainer, *, last: bool, weight: float, payloads: Mapping[str, Payload]
) -> Iterator[None]:
    """Average the gradients of all processes at the end of a backward pass, and send the payloads
    with them. Does nothing for a single process.

    last: whether the batch is the last one of its optimizer step. Before that, gradients are
        accumulated and nothing is sent.
    weight: of this process's samples in the mean over all processes; 1 for equal parts.
    """
    if (strategy := payload_strategy(trainer)) is None:
        yield
    elif last:
        with strategy.sending(weight, payloads):
            yield
    else:
        with strategy.block_backward_sync():
            yield
