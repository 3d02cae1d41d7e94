"""Augmentation: what each does, how its draws are distributed, and on what they depend."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from fastdeq.data import (
    Augmentation,
    Batches,
    Cifar10DataModule,
    EpochLoader,
    InMemoryDataModule,
    Normalization,
    PadCrop,
    RandomFlip,
    ResizeCrop,
    Samples,
    Transform,
)
from tests.data.cifar_svhn_files import cifar_files, small_cifar, write_folder

SAMPLES = 23
IMAGES = torch.arange(SAMPLES * 3 * 8 * 8).view(SAMPLES, 3, 8, 8)
EVERY = (RandomFlip(), ResizeCrop(resize=11, size=8), PadCrop(padding=2))


def drawn(augmentation: Augmentation, samples: int = 20_000) -> Tensor:
    return augmentation.draw(samples, torch.Generator().manual_seed(3))


# What each does


def test_flipped_samples_are_mirrored_and_the_others_left_alone():
    images = IMAGES[:3].float()
    found = RandomFlip().apply(images, torch.tensor([True, False, True]))
    assert torch.equal(found[1], images[1])
    assert torch.equal(found[[0, 2], ..., 0], images[[0, 2], ..., 7])
    assert torch.equal(found.flip(-1)[[0, 2]], images[[0, 2]])


def test_a_padded_crop_is_the_image_shifted_with_zeros_behind_it():
    image = IMAGES[1:2].float()
    for row, column in ((0, 0), (2, 2), (4, 1)):
        found = PadCrop(padding=2).apply(image, torch.tensor([[row, column]]))
        expected = torch.zeros(3, 12, 12)
        expected[:, 2:10, 2:10] = image[0]
        assert torch.equal(found[0], expected[:, row : row + 8, column : column + 8])


def test_a_resized_crop_has_bilinear_values_by_hand():
    # A ramp stays a ramp: pixel i of 42 has its middle at (i + ½) · 32/42 − ½ of the old ones.
    ramp = torch.arange(32.0).view(1, 1, 1, 32).expand(1, 1, 32, 32)
    found = ResizeCrop(resize=42, size=32).apply(ramp, torch.tensor([[4, 7]]))
    middles = (torch.arange(7, 39) + 0.5) * 32 / 42 - 0.5
    # float32, values up to 32
    torch.testing.assert_close(found[0, 0], middles.expand(32, 32), atol=1e-5, rtol=0)


def test_every_sample_has_its_own_crop():
    images = IMAGES.float()
    first = drawn(PadCrop(padding=2), SAMPLES)
    together = PadCrop(padding=2).apply(images, first)
    alone = [PadCrop(padding=2).apply(images[i : i + 1], first[i : i + 1]) for i in range(SAMPLES)]
    assert torch.equal(together, torch.cat(alone))
    assert len(first.unique(dim=0)) > 1


def test_shape_and_type_are_kept():
    for augmentation in EVERY:
        for dtype in (torch.float32, torch.float64):
            found = augmentation.apply(IMAGES.to(dtype), drawn(augmentation, SAMPLES))
            assert found.shape == IMAGES.shape, augmentation
            assert found.dtype == dtype, augmentation


def test_what_is_at_the_limit_changes_nothing():
    images = IMAGES.float()
    for one in (RandomFlip(share=0), ResizeCrop(resize=8, size=8), PadCrop(padding=0)):
        assert torch.equal(one.apply(images, drawn(one, SAMPLES)), images)
    assert drawn(RandomFlip(share=1)).all()


# Draws


def test_the_share_of_flips():
    for share in [0.5, 0.1]:
        assert drawn(RandomFlip(share=share)).double().mean().item() == pytest.approx(
            share, abs=5 * (share * (1 - share) / 20_000) ** 0.5
        )


def test_crops_are_uniform_over_all_places():
    for augmentation, places in [(ResizeCrop(resize=42, size=32), 11), (PadCrop(padding=4), 9)]:
        first = drawn(augmentation)
        counts = (first[:, 0] * places + first[:, 1]).bincount(minlength=places**2).double()
        assert len(counts) == places**2, augmentation
        expected = 20_000 / places**2
        statistic = ((counts - expected).square() / expected).sum().item()
        # χ² has mean n and variance 2n with n = places² − 1: five standard deviations
        degrees = places**2 - 1
        assert abs(statistic - degrees) < 5 * (2 * degrees) ** 0.5, augmentation


def test_settings_out_of_range_are_refused_by_name():
    cases: list[tuple[type[Augmentation], dict[str, Any], str]] = [
        (
            RandomFlip,
            {"share": 1.5},
            "share is 1.5, but must be finite and at least 0 ",
        ),
        (RandomFlip, {"share": "x"}, "share is 'x', but must be a number"),
        (
            ResizeCrop,
            {"resize": 31, "size": 32},
            "resize is 31, but must be at least the size",
        ),
        (ResizeCrop, {"resize": 42, "size": 0}, "size is 0, but must be finite and at least 1"),
        (PadCrop, {"padding": -1}, "padding is -1, but must be finite and at least 0"),
        (PadCrop, {"padding": 1.5}, "padding is 1.5, but must be a whole number"),
    ]
    for kind, settings, message in cases:
        with pytest.raises((TypeError, ValueError), match=message):
            kind(**settings)


# In batches


def make(augmentation: Sequence[Augmentation] = EVERY, **settings) -> Batches:
    settings = {"batch_size": 5, "shuffle": True, "seed": 7, **settings}
    return Batches(IMAGES, torch.arange(SAMPLES), augmentation=augmentation, **settings)


def one_epoch(batches: EpochLoader) -> list[Tensor]:
    return [batch.inputs for batch in batches]


def equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def by_place(batches: EpochLoader) -> Tensor:
    return torch.cat(one_epoch(batches))


def test_the_order_is_the_same_with_and_without_augmentation():
    plain = [batch.targets.tolist() for batch in make(())]
    assert [batch.targets.tolist() for batch in make()] == plain


def test_the_same_seed_and_epoch_give_the_same_images_whatever_else_is_drawn():
    torch.manual_seed(1)
    first = one_epoch(make())
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert equal(one_epoch(make()), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not equal(one_epoch(make(seed=8)), first)


def test_every_epoch_draws_anew():
    batches = make((RandomFlip(),), shuffle=False)
    one, two = by_place(batches), by_place(batches)
    assert not torch.equal(one, two)
    assert torch.equal(one.sort(-1).values, two.sort(-1).values)


def test_the_batch_size_does_not_matter():
    # The resizing's float32 sums may be split otherwise for another batch size.
    torch.testing.assert_close(by_place(make()), by_place(make(batch_size=9)))


def test_restored_batches_are_augmented_as_they_would_have_been():
    for given in range(6):
        uninterrupted, interrupted, resumed = make(), make(), make(seed=99)
        expected = one_epoch(uninterrupted) + one_epoch(uninterrupted)
        iterator = iter(interrupted)
        before = [next(iterator).inputs for _ in range(given)]
        resumed.load_state_dict(interrupted.state_dict())
        after = one_epoch(resumed)
        if given < len(resumed):  # otherwise the first one was already the next epoch
            after += one_epoch(resumed)
        assert equal(before + after, expected), given


def test_the_parts_of_all_ranks_are_the_batch_of_one():
    for ranks in [2, 3, 8]:
        every = [list(make(rank=rank, ranks=ranks)) for rank in range(ranks)]
        for whole, *parts in zip(make(), *every, strict=True):
            together = torch.cat([part.inputs for part in parts if part.weight > 0])
            # The resizing's float32 sums may be split otherwise for another number of samples.
            torch.testing.assert_close(together, whole.inputs)


def test_augmentation_comes_before_the_normalization():
    normalization = Normalization(scale=2.0, mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0))
    found = one_epoch(make((PadCrop(padding=8),), normalization=normalization))
    plain = one_epoch(make((PadCrop(padding=8),)))
    mean, std = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])
    expected = [(x / 2 - mean.view(3, 1, 1)) / std.view(3, 1, 1) for x in plain]
    assert equal(found, expected)
    assert any((x == 0).any() for x in plain)  # black, not the mean


def test_without_augmentation_nothing_is_copied():
    batches = make((), shuffle=False)
    assert next(iter(batches)).inputs.data_ptr() == IMAGES.data_ptr()


def test_inputs_that_are_not_images_are_refused():
    numbers = torch.arange(4).view(4, 1)
    with pytest.raises(ValueError, match=r"augmentation needs images \(N, C, H, W\), not \(4, 1\)"):
        Batches(numbers, numbers, batch_size=2, augmentation=EVERY)


# In data modules


class Pictures(InMemoryDataModule):
    input_shape = (3, 8, 8)
    outputs = SAMPLES
    normalization: Normalization | None = None

    def __init__(self, **settings) -> None:
        super().__init__(**{"batch_size": 7, "eval_batch_size": 5, **settings})

    def load(self) -> tuple[Samples, Samples]:
        samples = Samples(IMAGES.float(), torch.arange(SAMPLES))
        return samples, samples


def test_only_training_batches_are_augmented():
    data = Pictures(augmentation=list(EVERY), validation=3)
    data.setup()
    assert len(data.sample_batch(4).inputs) == 4
    assert torch.equal(data.sample_batch(SAMPLES).inputs, data._splits["train"].inputs)
    assert torch.equal(by_place(data.test_dataloader()), IMAGES.float())
    assert torch.equal(by_place(data.val_dataloader()), data._splits["validation"].inputs)
    batches = data.train_dataloader()
    for batch in batches:
        assert not torch.equal(batch.inputs, IMAGES[batch.targets].float())


def test_a_restored_module_augments_as_it_would_have():
    whole, interrupted, resumed = (Pictures(augmentation=EVERY) for _ in range(3))
    for data in (whole, interrupted, resumed):
        data.setup()
    expected = one_epoch(whole.train_dataloader())
    iterator = iter(interrupted.train_dataloader())
    before = [next(iterator).inputs for _ in range(2)]
    resumed.load_state_dict(interrupted.state_dict())
    assert equal(before + one_epoch(resumed.train_dataloader()), expected)


def test_under_overfit_batches_images_stay_as_they_are():
    data = Pictures(augmentation=EVERY)
    strategy = Mock(root_device=torch.device("cpu"))
    data.trainer = Mock(strategy=strategy, global_rank=0, world_size=1, overfit_batches=1)
    data.setup()
    assert torch.equal(by_place(data.train_dataloader()), IMAGES.float())


def test_an_augmentation_that_does_not_fit_is_refused_when_it_is_given():
    for augmentation, message in [
        ([ResizeCrop(resize=42, size=32)], r"makes images of \(3, 32, 32\) from \(3, 8, 8\): keep"),
        ("flip", "augmentation is 'flip', but must be a list, each an Augmentation"),
        ([RandomFlip], "augmentation is .*, but must be a list, each an Augmentation"),
        (RandomFlip(), "augmentation is .*, but must be a list, each an Augmentation"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            Pictures(augmentation=augmentation)


class Shifted(nn.Module):
    """A transform as torchvision.transforms.v2 has them: one image, from the global state."""

    def forward(self, image):
        return image.roll(int(torch.randint(image.shape[-1], ())), dims=-1)


def test_a_transform_of_another_library_draws_for_each_sample_by_seed_and_epoch():
    row = torch.arange(8).expand(SAMPLES, 3, 8, 8)

    def images(batch_size=5, seed=7):
        chain = [Transform(transform=Shifted())]
        settings = {"batch_size": batch_size, "seed": seed, "augmentation": chain}
        return torch.cat(one_epoch(Batches(row, torch.arange(SAMPLES), **settings)))

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = images()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(images(batch_size=3), first)  # whatever was drawn elsewhere
    assert not torch.equal(images(seed=8), first)
    assert len(set(first[:, 0, 0, 0].tolist())) > 4  # not one shift for all


def test_a_transform_that_changes_type_or_shape_is_refused():
    for transform, message in [
        (
            lambda image: image.float() / 255,
            "transform returns torch.float32, but must return uint",
        ),
        (lambda image: image.numpy(), "transform returns ndarray, but must return uint8"),
        (lambda image: image[:, 1:], r"makes images of \(3, 7, 8\) from \(3, 8, 8\): keep"),
    ]:
        with pytest.raises(ValueError, match=message):
            Pictures(augmentation=[Transform(transform=transform)])


def test_a_stored_set_is_augmented(monkeypatch, tmp_path):
    monkeypatch.setattr(Cifar10DataModule, "source", small_cifar())
    root: Path = write_folder(tmp_path / "root", cifar_files())
    modules = [
        Cifar10DataModule(root=root, store=tmp_path, augmentation=chain)
        for chain in (None, [], [RandomFlip(share=1)])
    ]
    for data in modules:
        data.setup()
    plain, empty, flipped = (by_place(data.train_dataloader()) for data in modules)
    assert torch.equal(plain, empty)
    assert torch.equal(plain.flip(-1), flipped)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gives_the_same_images():
    on_gpu = Batches(
        IMAGES.cuda(),
        torch.arange(SAMPLES).cuda(),
        batch_size=5,
        shuffle=True,
        seed=7,
        augmentation=EVERY,
    )
    for found, expected in zip(one_epoch(on_gpu), one_epoch(make()), strict=True):
        assert found.is_cuda
        torch.testing.assert_close(found.cpu(), expected)
