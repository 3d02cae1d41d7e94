"""Equilibria side by side, each with networks of its own around it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastdeq.nn.base import AbstractCellLayer, AbstractSolvingModule
from fastdeq.nn.joined import joined
from fastdeq.notation import State
from fastdeq.solution import Solution


class Concatenation(nn.Module):
    """y₁ … yₙ, (B, Cᵢ, ...), ↦ (B, ΣCᵢ, ...)."""

    def forward(self, *outputs: Tensor) -> Tensor:
        return torch.cat(outputs, dim=1)


class WidthStackedDEQ(AbstractSolvingModule):
    """y = final(combine(post₁(z₁*), …, postₙ(zₙ*))), zᵢ* the equilibrium of branch i for the input
    preᵢ(x) (the first release of FastDEQ.jl).

    deqs: an equilibrium layer per branch. pre, post: a network per branch; None: the identity.
    combine: called with the outputs of all branches; None concatenates them along their features.
    final: the final mapping; None: the identity.

    The branches are solved one after the other. The solution is that of all of them, see
    `fastdeq.nn.joined`.

    Raises: ValueError for other numbers of networks than of equilibria, and for none; TypeError for
    branches that are not equilibrium layers.
    """

    def __init__(
        self,
        deqs: Sequence[AbstractCellLayer],
        *,
        pre: Sequence[nn.Module] | None = None,
        post: Sequence[nn.Module] | None = None,
        combine: nn.Module | None = None,
        final: nn.Module | None = None,
    ) -> None:
        super().__init__()
        for name, networks in (("pre", pre), ("post", post)):
            if not deqs or (networks is not None and len(networks) != len(deqs)):
                count = 0 if networks is None else len(networks)
                raise ValueError(
                    f"there are {len(deqs)} equilibria and {count} networks in {name}: give one "
                    "each, and at least one equilibrium"
                )
        for layer in deqs:
            if not isinstance(layer, AbstractCellLayer):
                raise TypeError(
                    f"a branch is a {type(layer).__name__}: give an equilibrium layer, such as "
                    "DeepEquilibriumNetwork(cell)"
                )
        self.pre = nn.ModuleList(pre or [nn.Identity() for _ in deqs])
        self.deqs = nn.ModuleList(deqs)
        self.post = nn.ModuleList(post or [nn.Identity() for _ in deqs])
        self.combine = Concatenation() if combine is None else combine
        self.final = nn.Identity() if final is None else final

    @property
    def equilibria(self) -> tuple[AbstractCellLayer, ...]:
        return tuple(self.deqs)  # type: ignore[arg-type]  # a ModuleList

    def forward(
        self,
        x: Any,
        *,
        z0: Sequence[State | None] | None = None,
        v0: Sequence[Tensor | None] | None = None,
        **options: Any,
    ) -> tuple[Any, Solution]:
        """(y, solution). z0, v0: a start per branch, or None for that of its layer; the other
        options are those of `AbstractCellLayer.forward`, for every branch.
        """
        none = [None] * len(self.deqs)
        starts = zip(none if z0 is None else z0, none if v0 is None else v0, strict=True)
        outputs, solutions = [], []
        for pre, deq, post, (z, v) in zip(self.pre, self.deqs, self.post, starts, strict=True):
            z, solution = deq(pre(x), z0=z, v0=v, **options)
            outputs.append(post(z))
            solutions.append(solution)
        return self.final(self.combine(*outputs)), joined(solutions)

    def explicit(self, x: Any) -> Any:
        branches = zip(self.pre, self.equilibria, self.post, strict=True)
        return self.final(
            self.combine(*(post(deq.explicit(pre(x))) for pre, deq, post in branches))
        )
