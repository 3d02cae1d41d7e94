"""The published convolutional cell of several scales, and the network that predicts its
equilibrium (arXiv 2006.08656, §3; arXiv 2201.12240, §4)."""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

from torch import Tensor, nn

from fastdeq.nn.multiscale.blocks import (
    Normalization,
    ResidualBlock,
    check_channels,
    downsample,
    group_count,
    post_fusion,
    upsample,
)
from fastdeq.nn.multiscale.cell import MultiScaleCell


def image_scales(
    image: Sequence[int], channels: Sequence[int], downsample_times: int = 0
) -> list[list[int]]:
    """The scales' shapes [channels, height, width]: the image halved `downsample_times` times for
    the first, and once more for each further one.

    image: [channels, height, width] of the data. channels: of each scale.

    Raises: ValueError for what is not an image, for channels that are not positive whole numbers,
    and for a height or width that cannot be halved so often.
    """
    if len(image) != 3:
        raise ValueError(
            f"multiscale cells take images [channels, height, width], but the data are "
            f"{list(image)}: use data of images, or another arch"
        )
    check_channels(channels=channels)
    if downsample_times < 0:
        raise ValueError(f"downsample_times is {downsample_times}, but must be at least 0")
    _, height, width = image
    halvings = downsample_times + len(channels) - 1
    if height % 2**halvings or width % 2**halvings:
        raise ValueError(
            f"images of {height} × {width} cannot be halved {halvings} times (downsample_times "
            f"{downsample_times}, {len(channels)} scales): use fewer scales, or images whose sides "
            f"are multiples of {2**halvings}"
        )
    halved = [downsample_times + i for i in range(len(channels))]
    return [[c, height >> n, width >> n] for c, n in zip(channels, halved, strict=True)]


def MultiScaleResidualCell(
    image: Sequence[int],
    channels: Sequence[int],
    *,
    expansion: int,
    downsample_times: int = 0,
    normalization: Normalization = "batch",
    weight_norm: bool = False,
    dropout: float = 0.0,
) -> MultiScaleCell:
    """A residual block per scale, convolutions down and up between them, a 1 × 1 one after fusion.

    image: [channels, height, width] of the data; together with `downsample_times` (of the stem) and
        `channels` (of each scale) it gives the shapes of the state; see `image_scales`.
    expansion, dropout: of the residual blocks. weight_norm: of their convolutions and of those
        after fusion.
    normalization: throughout the cell. `batch` (as published) couples the samples of a batch: it
        needs `per_sample=False` in the solver and in the adjoint's GMRES. `group` does not: 8
        groups, 4 after fusion.

    Raises: ValueError as `image_scales`, and where group norm would be left with single numbers.
    """
    scales = image_scales(image, channels, downsample_times)
    if normalization == "group":
        _check_groups(scales)
    block = partial(
        ResidualBlock, normalization=normalization, weight_norm=weight_norm, dropout=dropout
    )
    branches = [block(width, expansion) for width in channels]
    n = len(channels)
    mappings = [[_mapping(channels, j, i, normalization) for i in range(n)] for j in range(n)]
    ends = [post_fusion(width, normalization, weight_norm) for width in channels]
    return MultiScaleCell(branches, mappings, scales, ends)


class MultiScaleExplicitNetwork(nn.Module):
    """g_φ of the published multiscale skip models: the stem's output, (B, C₁, H, W), through a
    residual block of expansion 3 for scale 1, and downsampled for each of the others.

    Arguments as in `MultiScaleResidualCell`; dropout draws a new mask each call.

    Raises: ValueError for channels that are not positive whole numbers.
    """

    def __init__(
        self,
        channels: Sequence[int],
        *,
        normalization: Normalization = "batch",
        weight_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_channels(channels=channels)
        block = ResidualBlock(
            channels[0], 3, normalization=normalization, weight_norm=weight_norm, dropout=dropout
        )
        others = range(1, len(channels))
        self.branches = nn.ModuleList(
            [block, *(_mapping(channels, 0, i, normalization) for i in others)]
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(predict(x) for predict in self.branches)


class MultiScaleResidualNetwork(nn.Module):
    """An ordinary residual network of the blocks of `MultiScaleResidualCell`: each scale is a
    residual block of the scale above, downsampled. It takes and ignores a state, as a cell does.

    Called as network(z, x), x (B, C₁, H, W); a tuple of scales. About as many parameters as the
    cell: without those after fusion, and those between scales other than to the next coarser one.
    Arguments and errors as `MultiScaleResidualCell`. Use it as UnrolledNetwork(network,
    steps=1).
    """

    def __init__(
        self,
        image: Sequence[int],
        channels: Sequence[int],
        *,
        expansion: int,
        downsample_times: int = 0,
        normalization: Normalization = "batch",
        weight_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.scales = image_scales(image, channels, downsample_times)
        block = partial(
            ResidualBlock, normalization=normalization, weight_norm=weight_norm, dropout=dropout
        )
        self.blocks = nn.ModuleList(block(width, expansion) for width in channels)
        self.downs = nn.ModuleList(
            downsample(fine, coarse, 1, normalization) for fine, coarse in pairwise(channels)
        )

    def forward(self, z: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, ...]:
        first, *others = self.blocks
        y = [first(x)]
        for down, block in zip(self.downs, others, strict=True):
            y.append(block(down(y[-1])))
        return tuple(y)


def _mapping(channels: Sequence[int], j: int, i: int, normalization: Normalization) -> nn.Module:
    if i > j:
        return downsample(channels[j], channels[i], i - j, normalization)
    if i < j:
        return upsample(channels[j], channels[i], j - i, normalization)
    return nn.Identity()


def _check_groups(scales: Sequence[Sequence[int]]) -> None:
    for i, (channels, height, width) in enumerate(scales):
        groups = group_count(channels)
        if channels // groups * height * width == 1:
            raise ValueError(
                f"scale {i + 1} is {channels} channels of 1 × 1, which group norm would split into "
                f"{groups} groups of one number, all made 0: use fewer scales, more channels, or "
                "normalization 'batch'"
            )
