"""States on the way to the equilibrium, with gradients of their own."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from fastdeq.adjoints.base import AbstractAdjoint, Equilibrium
from fastdeq.adjoints.reversible import Reversible
from fastdeq.adjoints.unrolled import Unrolled
from fastdeq.notation import FlatMap

StatesAt: TypeAlias = int | Sequence[int]
"""After which steps of the solver: of n, evenly spaced, or of those that are listed, from 1."""


def chosen_steps(states: StatesAt | None, max_steps: int) -> tuple[int, ...]:
    """The numbers of the steps, ascending. n of them lie at max_steps · i / (n + 1), i = 1 … n.

    Raises: TypeError for what is not whole numbers; ValueError for steps that do not ascend, and
    for those beyond the solver's last.
    """
    if states is None:
        return ()
    listed = not isinstance(states, int)
    steps: list[int] = list(states) if isinstance(states, Sequence) else [states]
    if isinstance(states, str) or any(type(step) is not int for step in steps):
        raise TypeError(f"states is {states!r}, but must be a number of states, or step numbers")
    last = max_steps if listed else max_steps - 1
    if any(step < 1 for step in steps) or sorted(set(steps)) != steps:
        raise ValueError(f"states is {states!r}, but must be 1 or more, or ascending step numbers")
    if steps and steps[-1] > last:
        raise ValueError(
            f"states is {states!r}, but the solver takes at most max_steps={max_steps} steps: "
            "raise solver.max_steps, or ask for earlier states"
        )
    if listed:
        return tuple(steps)
    return tuple(max_steps * i // (steps[0] + 1) for i in range(1, steps[0] + 1))


def check_closing(closing: AbstractAdjoint | None, adjoint: AbstractAdjoint) -> None:
    """Refuse an adjoint of the states on the way that needs the graph of steps that have none.

    Raises: TypeError, ValueError.
    """
    if not isinstance(closing, AbstractAdjoint | None):
        raise TypeError(
            f"states_adjoint is {closing!r}, but must be an adjoint, such as "
            "fastdeq.adjoints.Phantom()"
        )
    for kind in (Unrolled, Reversible):
        if isinstance(closing, kind) and not isinstance(adjoint, kind):
            raise ValueError(
                f"states_adjoint is {kind.__name__}, but the adjoint of the solve is another: give "
                "the same, or Phantom"
            )


def closed(
    f: FlatMap, found: Equilibrium, adjoint: AbstractAdjoint, closing: AbstractAdjoint | None
) -> tuple[Tensor, ...]:
    """f at each recorded state, (B, D), with the gradient of `closing`, or else of `adjoint`.

    Where f is not finite, the state itself is returned.
    """
    outputs = []
    for z in found.forward.states:
        keeps = closing is None or closing == adjoint  # of unrolled steps, the graph
        at = replace(found.forward, value=z if keeps else z.detach())
        output = (closing or adjoint).close(f, at).value
        finite = torch.isfinite(output.detach().sum(dim=1, keepdim=True))
        outputs.append(torch.where(finite, output, at.value))
    return tuple(outputs)
