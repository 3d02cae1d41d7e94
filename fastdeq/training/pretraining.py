"""Pretraining: the first steps of a run unroll the cell instead of solving."""

from pytorch_lightning import Callback


class Pretraining(Callback):
    """Unrolls the cell `depth` times from z₀, with ordinary backpropagation, in the first `steps`
    optimizer steps (Bai et al. 2020, arXiv 2006.08656, §4). Later steps and all evaluations solve.

    It has no hooks: the training step reads it from the trainer's callbacks.

    Raises: ValueError for steps below 0 or a depth below 1.
    """

    def __init__(self, *, steps: int, depth: int = 5) -> None:
        for name, value, least in (("steps", steps, 0), ("depth", depth, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"Pretraining.{name} is {value!r}, but must be a whole number of at least "
                    f"{least}"
                )
        self.steps, self.depth = steps, depth

    def depth_of(self, step: int) -> int | None:
        """The depth of optimizer step number `step` (from 0); None: it solves."""
        return self.depth if step < self.steps else None
