"""A small dense f, where everything beside f counts: milliseconds, and how they scale."""

from collections.abc import Iterator

import torch
from torch import nn

from benchmarks.measuring import Case, Row, timed_rows
from benchmarks.steps import SOLVERS, Problem, our_solve, our_step, their_solve, their_step


def problem(batch: int, size: int) -> Problem:
    """f(z) = relu(W z) + u, contractive; about 20 µs per evaluation at 32 × 128."""
    torch.manual_seed(0)
    weight = nn.Linear(size, size, bias=False)
    with torch.no_grad():
        weight.weight.mul_(0.5)
    injection = torch.relu(torch.randn(batch, size))
    return Problem(
        f=lambda z: torch.relu(weight(z)) + injection,
        z0=torch.zeros(batch, size),
        parameters=list(weight.parameters()),
        forward=13,
        backward=12,
    )


def rows(quick: bool) -> Iterator[Row]:
    """A solve of 13 evaluations, and a training step with 12 VJPs more."""
    small = problem(32, 128)
    turns, warm_up = (1, 1) if quick else (60, 10)
    for what, alone, ours, theirs in (
        ("dense solve", small.evaluations, our_solve, their_solve),
        ("dense training step", small.passes, our_step, their_step),
    ):
        cases: dict[tuple[str, str], Case] = {}
        for name in SOLVERS:
            cases[name, "fastdeq"] = ours(name, small)
            if (run := theirs(name, small)) is not None:
                cases[name, "torchdeq"] = run
        yield from timed_rows(what, {"": alone}, cases, turns=turns, warm_up=warm_up)


def compiled(quick: bool) -> Iterator[Row]:
    """The same, eager and with `compile`. The first of the turns compiles, which takes minutes."""
    small, settings = problem(32, 128), {"compile": True, "check_every": 6}
    turns, warm_up = (1, 1) if quick else (60, 10)
    for what, alone, ours in (
        ("dense solve", small.evaluations, our_solve),
        ("dense training step", small.passes, our_step),
    ):
        cases: dict[tuple[str, str], Case] = {}
        for name in ("Picard",) if quick else SOLVERS:
            cases[name, "fastdeq"] = ours(name, small)
            cases[name, "compiled"] = ours(name, small, **settings)
        yield from timed_rows(f"compiled {what}", {"": alone}, cases, turns=turns, warm_up=warm_up)


_BATCHES = ((8, 128), (128, 128), (512, 128))
_SIZES = ((32, 32), (32, 512), (32, 2048))
_MEMORIES = (5, 10, 20, 40)


def scaling(quick: bool) -> Iterator[Row]:
    """A training step by batch and state size, and a solve of 41 evaluations by `memory`."""
    turns, warm_up = (1, 0) if quick else (12, 3)
    alone: dict[str, Case] = {}
    cases: dict[tuple[str, str], Case] = {}
    for batch, size in (*_BATCHES[:1], *_SIZES[:1]) if quick else (*_BATCHES, *_SIZES):
        one = problem(batch, size)
        for name in ("Anderson", "L-Broyden"):
            case = f"{name}, {batch} × {size}"
            alone[case], cases[case, "fastdeq"] = one.passes, our_step(name, one)
            if (run := their_step(name, one)) is not None:
                cases[case, "torchdeq"] = run
    yield from timed_rows("scaling: training step", alone, cases, turns=turns, warm_up=warm_up)
    long = problem(32, 512).with_forward(41)
    yield from timed_rows(
        "scaling: solve of 41, 32 × 512",
        {"": long.evaluations},
        {
            (f"{name}, memory {memory}", "fastdeq"): our_solve(name, long, memory=memory)
            for name in ("Anderson", "L-Broyden")
            for memory in _MEMORIES
        },
        turns=turns,
        warm_up=warm_up,
    )
