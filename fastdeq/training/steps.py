"""Batches and optimizer steps: with accumulated gradients several batches make one step."""

from pytorch_lightning import Trainer


def completes_step(trainer: Trainer) -> bool:
    """Whether the current batch of training is the last one of an optimizer step.

    Lightning's own rule: every `accumulate_grad_batches`-th batch of an epoch, and its last one.
    """
    return not trainer.fit_loop._should_accumulate()
