"""L5: an equilibrium layer between ordinary ones."""

from typing import Any

from torch import nn

from fastdeq.layers import DeepEquilibriumNetwork
from fastdeq.notation import State
from fastdeq.solution import Solution


class DEQChain(nn.Module):
    """Layers in sequence, exactly one of them an equilibrium layer; returns its solution beside y.

    layers: modules in order, given by position or by name (`stem=..., deq=..., head=...`); names
        show in the state_dict. An equilibrium layer is a `DeepEquilibriumNetwork`, plain or skip.

    Raises: TypeError for what is no module, ValueError for none or several equilibrium layers.
    """

    def __init__(self, *layers: nn.Module, **named: nn.Module) -> None:
        super().__init__()
        for name, layer in [*((str(i), layer) for i, layer in enumerate(layers)), *named.items()]:
            if not isinstance(layer, nn.Module):
                raise TypeError(
                    f"layer '{name}' of the chain is a {type(layer).__name__}, not an nn.Module"
                )
            self.add_module(name, layer)
        found = [name for name, layer in self._modules.items() if _is_equilibrium(layer)]
        if len(found) != 1:
            raise ValueError(
                f"a DEQChain holds exactly one equilibrium layer, but got {len(found)} {found}: "
                "stack further ones outside the chain, each with its own solution"
            )
        self._equilibrium_name = found[0]

    @property
    def equilibrium(self) -> DeepEquilibriumNetwork:
        """The equilibrium layer."""
        layer = self.get_submodule(self._equilibrium_name)
        assert isinstance(layer, DeepEquilibriumNetwork)
        return layer

    def forward(self, x: Any, *, jacobian_loss: bool = False) -> tuple[State, Solution]:
        """(y, solution); `jacobian_loss` as in `DeepEquilibriumNetwork`."""
        for name, layer in self._modules.items():
            if name == self._equilibrium_name:
                x, solution = layer(x, jacobian_loss=jacobian_loss)
            else:
                x = layer(x)
        return x, solution

    def explicit(self, x: Any) -> State:
        """The prediction without a solve: the layers after the equilibrium applied to its z₀.

        Raises: ValueError where the equilibrium layer does not predict.
        """
        for name, layer in self._modules.items():
            x = self.equilibrium.explicit(x) if name == self._equilibrium_name else layer(x)
        y: State = x
        return y


def _is_equilibrium(layer: nn.Module) -> bool:
    return isinstance(layer, DeepEquilibriumNetwork)
