"""The polynomial: the function exactly, and samples that the seed alone determines."""

import math
from fractions import Fraction
from typing import Any

import pytest
import torch

from fastdeq.data import PolynomialDataModule, Samples, polynomial

CLEAN = {"noise": 0.0}


def splits(**settings) -> tuple[Samples, Samples]:
    return PolynomialDataModule(**settings).load()


def exact(x: float) -> float:
    """h(x) with the polynomial part in exact arithmetic."""
    whole = Fraction(x)
    part = Fraction(3, 2) * whole**3 + whole**2 - 5 * whole - 3
    return float(part + 2 * Fraction(math.sin(x)))


def test_h_at_points_where_it_is_known():
    for x, h in [
        (0.0, -3.0),
        (1.0, -5.5 + 2 * math.sin(1.0)),
        (-1.0, 1.5 - 2 * math.sin(1.0)),
        (2.0, 3.0 + 2 * math.sin(2.0)),
        (math.pi, 1.5 * math.pi**3 + math.pi**2 - 5 * math.pi - 3),
    ]:
        assert polynomial(torch.tensor(x, dtype=torch.float64)).item() == pytest.approx(
            h, abs=1e-13
        ), x


def test_there_are_512_points_to_train_and_128_to_test():
    train, test = splits()
    assert train.inputs.shape == train.targets.shape == (512, 1)
    assert test.inputs.shape == test.targets.shape == (128, 1)
    for samples in (train, test):
        assert samples.inputs.dtype == samples.targets.dtype == torch.float32


def test_targets_without_noise_are_h_rounded_once():
    for samples in splits(**CLEAN):
        for x, target in zip(samples.inputs, samples.targets, strict=True):
            # Half a unit in the last place of float32 below 8, and float64's rounding before it
            assert target.item() == pytest.approx(exact(x.item()), abs=2.4e-7)


def test_test_targets_are_clean_and_their_points_equally_spaced():
    _, test = splits(noise=0.5)
    _, clean = splits(**CLEAN)
    assert torch.equal(test.targets, clean.targets)
    steps = test.inputs.double().diff(dim=0)
    assert test.inputs[0] == -1
    assert test.inputs[-1] == 1
    # Points are rounded to float32, each by up to 3e-8.
    assert steps.flatten().tolist() == pytest.approx([2 / 127] * 127, abs=6.1e-8)


def test_training_points_fill_the_interval_and_their_noise_is_as_documented():
    train, _ = splits(samples=20_000)
    assert train.inputs.min() >= -1
    assert train.inputs.max() <= 1
    # Five standard errors of the mean and the variance of 20,000 uniform points
    assert train.inputs.mean().item() == pytest.approx(0.0, abs=5 * math.sqrt(1 / 3 / 20_000))
    assert train.inputs.var().item() == pytest.approx(1 / 3, abs=5 * math.sqrt(4 / 45 / 20_000))
    noise = (train.targets.double() - polynomial(train.inputs.double())).flatten()
    # Five standard errors: σ/√N of the mean, σ/√(2N) of the standard deviation
    assert noise.mean().item() == pytest.approx(0.0, abs=5 * 0.005 / math.sqrt(20_000))
    assert noise.std().item() == pytest.approx(0.005, abs=5 * 0.005 / math.sqrt(40_000))


def test_the_default_512_have_noise_of_about_0_005():
    train, _ = splits()
    noise = train.targets.double() - polynomial(train.inputs.double())
    # Five standard errors, σ/√(2N)
    assert noise.std().item() == pytest.approx(0.005, abs=5 * 0.005 / math.sqrt(1024))


def test_the_seed_determines_points_and_noise_whatever_else_is_drawn():
    torch.manual_seed(1)
    first, _ = splits(seed=3)
    torch.manual_seed(2)
    again, _ = splits(seed=3)
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(first.targets, again.targets)
    other, _ = splits(seed=4)
    assert not torch.equal(first.inputs, other.inputs)


def test_points_do_not_depend_on_the_noise():
    assert torch.equal(splits(noise=0.5)[0].inputs, splits(**CLEAN)[0].inputs)


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    data = PolynomialDataModule()
    data.setup()
    list(data.train_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_the_interval_can_be_chosen():
    train, test = splits(low=2, high=3.5, **CLEAN)
    assert train.inputs.min() >= 2
    assert train.inputs.max() <= 3.5
    assert test.inputs[0] == 2
    assert test.inputs[-1] == 3.5


def test_batches_are_not_normalized_and_fit_the_documented_shapes():
    data = PolynomialDataModule(batch_size=32)
    inputs, targets, weight = data.sample_batch(4)
    train, _ = data.load()
    assert torch.equal(inputs, train.inputs[:4])
    assert torch.equal(targets, train.targets[:4])
    assert weight == 1.0
    assert inputs.shape[1:] == data.input_shape
    assert targets.shape[1:] == (data.outputs,)
    data.setup()
    assert len(data.train_dataloader()) == 16


def test_a_hold_out_is_taken_from_the_training_points():
    data = PolynomialDataModule(validation=112)
    data.setup()
    held_out = [x for batch in data.val_dataloader() for x in batch.inputs.flatten().tolist()]
    rest = [x for batch in data.train_dataloader() for x in batch.inputs.flatten().tolist()]
    assert len(held_out) == 112
    assert sorted(held_out + rest) == sorted(data.load()[0].inputs.flatten().tolist())


def test_settings_out_of_range_are_refused_by_name():
    cases: list[tuple[dict[str, Any], str]] = [
        ({"samples": 0}, "samples is 0, but must be finite and at least 1"),
        ({"test_samples": "128"}, "test_samples is '128', but must be a whole number"),
        ({"low": 1.0}, r"low must be less than high: low is 1\.0, high is 1\.0"),
        ({"high": math.inf}, "high is inf, but must be finite"),
        ({"low": "abc"}, "low is 'abc', but must be a number"),
        ({"noise": -0.1}, r"noise is -0\.1, but must be finite and at least 0"),
        ({"noise": math.nan}, "noise is nan, but must be finite"),
        ({"noise": True}, "noise is True, but must be a number"),
    ]
    for settings, message in cases:
        with pytest.raises((TypeError, ValueError), match=message):
            PolynomialDataModule(**settings)
