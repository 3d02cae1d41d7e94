"""An equilibrium layer between ordinary ones."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from fastdeq.adjoints import AbstractAdjoint
from fastdeq.adjoints.states import StatesAt
from fastdeq.nn.base import AbstractCellLayer
from fastdeq.nn.initialization import Initialization, initialize
from fastdeq.notation import State
from fastdeq.solution import Solution, TraceKind


class DEQChain(nn.Module):
    """Layers in sequence, exactly one of them an equilibrium layer; returns its solution beside y.

    layers: modules in order, given by position or by name (`stem=..., deq=..., head=...`); names
        appear in the state_dict. An equilibrium layer is any `AbstractCellLayer`: a
        `DeepEquilibriumNetwork`, plain or skip, or a baseline in its place.
    initialization: draws all weights again, see `fastdeq.nn.initialize`; None keeps those that
        the layers have.

    Raises: TypeError for what is not a module, ValueError for no or several equilibrium layers, and
    as `initialize`.
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
        found = [name for name, layer in self._layers() if _is_equilibrium(layer)]
        if len(found) != 1:
            raise ValueError(
                f"a DEQChain has exactly one equilibrium layer, but got {len(found)} {found}: "
                "stack further ones outside the chain, each with its own solution"
            )
        self._equilibrium_name = found[0]
        if initialization is not None:
            initialize(self, initialization)

    @property
    def equilibrium(self) -> AbstractCellLayer:
        """The equilibrium layer."""
        layer = self._modules[self._equilibrium_name]  # also of a layer named "equilibrium"
        assert isinstance(layer, AbstractCellLayer)
        return layer

    def forward(
        self,
        x: Any,
        *,
        z0: State | None = None,
        jacobian_loss: bool = False,
        depth: int | None = None,
        trace: TraceKind | None = None,
        states: StatesAt | None = None,
        states_adjoint: AbstractAdjoint | None = None,
    ) -> tuple[Any, Solution]:
        """(y, solution); the options are those of `AbstractCellLayer.forward`."""
        options: dict[str, Any] = {
            **{"z0": z0, "jacobian_loss": jacobian_loss, "depth": depth, "trace": trace},
            **{"states": states, "states_adjoint": states_adjoint},
        }
        for name, layer in self._layers():
            if name == self._equilibrium_name:
                x, solution = layer(x, **options)
            else:
                x = layer(x)
        return x, solution

    def predict_from(self, z: State) -> Any:
        """The prediction from a state: the layers after the equilibrium, applied to it."""
        layers = list(self._layers())
        place = [name for name, _ in layers].index(self._equilibrium_name)
        y: Any = z
        for _, layer in layers[place + 1 :]:
            y = layer(y)
        return y

    def explicit(self, x: Any) -> Any:
        """The prediction without a solve: the layers after the equilibrium applied to its z₀.

        Raises: ValueError where the equilibrium layer does not predict.
        """
        for name, layer in self._layers():
            x = self.equilibrium.explicit(x) if name == self._equilibrium_name else layer(x)
        return x

    def _layers(self) -> Iterator[tuple[str, nn.Module]]:
        # Not named_children(), which leaves out the second use of a module.
        for name, layer in self._modules.items():
            assert layer is not None
            yield name, layer


def _is_equilibrium(layer: nn.Module) -> bool:
    return isinstance(layer, AbstractCellLayer)
