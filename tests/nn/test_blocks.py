"""The convolutional blocks: values, shapes, parameters and errors."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from fastdeq.nn import MultiScaleHead, MultiScaleStem
from fastdeq.nn.multiscale.blocks import (
    Bottleneck,
    ResidualBlock,
    convolution,
    downsample,
    group_count,
    normalization_layer,
    post_fusion,
    upsample,
)
from tests.loops import each


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def images(channels: int = 6, size: int = 8, batch: int = 3) -> Tensor:
    return torch.randn(batch, channels, size, size)


def channels_of(layers: nn.Module) -> list[tuple[int, int]]:
    found = [layer for layer in layers.modules() if isinstance(layer, nn.Conv2d)]
    return [(layer.in_channels, layer.out_channels) for layer in found]


def test_weights_have_the_published_spread_and_biases_are_zero():
    layer = convolution(64, 64, bias=True)
    # 36,864 draws: their standard deviation is within 2 % of 0.01 but for five sigma.
    assert layer.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert layer.bias is not None
    assert not layer.bias.any()
    assert convolution(3, 3).bias is None


@each(
    "channels, groups, wanted",
    [(24, 8, 8), (12, 8, 6), (7, 8, 7), (11, 8, 1), (24, 4, 4), (6, 4, 3), (2, 8, 2)],
)
def test_group_norm_has_the_largest_number_of_groups_that_divides(channels, groups, wanted):
    assert group_count(channels, groups) == wanted
    norm = normalization_layer("group", channels, groups)
    assert isinstance(norm, nn.GroupNorm)
    assert norm.num_groups == wanted


def test_after_fusion_there_are_four_groups():
    *_, norm = post_fusion(24, "group")
    assert isinstance(norm, nn.GroupNorm)
    assert norm.num_groups == 4


def test_batch_norm_uses_the_batch_in_evaluation_too():
    norm, x = normalization_layer("batch", 6), 3 + images()
    assert torch.equal(norm(x), norm.eval()(x))


def test_another_normalization_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="'layer', but must be 'batch' or 'group'"):
        normalization_layer("layer", 6)  # type: ignore[arg-type]


@each("kind", ["batch", "group"])
def test_a_residual_block_is_its_formula(kind):
    block, z, x = ResidualBlock(6, 2, normalization=kind), images(), images()
    for norm in (block.norm1, block.norm2, block.norm3):
        for parameter in norm.parameters():
            nn.init.normal_(parameter)
    h = block.narrow(torch.relu(block.norm1(block.widen(z))))
    torch.testing.assert_close(block(z, x), block.norm3(torch.relu(block.norm2(h + x) + z)))
    torch.testing.assert_close(block(z), block(z, torch.zeros_like(z)))


def test_weight_norm_adds_one_magnitude_an_output_channel_and_leaves_the_function():
    torch.manual_seed(1)
    plain = ResidualBlock(6, 2)
    torch.manual_seed(1)
    block, z = ResidualBlock(6, 2, weight_norm=True), images()
    assert count(block) == count(plain) + 12 + 6
    torch.testing.assert_close(block(z), plain(z))
    assert count(post_fusion(6, weight_norm=True)) == count(post_fusion(6)) + 6


def test_dropout_takes_whole_channels_before_the_injection():
    block, x = ResidualBlock(6, 2, dropout=0.5), images()
    seen: list[Tensor] = []
    block.norm2.register_forward_pre_hook(lambda _, given: seen.append(given[0] - x))
    block(images(), x)
    whole = (seen[0].abs().amax(dim=(2, 3)) < 1e-6).float()
    assert 0 < whole.sum() < whole.numel()


def test_the_error_for_an_injection_of_another_shape_names_both_shapes():
    with pytest.raises(ValueError, match=r"\(3, 6, 1, 1\), but its branch \(3, 6, 8, 8\)"):
        ResidualBlock(6, 2)(images(), images(size=1))


def test_an_expansion_below_one_is_refused():
    with pytest.raises(ValueError, match="expansion is 0, but must be at least 1"):
        ResidualBlock(6, 0)


@each(
    "inputs, outputs, steps, wanted",
    [
        (4, 16, 2, [(4, 8), (8, 16)]),  # doubling ends at the outputs
        (4, 4, 2, [(4, 4), (4, 4)]),
        (4, 10, 2, [(4, 4), (4, 10)]),
        (4, 8, 1, [(4, 8)]),
    ],
)
def test_downsampling_halves_and_doubles_channels_where_that_fits(inputs, outputs, steps, wanted):
    layers = downsample(inputs, outputs, steps)
    assert channels_of(layers) == wanted
    assert layers(images(inputs)).shape == (3, outputs, 8 >> steps, 8 >> steps)


def test_upsampling_repeats_what_is_computed_on_the_coarse_grid():
    layers = upsample(4, 6, 2)
    z = images(4, size=2)
    coarse = layers[:3](z)
    torch.testing.assert_close(layers(z), coarse.repeat_interleave(4, 2).repeat_interleave(4, 3))


@each("inputs, extra", [(8, 0), (6, 6 * 8 + 16)])
def test_a_bottleneck_has_a_shortcut_convolution_where_channels_differ(inputs, extra):
    block = Bottleneck(inputs, 2)
    assert block(images(inputs)).shape == (3, 8, 8, 8)
    assert count(block) == inputs * 2 + 4 + 36 + 4 + 16 + 16 + extra


@each("times, scales", list(itertools.product([0, 1, 2, 3], [1, 2, 3])))
def test_the_stem_halves_downsample_times_times(times, scales):
    stem = MultiScaleStem(3, [4] * scales, times)
    assert stem(images(3, size=16)).shape == (3, 4, 16 >> times, 16 >> times)
    assert len(stem) == max(2, times) + (times > 0 or scales > 2)


def test_the_head_adds_from_fine_to_coarse():
    head = MultiScaleHead([4, 6], [1, 2], 5, 7).eval()
    fine, coarse = images(4), images(6, 4)
    one, two = head.bottlenecks
    y = two(coarse) + head.downs[0](one(fine))
    wanted = head.classify(head.final(y).mean(dim=(2, 3)))
    torch.testing.assert_close(head((fine, coarse)), wanted)


@each("channels, hidden", [([4, 6], [1]), ([4], [1, 2])])
def test_a_head_of_another_number_of_scales_is_refused(channels, hidden):
    with pytest.raises(ValueError, match="give one each"):
        MultiScaleHead(channels, hidden, 5, 7)


@each("channels", [4, [], [4, 0], [4, "a"], [4, True]])
def test_channels_that_are_not_positive_numbers_are_refused(channels):
    for make in (
        lambda: MultiScaleStem(3, channels),
        lambda: MultiScaleHead(channels, [1, 1], 5, 7),
    ):
        with pytest.raises(ValueError, match=r"channels is .* must list whole numbers"):
            make()
