"""The result of a training step, for the verdict, the metrics, callbacks and loggers."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor

from fastdeq.flatten import scales_of
from fastdeq.notation import State
from fastdeq.solution import Solution
from fastdeq.timer import Seconds, Stopwatch
from fastdeq.training.diagnosis import joined
from fastdeq.training.metrics import Value, backward_metrics


class Evaluation(NamedTuple):
    """The loss of a batch, its solution, and its metrics before the backward pass."""

    loss: Tensor
    solution: Solution
    metrics: Mapping[str, Value]


@dataclass(frozen=True, kw_only=True)
class BatchResult:
    """A batch of an optimizer step, after its backward pass.

    samples: of this process; 0 for a placeholder batch. metrics: means over the samples.
    seconds: of the solves.
    watch: from the start of the batch to its end; of the last batch, to the end of the step.
    measures: see `diagnosis.measure`.
    random: the random state before the batch, if the step may be kept.
    states: start and equilibrium, if the step may be kept; `start` where it was given.
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
        start: State | None = None,
        keep_states: bool,
    ) -> "BatchResult":
        """From a solution that the backward pass has completed. start: a z₀ that was given."""
        backward = solution.backward
        seconds: dict[str, Value] = {"solve_seconds": solution.elapsed}
        if backward.stats is not None:
            seconds["backward_seconds"] = backward.stats.elapsed
        states = _states(solution) if keep_states and batch[2] else {}
        if states and start is not None:
            states["start"] = start
        return cls(
            batch=batch,
            samples=len(solution.status) if batch[2] else 0,
            metrics={**metrics, **backward_metrics(backward)},
            seconds=seconds,
            watch=watch.stop(),
            measures=measures,
            random=random,
            states=states,
        )


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """An optimizer step: its batches on this process, several if gradients are accumulated.

    number: of the optimizer step, from 0. depth: of an unrolled step; None: it solves.
    accumulates: the number that the loss of each batch is divided by.
    before: copies of the module's tensors at the beginning of the step, for a failed step; their
        memory is used again by the next step but one.
    rate: the learning rate.
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
        """The measures of all batches together with `others`, of a batch that is not added yet."""
        return joined([*(batch.measures for batch in self.batches), *others])

    @property
    def seconds(self) -> Seconds:
        """The seconds of the whole step: forward and backward passes, and the optimizer."""
        return Seconds(tuple(batch.watch for batch in self.batches))


def _states(solution: Solution) -> dict[str, Any]:
    """Start, equilibrium and status of each sample, without graphs."""
    scales = {"z0": solution.z0, "z_star": solution.value}
    backward = solution.backward.stats
    return {
        **{name: [z.detach() for z in scales_of(state)] for name, state in scales.items()},
        "status": solution.status,
        "residual": solution.residual.detach(),
        "relative_residual": solution.relative_residual.detach(),
        "status_backward": None if backward is None else backward.status,
    }
