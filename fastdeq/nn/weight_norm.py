"""Weight norm, and parametrizations that are computed once per call."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm as _torch_weight_norm

from fastdeq.nn.initialization import WEIGHTED


def weight_norm(module: nn.Module) -> nn.Module:
    """Weight-normalize all linear and convolutional layers of `module`, in place (Salimans & Kingma
    2016).

    One magnitude for each output channel, w = g v / ‖v‖. Torch's own parametrization: it survives
    deepcopy, state_dict and DistributedDataParallel.

    Raises: ValueError where there is nothing to normalize.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, WEIGHTED)]
    if not layers:
        raise ValueError(
            f"{type(module).__name__} has no linear or convolutional layer to normalize"
        )
    for layer in layers:
        _torch_weight_norm(layer)
    return module


@contextmanager
def parametrizations_cached(module: nn.Module) -> Iterator[None]:
    """Within, every parametrized tensor of `module` (weight norm, spectral norm, ...) is computed
    once.

    They are computed on entry, in the caller's gradient mode: if computed lazily, they would be
    cached inside the solver, without a graph, and the closing evaluation would reuse them without
    gradients.
    """
    with parametrize.cached():
        for layer in module.modules():
            if parametrize.is_parametrized(layer):
                for name in layer.parametrizations:  # type: ignore[union-attr]
                    getattr(layer, name)
        yield


Parametrizations: TypeAlias = dict[tuple[int, str], Tensor]
"""Computed tensors, by the id of their module and their name."""


def computed_parametrizations(module: nn.Module) -> Parametrizations:
    """The parametrized tensors of `module` within `parametrizations_cached`; outside, none."""
    if not parametrize._cache_enabled:
        return {}
    ids = {id(layer) for layer in module.modules()}
    return {
        key: value
        for key, value in parametrize._cache.items()
        if key[0] in ids and value is not None
    }


@contextmanager
def parametrizations_restored(computed: Parametrizations) -> Iterator[None]:
    """Within, these tensors are used again, also after their `parametrizations_cached` has ended:
    for evaluations that the backward pass repeats."""
    with parametrize.cached():
        for key, value in computed.items():
            parametrize._cache.setdefault(key, value)
        yield
