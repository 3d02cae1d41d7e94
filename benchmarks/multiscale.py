"""A training step of the tiny CIFAR-10 cell: 18 evaluations forward, 20 VJPs backward, batch 16."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measuring import Case, Row, timed_rows
from benchmarks.steps import SOLVERS, Problem, our_step, their_step
from fastdeq.autocast import in_bf16
from fastdeq.experiment.build import build_model
from fastdeq.experiment.parts import composed


def rows(quick: bool) -> Iterator[Row]:
    """In float32 and contiguous; the best settings: channels_last, and f in bfloat16."""
    plain, best = problems(2 if quick else 16, 3 if quick else 18, 3 if quick else 20)
    cases: dict[tuple[str, str], Case] = {}
    for name in SOLVERS:
        cases[name, "fastdeq"] = our_step(name, plain)
        cases[name, "best settings"] = our_step(name, best)
        if (run := their_step(name, plain)) is not None:
            cases[name, "torchdeq"] = run
    turns, warm_up = (1, 0) if quick else (3, 1)
    what = "multiscale training step"
    yield from timed_rows(what, {"": plain.passes}, cases, turns=turns, warm_up=warm_up)


def problems(batch: int, forward: int, backward: int) -> tuple[Problem, Problem]:
    """The same cell and state twice, the second with the best settings."""
    torch.manual_seed(0)
    cell = build_model(composed(["model=mdeq", "arch=cifar_tiny", "data=cifar10"])).equilibrium.cell
    x = torch.randn(batch, 24, 32, 32)
    z0 = (torch.zeros(batch, 24, 32, 32), torch.zeros(batch, 24, 16, 16))
    counts = {"forward": forward, "backward": backward}
    return _plain(cell, x, z0, **counts), _best(copy.deepcopy(cell), x, z0, **counts)


def _plain(cell: nn.Module, x: Tensor, z0: tuple[Tensor, ...], **counts: int) -> Problem:
    return _problem(lambda z: cell(z, x), cell, z0, **counts)


def _best(cell: nn.Module, x: Tensor, z0: tuple[Tensor, ...], **counts: int) -> Problem:
    cell = cell.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    start, input_ = tuple(map(_channels_last, z0)), _channels_last(x)
    return _problem(lambda z: in_bf16(lambda at: cell(at, input_), z), cell, start, **counts)


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _problem(f: Any, cell: nn.Module, z0: tuple[Tensor, ...], **counts: int) -> Problem:
    return Problem(f=f, z0=z0, parameters=list(cell.parameters()), per_sample=False, **counts)
