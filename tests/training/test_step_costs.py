"""What a training step does besides the model's forward and backward pass, counted."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback

from fastdeq.bench.operations import Operations
from fastdeq.experiment.job import leave_out_empty_hooks
from fastdeq.training import AbstractTask, Failures, Pretraining, StepTimer
from tests.training.tasks import make_task, make_trainer, network, samples, trained


class _Counted(Callback):
    """For every step, kernels and waits outside of the model's forward and backward passes."""

    def __init__(self, operations: Operations, task: AbstractTask) -> None:
        self._operations = operations
        self._inside = torch.zeros(2, dtype=torch.int64)
        self.steps: list[list[int]] = []
        task.model.forward = self._apart(task.model.forward)  # type: ignore[method-assign]
        task._backward = self._apart(task._backward)  # type: ignore[method-assign]

    def _apart(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def apart(*args: Any, **options: Any) -> Any:
            before = self._counts()
            result = call(*args, **options)
            self._inside += self._counts() - before
            return result

        return apart

    def _counts(self) -> torch.Tensor:
        counts = [self._operations.kernels, self._operations.waits]
        with torch._C._DisableTorchDispatch():  # not counted
            return torch.tensor(counts)

    def on_train_batch_start(self, *_: Any) -> None:
        self._begun = self._counts() - self._inside

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps.append((self._counts() - self._inside - self._begun).tolist())


def test_a_step_adds_few_kernels_and_no_waits_to_the_models_passes(tmp_path: Path) -> None:
    """Its metrics, verdict and bookkeeping; the optimizer is one call. The limits are the counts of
    today: a device starts each kernel, and waits where the host reads a number.
    """
    task = make_task(model=network("first"), skip=1.0)
    task.make_optimizer = partial(torch.optim.Adam, fused=True)
    operations = Operations()
    counted = _Counted(operations, task)
    with operations:
        trained(
            *(task, [samples(5)] * 8, tmp_path),
            callbacks=[StepTimer(), Failures(), Pretraining(steps=0), counted],
            log_every_n_steps=0,
        )
    kernels, waits = counted.steps[4]
    assert kernels <= 51
    assert waits == 0


class _AfterBackward(Callback):
    def on_after_backward(self, *_: Any) -> None:
        pass


def test_only_hooks_that_do_something_are_called_in_a_step(tmp_path: Path) -> None:
    own = _AfterBackward()
    trainer = make_trainer(tmp_path, callbacks=[own, timer := StepTimer()])
    leave_out_empty_hooks(trainer, make_task())
    assert callable(own.on_after_backward)
    assert own.on_before_backward is None
    assert timer.on_after_backward is None
    assert callable(timer.on_train_batch_end)
