"""Equilibrium layers between ordinary ones."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fastdeq.adjoints import AbstractAdjoint
from fastdeq.adjoints.states import StatesAt
from fastdeq.nn.base import AbstractCellLayer, AbstractSolvingModule
from fastdeq.nn.initialization import Initialization, initialize
from fastdeq.nn.joined import joined
from fastdeq.notation import State
from fastdeq.solution import Solution, TraceKind


class DEQChain(AbstractSolvingModule):
    """Layers in sequence, one or more of them equilibrium layers; returns the solution beside y.

    layers: modules in order, given by position or by name (`stem=..., deq=..., head=...`); names
        appear in the state_dict. An equilibrium layer is any `AbstractSolvingModule`: a
        `DeepEquilibriumNetwork`, plain or skip, a baseline in its place, or a network of several
        (`WidthStackedDEQ`, another chain).
    initialization: draws all weights again, see `fastdeq.nn.initialize`; None keeps those that
        the layers have.

    The solution of several equilibria is that of `fastdeq.nn.joined`: every loss and metric is of
    all of them, and `solution.parts` are their own.

    Raises: TypeError for what is not a module, ValueError without an equilibrium layer, and as
    `initialize`.
    """

    def __init__(
        self, *layers: nn.Module, initialization: Initialization | None = None, **named: nn.Module
    ) -> None:
        super().__init__()
        for name, layer in [*((str(i), layer) for i, layer in enumerate(layers)), *named.items()]:
            if not isinstance(layer, nn.Module):
                raise TypeError(
                    f"layer '{name}' of the chain is a {type(layer).__name__}, not an nn.Module"
                )
            self.add_module(name, layer)
        self._solving = tuple(name for name, layer in self._layers() if _solves(layer))
        if not self._solving:
            raise ValueError("a DEQChain has at least one equilibrium layer, but got none")
        if initialization is not None:
            initialize(self, initialization)

    @property
    def equilibria(self) -> tuple[AbstractCellLayer, ...]:
        """The equilibrium layers, in order."""
        solving = [layer for _, layer in self._layers() if isinstance(layer, AbstractSolvingModule)]
        return tuple(each for layer in solving for each in layer.equilibria)

    @property
    def equilibrium(self) -> AbstractCellLayer:
        """The equilibrium layer. Raises: ValueError for several."""
        if len(self._solving) != 1 or len(self.equilibria) != 1:
            raise ValueError(f"this chain has {len(self.equilibria)} equilibria: use `equilibria`")
        return self.equilibria[0]

    def forward(
        self,
        x: Any,
        *,
        z0: State | dict[str, Any] | None = None,
        v0: Tensor | dict[str, Tensor] | None = None,
        jacobian_loss: bool = False,
        depth: int | None = None,
        trace: TraceKind | None = None,
        states: StatesAt | None = None,
        states_adjoint: AbstractAdjoint | None = None,
    ) -> tuple[Any, Solution]:
        """(y, solution); the options are those of `AbstractCellLayer.forward`, for every
        equilibrium layer.

        z0, v0: of several layers, a dictionary of the starts of some of them by name.
        """
        starts, cotangents = self._starts("z0", z0), self._starts("v0", v0)
        options: dict[str, Any] = {
            **{"jacobian_loss": jacobian_loss, "depth": depth, "trace": trace},
            **{"states": states, "states_adjoint": states_adjoint},
        }
        solutions = []
        for name, layer in self._layers():
            if name in self._solving:
                x, solution = layer(x, z0=starts.get(name), v0=cotangents.get(name), **options)
                solutions.append(solution)
            else:
                x = layer(x)
        return x, joined(solutions)

    def predict_from(self, z: State) -> Any:
        """The prediction from a state: the layers after the last equilibrium, applied to it."""
        layers = list(self._layers())
        last = [name for name, _ in layers].index(self._solving[-1])
        y: Any = z
        for _, layer in layers[last + 1 :]:
            y = layer(y)
        return y

    def explicit(self, x: Any) -> Any:
        """The prediction without a solve: every equilibrium layer returns its z₀.

        Raises: ValueError where one does not predict.
        """
        for _, layer in self._layers():
            x = layer.explicit(x) if isinstance(layer, AbstractSolvingModule) else layer(x)
        return x

    def _starts(self, name: str, given: Any) -> dict[str, Any]:
        if given is None:
            return {}
        if len(self._solving) == 1:
            return {self._solving[0]: given}
        if not isinstance(given, dict) or not given.keys() <= set(self._solving):
            raise ValueError(
                f"this chain has several equilibrium layers: give {name} as a dictionary of their "
                f"names ({', '.join(self._solving)}) and starts"
            )
        return given

    def _layers(self) -> Iterator[tuple[str, nn.Module]]:
        # Not named_children(), which leaves out the second use of a module.
        for name, layer in self._modules.items():
            assert layer is not None
            yield name, layer


def _solves(layer: nn.Module) -> bool:
    return isinstance(layer, AbstractSolvingModule)
