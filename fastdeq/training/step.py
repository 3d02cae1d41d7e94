"""What a training step hands on to the verdict, the metrics, callbacks and loggers."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor

from fastdeq.solution import Solution
from fastdeq.timer import Stopwatch
from fastdeq.training.diagnosis import joined
from fastdeq.training.metrics import Value, backward_metrics


class Evaluation(NamedTuple):
    """A batch's loss, to be minimized, its solution, and its metrics before a backward pass."""

    loss: Tensor
    solution: Solution
    metrics: Mapping[str, Value]


@dataclass(frozen=True, kw_only=True)
class BatchResult:
    """A batch of an optimizer step, after its backward pass.

    samples: of this process; 0 for a batch that only stands in. metrics: means over them. seconds:
    of the solves. watch: from the start of the batch; on the last one, to the end of the step.
    measures: see `diagnosis.measure`. random: the random numbers before the batch, if they may be
    wanted. states: start and equilibrium, likewise.
    """

    batch: Any
    samples: int
    metrics: Mapping[str, Value]
    seconds: Mapping[str, Value]
    watch: Stopwatch
    measures: Tensor
    random: tuple[Any, ...] | None
    states: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        batch: Any,
        solution: Solution,
        metrics: Mapping[str, Value],
        measures: Tensor,
        watch: Stopwatch,
        random: tuple[Any, ...] | None,
        *,
        keep_states: bool,
    ) -> "BatchResult":
        """After the backward pass, which has completed the solution."""
        backward = solution.backward
        seconds: dict[str, Value] = {"solve_seconds": solution.elapsed}
        if backward.stats is not None:
            seconds["backward_seconds"] = backward.stats.elapsed
        return cls(
            batch=batch,
            samples=len(solution.status) if batch[2] else 0,
            metrics={**metrics, **backward_metrics(backward)},
            seconds=seconds,
            watch=watch.stop(),
            measures=measures,
            random=random,
            states=_states(solution) if keep_states and batch[2] else {},
        )


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """An optimizer step: its batches on this process, several where gradients are accumulated.

    number: of the optimizer step, from 0. depth: of an unrolled step; None: it solves. accumulates:
    the number that the loss of each batch is divided by. before: copies of the module's tensors at
    its beginning that a failed step needs. rate: the learning rate.
    """

    number: int
    epoch: int
    depth: int | None
    accumulates: int
    rate: float
    before: Mapping[str, Tensor]
    batches: tuple[BatchResult, ...] = ()

    def with_batch(self, batch: BatchResult) -> "StepResult":
        """This step with one more batch."""
        return replace(self, batches=(*self.batches, batch))

    def measures(self, *others: Tensor) -> Tensor:
        """Those of all batches, and of others that are still to come."""
        return joined([*(batch.measures for batch in self.batches), *others])

    @property
    def seconds(self) -> "Seconds":
        """Of the whole step: forward and backward passes, and the optimizer."""
        return Seconds(tuple(batch.watch for batch in self.batches))


@dataclass(frozen=True)
class Seconds:
    """The sum of what stopwatches measure; reading it waits for the device."""

    watches: tuple[Stopwatch, ...]

    def __float__(self) -> float:
        return sum(watch.seconds for watch in self.watches)


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
