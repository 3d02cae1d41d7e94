"""What goes wrong in a run, to be put into one as a callback."""

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from pytorch_lightning import Callback, LightningModule, Trainer

from fastdeq import DeepEquilibriumNetwork
from fastdeq.experiment.signals import received
from fastdeq.training import AbstractTask


class FailingRank(Callback):
    """The second process fails in its second step; the first waits for its gradients."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_rank == 1 and batch_idx == 1:
            raise RuntimeError("the second fails")


class Exchanged(Callback):
    """Writes down what the processes exchange from the end of the second step to that of the
    fourth, one line each, in exchanged.<rank>.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 1:
            self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
            self.profile.start()
        if batch_idx == 3:
            self.profile.stop()
            lines = [e.name for e in self.profile.events() if e.name.startswith("gloo:")]
            folder = Path(trainer.default_root_dir)
            (folder / f"exchanged.{trainer.global_rank}").write_text("\n".join(lines))


class Waiting(Callback):
    """The ninth step of a job that starts for the first time lasts until a signal to stop:
    what comes before and after a signal is the same however fast the machine is.

    Raises: TimeoutError after five minutes.
    """

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if os.environ.get("SLURM_RESTART_COUNT", "0") != "0" or batch_idx != 8:
            return
        (Path(trainer.default_root_dir) / f"waiting.{trainer.global_rank}").touch()
        end = time.monotonic() + 300
        while not received():
            if time.monotonic() > end:
                raise TimeoutError("no signal has come")
            time.sleep(0.1)


class BadPart(Callback):
    """In the second step, the second process's inputs are not finite (`what="inputs"`), or its
    solve ends far too early (`what="solve"`), which no other process can see. In the end all
    processes must have the same weights.
    """

    def __init__(self, what: str) -> None:
        self.what = what

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        task = cast(AbstractTask, pl_module)
        layer = cast(DeepEquilibriumNetwork, task.model.equilibrium)
        if trainer.global_rank == 0:
            return
        if batch_idx == 0:
            self.solver = layer.solver
        layer.solver = self.solver
        if batch_idx == 1 and self.what == "inputs":
            batch[0].fill_(torch.nan)
        elif batch_idx == 1:
            layer.solver = replace(self.solver, max_steps=1, tol=1e-12)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        mine = torch.cat([parameter.detach().flatten() for parameter in pl_module.parameters()])
        everyone = [torch.empty_like(mine) for _ in range(trainer.world_size)]
        torch.distributed.all_gather(everyone, mine)
        assert all(torch.equal(mine, other) for other in everyone)


class Gradients(Callback):
    """Keeps the gradients of every step, as they are after the backward pass, in gradients.pt."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        named = pl_module.named_parameters()
        self.steps.append({name: p.grad.clone() for name, p in named if p.grad is not None})
        if trainer.is_global_zero:
            torch.save(self.steps, Path(trainer.default_root_dir) / "gradients.pt")


class StepCount(Callback):
    """Counts optimizer steps in a state of its own, and logs the count at every step."""

    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.count += 1
        pl_module.log("count", float(self.count), on_step=True)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]


def gradients(folder: Path, step: int) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(folder / "gradients.pt", weights_only=True)[step]
    return found
