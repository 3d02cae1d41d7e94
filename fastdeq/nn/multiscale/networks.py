"""The stem and head around a multiscale equilibrium in the published classifiers.

A classifier is DEQChain(MultiScaleStem(...), MultiScaleDeepEquilibriumNetwork(cell) or
MultiScaleSkipDeepEquilibriumNetwork(cell, explicit), MultiScaleHead(...)); its sizes are in
conf/arch.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from fastdeq.nn.multiscale.blocks import (
    Bottleneck,
    check_channels,
    convolution,
    convolved,
    normalization_layer,
)


class MultiScaleStem(nn.Sequential):
    """Images (B, inputs, H, W) → the injection (B, channels[0], H / 2^k, W / 2^k), k =
    downsample_times.

    Two 3 × 3 convolutions (more where k > 2), the first k of stride 2, then a 1 × 1 one where k > 0
    or there are more than two scales; each followed by batch norm and ReLU. The batch norm uses the
    batch's own statistics, in evaluation too.

    channels: of the scales of the cell.

    Raises: ValueError for channels that are not positive whole numbers.
    """

    def __init__(self, inputs: int, channels: Sequence[int], downsample_times: int = 0) -> None:
        check_channels(channels=channels)
        width, halvings = channels[0], downsample_times
        layers = [
            convolved(inputs if i == 0 else width, width, stride=2 if i < halvings else 1)
            for i in range(max(2, halvings))
        ]
        if halvings > 0 or len(channels) > 2:
            layers.append(convolved(width, width, 1))
        super().__init__(*layers)


class MultiScaleHead(nn.Module):
    """Scales (B, C_i, H_i, W_i), fine to coarse → logits (B, outputs).

        y_i = bottleneck_i(z_i),    y_{i+1} ← y_{i+1} + relu(norm(K_i y_i)),

    then a 1 × 1 convolution to `final` channels, norm, relu, the mean over positions, and a dense
    layer. K_i has stride 2; norm is batch norm with the batch's own statistics, while the
    bottlenecks keep running ones.

    channels: C_i. hidden: of each bottleneck, which makes 4 times as many channels.

    Raises: ValueError where `channels` and `hidden` differ in number, or are not positive
    whole numbers.
    """

    def __init__(
        self, channels: Sequence[int], hidden: Sequence[int], final: int, outputs: int
    ) -> None:
        super().__init__()
        check_channels(channels=channels, hidden=hidden, final=[final])
        if len(channels) != len(hidden):
            raise ValueError(
                f"there are {len(channels)} scales, channels {list(channels)}, but "
                f"{len(hidden)} head channels {list(hidden)}: give one each"
            )
        self.bottlenecks = nn.ModuleList(
            Bottleneck(width, h) for width, h in zip(channels, hidden, strict=True)
        )
        self.downs = nn.ModuleList(
            _convolved_with_bias(4 * fine, 4 * coarse, 3, stride=2)
            for fine, coarse in pairwise(hidden)
        )
        self.final = _convolved_with_bias(4 * hidden[-1], final, 1)
        self.classify = nn.Linear(final, outputs)

    def forward(self, z: tuple[Tensor, ...]) -> Tensor:
        first, *others = (layer(z_i) for layer, z_i in zip(self.bottlenecks, z, strict=True))
        y = first
        for down, coarser in zip(self.downs, others, strict=True):
            y = coarser + down(y)
        logits: Tensor = self.classify(self.final(y).mean(dim=(2, 3)))
        return logits


def _convolved_with_bias(inputs: int, outputs: int, size: int, *, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        convolution(inputs, outputs, size, stride=stride, bias=True),
        normalization_layer("batch", outputs),
        nn.ReLU(),
    )
