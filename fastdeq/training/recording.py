"""Records how the solves of an evaluation went: all samples in brief, some batches in full."""

import logging
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from fastdeq.flatten import Layout
from fastdeq.nn import DeepEquilibriumNetwork
from fastdeq.nn.call import CellCall
from fastdeq.norms import sample_norm
from fastdeq.regularizers import spectral_radius
from fastdeq.rows import select_rows
from fastdeq.runs.folder import RECORDED, recording_file
from fastdeq.runs.recorded import (
    BatchRecord,
    Numbers,
    RecordedSolves,
    SolveRecord,
    write_recording,
)
from fastdeq.solution import Solution, SolveStats
from fastdeq.training.task import AbstractTask

LOG = logging.getLogger("fastdeq")

_ITERATIONS = 30  # of the power method
_BRIEF = ("nfe", "status", "relative_residual")


class RecordEquilibria(Callback):
    """Writes recorded/epoch_<number>.h5 after a validation, and recorded/test.h5 after the
    test. `fastdeq.runs.recorded` has the layout and the reader.

    Of every sample it keeps NFE, status and relative residual. The chosen batches are solved once
    more, forward and backward (of the task's loss), with the residual after every step; and the
    spectral radius of ∂f/∂z is measured, which is also the metric `<stage>/spectral_radius`. The
    random state and the gradients of the training are left as they are.

    batches: indices of batches of the validation and the test set; None: the first; []: none is
        solved again, as in a model without a solver or with several equilibria.
    samples: of each batch at most; None: all.
    every: epochs from one recording to the next.
    keep: "last" keeps the newest epoch's file; "all" keeps every file.
    states: also record inputs, targets, equilibria and the solver's iterates.

    Only the first process records, its own samples.

    Raises: ValueError for an index below 0, and for samples or every below 1.
    """

    def __init__(
        self,
        *,
        batches: list[int] | None = None,
        samples: int | None = 64,
        every: int = 1,
        keep: Literal["last", "all"] = "last",
        states: bool = False,
    ) -> None:
        self.batches = [0] if batches is None else list(batches)
        for name, values, least in (
            ("batches", self.batches, 0),
            ("samples", [1 if samples is None else samples], 1),
            ("every", [every], 1),
        ):
            if any(isinstance(n, bool) or not isinstance(n, int) or n < least for n in values):
                raise ValueError(
                    f"RecordEquilibria.{name} is {values}, but must be whole numbers of at least "
                    f"{least}"
                )
        if keep not in ("last", "all"):
            raise ValueError(f"RecordEquilibria.keep is {keep!r}, but must be 'last' or 'all'")
        self.samples, self.every, self.keep, self.states = samples, every, keep, states
        self._kept: dict[str, list[Tensor]] = {}
        self._found: dict[int, BatchRecord] = {}

    # Lightning's hooks

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the size of what will be written, if that is more than one small file."""
        data = getattr(trainer, "datamodule", None)
        small = self.keep == "last" and not self.states
        if not trainer.is_global_zero or not self.batches or small or data is None:
            return
        assert isinstance(pl_module, AbstractTask)
        size = self.size(pl_module, data.sample_batch(1), getattr(data, "eval_batch_size", 1))
        epochs = trainer.max_epochs or -1
        files = 1 if self.keep == "last" else -(-epochs // self.every)
        text = f"{size / 1e6:,.2f} MB" + (f" × {files} epochs" if files > 1 else "")
        LOG.info("recording   %s at most, before compression, in %s/", text, RECORDED)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what an evaluation that was interrupted has left."""
        self._kept, self._found = {name: [] for name in _BRIEF}, {}

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the statistics of the batch, and solve it again if it is a chosen one."""
        if trainer.current_epoch % self.every == 0:
            self._batch_end(trainer, pl_module, outputs, batch, batch_idx, "val")

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the statistics of the batch, and solve it again if it is a chosen one."""
        self._batch_end(trainer, pl_module, outputs, batch, batch_idx, "test")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file of this epoch."""
        self._write(trainer, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file of the test."""
        self._write(trainer, "test")

    # What they do

    def _batch_end(
        self,
        trainer: Trainer,
        task: LightningModule,
        outputs: Any,
        batch: Any,
        index: int,
        stage: str,
    ) -> None:
        if not trainer.is_global_zero or trainer.sanity_checking or not outputs:
            return
        solution: Solution = outputs["solution"]
        for name in _BRIEF:
            self._kept[name].append(getattr(solution, name).detach())
        assert isinstance(task, AbstractTask)
        if index in self.batches and _has_one_solver(task):
            found = record_batch(
                task, batch, samples=self.samples, states=self.states, context=_autocast(trainer)
            )
            self._found[index] = found
            if found.spectral_radius is not None:
                mean = torch.tensor(found.spectral_radius).mean()
                task.record(stage, {"spectral_radius": mean}, len(found.spectral_radius))

    def _write(self, trainer: Trainer, stage: str) -> None:
        if not self._kept["nfe"]:
            return
        folder, epoch = Path(trainer.default_root_dir), trainer.current_epoch
        path = recording_file(folder, None if stage == "test" else epoch)
        recording = RecordedSolves(
            stage=stage,
            epoch=epoch,
            step=trainer.global_step,
            **{name: torch.cat(parts).cpu().numpy() for name, parts in self._kept.items()},
            batches=self._found,
        )
        write_recording(path, recording)
        if self.keep == "last" and stage == "val":
            for other in path.parent.glob("epoch_*.h5"):
                if other != path:
                    other.unlink()

    def size(self, task: AbstractTask, batch: Any, batch_size: int) -> int:
        """The bytes of a file at most, without compression and without the brief statistics.

        batch: a sample, which shows the sizes of input, target and state.
        """
        if not _has_one_solver(task):
            return 0
        layer = task.model.equilibrium
        assert isinstance(layer, DeepEquilibriumNetwork)
        x, targets, _ = batch
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            training = task.training
            _, solution = task.eval().model(x.to(task.device))
            task.train(training)
        width = Layout.of(solution.value).flatten(solution.value).shape[1] if self.states else 0
        backward = getattr(getattr(layer.adjoint, "solver", None), "max_steps", 0)
        rows = (layer.solver.max_steps + 1) * (1 + width) + (backward + 1) * (1 + width)
        shown = (x.numel() + targets.numel()) if self.states else 0
        samples = batch_size if self.samples is None else min(self.samples, batch_size)
        numbers = 12 + rows + 2 * width + shown
        return 4 * numbers * samples * len(self.batches)


def _has_one_solver(task: AbstractTask) -> bool:
    layers = task.model.equilibria
    return len(layers) == 1 and isinstance(layers[0], DeepEquilibriumNetwork)


def record_batch(
    task: AbstractTask, batch: Any, *, samples: int | None, states: bool, context: Any = None
) -> BatchRecord:
    """Solve a batch forward and backward in evaluation mode, and record it.

    context: makes the context of the forward pass; None: none.
    """
    x, targets, _ = batch
    count = min(len(targets), samples or len(targets))
    rows = torch.arange(count, device=targets.device)
    layer = task.model.equilibrium
    calls: list[Any] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0]))
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # the evaluation has warned already
            x, targets = _copied(select_rows(x, rows, len(targets))), targets[rows].clone()
            with context() if context is not None else ExitStack():
                trace: Literal["states", "residuals"] = "states" if states else "residuals"
                prediction, solution = task.model(x, trace=trace)
                loss = task.criterion(prediction, targets)
            _differentiate(loss, task)
            with context() if context is not None else ExitStack():  # as the input was made
                call = CellCall(layer.cell, calls[0], layer.precision)
                radius = _spectral_radius(call, solution)
    finally:
        handle.remove()
    return _as_record(solution, radius, (x, targets) if states else None)


def _differentiate(loss: Tensor, task: AbstractTask) -> None:
    """The backward pass, whose statistics the solution then has; gradients are not accumulated."""
    parameters = [parameter for parameter in task.parameters() if parameter.requires_grad]
    if loss.requires_grad and parameters:
        torch.autograd.grad(loss, parameters, allow_unused=True)


def _spectral_radius(f: CellCall, solution: Solution) -> Tensor:
    layout = Layout.of(solution.value)
    flat = layout.flatten(solution.value).detach()
    with torch.random.fork_rng(devices=[flat.device] if flat.device.type == "cuda" else []):
        torch.manual_seed(0)
        return spectral_radius(f, layout.unflatten(flat), iterations=_ITERATIONS)


def _as_record(solution: Solution, radius: Tensor, shown: tuple[Any, Tensor] | None) -> BatchRecord:
    report = solution.backward
    z = Layout.of(solution.value).flatten(solution.value)
    stats = report.stats
    inputs = None if shown is None or not isinstance(shown[0], Tensor) else _numbers(shown[0])
    return BatchRecord(
        forward=_solve(solution, z, states=shown is not None),
        backward=None if stats is None else _solve(stats, report.value, states=shown is not None),
        spectral_radius=_numbers(radius),
        inputs=inputs,
        targets=None if shown is None else _numbers(shown[1]),
    )


def _solve(stats: SolveStats, value: Tensor | None, *, states: bool) -> SolveRecord:
    trace = stats.trace
    return SolveRecord(
        **{
            name: _numbers(getattr(stats, name))
            for name in ("nfe", "steps", "status", "residual", "relative_residual")
        },
        residuals=None if trace is None else _numbers(trace.residuals),
        norm=None if value is None else _numbers(sample_norm(value.detach())),
        value=_numbers(value) if states and value is not None else None,
        states=None if trace is None or trace.states is None else _numbers(trace.states),
    )


def _numbers(tensor: Tensor) -> Numbers:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _copied(x: Any) -> Any:
    """Tensors that autograd may save, also where the loader has made them in inference mode."""
    return x.clone() if isinstance(x, Tensor) else x


def _autocast(trainer: Trainer) -> Any:
    return trainer.precision_plugin.forward_context
