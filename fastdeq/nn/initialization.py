"""How the weights of linear and convolutional layers are drawn."""

import math
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

Initialization: TypeAlias = Literal["torch", "glorot", "normal"]
"""How weights are drawn; see `initialize`."""

WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Layers with a weight (outputs, inputs, *kernel) and perhaps a bias (outputs)."""

STD = 0.01  # of `normal`


@torch.no_grad()
def initialize(module: nn.Module, initialization: Initialization) -> None:
    """Draw the weights w and biases b of all linear and convolutional layers of `module` again, in
    place.

    | initialization | w | b | default of |
    |---|---|---|---|
    | `torch` | U(−a, a), a = 1 / √fan_in | U(−a, a) | PyTorch |
    | `glorot` | U(−a, a), a = √(6 / (fan_in + fan_out)) | 0 | Flux.jl and Lux.jl |
    | `normal` | N(0, 0.01²) | 0 | MDEQ's public code, for convolutions |

    fan_in and fan_out are inputs and outputs times the size of the kernel. Other parameters keep
    their values. A parametrized weight (weight norm) is set to the drawn one through its
    parametrization. Draws from PyTorch's global generator.

    Raises: ValueError for another initialization.

    Glorot & Bengio 2010 (AISTATS), eq. 16, for `glorot`; Bai et al. 2020, arXiv 2006.08656, for
    `normal`.
    """
    if initialization not in get_args(Initialization):
        names = "', '".join(get_args(Initialization))
        raise ValueError(f"initialization is {initialization!r}, but must be one of '{names}'")
    for layer in module.modules():
        if not isinstance(layer, WEIGHTED):
            continue
        weight = torch.empty_like(layer.weight)
        bias = None if layer.bias is None else torch.empty_like(layer.bias)
        _draw(initialization, weight, bias)
        _set(layer, "weight", weight)
        if bias is not None:
            _set(layer, "bias", bias)


def _draw(initialization: Initialization, weight: Tensor, bias: Tensor | None) -> None:
    bias_bound = 0.0
    if initialization == "torch":
        bias_bound = 1 / math.sqrt(weight[0].numel())
        weight.uniform_(-bias_bound, bias_bound)
    elif initialization == "glorot":
        nn.init.xavier_uniform_(weight)
    else:
        weight.normal_(std=STD)
    if bias is not None:
        bias.uniform_(-bias_bound, bias_bound)


def _set(layer: nn.Module, name: str, value: Tensor) -> None:
    if is_parametrized(layer, name):  # its value is computed: writing into it has no effect
        setattr(layer, name, value)
    else:
        getattr(layer, name).copy_(value)
